"""Watches the processes that run the self-test: what one of them dies of, or never comes back from, has a fault."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vllm_w8a8_bismooth.ops.selftest.cases import Tile
from vllm_w8a8_bismooth.ops.selftest.verdict import Verdict

COMMAND = (sys.executable, "-m", "vllm_w8a8_bismooth.ops.selftest")


@dataclass(frozen=True)
class Limits:
    """Seconds.

    Attributes:
        start: until a process has said what there is to try. It imports torch and wakes the device.
        case: for each case, which takes well under one, on busy processors more.
        whole: for all of it.
    """

    start: float = 120
    case: float = 60
    whole: float = 300


class _Process:
    """One of them.

    Raises:
        OSError: it could not be started.
    """

    def __init__(self, command: Sequence[str], request: Any):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by __exit__
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors)
        self._rest = b""
        with suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), json.dumps(request).encode() + b"\n")  # type: ignore[union-attr]

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # the driver may hold it as long as the device does not answer
            self._process.wait(10)
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):
                file.close()  # type: ignore[union-attr]

    def line(self, seconds: float) -> dict[str, Any] | None:
        """The next; ``None`` if there is none in time, or no more."""
        until = time.monotonic() + seconds
        source = self._process.stdout.fileno()  # type: ignore[union-attr]
        while b"\n" not in self._rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([source], [], [], left)[0]:
                return None
            got = os.read(source, 1 << 16)
            if not got:
                return None
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def fate(self, seconds: float) -> str:
        """Why there was no line for so long."""
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return f"no answer in {seconds:.3g} s"
        if status < 0:
            return f"its process died of {signal.Signals(-status).name}"
        return f"its process ended with status {status}"

    def runs(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")


def examine(device: int | None, command: Sequence[str] = COMMAND, limits: Limits = Limits()) -> Verdict:  # noqa: B008
    """Try all kernels on a device, in as many processes as it takes.

    Args:
        device: number of a GPU; ``None`` is the CPU.
        command: what runs :mod:`process`.
        limits: of time.
    """
    ended: dict[str, str] = {}
    tiles: tuple[Tile, ...] = ()
    names: list[str] = []
    waited = False
    until = time.monotonic() + limits.whole

    def verdict(problem: str = "", lasting: bool = False) -> Verdict:
        untried = {name: f"not tried, as {problem}" for name in names if name not in ended}
        faults = {name: fault for name, fault in ended.items() if fault} | untried
        return Verdict(tiles, tuple(names), faults, "" if lasting else problem)

    while not names or len(ended) < len(names):
        if time.monotonic() > until:
            return verdict(f"{limits.whole:.3g} s were not enough", lasting=waited)  # or every start would wait as long
        try:
            process = _Process(command, {"device": device, "ended": ended})
        except OSError as error:
            return verdict(f"its process could not be started: {error}")
        with process:
            first = process.line(limits.start)
            if first is None:
                return verdict(process.fate(limits.start) + process.last_words())
            if "problem" in first:
                return verdict(first["problem"])
            tiles, names = tuple(Tile(*row) for row in first["tiles"]), first["names"]
            for name in [name for name in names if name not in ended]:
                seconds = min(limits.case, until - time.monotonic())
                if seconds <= 0:
                    break
                line = process.line(seconds)
                if line is not None and "problem" in line:
                    return verdict(line["problem"])
                ended[name] = process.fate(seconds) if line is None else line["fault"]
                waited = waited or (line is None and seconds == limits.case and process.runs())
                if line is None or line.get("last"):
                    break
    return verdict()
