"""Where scores are kept while they are made: the source's for the next run too, the checkpoint's until it is scored."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vllm_w8a8_bismooth.checkpoint.files import WEIGHT_SUFFIXES, Folder, sha256, write_atomically, write_json
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted
from vllm_w8a8_bismooth.scoring.divergence import Window

_KNOWN = {".json", ".jinja", ".model", ".txt"}
"""Suffixes of small files by which a model computes or reads text."""


def default_root() -> Path:
    """``bismooth/scores`` in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bismooth" / "scores"


def fingerprint(folder: Path) -> str:
    """Tells checkpoints apart: by the content of small files, by size and time of change of weights.

    Reading the weights could take as long as scoring them.
    """
    digest = hashlib.sha256()
    for name in Folder(folder).files():
        path = folder / name
        if path.suffix in WEIGHT_SUFFIXES:
            stat = path.stat()
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        elif path.suffix in _KNOWN:
            digest.update(f"{name} {sha256(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def key(identity: Mapping[str, Any]) -> str:
    """A name for a folder; equal for equal JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


class Store:
    """The folder of one source on one text, in it the source's log-probabilities and what the checkpoint has so far.

    Use as a context manager: it is locked against other runs.

    Args:
        root: holds a folder for each source and text.
        source: identity of what the source's scores depend on.
        checkpoint: identity of what is compared with it.

    Attributes:
        folder: of the source's windows and the logs.
    """

    def __init__(self, root: Path, source: Mapping[str, Any], checkpoint: Mapping[str, Any]):
        self.folder = root / key(source)
        self._identity = dict(source)
        self._compared = self.folder / f"against-{key(checkpoint)}"

    def __enter__(self) -> "Store":
        with _disk_errors(self.folder):
            self._compared.mkdir(parents=True, exist_ok=True)
            self.source.mkdir(exist_ok=True)
            self._lock = open(self.folder / "lock", "w")  # noqa: SIM115 (held until the end of the run)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise BismoothError.of(self.folder, "another score is using it", "wait until that is done") from None
            write_json(self.folder / "identity.json", self._identity)
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    @property
    def source(self) -> Path:
        """Folder of the source's windows, ``<number>.npy``, fp32 ``[length - 1, vocab]``."""
        return self.folder / "source"

    def kept(self) -> set[int]:
        """Numbers of the source's windows that are there."""
        return _numbers(self.source, ".npy")

    def compared(self) -> set[int]:
        """Numbers of the windows in which the checkpoint has been compared."""
        return _numbers(self._compared, ".npz")

    @contextmanager
    def passing(self) -> Iterator[Path]:
        """A folder for windows that are looked at and taken away."""
        folder = self._compared / "passing"
        shutil.rmtree(folder, ignore_errors=True)
        with _disk_errors(self.folder):
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, number: int, window: Window) -> None:
        """Keep what the checkpoint has in one window."""

        def write(path: Path) -> None:
            with open(path, "wb") as file:
                np.savez(file, **vars(window))

        with _disk_errors(self.folder):
            write_atomically(self._compared / f"{number:06d}.npz", write)

    def get(self, number: int) -> Window:
        """What :meth:`put` was given."""
        with np.load(self._compared / f"{number:06d}.npz") as found:
            return Window(**{name: found[name] for name in found.files})

    def note(self, name: str, answer: Mapping[str, Any]) -> None:
        """Keep what an engine said of itself."""
        with _disk_errors(self.folder):
            write_atomically(self._facts(name), lambda path: write_json(path, answer))

    def noted(self, name: str) -> dict[str, Any]:
        """What :meth:`note` was given; empty before that."""
        path = self._facts(name)
        return json.loads(path.read_text()) if path.is_file() else {}

    def forget(self) -> None:
        """Remove what the checkpoint has: its score is done."""
        shutil.rmtree(self._compared, ignore_errors=True)

    def _facts(self, name: str) -> Path:
        return (self.folder if name == "source" else self._compared) / f"{name}.json"


def present(root: Path, source: Mapping[str, Any]) -> set[int]:
    """Numbers of the source's windows that are there."""
    return _numbers(root / key(source) / "source", ".npy")


def _numbers(folder: Path, suffix: str) -> set[int]:
    return {int(path.stem) for path in folder.glob(f"*{suffix}") if path.stem.isdigit()}


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "check space and permissions, then run the same command again: it goes on where it stopped"
        raise Interrupted.of(folder, f"cannot be written ({error})", remedy) from None
