"""Are the kernels right on this machine? What it is, their self-test, the tests for a GPU, and a verdict in one line.

    python -m benchmarks.check --device cpu|cuda [--dry] [--seconds 170] [--json FILE]

The self-test is that of ``bismooth doctor``, which also says who would serve which layers; where there is no vLLM to
ask, the self-test alone. ``--dry`` collects the tests and runs none. The file fills while the tests run. The exit
status is 1 if anything is wrong, and 77 if nothing is, but neither is anything known to be right.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, record
from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.ops import gate

TESTS, TESTS_SECONDS = ["tests/ops/test_gpu.py", "tests/ops/test_gpu_triton.py"], 60.0
_OUTCOME = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
_LEAST = 5.0  # seconds between two writes of the file


def self_test(device: str, seconds: float) -> dict[str, Any]:
    """Run the self-test of the compiled kernels anew.

    Returns:
        ``passed`` (``None``: it did not run), ``words``, ``faults``, and what the ``doctor`` says, if vLLM is here.
    """
    if not ops.has_kernel(device):
        return {"passed": None, "words": f"no compiled kernels for {device}", "faults": {}, "doctor": None}
    doctor = ask_doctor(seconds)
    tests = ((doctor or {}).get("serving") or {}).get("tests") or {}
    if not tests:
        verdict = gate.judge(None if device == "cpu" else torch.cuda.current_device(), anew=True)
        tests = {device: {"words": verdict.words(), "faults": verdict.faults}}
    words = "; ".join(f"{name}: {test['words']}" for name, test in tests.items())
    faults = {f"{name}: {each}": fault for name, test in tests.items() for each, fault in test["faults"].items()}
    passed = False if faults else (None if "did not run" in words else True)
    return {"passed": passed, "words": words, "faults": faults, "doctor": doctor}


def ask_doctor(seconds: float) -> dict[str, Any] | None:
    """What ``bismooth doctor --self-test --json`` prints; ``None`` if it cannot, or not in time."""
    command = [sys.executable, "-m", "vllm_w8a8_bismooth", "doctor", "--self-test", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        return json.loads(process.communicate(timeout=seconds)[0])
    except (subprocess.TimeoutExpired, ValueError) as error:
        print(f"! bismooth doctor gave no answer: {error}", file=sys.stderr)
        return None
    finally:  # with vLLM's process, and that of the self-test, which ends with its parent
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_tests(seconds: float, collect: bool, chosen: str = "not sanitizer") -> Iterator[dict[str, Any]]:
    """Run the tests for a GPU, at most for so long.

    Yields:
        After each, ``passed`` (``None``: none ran until now), ``words``, and the names of those that ``failed``.
    """
    how = ["-q", "--collect-only"] if collect else ["-v", "--tb=short"]
    command = [sys.executable, "-m", "pytest", *how, "-p", "no:cacheprovider", "-m", "gpu", "-k", chosen, *TESTS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    cut = threading.Event()
    timer = threading.Timer(seconds, lambda: (cut.set(), process.kill()))
    timer.start()
    counts, failed, last = Counter(), [], ""
    assert process.stdout is not None

    def found(words: str) -> dict[str, Any]:
        wrong = counts["failed"] + counts["error"]
        return {"passed": None if not wrong + counts["passed"] else not wrong, "words": words, "failed": failed}

    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
        if outcome := _OUTCOME.match(line):
            name, end = outcome.groups()
            counts[end.lower()] += 1
            failed += [name] * (end in ("FAILED", "ERROR"))
            yield found(f"{_said(counts)} until now")
    status = process.wait()
    timer.cancel()
    if cut.is_set():
        yield found(f"cut short after {seconds:.0f} s: {_said(counts) or 'nothing'}")
    elif status and not failed:  # pytest itself
        yield {"passed": False, "words": f"pytest ended with {status}: {last}", "failed": failed}
    else:
        yield found(last.strip("= ") if collect else _said(counts))


def _said(counts: Counter) -> str:
    return ", ".join(f"{count} {how}" for how, count in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--seconds", type=float, default=170.0, help="in all")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: there is no CUDA device")
    began, written = time.monotonic(), 0.0
    steps: dict[str, dict[str, Any]] = {}
    facts = ceilings.environment()

    def keep(now: bool) -> None:
        nonlocal written
        if asked.json and (now or time.monotonic() - written > _LEAST):
            rows = [{"step": name, **found} for name, found in steps.items()]
            record.write(asked.json, rows, dry=asked.dry, verdict=verdict(steps), environment=facts, gpu=ceilings.gpu())
            written = time.monotonic()

    def left() -> float:
        return max(asked.seconds - (time.monotonic() - began), 1.0)

    steps["self-test"] = {"passed": None, "words": "cut short", "faults": {}, "doctor": None}
    keep(True)
    steps["self-test"] = self_test(asked.device, left() - TESTS_SECONDS)
    print("self-test:", steps["self-test"]["words"], *steps["self-test"]["faults"].items(), sep="\n  ", flush=True)
    keep(True)
    for steps["tests"] in run_tests(left(), asked.dry):
        keep(False)
    keep(True)
    print(verdict(steps))
    sys.exit(STATUS[right(steps)])


STATUS = {True: 0, False: 1, None: 77}


def right(steps: dict[str, dict[str, Any]]) -> bool | None:
    """Whether something is known to be right and nothing to be wrong; ``None`` if neither."""
    found = [step["passed"] for step in steps.values()]
    return False if False in found else (True if True in found else None)


def verdict(steps: dict[str, dict[str, Any]]) -> str:
    """One line."""
    word: dict[bool | None, str] = {True: "right", False: "WRONG", None: "left out: nothing is known"}
    said = "; ".join(f"{name}: {step['words']}" for name, step in steps.items())
    return f"{word[right(steps)]} ({said})"


if __name__ == "__main__":
    main()
