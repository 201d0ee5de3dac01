"""What INT8 costs a real model in what it does: functions that pass their tests, and answers that stay the same.

    python -m benchmarks.real.tasks MODEL [--arms ARM,...] [--tasks TASK,...] [--peer PYTHON] [--json FILE]

Every arm is converted by the package (SmoothQuant by llm-compressor, of which ``--peer`` is the interpreter), answers
in vLLM, bf16 and greedily, and is judged: :mod:`humaneval` and :mod:`agreement` say how. An arm called ``planted ...``
begins from the model with outlier columns, k = 1000 (:mod:`benchmarks.testbed.plant`), which computes the same. All are
compared with full precision, the first arm, request by request; ``bf16 again`` is full precision given the requests in
another order, which is what chance alone does. Its weights were rounded to about 4 bits once (:mod:`benchmarks.real`).

Checkpoints and answers are kept under ``build/real/tasks`` and not made again: a run that was stopped goes on, and an
arm can be added later. Rows have the commit that their answers are of. Remove an arm's folder to begin it anew.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import vllm_w8a8_bismooth as package
from benchmarks import peer, real, record
from benchmarks.real import MODELS, agreement, humaneval, sandbox
from benchmarks.real.generate import Answer, Request, generate
from benchmarks.real.weights import folder_of
from benchmarks.testbed.plant import plant
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.measure.bundled import WORD
from vllm_w8a8_bismooth.measure.text import read_text, tokenize
from vllm_w8a8_bismooth.scoring.divergence import interval

K = 1000.0
PLANTED = "planted "
TOKENS = 16_384
"""For the peer's calibration: as many as ours takes, and the same ones."""

Convert = Callable[[Path, Path], Any]
"""Writes the checkpoint of a source into a folder."""


@dataclass(frozen=True)
class Arm:
    """How its checkpoint is made, ``None`` for the source as it is, and the order of its requests."""

    convert: Convert | None
    order: int = 0


def arms(model: str, python: str | None) -> dict[str, Arm]:
    """All arms of a model by name, full precision first; the peer's only with the interpreter that has it."""

    def smoothquant(source: Path, destination: Path) -> None:
        windows = tokenize(read_text(WORD), Source(source).checkpoint, TOKENS)
        peer.convert(python, source, destination, windows.numpy())

    healthy = {
        "bf16": Arm(None),
        "bf16 again": Arm(None, order=1),
        "RTN": Arm(partial(package.convert, method="rtn")),
        "default": Arm(package.convert),
        **({"SmoothQuant": Arm(smoothquant)} if python else {}),
        "data-free": Arm(partial(package.convert, calibration="none")),
        "auto": Arm(partial(package.convert, method="auto")),
    }
    return healthy | {PLANTED + name: arm for name, arm in healthy.items()}


class Run:
    """A model with its tasks, and the folder of what is kept."""

    def __init__(self, model: str, work: Path = real.WORK / "tasks"):
        self.model, self.work = model, work / model
        self.work.mkdir(parents=True, exist_ok=True)
        self.healthy = folder_of(MODELS[model])

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.healthy)

    @cached_property
    def problems(self) -> list[humaneval.Problem]:
        return humaneval.problems()

    @cached_property
    def planted(self) -> Path:
        """The planted source."""
        return _made(lambda folder: plant(self.healthy, folder, k=K), self.work / "planted")

    def checkpoint(self, name: str, arm: Arm) -> Path:
        """The folder that vLLM loads."""
        source = self.planted if name.startswith(PLANTED) else self.healthy
        return _made(partial(arm.convert, source), self.work / name / "checkpoint") if arm.convert else source

    def answers(self, name: str, arm: Arm, task: str, requests: Callable[[], list[Request]]) -> "Kept":
        """An arm's answers, as they were kept, or from a conversion and an engine."""
        file = self.work / name / f"{task}.json"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            started = time.monotonic()
            folder = self.checkpoint(name, arm)
            converted = time.monotonic()
            given = generate(folder, requests(), file.with_suffix(".log"), arm.order)
            seconds = {"convert": converted - started, "answer": time.monotonic() - converted}
            partial_file = file.with_suffix(".partial")
            kept = {"commit": record.COMMIT, "seconds": seconds, "answers": [asdict(answer) for answer in given]}
            partial_file.write_text(json.dumps(kept))
            partial_file.replace(file)
        kept = json.loads(file.read_text())
        return Kept(kept["commit"], kept["seconds"], [Answer(**answer) for answer in kept["answers"]])


@dataclass(frozen=True)
class Kept:
    """Answers, the commit that they are of, and the seconds that conversion and engine took."""

    commit: str
    seconds: dict[str, float]
    answers: list[Answer]


def _made(write: Callable[[Path], Any], folder: Path) -> Path:
    """A folder that is there, or is written now: it gets its name at the end, so that one that is there is whole."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        write(unfinished)
        unfinished.rename(folder)
    return folder


class HumanEval:
    """Judges answers by the tests, and remembers the first that it judged."""

    def __init__(self, run: Run):
        self.run, self._reference = run, None

    def requests(self) -> list[Request]:
        return [problem.request(self.run.tokenizer) for problem in self.run.problems]

    def judge(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Figures of a row; see :func:`judged`."""
        programs = [p.program(answer.text) for p, answer in zip(self.run.problems, answers, strict=True)]
        verdicts = sandbox.run_all(programs)
        passed = [verdict == sandbox.PASSED for verdict in verdicts]
        self._reference = self._reference or passed
        return {
            **judged(self._reference, passed),
            "verdicts": dict(Counter(verdicts)),
            "cut": sum(not answer.ended for answer in answers),
            "isolation": sandbox.isolation(),
        }


def judged(reference: Sequence[bool], passed: Sequence[bool]) -> dict[str, Any]:
    """pass@1 beside full precision's. Intervals are 95 %, over problems that are drawn anew, both arms' the same.

    Args:
        reference, passed: of each problem.

    Returns:
        ``passed`` as a string of 0 and 1, ``pass1`` with its interval, ``difference`` of it to the reference with its
        interval, ``gained`` and ``lost`` problems, and ``recovery``, the ratio of both; ``None`` where the reference
        passes nothing.
    """
    ours, theirs = np.array(passed, float), np.array(reference, float)
    change = ours - theirs
    return {
        "passed": "".join("01"[bit] for bit in passed),
        "pass1": float(ours.mean()),
        "pass1_interval": interval(ours),
        "difference": float(change.mean()),
        "difference_interval": interval(change),
        "gained": int((change > 0).sum()),
        "lost": int((change < 0).sum()),
        "recovery": float(ours.mean() / theirs.mean()) if theirs.any() else None,
    }


class Same:
    """Compares answers with the first that it was given."""

    def __init__(self, run: Run):
        self.run, self._reference = run, None

    def requests(self) -> list[Request]:
        return agreement.requests(self.run.tokenizer)

    def judge(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Figures of a row."""
        self._reference = self._reference or answers
        tokens = float(np.mean([len(answer.tokens) for answer in answers]))
        return asdict(agreement.agreement(self._reference, answers)) | {"tokens": tokens}


TASKS = {"humaneval": HumanEval, "agreement": Same}


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if row["task"] == "humaneval":
        low, high = row["difference_interval"]
        figures = (
            f"pass@1 {row['pass1']:.1%} recovery {row['recovery'] or 0:.1%} "
            f"difference {row['difference']:+.1%} ({low:+.1%} to {high:+.1%}) cut off {row['cut']}"
        )
    else:
        low, high = row["mean_interval"]
        figures = (
            f"in common {row['mean']:.1f} ({low:.1f} to {high:.1f}) of {row['tokens']:.1f} tokens, "
            f"median {row['median']:.0f}, to the end {row['whole']:.1%}"
        )
    return f"{row['arm']:<20} {figures} " + " ".join(f"{name} {s:.0f} s" for name, s in row["seconds"].items())


def measure(run: Run, wanted: dict[str, Arm], tasks: Sequence[str], done: Callable[[list[dict]], None]) -> None:
    """Measure arms, of which the first is the reference, task by task; ``done`` gets all rows after every new one."""
    rows: list[dict[str, Any]] = []
    for task in tasks:
        judge = TASKS[task](run)
        for name, arm in wanted.items():
            kept = run.answers(name, arm, task, judge.requests)
            started = time.monotonic()
            figures = judge.judge(kept.answers)
            seconds = kept.seconds | {"judge": time.monotonic() - started}
            k = K if name.startswith(PLANTED) else None
            row = {"model": run.model, "k": k, "arm": name, "order": arm.order, "task": task, "commit": kept.commit}
            rows.append(row | figures | {"seconds": seconds})
            done(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--arms", help="all by default, of which full precision is always one")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter with llm-compressor")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    known, tasks = arms(asked.model, asked.peer), asked.tasks.split(",")
    names = asked.arms.split(",") if asked.arms else list(known)
    for given, possible in ((names, known), (tasks, TASKS)):
        if unknown := [name for name in given if name not in possible]:
            parser.error(f"{unknown[0]} is none of {', '.join(possible)}")
    console = Console()

    def done(rows: list[dict]) -> None:
        console.print(line(rows[-1]), highlight=False, soft_wrap=True)
        if asked.json:
            weights = f"were {MODELS[asked.model].weights} once"
            seconds = round(sum(sum(row["seconds"].values()) for row in rows))  # of answers that were kept, too
            record.write(asked.json, rows, seconds=seconds, weights=weights, computed="bf16, greedy, in vLLM")

    measure(Run(asked.model), {name: known[name] for name in dict.fromkeys(["bf16", *names])}, tasks, done)


if __name__ == "__main__":
    main()
