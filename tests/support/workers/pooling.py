"""vLLM's pooling runner on several checkpoints, one after the other in one process:
``python -m tests.support.workers.pooling REQUEST.json ANSWER.json``.

The request holds ``prompts`` and ``models``: name -> folder and what is asked of it, ``embed``, ``classify`` or
``reward`` (of the last token). For
each name the answer holds a vector for each prompt (``vectors``), the quantization method that vLLM settled on, and how
many linears run on which group size of ours; or the ``error`` that the engine ended in.
"""

import json
import subprocess
import sys
import traceback
from pathlib import Path

from benchmarks.score import engine_environment
from tests.support.workers.engines import clean_up, schemes


def run(folder: Path, prompts: list[str], models: dict[str, tuple[Path, str]]) -> tuple[dict[str, dict], str]:
    """Start the process; returns its answer and all that it printed."""
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(json.dumps({"prompts": prompts, "models": models}, default=str))
    environment = engine_environment() | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to look at the model that the engine built
    }
    command = [sys.executable, "-m", "tests.support.workers.pooling", request, answer]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1200)
    log = done.stdout.decode(errors="replace")
    return (json.loads(answer.read_text()) if answer.exists() else {}), log


def ask(model: str, task: str, prompts: list[str]) -> dict:
    from vllm import LLM

    settings = dict(enforce_eager=True, max_model_len=128, max_num_seqs=8, disable_log_stats=True, dtype="bfloat16")
    engine = LLM(model, runner="pooling", **settings)  # of the bare decoder vLLM would make a causal LM
    if task == "embed":
        vectors = [output.outputs.embedding for output in engine.embed(prompts, use_tqdm=False)]
    elif task == "classify":
        vectors = [output.outputs.probs for output in engine.classify(prompts, use_tqdm=False)]
    else:
        answers = engine.encode(prompts, pooling_task="token_classify", use_tqdm=False)
        vectors = [output.outputs.data[-1].float().flatten().tolist() for output in answers]
    return {
        "vectors": vectors,
        "quantization": engine.llm_engine.model_config.quantization,
        "linears": engine.apply_model(schemes)[0],
    }


def main(request: Path, answer: Path) -> None:
    asked, found = json.loads(request.read_text()), {}
    for name, (model, task) in asked["models"].items():
        try:
            found[name] = ask(model, task, asked["prompts"])
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        answer.write_text(json.dumps(found))
        clean_up()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
