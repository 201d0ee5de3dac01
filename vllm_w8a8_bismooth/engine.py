"""Asks the installed vLLM, in a process of its own, because this half of the package never imports it."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_PATIENCE = 300  # seconds for vLLM to start and answer; 15 are usual


class Silent(Exception):
    """vLLM gave no answer; the message says why, without a full stop."""


def ask(module: str, request: Any = None) -> Any:
    """What ``python -m vllm_w8a8_bismooth.serving.<module> ANSWER.json`` answers to a request on stdin, both JSON.

    Raises:
        Silent: vLLM is not installed, cannot be imported, or did not answer in five minutes.
    """
    if importlib.util.find_spec("vllm") is None:
        raise Silent("vLLM is not installed here")
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, "-m", f"vllm_w8a8_bismooth.serving.{module}", str(answer)]
        try:
            done = subprocess.run(
                command, input=json.dumps(request), capture_output=True, text=True, errors="replace", timeout=_PATIENCE
            )
        except subprocess.TimeoutExpired:
            raise Silent(f"vLLM did not answer in {_PATIENCE} s") from None
        # Not the exit code: vLLM sometimes aborts in the interpreter's teardown, after all work is done.
        if not answer.exists():
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise Silent(f"vLLM could not be asked ({reason})")
        return json.loads(answer.read_text())
