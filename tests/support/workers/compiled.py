"""One model in two vLLM engines, one after the other:
``python -m tests.support.workers.compiled MODEL TEXT ANSWER.json``.

Each engine, ``eager`` and ``compiled``, greedily continues batches of many sizes, of prompts of many lengths out of
TEXT. The answer holds for each the tokens and log-probabilities as in :mod:`tests.support.workers.engine`, how often
each of our ops ran in one forward pass (``ops``; linears that take gate and up apart), what vLLM and Dynamo counted
while compiling (``compiling``) and from then on (``compiled_later``). The eager engine also answers with its fusion off
(``unfused``). ``rows_at_registration`` counts the plugin's rows in vLLM's registry of fused producers before the first
engine.
"""

import dataclasses
import gc
import json
import sys
from collections import Counter
from pathlib import Path

import torch

BATCHES = (1, 40, 3, 17, 2, 8)


def answers(engine, tokens: list[int]) -> dict:
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=6, temperature=0, logprobs=5, ignore_eos=True)
    outputs = []
    for size in BATCHES:
        starts = [(len(outputs) + i) * 50 for i in range(size)]
        prompts = [{"prompt_token_ids": tokens[start : start + 1 + (7 * start + size) % 61]} for start in starts]
        outputs += [o.outputs[0] for o in engine.generate(prompts, asked, use_tqdm=False)]
    return {
        "tokens": [list(o.token_ids) for o in outputs],
        "logprobs": [[{str(t): lp.logprob for t, lp in step.items()} for step in o.logprobs] for o in outputs],
    }


def ops_of_a_pass(engine, tokens: list[int]) -> Counter:
    from vllm import SamplingParams

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        engine.generate([{"prompt_token_ids": tokens[:5]}], SamplingParams(max_tokens=1), use_tqdm=False)
    ours = [event for event in profile.events() if event.name.startswith("w8a8_bismooth::")]
    with_silu = [event.name.endswith("::linear") and event.concrete_inputs[5] is True for event in ours]
    return Counter(
        event.name.removeprefix("w8a8_bismooth::") + " with silu" * silu
        for event, silu in zip(ours, with_silu, strict=True)
    )


def compilations() -> Counter:
    from vllm.compilation.counter import compilation_counter

    dynamo = torch._dynamo.utils.counters
    breaks = {"graph_breaks": sum(dynamo["graph_break"].values()), "frames": dynamo["stats"]["unique_graphs"]}
    return Counter(dataclasses.asdict(compilation_counter) | breaks)


def stop_fusing(model) -> None:
    for module in model.modules():
        if hasattr(module, "_input_quant_key"):
            del module._input_quant_key


def main(model: str, text: Path) -> dict:
    from transformers import AutoTokenizer
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from vllm_w8a8_bismooth import register
    from vllm_w8a8_bismooth.serving import fusion

    register()
    result = {"rows_at_registration": sum(isinstance(key, fusion.Key) for _, key in fusion.REGISTRY)}
    tokens = AutoTokenizer.from_pretrained(model).encode(text.read_text())
    for mode in ("eager", "compiled"):
        before = compilations()
        engine = LLM(
            model,
            enforce_eager=mode == "eager",
            max_model_len=128,
            max_num_seqs=64,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        started = compilations()
        result[mode] = {"compiling": started - before, **answers(engine, tokens)}
        result[mode] |= {"compiled_later": compilations() - started, "ops": ops_of_a_pass(engine, tokens)}
        if mode == "eager":
            engine.apply_model(stop_fusing)
            result["unfused"] = answers(engine, tokens) | {"ops": ops_of_a_pass(engine, tokens)}
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
    return result


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
