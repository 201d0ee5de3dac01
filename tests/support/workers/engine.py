"""One vLLM engine in a process of its own: ``python -m tests.support.workers.engine REQUEST.json RESULT.json``.

The request holds ``options`` for ``vllm.LLM``, ``prompts``, ``max_tokens`` and perhaps ``lora``, an adapter folder. The
result holds the quantization method that vLLM settled on, and what :func:`answers` gives; with an adapter the latter
also with it (``adapted``) and, after the engine reloaded its weights, without it (``reloaded``).
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.score import engine_environment

PROMPTS = [
    "import os\n\ndef main():\n    ",
    "class Node:\n    def __init__(self, ",
    "for i in range(",
    '"""Return the ',
]


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
    environment = engine_environment() | {
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        # Engine core and worker in one process, for speed; the server test has them apart, as users do.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    command = [sys.executable, "-m", module, str(question), str(answer)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400)
    log = done.stdout.decode(errors="replace")
    # Not the exit code: vLLM 0.32 sometimes aborts in the interpreter's teardown, after all work is done.
    return (json.loads(answer.read_text()) if answer.exists() else None), log


def ask(folder: Path, model: Path, plugins: str | None = None, lora: Path | None = None, **options) -> dict:
    """Greedy answers to all prompts; fails with the engine's log if there are none."""
    request = {"options": {"model": model, **options}, "prompts": PROMPTS, "max_tokens": 24, "lora": lora}
    result, log = run(folder, plugins, **request)
    assert result is not None, log[-3000:]
    return result | {"log": log, "first_steps": [steps[0] for steps in result["logprobs"]]}


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


def main(request: dict) -> dict:
    from vllm import LLM

    engine = LLM(**{"max_model_len": 256, "disable_log_stats": True} | request["options"])
    result = {"quantization": engine.llm_engine.model_config.quantization, **answers(engine, request)}
    if adapter := request.get("lora"):
        from vllm.lora.request import LoRARequest

        result["adapted"] = answers(engine, request, lora_request=LoRARequest("adapter", 1, adapter))
        engine.collective_rpc("reload_weights")
        result["reloaded"] = answers(engine, request)
    return result


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
