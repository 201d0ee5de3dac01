"""The command lines that benchmarks run, and a vLLM server for as long as it is needed."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.score import engine_environment

_MODULES = {"bismooth": "vllm_w8a8_bismooth", "vllm": "vllm.entrypoints.cli.main"}
_START_SECONDS = 600


def command_of(tool: str) -> list[str]:
    """How ``bismooth`` or ``vllm`` is run by this interpreter; works where no scripts were installed."""
    return [sys.executable, "-m", _MODULES[tool]]


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a command until the block ends, with its output in ``log``."""
    with open(log, "wb") as sink:
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def serve(model: Path, log: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run ``vllm serve`` on a free port until the block ends; yields the base URL.

    Args:
        model: checkpoint folder.
        log: receives what the server says.
        options: of ``vllm serve``.
        environment: variables over those of :func:`score.engine_environment`.

    Raises:
        RuntimeError: the server ended or was not ready within ten minutes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [*command_of("vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options]
    with running(command, engine_environment() | dict(environment or {}), log) as server:
        deadline = time.monotonic() + _START_SECONDS
        while not _healthy(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vllm serve did not come up, see {log}:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
