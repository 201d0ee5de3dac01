"""Greedy answers of a checkpoint, from real vLLM.

    python -m benchmarks.real.generate REQUESTS.json MODEL ANSWERS.json [--order SEED] [--dtype DTYPE]

In a process of its own, because an engine is only wholly gone when its process is. Requests are given to the engine in
a shuffled order: which of them share a batch changes the last bits of sums, and so what a greedy choice between near
equals is. Two orders of full precision show how much that alone changes.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.score import engine_environment

SEQUENCES = 128
"""In a batch at once."""


@dataclass(frozen=True)
class Request:
    """A prompt and where its answer ends.

    Attributes:
        prompt: token ids.
        most: tokens of the answer, at most.
        stop: texts that end the answer, not part of it, beside the model's own end.
    """

    prompt: list[int]
    most: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """Text, token ids (with that of the model's own end, if it came), and whether it ended before the limit."""

    text: str
    tokens: list[int]
    ended: bool


def generate(
    model: Path, requests: Sequence[Request], log: Path, order: int = 0, dtype: str = "bfloat16"
) -> list[Answer]:
    """The answers to requests, in their order, in a fresh vLLM process.

    Args:
        model: checkpoint folder.
        requests: to answer greedily.
        log: file that receives the engine's output.
        order: seed of the order in which the engine is given the requests.
        dtype: in which the engine computes.

    Raises:
        RuntimeError: the engine failed; the message ends with the tail of its log.
    """
    with tempfile.TemporaryDirectory() as scratch, open(log, "wb") as sink:
        asked, answered = Path(scratch, "requests.json"), Path(scratch, "answers.json")
        asked.write_text(json.dumps([asdict(request) for request in requests]))
        command = [sys.executable, "-m", "benchmarks.real.generate", str(asked), str(model), str(answered)]
        done = subprocess.run(
            [*command, "--order", str(order), "--dtype", dtype],
            env=engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        # Not the exit code: vLLM sometimes aborts in the interpreter's teardown, after all work is done.
        if not answered.exists():
            tail = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"vLLM failed on {model} (exit code {done.returncode}), see {log}:\n{tail}")
        return [Answer(**answer) for answer in json.loads(answered.read_text())]


def _answers(model: str, requests: Sequence[Request], order: int, dtype: str) -> list[Answer]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        enforce_eager=True,
        max_model_len=max(len(request.prompt) + request.most for request in requests),
        max_num_seqs=SEQUENCES,
        enable_prefix_caching=False,
        disable_log_stats=True,
        dtype=dtype,
    )
    places = list(range(len(requests)))
    random.Random(order).shuffle(places)
    outputs = engine.generate(
        [{"prompt_token_ids": requests[place].prompt} for place in places],
        [
            SamplingParams(temperature=0, max_tokens=requests[place].most, stop=list(requests[place].stop))
            for place in places
        ],
    )
    answers = {
        place: Answer(output.text, list(output.token_ids), output.finish_reason == "stop")
        for place, output in zip(places, (output.outputs[0] for output in outputs), strict=True)
    }
    return [answers[place] for place in range(len(requests))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("requests", type=Path)
    parser.add_argument("model")
    parser.add_argument("answers", type=Path)
    parser.add_argument("--order", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    asked = parser.parse_args()
    requests = [Request(**request) for request in json.loads(asked.requests.read_text())]
    answers = _answers(asked.model, requests, asked.order, asked.dtype)
    partial = asked.answers.with_suffix(".partial")
    partial.write_text(json.dumps([asdict(answer) for answer in answers]))
    partial.replace(asked.answers)  # in one step: a file that is there is whole


if __name__ == "__main__":
    main()
