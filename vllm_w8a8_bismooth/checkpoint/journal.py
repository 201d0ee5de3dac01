"""The journal of a run that may be killed at any moment: what is done, and the states from which it goes on."""

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from vllm_w8a8_bismooth.checkpoint.files import disk_errors, partial_folder, write_atomically
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted, Problem

FOLDER = ".bismooth"
NAMES = "names"
"""The key of an identity under which hashes in it have names that people know."""
RUN = "run.json"
"""What a run is, as JSON."""
_LOCK = "lock"
_LAYOUT = 2  # of what lies in the folder; a run that left another layout is not continued


class Journal:
    """The partial folder of one run, locked against others, with records and states in ``.bismooth`` inside.

    Use as a context manager. Left by an error of the input the folder is removed if this run began it and nothing in
    it is finished; else, and left by anything else (a full disk, an interrupt, SIGKILL), it stays, and the next run
    with the same identity goes on from it.

    Args:
        destination: the folder to be; it does not exist yet, or is empty.
        identity: JSON that says what the run makes of what. A run that left another one here is not continued, but
            for :data:`NAMES`, which are for messages.

    Raises:
        BismoothError: the folder cannot be created, another run is writing it, holds another run, or is not ours.
    """

    def __init__(self, destination: Path, identity: Mapping[str, Any]):
        self.destination = destination
        self.partial = partial_folder(destination)
        self._identity = json.loads(json.dumps({"journal": _LAYOUT, **identity}))
        self._folder = self.partial / FOLDER
        self._begun = self._spoilt = False

    def __enter__(self) -> "Journal":
        try:
            self._begun = not self.partial.exists()
            if self._begun:
                self.partial.mkdir(parents=True)
                self._take_after(self.destination)
            self._refuse_strangers()
            self._folder.mkdir(exist_ok=True)
            self._lock = open(self._folder / _LOCK, "w")  # noqa: SIM115 (held until the end of the run)
        except OSError as error:
            what = f"cannot be written ({error})"
            raise BismoothError.of(self.destination, what, "check the path and its permissions") from None
        try:
            self._take(fcntl.LOCK_EX, self._lock)
            if not self._compare():
                self._begun = True  # a run that was killed before it wrote a word has left nothing
                self._write(RUN, self._identity)
        except BaseException:
            self._lock.close()
            raise
        return self

    def _take_after(self, folder: Path) -> None:
        """An empty folder that is there already says who may read the result; it takes that folder's place."""
        if folder.is_dir():
            there = folder.stat()
            with suppress(PermissionError):
                os.chown(self.partial, -1, there.st_gid)
            self.partial.chmod(stat.S_IMODE(there.st_mode) | stat.S_IRWXU)

    def look(self) -> None:
        """Check what entering would check, but write nothing.

        Raises:
            BismoothError: entering would raise it.
        """
        nearest = self.partial
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise BismoothError.of(self.destination, f"cannot be written ({nearest})", "check its permissions")
        if self.partial.exists():
            self._refuse_strangers()
        if self._folder.is_dir():
            with suppress(FileNotFoundError), open(self._folder / _LOCK) as lock:
                self._take(fcntl.LOCK_SH, lock)
            self._compare()

    def nbytes(self) -> int:
        """Bytes on disk of what is there so far."""
        return sum(path.stat().st_blocks * 512 for path in self.partial.rglob("*") if path.is_file())

    def _refuse_strangers(self) -> None:
        if any(self.partial.iterdir()) and not self._folder.is_dir():
            remedy = "choose another destination, or move it away"
            raise BismoothError.of(self.partial, "exists and is no unfinished conversion", remedy)

    def _take(self, kind: int, lock: IO) -> None:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "another conversion is writing it"
            raise BismoothError.of(self.destination, what, "stop one of them") from None

    def _compare(self) -> bool:
        """Whether an earlier run is there; raises if it was another one."""
        if (before := self._read(RUN)) is None:
            return False
        names = {**before.pop(NAMES, {}), **self._identity.get(NAMES, {})}
        lines = readable(differences(before, {k: v for k, v in self._identity.items() if k != NAMES}), names)
        if lines:
            more = ", ..." if len(lines) > 4 else ""
            raise BismoothError.of(
                self.partial,
                f"an unfinished conversion of another kind ({'; '.join(lines[:4])}{more})",
                "finish that one with its own options, or remove the folder",
            )
        return True

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, BismoothError) and not isinstance(error, Interrupted):
            if self._spoilt or self._begun:
                shutil.rmtree(self.partial, ignore_errors=True)
            else:
                error.problems += (_kept(self.partial),)
        self._lock.close()

    def give_up(self) -> None:
        """What is here is of no more use: it goes with the error that follows."""
        self._spoilt = True

    def _read(self, name: str) -> Any:
        """Stored JSON, ``None`` if there is none. What a power cut spoilt counts as not there."""
        try:
            return json.loads((self._folder / name).read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _write(self, name: str, value: Any) -> None:
        with disk_errors(self.destination):
            write_atomically(self._folder / name, lambda path: path.write_text(json.dumps(value)))

    def record(self, unit: str) -> Any:
        """What :meth:`finish` stored for a unit of work; ``None`` if it is not finished."""
        return self._read(f"{unit}.json")

    def finish(self, unit: str, record: Any) -> None:
        """Mark a unit as done, with a JSON record of what came of it."""
        self._write(f"{unit}.json", record)

    def state(self, unit: str) -> dict[str, torch.Tensor] | None:
        """Tensors that :meth:`keep` stored, bit for bit; ``None`` if there are none, or a power cut spoilt them."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._folder / f"{unit}.safetensors")
        except (FileNotFoundError, SafetensorError):
            return None

    def keep(self, unit: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store tensors from which a later run can go on."""
        from safetensors.torch import save_file

        contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with disk_errors(self.destination):
            write_atomically(self._folder / f"{unit}.safetensors", lambda path: save_file(contents, path))

    def forget(self, unit: str) -> None:
        """Remove a state that is no longer needed."""
        (self._folder / f"{unit}.safetensors").unlink(missing_ok=True)

    def commit(self) -> None:
        """Flush everything to disk and give the folder its name. The journal goes last: it marks the folder as ours."""
        with disk_errors(self.destination):
            for path in self.partial.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            os.replace(self.partial, self.destination)
        clear(self.destination)


def _kept(partial: Path) -> Problem:
    what = "holds what is finished so far; the same command on the same source goes on from there"
    return Problem(str(partial), what, "remove it once the source or the options are others")


def clear(destination: Path) -> None:
    """Remove the journal from a committed folder."""
    shutil.rmtree(destination / FOLDER, ignore_errors=True)


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Readable lines on where two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now and path.startswith("source."):  # its size and time, which tell nobody anything
        yield f"the source's {path.removeprefix('source.')} was changed"
    elif before != now:
        yield f"{path}: {before!r} there, {now!r} now"


def readable(lines: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """Lines in which the name stands beside the beginning of each hash that has one."""
    found = list(lines)
    for digest, name in names.items():
        found = [line.replace(repr(digest), f"{name} ({digest[:12]})") for line in found]
    return found
