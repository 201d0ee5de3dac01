"""The files of a checkpoint beside its tensors: JSON, hashes, folders, room on the disk."""

import hashlib
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_w8a8_bismooth.errors import BismoothError, Interrupted

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
RECIPE, REPORT = "recipe.json", "report.json"
"""Written beside the weights; the report's ``sha256`` maps shards to hashes."""
_JSON_LIMIT = 100 * 2**20  # the same bound that safetensors puts on a header
_A_FOLDER = "give the path of a local Hugging Face checkpoint"
_SHARD_AGAIN = "download the shard again"
_POINTER = b"version https://git-lfs"
_UNITS = {"GB": 1e9, "MB": 1e6, "KB": 1e3}
WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl", ".pickle", ".npz",
}  # fmt: skip


def read_json(path: Path) -> dict:
    """A JSON object from disk.

    Raises:
        BismoothError: as :func:`read_value`; or it is another value.
    """
    value = read_value(path)
    if not isinstance(value, dict):
        raise BismoothError.of(path, f"holds a JSON {type(value).__name__}, not an object", "download the file again")
    return value


def read_value(path: Path) -> Any:
    """A JSON value from disk.

    Raises:
        BismoothError: missing, no regular file, larger than 100 MiB, not UTF-8, not JSON, or a key that occurs twice.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait forever
            raise BismoothError.of(path, "not a regular file", f"put the checkpoint's {path.name} there")
        if path.stat().st_size > _JSON_LIMIT:
            remedy = f"put the checkpoint's {path.name} there; this cannot be it"
            raise BismoothError.of(path, f"larger than {_JSON_LIMIT >> 20} MiB", remedy)
        refuse_pointer(path)
        return json.loads(path.read_bytes(), object_pairs_hook=_once)
    except FileNotFoundError:
        raise BismoothError.of(path, "not found", "give the folder of a Hugging Face checkpoint") from None
    except NotADirectoryError:
        raise _no_folder(path.parent) from None
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise BismoothError.of(path, what, "check the path and its permissions") from None
    except (ValueError, RecursionError) as error:
        raise BismoothError.of(path, f"not valid JSON ({error})", "mend it or download the file again") from None


def _no_folder(path: Path) -> BismoothError:
    """The error that a file was given for a folder, and the folder that was probably meant."""
    around = path.parent
    remedy = f"give {around}, which holds it" if (around / CONFIG).exists() else _A_FOLDER
    return BismoothError.of(path, "a file, not the folder of a checkpoint", remedy)


def _once(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object, refused if it says something twice: readers differ in which one they take."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} occurs twice in one object")
    return value


def refuse_pointer(path: Path) -> None:
    """Raises :class:`BismoothError` for what a clone without Git LFS has in the place of a large file."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            what, remedy = "a pointer of Git LFS, not the file", "run git lfs pull in its clone, or download it again"
            raise BismoothError.of(path, what, remedy)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest, memory = hashlib.sha256(), memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(memory):
            digest.update(memory[:count])
    return digest.hexdigest()


class Checksum:
    """A checksum at the speed of memory, which tells tensors apart unless an adversary made them.

    It is the SHA-256 of the sums, by rows and by columns, of pieces of 128 x 1024 words of 64 bits. It has the
    interface of hashlib's objects; every :meth:`update` but the last must be of whole MiB.
    """

    def __init__(self):
        self._hash = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        import numpy as np

        whole = len(data) // 2**20 * 2**20
        for piece in np.frombuffer(data[:whole], np.uint64).reshape(-1, 128, 1024):
            self._hash.update(piece.sum(axis=0))
            self._hash.update(piece.sum(axis=1))
        self._hash.update(data[whole:])

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class Place(Protocol):
    """Where the files of a checkpoint are. Messages call it what ``str`` makes of it."""

    def files(self) -> Mapping[str, int]:
        """Every file but hidden ones, in order: path inside the place -> bytes."""

    def has(self, file: str) -> bool:
        """Whether there is such a file."""

    def local(self, file: str) -> Path:
        """Where on this machine a small file can be read.

        Raises:
            BismoothError: there is none.
        """

    def code(self) -> Path:
        """A folder on this machine that holds the code beside the config."""

    def header(self, file: str) -> tuple[int, dict[str, Any]]:
        """Where in a safetensors file the data begin, and tensor name -> ``dtype``, ``shape`` and ``data_offsets``.

        Raises:
            BismoothError: absent, truncated or corrupt.
        """


@dataclass(frozen=True)
class Folder:
    """A folder on this machine, and the repository and commit on the Hub that it holds, if they are known.

    Raises:
        BismoothError: on construction, if there is no such folder.
    """

    path: Path
    hub_id: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.path.is_file():
            raise _no_folder(self.path)
        if not self.path.is_dir():
            raise BismoothError.of(self.path, "no such folder", _A_FOLDER)

    @classmethod
    def of(cls, folder: "str | Path | Folder") -> "Folder":
        """The same, or the folder of a path."""
        return folder if isinstance(folder, Folder) else cls(Path(folder))

    def __str__(self) -> str:
        return str(self.path)

    def has(self, file: str) -> bool:
        return os.path.lexists(self.path / file)  # a broken link is there, and reading it says what is wrong

    def files(self) -> dict[str, int]:
        """Links to files count as files, as in a Hub cache, also those that lead nowhere; links to folders are not
        entered."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            if any(part.startswith(".") for part in relative.parts):
                continue
            if path.is_file() or (path.is_symlink() and not path.exists()):
                found[relative.as_posix()] = path.stat().st_size if path.exists() else 0
        return found

    def local(self, file: str) -> Path:
        return self.path / file

    def code(self) -> Path:
        return self.path

    def header(self, file: str) -> tuple[int, dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        path = self.path / file
        again = "download the file again" if "/" in file else _SHARD_AGAIN
        try:
            if not path.is_file():
                what = "a link that leads nowhere" if path.is_symlink() else f"named by {INDEX} but absent"
                raise BismoothError.of(path, what, again)
            refuse_pointer(path)
            # safe_open checks sizes and offsets; for numpy it does so without torch
            with safe_open(path, framework="np"), open(path, "rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                entries = json.loads(raw.read(length), object_pairs_hook=_once)
        except (SafetensorError, OSError, ValueError) as error:
            raise BismoothError.of(path, f"truncated or corrupt ({error})", again) from None
        entries.pop("__metadata__", None)
        return 8 + length, entries


def write_json(path: Path, value: Mapping, compact: Collection[str] = ()) -> None:
    """Write a small JSON file, keys in the order given; what is under ``compact`` ones has a line each."""
    lines = [
        f"  {json.dumps(key)}: "
        + (json.dumps(item) if key in compact else json.dumps(item, indent=2).replace("\n", "\n  "))
        for key, item in value.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n" if lines else "{}\n")


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes, following links; folders are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def partial_folder(destination: Path) -> Path:
    """Where a checkpoint grows until it is whole: ``<destination>.partial``."""
    return destination.parent / f"{destination.name}.partial"  # with_name knows no "." and no "/"


@contextmanager
def disk_errors(destination: Path) -> Iterator[None]:
    """Turns an OSError, or the SafetensorError that wraps one, into a message for the user."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise Interrupted.of(
            destination,
            f"cannot be written ({error})",
            "check space and permissions, then run the same command again: it goes on where it stopped. "
            f"Removing {partial_folder(destination)} gives it up",
        ) from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary name, flush it to disk, and give the file its name in one step."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def free_space(folder: Path) -> int:
    """Bytes that are free on the disk that holds, or would hold, a folder."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def readable_size(count: int) -> str:
    """A number of bytes for people, who are to see no 0.00 of anything."""
    unit = next((unit for unit, least in _UNITS.items() if count >= 0.1 * least), None)
    return f"{count / _UNITS[unit]:.2f} {unit}" if unit else f"{count} bytes"


def check_space(folder: Path, needed: int, what: str = "result") -> None:
    """Raises :class:`BismoothError` if the disk that will hold ``folder`` has too little room for ``what``."""
    if (free := free_space(folder)) < needed:
        raise BismoothError.of(
            folder,
            f"the {what} needs {readable_size(needed)}, the disk has {readable_size(free)} free",
            "make room or choose another place",
        )
