"""What checkpoints predict on windows of text, and what they answer to prompts, in real vLLM.

    python -m benchmarks.speak REQUEST.json

One process for all of them: its start takes longer than a small model. Windows are scored as ``bismooth score`` does,
with the whole vocabulary; answers are greedy.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.score import engine_environment

WORDS = 40
"""Tokens of an answer, at most."""


@dataclass(frozen=True)
class Spoken:
    """What one checkpoint made of everything.

    Attributes:
        predictions: fp32 ``[length - 1, vocab]`` of each window, log-probabilities, mapped from disk.
        answers: to the prompts.
    """

    predictions: list[np.ndarray]
    answers: list[str]


def each(
    models: Sequence[Path], windows: np.ndarray, prompts: Sequence[str], log: Path, dtype: str = "bfloat16"
) -> Iterator[Spoken]:
    """What models predict and answer, one after the other in one vLLM process.

    Args:
        models: checkpoint folders.
        windows: integer ``[n, length]`` token ids.
        prompts: texts that they go on from.
        log: file that receives the output of all engines.
        dtype: in which the engines compute.

    Yields:
        For each model as soon as it is there. Predictions can be read until the end of the iteration.

    Raises:
        RuntimeError: an engine failed; the message ends with the tail of the log.
    """
    with tempfile.TemporaryDirectory() as scratch, open(log, "wb") as sink:
        request = Path(scratch, "request.json")
        request.write_text(
            json.dumps(
                {
                    "models": [str(model.absolute()) for model in models],
                    "windows": windows.tolist(),
                    "prompts": list(prompts),
                    "dtype": dtype,
                    "folder": scratch,
                }
            )
        )
        # The engine core in the same process: two start-ups and a shutdown less, and the same computation.
        environment = engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        command = [sys.executable, "-m", "benchmarks.speak", str(request)]
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            for number, model in enumerate(models):
                folder = Path(scratch, str(number))
                while not folder.exists() and process.poll() is None:
                    time.sleep(0.1)
                if not folder.exists():
                    tail = log.read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"vLLM failed on {model} (exit code {process.returncode}), see {log}:\n{tail}")
                predictions = [np.load(folder / f"{i}.npy", mmap_mode="r") for i in range(len(windows))]
                yield Spoken(predictions, json.loads((folder / "answers.json").read_text()))
        finally:
            process.kill()
            process.wait()


def main() -> None:
    from vllm import SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from vllm_w8a8_bismooth.serving import predictions

    request = json.loads(Path(sys.argv[1]).read_text())
    asked = SamplingParams(max_tokens=WORDS, temperature=0)
    for number, model in enumerate(request["models"]):
        if number:
            gc.collect()
            cleanup_dist_env_and_memory()
        engine = predictions.start(model, len(request["windows"][0]), {"dtype": request["dtype"]})
        partial = Path(request["folder"], f"{number}.partial")
        partial.mkdir()
        for place, tokens in enumerate(request["windows"]):
            predictions.window(engine, tokens, partial / f"{place}.npy")
        answers = engine.generate(request["prompts"], asked, use_tqdm=False) if request["prompts"] else []
        (partial / "answers.json").write_text(json.dumps([answer.outputs[0].text for answer in answers]))
        partial.rename(partial.with_suffix(""))  # in one step: who waits for it reads all of it
        del engine


if __name__ == "__main__":
    main()
