"""Files in the user's cache that keep what was found out about a device, for the next process there."""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO, TypeVar

_logger = logging.getLogger("vllm.w8a8_bismooth")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Shelf:
    """A folder of files of one kind, each under a key: all that its contents depend on.

    Attributes:
        name: of the folder.
        what: the files hold, a word.
        instead: what happens where a file is of no use, in words.
    """

    name: str
    what: str
    instead: str

    def folder(self) -> Path:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "bismooth" / self.name

    def path(self, key: Mapping[str, Any]) -> Path:
        return self.folder() / f"{sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"

    def read(self, key: Mapping[str, Any], parse: Callable[[Any], _T]) -> _T | None:
        """What is kept under a key; ``None`` if nothing is, or nothing that can be used, which the log says.

        Args:
            key: of JSON values.
            parse: makes it of what :meth:`write` was given; may raise anything.
        """
        path = self.path(key)
        try:
            stored = json.loads(path.read_text())
            if stored["key"] != key:
                raise ValueError("it is of another device or library")
            return parse(stored[self.what])
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a file can hold
            _logger.warning("%s is not what this version keeps (%s), so %s", path, error, self.instead)
            return None

    def write(self, key: Mapping[str, Any], value: Any) -> bool:
        """Keep a JSON value, at once or not at all; whether that worked: a cache that cannot be written is none."""
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
                try:
                    json.dump({"key": key, self.what: value}, file, indent=1)
                    file.flush()
                    os.replace(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError:
            return False
        return True

    @contextmanager
    def alone(self, key: Mapping[str, Any]) -> Iterator[None]:
        """Have other processes with this key wait. Where files cannot be locked, nobody waits."""
        lock = _locked(self.path(key).with_suffix(".lock"))
        try:
            yield
        finally:
            if lock is not None:
                lock.close()


def _locked(path: Path) -> TextIO | None:
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 -- closing it unlocks
        fcntl.flock(file, fcntl.LOCK_EX)
    except (OSError, ImportError):
        return None
    return file
