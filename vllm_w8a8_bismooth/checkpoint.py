"""Open a Hugging Face checkpoint: headers, tensors, side files. Nothing in it is trusted or executed."""

import hashlib
import json
import math
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_w8a8_bismooth.errors import BismoothError, Interrupted

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
REPORT = "report.json"
"""Of a conversion, beside the weights; its `sha256` has every shard's."""
FLOAT_DTYPES = ("BF16", "F16", "F32")
# safetensors' name -> torch's; I8 is what we write.
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "I8": "int8"}
_JSON_LIMIT = 100 * 2**20  # the same bound that safetensors puts on a header
WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl", ".pickle", ".npz",
}  # fmt: skip
_PIECE = 2**25
AHEAD = 2**28
"""Bytes that are read ahead of what is worked on."""


@dataclass(frozen=True)
class Header:
    """Where a tensor lies (file, byte offset, bytes), its shape, and its dtype as safetensors names it (``BF16``)."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


def read_json(path: Path) -> dict:
    """A JSON object from disk.

    Raises:
        BismoothError: missing, no regular file, larger than 100 MiB, not UTF-8, not JSON, a key that occurs twice, or
            not an object.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait forever
            raise BismoothError(f"{path}: not a regular file; put the checkpoint's {path.name} there")
        if path.stat().st_size > _JSON_LIMIT:
            raise BismoothError(f"{path}: larger than {_JSON_LIMIT >> 20} MiB; this is not a checkpoint's {path.name}")
        value = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except FileNotFoundError:
        raise BismoothError(f"{path}: not found; is this the folder of a Hugging Face checkpoint?") from None
    except OSError as error:
        raise BismoothError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except (ValueError, RecursionError) as error:
        raise BismoothError(f"{path}: not valid JSON ({error}); mend it or download the file again") from None
    if not isinstance(value, dict):
        raise BismoothError(f"{path}: holds a JSON {type(value).__name__}, not an object; download the file again")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object, refused if it says something twice: readers differ in which one they take."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} occurs twice in one object")
    return value


def torch_dtype(name: str):
    """torch's dtype for safetensors' name of it."""
    import torch

    return getattr(torch, _DTYPES[name])


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest, memory = hashlib.sha256(), memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(memory):
            digest.update(memory[:count])
    return digest.hexdigest()


class Checksum:
    """Tells one tensor's bytes from another's, at the speed of memory; an adversary could deceive it.

    SHA-256 over the sums, by rows and by columns, of pieces of 128 x 1024 words of 64 bits. With the interface of
    hashlib's objects; every :meth:`update` but the last must be of whole MiB.
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
    """Where the files of a checkpoint are; as a string, what messages call it."""

    def has(self, file: str) -> bool:
        """Whether there is such a file."""

    def json(self, file: str) -> dict:
        """The object in a JSON file; errors as of :func:`read_json`."""

    def header(self, file: str) -> tuple[int, dict[str, Any]]:
        """Where in a safetensors file the data begin, and tensor name -> ``dtype``, ``shape`` and ``data_offsets``.

        Raises:
            BismoothError: absent, truncated or corrupt.
        """


@dataclass(frozen=True)
class Folder:
    """A folder of this machine, and which commit of which repository on the Hub it holds, if that is known.

    Raises:
        BismoothError: on construction, if there is no such folder.
    """

    path: Path
    hub_id: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise BismoothError(f"{self.path}: no such folder; give the path of a local Hugging Face checkpoint")

    @classmethod
    def of(cls, folder: "str | Path | Folder") -> "Folder":
        """The same, or the folder of a path."""
        return folder if isinstance(folder, Folder) else cls(Path(folder))

    def __str__(self) -> str:
        return str(self.path)

    def has(self, file: str) -> bool:
        return os.path.lexists(self.path / file)  # a broken link is there, and reading it says what is wrong

    def json(self, file: str) -> dict:
        return read_json(self.path / file)

    def side_files(self) -> Iterator[Path]:
        """Relative paths of everything to be copied byte for byte: not weights, config, index or hidden files.

        Links to files count as files, as in a Hub cache; links to folders are not entered.

        Raises:
            BismoothError: a link leads nowhere.
        """
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            if any(part.startswith(".") for part in relative.parts):
                continue
            if path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json") or relative == Path(CONFIG):
                continue
            if path.is_symlink() and not path.exists():
                raise BismoothError(f"{path}: a link that leads nowhere; download the file again or remove the link")
            if path.is_file():
                yield relative

    def header(self, file: str) -> tuple[int, dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        path = self.path / file
        try:
            if not path.is_file():
                raise BismoothError(f"{path}: named by {INDEX} but absent; download the shard again")
            # safe_open checks sizes and offsets; for numpy it does so without torch
            with safe_open(path, framework="np"), open(path, "rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                entries = json.loads(raw.read(length), object_pairs_hook=_once)
        except (SafetensorError, OSError, ValueError) as error:
            raise BismoothError(f"{path}: truncated or corrupt ({error}); download the shard again") from None
        entries.pop("__metadata__", None)
        return 8 + length, entries


class Headers:
    """What a checkpoint says of itself before any weight is read: its config, its index, the headers of its shards.

    Attributes:
        place: of its files.
        config: the parsed ``config.json``; empty if that cannot be read.
        files: the shards.
        headers: tensor name -> :class:`Header`, in the order of the files, of every dtype.
        problems: what is missing, unreadable, inconsistent or truncated, and dtypes that are not accepted.
        lost: tensors that are not where the index says, as some problem tells already.

    Args:
        place: holds ``config.json`` and safetensors, sharded or not.
        dtypes: safetensors names of the dtypes to accept; others are taken for already quantized.
    """

    def __init__(self, place: Place, dtypes: Sequence[str] = FLOAT_DTYPES):
        self.place = place
        self.config: dict = {}
        self.files: list[str] = []
        self.headers: dict[str, Header] = {}
        self.problems: list[str] = []
        self.lost: set[str] = set()
        try:
            self.config = place.json(CONFIG)
        except BismoothError as error:
            self.problems += error.args
        weight_map = self._read_index()
        if weight_map is not None:
            self.files = sorted(set(weight_map.values())) or [SINGLE]
            promised: dict[str, set[str]] = {file: set() for file in self.files}
            for name, file in weight_map.items():
                promised[file].add(name)
            with ThreadPoolExecutor(8) as pool:  # far away each header takes a while
                for file, answer in zip(self.files, pool.map(self._read_header, self.files), strict=True):
                    self._add(file, answer, promised[file], weight_map)
        self._check_dtypes(dtypes)

    def _read_index(self) -> Mapping[str, str] | None:
        """Tensor -> the shard that the index names; empty for a checkpoint of one file, ``None`` without weights."""
        if not self.place.has(INDEX):
            if self.place.has(SINGLE):
                return {}
            self.problems.append(
                f"{self.place}: neither {SINGLE} nor {INDEX}; only safetensors checkpoints can be converted "
                "(pickled .bin files are refused: save the model again with save_pretrained)"
            )
            return None
        path = f"{self.place}/{INDEX}"
        try:
            weight_map = self.place.json(INDEX).get("weight_map")
        except BismoothError as error:
            self.problems += error.args
            return None
        if not isinstance(weight_map, dict) or not weight_map:
            self.problems.append(f"{path}: no weight_map; download the file again")
            return None
        for name, file in weight_map.items():
            fits = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
            if not fits or not file.isprintable():
                self.problems.append(
                    f"{path}: {name} is said to be in {file!r}, which is not a shard of this folder; "
                    "download the file again"
                )
                self.lost.add(name)
        return {name: file for name, file in weight_map.items() if name not in self.lost} or None

    def _read_header(self, file: str) -> tuple[int, dict[str, Any]] | BismoothError:
        try:
            return self.place.header(file)
        except BismoothError as error:
            return error

    def _add(
        self,
        file: str,
        answer: tuple[int, dict[str, Any]] | BismoothError,
        promised: set[str],
        weight_map: Mapping[str, str],
    ) -> None:
        if isinstance(answer, BismoothError):
            self.problems += answer.args
            self.lost |= promised
            return
        path, (begin, entries) = f"{self.place}/{file}", answer
        for name in sorted(promised - entries.keys()):
            self.problems.append(f"{path}: tensor {name} is missing, {INDEX} says that it is here; download both again")
            self.lost.add(name)
        for name, entry in entries.items():
            place = weight_map.get(name) if weight_map else file
            if math.prod(max(1, size) for size in entry["shape"]) >= 2**63:  # of an empty tensor, or torch could not be
                self.problems.append(f"tensor {name} in {file} has shape {entry['shape']}; no tensor is that large")
                self.lost.add(name)
            elif place == file:
                first, last = entry["data_offsets"]
                self.headers[name] = Header(file, tuple(entry["shape"]), entry["dtype"], begin + first, last - first)
            elif name not in self.lost:
                self.problems.append(
                    f"{path}: holds tensor {name}, which {INDEX} {f'places in {place}' if place else 'does not name'}; "
                    "one of them is a duplicate or stale, download both again"
                )
                self.lost.add(name)

    def _check_dtypes(self, accepted: Sequence[str]) -> None:
        others: dict[str, list[str]] = {}
        for name, header in self.headers.items():
            if header.dtype not in accepted:
                others.setdefault(header.dtype, []).append(name)
        for dtype, names in others.items():
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            self.problems.append(
                f"tensor {names[0]} in {self.headers[names[0]].file}{more} has dtype {dtype}: already quantized or not "
                f"a weight; only {', '.join(accepted)} checkpoints can be converted"
            )

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.headers.values())


class Checkpoint(Headers):
    """A checkpoint folder, opened by its headers alone; tensors are read when asked for.

    Attributes:
        place: its folder.
        folder: the path of that.

    Args:
        folder, dtypes: see :class:`Headers`.

    Raises:
        BismoothError: on construction, with all problems that config, index and headers have.
    """

    place: Folder

    def __init__(self, folder: str | Path | Folder, dtypes: Sequence[str] = FLOAT_DTYPES):
        super().__init__(Folder.of(folder), dtypes)
        self.folder = self.place.path
        if self.problems:
            raise BismoothError(*self.problems)

    def read(self, name: str, digest=None, into=None):
        """One tensor, in its stored dtype.

        Args:
            name: of the tensor.
            digest: a hashlib object to feed with its bytes.
            into: a uint8 tensor of the same number of bytes, to read into instead of new memory.

        Raises:
            BismoothError: it holds a NaN or an infinity, or its shard can no longer be read.
        """
        return self._read(name, 0, self.headers[name].shape, digest, into)

    def rows(self, name: str, start: int, count: int):
        """Rows ``start`` to ``start + count`` of a matrix, as :meth:`read` gives the whole."""
        inner = self.headers[name].shape[1:]
        return self._read(name, start * math.prod(inner), (count, *inner))

    def pieces(self, name: str, digest=None) -> Iterator:
        """The same values as :meth:`read`, one-dimensional and 32 MiB at a time, for tensors that only pass through."""
        size, step = math.prod(self.headers[name].shape), _PIECE // 4
        for first in range(0, size, step):
            yield self._read(name, first, (min(step, size - first),), digest)

    def _read(self, name: str, first: int, shape: Sequence[int], digest=None, into=None):
        """Elements from ``first`` on, of a given shape.

        Not by mapping: a file that shrinks would kill the process, and mapped pages count as its memory.
        """
        import torch

        header, path = self.headers[name], self.folder / self.headers[name].file
        dtype = torch_dtype(header.dtype)
        tensor = torch.empty(shape, dtype=dtype) if into is None else into.view(dtype).view(shape)
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        try:
            with open(path, "rb", buffering=0) as file:
                done = 0
                while done < len(view):
                    got = os.preadv(file.fileno(), [view[done:]], header.offset + first * tensor.itemsize + done)
                    if not got:
                        raise OSError("the file has become shorter")
                    done += got
        except OSError as error:
            raise Interrupted(
                f"{path}: tensor {name} can no longer be read ({error}); did the source change meanwhile?"
            ) from None
        if digest is not None:
            digest.update(view)
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            bad = (~tensor.view(-1).isfinite()).nonzero().view(-1)
            place = [int(i) for i in torch.unravel_index(first + bad[0], header.shape)]
            raise BismoothError(
                f"tensor {name} in {header.file} holds {tensor.view(-1)[bad[0]].item()} at {place} "
                f"({len(bad)} such values); download the shard again or repair the model"
            )
        return tensor

    def signature(self) -> dict[str, list[int]]:
        """Size in bytes and modification time in ns of every file that a conversion reads."""
        files = {Path(CONFIG), *(Path(header.file) for header in self.headers.values()), *self.place.side_files()}
        if (self.folder / INDEX).exists():
            files.add(Path(INDEX))
        try:
            stats = {relative.as_posix(): (self.folder / relative).stat() for relative in sorted(files)}
        except OSError as error:
            raise BismoothError(f"{error.filename}: gone ({error.strerror}); the source changed meanwhile") from None
        return {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()}

    def digest(self, name: str) -> str:
        """:class:`Checksum` of a tensor, read for this purpose."""
        digest = Checksum()
        for _ in self.pieces(name, digest):
            pass
        return digest.hexdigest()

    def read_fingerprint(self) -> str:
        """:meth:`fingerprint`, from every tensor read for this purpose."""
        return self.fingerprint({name: self.digest(name) for name in self.headers})

    def fingerprint(self, digests: Mapping[str, str]) -> str:
        """Tells sources apart by everything that the conversion reads: config, tensors, side files, however sharded.

        Args:
            digests: tensor name -> its :class:`Checksum`, for all tensors.
        """
        whole = hashlib.sha256()
        for name in sorted(self.headers):
            header = self.headers[name]
            whole.update(f"{name} {header.dtype} {list(header.shape)} {digests[name]}\n".encode())
        for relative in (Path(CONFIG), *self.place.side_files()):
            whole.update(f"{relative.as_posix()} {sha256(self.folder / relative)}\n".encode(errors="surrogateescape"))
        return whole.hexdigest()


class ReadAhead:
    """Reads tensors in a thread while their predecessors are worked on.

    Memory is used again once it is released: fresh pages cost more than the reading.

    Args:
        checkpoint: to read from.
        names: the tensors, in the order in which they will be taken.
        budget: bytes that may be held, counting what was taken and not yet released. A tensor that is being waited for
            is read whatever the budget.

    Attributes:
        digests: :class:`Checksum` of each tensor read so far.
    """

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str], budget: int):
        self._checkpoint, self._names, self._budget = checkpoint, names, budget
        self._ready: dict = {}
        self._buffers: dict = {}
        self._free: list = []
        self._held = 0
        self._wanted: str | None = None
        self._error: BaseException | None = None
        self._begun = self._closed = False
        self._changed = threading.Condition()
        self.digests: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "ReadAhead":
        import torch

        cores = torch.get_num_threads()
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._begun)
        torch.set_num_threads(cores)  # part of what a thread sets is everybody's
        return self

    def __exit__(self, *exception) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        for memory in (self._ready, self._buffers, self._free):
            memory.clear()

    def _run(self) -> None:
        import torch

        torch.get_num_threads()  # without a first look, this thread would later take over what everybody has
        torch.set_num_threads(1)  # the others are busy: waiting for them costs more than doing it alone
        with self._changed:
            self._begun = True
            self._changed.notify_all()
        for name in self._names:
            nbytes = self._checkpoint.headers[name].nbytes
            with self._changed:
                self._changed.wait_for(lambda n=nbytes: self._closed or self._wanted or self._held + n <= self._budget)
                if self._closed:
                    return
                self._held += nbytes
                self._buffers[name] = self._buffer(nbytes)
            try:
                digest = Checksum()
                tensor = self._checkpoint.read(name, digest, self._buffers[name])
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._ready[name], self.digests[name] = tensor, digest.hexdigest()
                self._wanted = None if self._wanted == name else self._wanted
                self._changed.notify_all()

    def _buffer(self, nbytes: int):
        """Released memory of just this size, else new memory, for which idle memory is given back first."""
        import torch

        for place, buffer in enumerate(self._free):
            if buffer.numel() == nbytes:
                return self._free.pop(place)
        while self._free and self._held + sum(buffer.numel() for buffer in self._free) > self._budget:
            self._free.pop(0)
        return torch.empty(nbytes, dtype=torch.uint8)

    def take(self, name: str):
        """The tensor; waits for it. Its memory is used again after :meth:`release`.

        Raises:
            BismoothError: see :meth:`Checkpoint.read`.
        """
        with self._changed:
            if name not in self._ready:
                self._wanted = name
                self._changed.notify_all()
                self._changed.wait_for(lambda: name in self._ready or self._error is not None)
            if name not in self._ready:
                raise self._error
            return self._ready.pop(name)

    def release(self, name: str) -> None:
        """Give a taken tensor back. Whoever still needs its values must have copied them."""
        with self._changed:
            self._held -= self._checkpoint.headers[name].nbytes
            self._free.append(self._buffers.pop(name))
            self._changed.notify_all()
