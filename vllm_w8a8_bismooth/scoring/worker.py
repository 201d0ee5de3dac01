"""Windows of log-probabilities, from an engine in a process of its own."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

from vllm_w8a8_bismooth.engine import Silent, running
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.shell import word

_PAUSE = 0.05  # seconds
_TAIL = 12  # lines of the log in a message


def environment() -> dict[str, str]:
    """The engine's core in the same process: two start-ups less, and the same computation. On a CPU 1 GiB for the KV
    cache, unless the user says otherwise: one window at a time needs no more."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class Engine:
    """One checkpoint in vLLM.

    Args:
        model: its folder.
        options: of ``vllm.LLM``, as JSON can have them.
        log: file that receives what the engine prints.

    Attributes:
        answer: what the engine said of itself, see :func:`serving.predictions.predict`; empty before its end.
    """

    def __init__(self, model: Path, options: Mapping[str, Any], log: Path):
        self.model, self._options, self._log = model, options, log
        self.answer: dict[str, Any] = {}

    def windows(
        self, tokens: Path, wanted: Sequence[int], folder: Path, ahead: int | None = None
    ) -> Iterator[tuple[int, Path]]:
        """Number and file of each window that is wanted, as soon as it is there.

        Args:
            tokens: a ``.npy`` of token ids ``[n, length]``.
            wanted: numbers of windows.
            folder: into which the engine writes.
            ahead: how many files may lie there; then each must be taken away. ``None`` is any number, and they stay.

        Raises:
            BismoothError: vLLM is not installed, or the engine failed; then with the end of its log.
        """
        answer = self._log.with_suffix(".json.tmp")
        answer.unlink(missing_ok=True)
        request = {
            "model": str(self.model.absolute()),
            "windows": str(tokens.absolute()),
            "wanted": list(wanted),
            "folder": str(folder.absolute()),
            "ahead": ahead,
            "options": dict(self._options),
        }
        try:
            with running("predictions", request, answer.absolute(), self._log, environment()) as process:
                for number in wanted:
                    path = folder / f"{number:06d}.npy"
                    self._wait(path, process)
                    yield number, path
                self._wait(answer, process)
                self.answer = json.loads(answer.read_text())
        except Silent as reason:
            raise BismoothError.of("score", str(reason), "run it in the environment that serves the model") from None
        finally:
            answer.unlink(missing_ok=True)

    def _wait(self, path: Path, process: Popen) -> None:
        """Until a file is there. It may be there although the process ended badly: vLLM sometimes aborts in the
        interpreter's teardown, after all work is done."""
        while not path.exists():
            if process.poll() is not None and not path.exists():
                raise self._failure(process)
            time.sleep(_PAUSE)

    def _failure(self, process: Popen) -> BismoothError:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        tail = "\n    ".join(lines[-_TAIL:])
        what = f"vLLM failed on it (exit code {process.poll()}), and said at last:\n    {tail}\n "
        return BismoothError.of(self.model, what, f"the whole log is {word(self._log)}")
