"""Asks the installed vLLM, in a process of its own, because this half of the package never imports it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PATIENCE = 300.0
"""Seconds for vLLM to start and answer; 15 are usual."""


class Silent(Exception):
    """vLLM gave no answer; the message says why, without a full stop."""


def ask(module: str, request: Any = None, patience: float = PATIENCE) -> Any:
    """What ``python -m vllm_w8a8_bismooth.serving.<module> ANSWER.json`` answers to a request on stdin, both JSON.

    Raises:
        Silent: vLLM is not installed, cannot be imported, or did not answer in so many seconds.
    """
    refuse_absence()
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        try:
            done = subprocess.run(
                _command(module, answer),
                input=json.dumps(request),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=patience,
            )
        except subprocess.TimeoutExpired:
            raise Silent(f"vLLM did not answer in {patience:.0f} s") from None
        # Not the exit code: vLLM sometimes aborts in the interpreter's teardown, after all work is done.
        if not answer.exists():
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise Silent(f"vLLM could not be asked ({reason})")
        return json.loads(answer.read_text())


@contextmanager
def running(
    module: str, request: Any, answer: Path, log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen]:
    """The process of :func:`ask` while it works on a request, for as long as that takes.

    At the end it is gone, with all that it started.

    Args:
        module, request: see :func:`ask`.
        answer: file that it writes in the end.
        log: file that receives what it prints.
        environment: of the process.

    Raises:
        Silent: vLLM is not installed.
    """
    refuse_absence()
    with tempfile.TemporaryFile() as question, open(log, "wb") as sink:
        question.write(json.dumps(request).encode())
        question.seek(0)
        process = subprocess.Popen(
            _command(module, answer),
            stdin=question,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # a group of its own, with the ranks of the engine in it
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def refuse_absence() -> None:
    """Raises :class:`Silent` if there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise Silent("vLLM is not installed here")


def _command(module: str, answer: Path) -> list[str]:
    return [sys.executable, "-m", f"vllm_w8a8_bismooth.serving.{module}", str(answer)]
