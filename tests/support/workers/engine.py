"""vLLM engines, one after the other in a process of their own:
``python -m tests.support.workers.engine REQUEST.json RESULT.json``.

The request holds ``prompts``, ``max_tokens`` and ``engines``: name -> ``options`` for ``vllm.LLM`` and perhaps
``lora``, an adapter's folder. For each name the result holds the quantization method that vLLM settled on, how many
linears run on which group size of ours (``linears``), and what :func:`answers` gives; with an adapter the latter also
with it (``adapted``) and, after the engine reloaded its weights, without it (``reloaded``). With a drafter there are
vLLM's counts of the tokens that it ``drafted`` and of those ``accepted``, and its ``methods``: each layer that vLLM
asked the quantization config about -> what it made of it. An engine that did not start has only its ``error``.
"""

import json
import re
import subprocess
import sys
import traceback
from pathlib import Path

from benchmarks.score import engine_environment
from tests.support.workers.engines import clean_up, meet, schemes

PROMPTS = [
    "import os\n\ndef main():\n    ",
    "class Node:\n    def __init__(self, ",
    "for i in range(",
    '"""Return the ',
]
BEGIN = "=== engine "


def run(
    folder: Path, plugins: str | None = None, module: str = "tests.support.workers.engine", **request
) -> tuple[dict | None, str]:
    """Start the process; returns its result (``None`` if it failed) and everything that it printed.

    Args:
        folder: scratch.
        plugins: value of ``VLLM_PLUGINS``; ``None`` leaves it unset.
        module: what the process runs.
        request: see above.
    """
    folder.mkdir(parents=True, exist_ok=True)
    question, answer = folder / "request.json", folder / "result.json"
    question.write_text(json.dumps(request, default=str))
    answer.unlink(missing_ok=True)
    # Engine core and worker in one process, for speed; the server tests have them apart, as users do.
    environment = engine_environment() | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to look at the model that the engine built
    }
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    command = [sys.executable, "-m", module, str(question), str(answer)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800)
    log = done.stdout.decode(errors="replace")
    # Not the exit code: vLLM 0.32 sometimes aborts in the interpreter's teardown, after all work is done.
    return (json.loads(answer.read_text()) if answer.exists() else None), log


def ask_each(folder: Path, engines: dict[str, dict], plugins: str | None = None) -> dict[str, dict]:
    """Greedy answers to all prompts of each of ``engines``, name -> options (``lora`` among them), and its ``log``.

    Fails with the log if the process did not come to its end.
    """
    requests = {name: {"options": dict(options)} for name, options in engines.items()}
    for request in requests.values():
        request["lora"] = request["options"].pop("lora", None)
    result, log = run(folder, plugins, engines=requests, prompts=PROMPTS, max_tokens=24)
    assert result is not None, log[-3000:]
    _, *parts = re.split(rf"^{BEGIN}.*\n", log, flags=re.MULTILINE)
    for answer, part in zip(result.values(), parts, strict=True):
        answer["log"] = part
        if "error" not in answer:
            answer["first_steps"] = [steps[0] for steps in answer["logprobs"]]
    return result


def ask(folder: Path, model: Path, plugins: str | None = None, **options) -> dict:
    """The same of one engine; fails with its error if it did not start."""
    (answer,) = ask_each(folder, {"engine": {"model": model, **options}}, plugins).values()
    assert "error" not in answer, answer["log"][-3000:] + answer["error"]
    return answer


def answers(engine, request: dict, **options) -> dict:
    """Each prompt's greedy tokens, at each step the log-probabilities of the best, and how much of it was cached."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=request["max_tokens"], temperature=0, logprobs=5)
    found = engine.generate(request["prompts"], asked, use_tqdm=False, **options)
    outputs = [answer.outputs[0] for answer in found]
    return {
        "tokens": [list(o.token_ids) for o in outputs],
        "logprobs": [[{str(t): lp.logprob for t, lp in step.items()} for step in o.logprobs] for o in outputs],
        "cached": [answer.num_cached_tokens for answer in found],
    }


def methods(model) -> dict[str, str]:
    """Layers by the names under which vLLM asked for their quantization -> the class of what they got."""
    asked = [module for module in model.modules() if getattr(module, "quant_method", None) is not None]
    names = (getattr(module, "prefix", "") or getattr(module, "layer_name", "") for module in asked)
    return {name: type(module.quant_method).__name__ for name, module in zip(names, asked, strict=True) if name}


def look(request: dict, options: dict, lora: str | None) -> dict:
    from vllm import LLM

    drafts = "speculative_config" in options
    engine = LLM(**{"max_model_len": 256, "disable_log_stats": not drafts} | options)
    result = {
        "quantization": engine.llm_engine.model_config.quantization,
        "linears": engine.apply_model(schemes)[0],
        **answers(engine, request),
    }
    if drafts:
        counts = {metric.name: metric for metric in engine.get_metrics()}
        result["drafted"], result["accepted"] = (
            counts[f"vllm:spec_decode_num_{name}_tokens"].value for name in ("draft", "accepted")
        )
        (drafter,) = engine.collective_rpc(lambda worker: worker.model_runner.drafter.model)
        result["methods"] = methods(drafter)
    if lora:
        from vllm.lora.request import LoRARequest

        result["adapted"] = answers(engine, request, lora_request=LoRARequest("adapter", 1, lora))
        engine.collective_rpc("reload_weights")
        result["reloaded"] = answers(engine, request)
    return result


def main(request: dict) -> dict:
    result = {}
    for name, asked in request["engines"].items():
        print(f"\n{BEGIN}{name}", flush=True)
        try:
            meet(asked["options"]["model"])
            result[name] = look(request, **asked)
        except Exception:
            result[name] = {"error": traceback.format_exc()}
        clean_up()
    return result


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
