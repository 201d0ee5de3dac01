"""Open a Hugging Face checkpoint: headers, tensors, side files. Nothing in it is trusted or executed."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.checkpoint import companions as beside
from vllm_w8a8_bismooth.checkpoint import shards
from vllm_w8a8_bismooth.checkpoint.companions import companions, left_out
from vllm_w8a8_bismooth.checkpoint.elements import bytes_of, read_into, refuse_infinite, torch_dtype
from vllm_w8a8_bismooth.checkpoint.encodings import Encoding, decode_into
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, INDEX, Checksum, Folder, Place, read_json, sha256
from vllm_w8a8_bismooth.checkpoint.formats import FP8, KEYS, Weights
from vllm_w8a8_bismooth.checkpoint.views import Shown, fill
from vllm_w8a8_bismooth.errors import BadSource, BismoothError, Problem
from vllm_w8a8_bismooth.model.classes import trunk_of
from vllm_w8a8_bismooth.model.layers import View
from vllm_w8a8_bismooth.model.names import Names, unwrapped

FLOAT_DTYPES = ("BF16", "F16", "F32")
BUFFER_DTYPES = ("F64", "I64", "I32", "I16", "U8", "BOOL")
"""Of tensors that are no weights (masks, positions, counters), which pass through; see :func:`is_buffer`."""
_PACKED = {"weight", "qweight", "qzeros", "g_idx", "weight_packed", "weight_shape", "weight_zero_point"}
"""Parts of names under which weights are stored in integers, by GPTQ, AWQ, compressed-tensors and bitsandbytes."""
_TABLE = ".rotary_emb.inv_freq"
_PIECE = 2**25


@dataclass(frozen=True)
class Header:
    """Where a tensor lies (file, byte offset, bytes), its shape, and its dtype as safetensors names it (``BF16``)."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


def is_buffer(name: str, dtype: str) -> bool:
    """Whether a tensor cannot be a weight, by its dtype, and is no part of a quantized one by its name."""
    return dtype in BUFFER_DTYPES and (dtype == "F64" or not _PACKED.intersection(name.split(".")))


class Headers:
    """What a checkpoint says of itself before any weight is read: its config, its index, the headers of its shards.

    Attributes:
        place: where its files are.
        config: the parsed ``config.json``; empty if that cannot be read. What it says of weights in FP8 or FP4, which
            are float to everybody else, is not in it.
        files: the shards.
        headers: tensor name -> :class:`Header`, in the order of the files, of every dtype. Names are without what
            wrappers added to them, see :func:`names.unwrapped`. Weights in FP8 and FP4 are float here: in F32 if the
            config gives the model that dtype, else in BF16; those of packed rows are I8.
        stored: the same as the files have it, but for the names.
        encodings: name of a weight that is stored in FP8, FP4 or packed INT8 -> how.
        views: matrices that are parts of stored tensors, or transposed, which are headers only after :meth:`show`.
        quantized: how these are stored, in words; ``None`` if there are none.
        names: what the parts of the decoder are called.
        renamed: what was taken from the names or added to them; ``None`` if nothing was.
        code: the folder of the model's own code, if it may run; set by :class:`layout.Layout`.
        unlike: see :class:`shards.Shards`.
        notes: what was passed over or taken in a way that the user should know.
        problems: what is missing, unreadable, inconsistent or truncated, and dtypes that are not accepted.
        lost: tensors that are not where the index says, for which there is a problem already.
        apart: other files, which hold what these lack, as far as somebody looked; see :mod:`strays`.

    Args:
        place: holds ``config.json`` and safetensors, sharded or not.
        dtypes: safetensors names of the dtypes to accept beside :data:`BUFFER_DTYPES`; others are taken for already
            quantized.
    """

    def __init__(self, place: Place, dtypes: Sequence[str] = FLOAT_DTYPES):
        self.place = place
        self.config: dict = {}
        self.files: list[str] = []
        self.headers: dict[str, Header] = {}
        self.problems: list[Problem] = []
        self.stored: dict[str, Header] = {}
        self.encodings: Mapping[str, Encoding] = {}
        self.views: Mapping[str, View] = {}
        self.quantized: str | None = None
        self.names, self.lost, self.notes = Names(), set(), []
        self.apart: set[str] = set()
        self.code: Path | None = None
        self.renamed: str | None = None
        self.unlike: str | None = None
        if isinstance(place, Folder) and not place.has(CONFIG):  # any folder, perhaps with millions of files in it
            self._fault(f"{place}/{CONFIG}", "not found", beside.elsewhere(place))
            return
        try:
            self.config = read_json(place.local(CONFIG))
        except BismoothError as error:
            self.problems += error.problems
        found = shards.find(place)
        self.files, self.lost, self.notes = found.files, found.lost, [*found.notes, *beside.notes(place)]
        self.unlike = found.unlike
        self.problems += found.problems
        promised: dict[str, set[str]] = {file: set() for file in self.files}
        for name, file in found.weight_map.items():
            promised[file].add(name)
        with ThreadPoolExecutor(8) as pool:  # far away each header takes a while
            for file, answer in zip(self.files, pool.map(self._read_header, self.files), strict=True):
                self._add(file, answer, promised[file], found.weight_map)
        self._unwrap()
        self.stored = self.headers
        weights = Weights.of(self.config, self.stored, self.lost)
        self.encodings, self.quantized = weights.encodings, weights.words()
        self._decode(weights)
        self.names = Names.among(self.headers)
        self._check_dtypes(dtypes)

    def _unwrap(self) -> None:
        try:
            plain, note = unwrapped([*self.headers, *self.lost], trunk_of(self.config))
        except BismoothError as error:
            self.problems += error.problems
            return
        self.headers = {plain[name]: header for name, header in self.headers.items()}
        self.lost = {plain[name] for name in self.lost}
        self.renamed = note
        self.notes += [note] if note else []

    def _decode(self, weights: Weights) -> None:
        """Put each weight that is stored in FP8, FP4 or packed INT8 in the place of what it is stored in."""
        if not weights:
            return
        exact = "float32" in (self.config.get("dtype"), self.config.get("torch_dtype"))
        dtype, size = ("F32", 4) if exact else ("BF16", 2)
        self.headers = weights.shown(self.stored, dtype, size)
        self.problems += weights.problems
        self.lost |= weights.lost
        if weights.are_float:
            self.config = {key: value for key, value in self.config.items() if key not in KEYS}

    def show(self, views: Mapping[str, View]) -> list[Problem]:
        """Put matrices in the place of the tensors that they are parts of, where these are there.

        Args:
            views: full name of a matrix -> where it may be, with the tensor's full name.

        Returns:
            Tensors of which the matrices cannot be parts.
        """
        shown = Shown.of(self.headers, views, self.lost)
        self.headers, self.views = shown.headers, shown.views
        self.lost |= shown.lost
        return shown.problems

    @property
    def turned(self) -> set[str]:
        """The matrices that the files have transposed, under their own names."""
        return {name for name, view in self.views.items() if view.tensor == name}

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
            self.problems += answer.problems
            self.lost |= promised
            return
        path, (begin, entries) = f"{self.place}/{file}", answer
        absent = sorted(promised - entries.keys())
        if tables := [name for name in absent if name.endswith(_TABLE)]:
            more = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
            self.notes.append(
                f"{INDEX} names {tables[0]}{more}, which no file holds; every reader computes such tables"
            )
        for name in (name for name in absent if name not in tables):
            self._fault(path, f"tensor {name} is missing, {INDEX} says that it is here", "download both again")
            self.lost.add(name)
        for name, entry in entries.items():
            place = weight_map.get(name) if weight_map else file
            if math.prod(max(1, size) for size in entry["shape"]) >= 2**63:  # even if it is empty, torch cannot hold it
                what = f"has shape {entry['shape']} in {file}, and no tensor is that large"
                self._fault(name, what, "download the shard again")
                self.lost.add(name)
            elif not weight_map and name in self.headers:
                where = self.headers.pop(name).file
                remedy = f"leave only the file of them that is right in {self.place}"
                self._fault(path, f"holds tensor {name}, which {where} holds too", remedy)
                self.lost.add(name)
            elif place == file:
                first, last = entry["data_offsets"]
                self.headers[name] = Header(file, tuple(entry["shape"]), entry["dtype"], begin + first, last - first)
            elif name not in self.lost:
                says = f"places in {place}" if place else "does not name"
                remedy = "one of them is a duplicate or stale, download both again"
                self._fault(path, f"holds tensor {name}, which {INDEX} {says}", remedy)
                self.lost.add(name)

    def _check_dtypes(self, accepted: Sequence[str]) -> None:
        others: dict[str, list[str]] = {}
        for name, header in self.headers.items():
            if header.dtype not in accepted and not is_buffer(name, header.dtype):
                others.setdefault(header.dtype, []).append(name)
        for dtype, names in others.items():
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            what = f"has dtype {dtype} in {self.headers[names[0]].file}{more}: already quantized or not a weight"
            remedy = f"give a checkpoint in {', '.join(accepted)}"
            if dtype == FP8 and not any(map(self.config.get, KEYS)):
                remedy += f", or mend {CONFIG}, which has no {KEYS[0]} that says how they are to be read"
            self._fault(names[0], what, remedy)

    def _fault(self, where: object, what: str, remedy: str) -> None:
        self.problems.append(Problem(str(where), what, remedy))

    def nbytes(self) -> int:
        """Bytes of all tensors, as the files have them."""
        return sum(header.nbytes for header in self.stored.values())

    def stored_nbytes(self, name: str) -> int:
        """Bytes that the files have for a tensor."""
        if (view := self.views.get(name)) is not None:
            second = view.tensor != name and view.tensor in self.headers  # the name of a head that is the embedding
            return 0 if second else self.headers[name].nbytes
        encoding = self.encodings.get(name)
        parts = (name,) if encoding is None else encoding.parts
        return sum(self.stored[part].nbytes for part in parts)

    def companion_nbytes(self) -> int:
        """Bytes of the files that are copied with them."""
        files = self.place.files()
        return sum(files[file] for file in companions(self.place))

    def left_out(self) -> dict[str, int]:
        """The files that are not copied, with their bytes."""
        return left_out(self.place, [*self.files, *self.apart])


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
            raise BadSource(*self.problems)

    def read(self, name: str, digest=None, into=None):
        """One tensor, in the dtype that :attr:`headers` has for it.

        Args:
            name: of the tensor.
            digest: a hashlib object to feed with its bytes, of float values if it is stored in FP8 or FP4.
            into: a uint8 tensor of the same number of bytes, to read into instead of new memory.

        Raises:
            BismoothError: it holds a NaN or an infinity, or its shard can no longer be read.
        """
        return self._read(name, 0, self.headers[name].shape, digest, into)

    def rows(self, name: str, start: int, count: int, digest=None):
        """Rows ``start`` to ``start + count`` of a matrix, as :meth:`read` gives the whole."""
        inner = self.headers[name].shape[1:]
        return self._read(name, start * math.prod(inner), (count, *inner), digest)

    def pieces(self, name: str, digest=None) -> Iterator:
        """The same values as :meth:`read`, one-dimensional and 2^23 at a time, for tensors that only pass through."""
        size, step = math.prod(self.headers[name].shape), _PIECE // 4
        for first in range(0, size, step):
            yield self._read(name, first, (min(step, size - first),), digest)

    def stored_pieces(self, name: str, digest=None) -> Iterator:
        """As :meth:`pieces`, of a tensor in the files as it is there."""
        header = self.stored[name]
        size, step = math.prod(header.shape), _PIECE // 4
        for first in range(0, size, step):
            yield self._fetch(name, first, (min(step, size - first),), digest=digest)

    def stored_rows(self, name: str, start: int, count: int):
        """As :meth:`rows`, of a tensor in the files as it is there."""
        inner = self.stored[name].shape[1:]
        return self._fetch(name, start * math.prod(inner), (count, *inner))

    def _read(self, name: str, first: int, shape: Sequence[int], digest=None, into=None):
        """Elements from ``first`` on, of a given shape."""
        import torch

        header, view = self.headers[name], self.views.get(name)
        dtype = torch_dtype(header.dtype)
        tensor = torch.empty(shape, dtype=dtype) if into is None else into.view(dtype).view(shape)
        if view is not None and view.transposed:
            fill(tensor.view(-1), view, first, partial(self._rows_of, view.tensor, dtype))
        elif view is not None:
            self._fill(tensor, view.tensor, view.offset + first)
        else:
            self._fill(tensor, name, first)
        if digest is not None:
            digest.update(bytes_of(tensor))
        if not is_buffer(name, header.dtype):
            refuse_infinite(tensor, name, header.file, header.shape, first)
        return tensor

    def _fill(self, tensor, name: str, first: int) -> None:
        """Fill a tensor with elements of one in the files, decoded if it is in FP8, FP4 or packed."""
        if name in self.encodings:
            decode_into(tensor.view(-1), self.encodings[name], self._fetch, first)
        else:
            self._read_into(tensor, name, first)

    def _rows_of(self, name: str, dtype, first: int, shape: tuple[int, int], stride: int):
        """Elements of a tensor that has matrices transposed, see :data:`views.Fetch`."""
        import torch

        if name not in self.encodings:
            tensor = torch.empty(shape, dtype=dtype)
            self._read_into(tensor, name, first, stride)
            return tensor
        values = torch.empty((shape[0] - 1) * stride + shape[1], dtype=dtype)
        self._fill(values, name, first)
        return values.as_strided(shape, (stride, 1))

    def _fetch(self, name: str, first: int, shape: Sequence[int], digest=None):
        """Elements of a stored tensor, from ``first`` on, in their stored dtype."""
        import torch

        header = self.stored[name]
        tensor = torch.empty(shape, dtype=torch_dtype(header.dtype))
        self._read_into(tensor, name, first)
        if digest is not None:
            digest.update(bytes_of(tensor))
        if header.dtype in FLOAT_DTYPES:
            refuse_infinite(tensor, name, header.file, header.shape, first)
        return tensor

    def _read_into(self, tensor, name: str, first: int, stride: int | None = None) -> None:
        """Fill a tensor with stored elements from ``first`` on; rows may begin ``stride`` elements apart."""
        header, size = self.stored[name], tensor.itemsize
        path, offset = self.folder / header.file, header.offset + first * size
        read_into(tensor, path, offset, name, None if stride is None else stride * size)

    def signature(self) -> dict[str, list[int]]:
        """Size in bytes and modification time in ns of every file that a conversion reads."""
        files = {Path(CONFIG), *map(Path, companions(self.place))}
        files |= {Path(header.file) for header in self.stored.values()}
        if (self.folder / INDEX).exists():
            files.add(Path(INDEX))
        try:
            stats = {relative.as_posix(): (self.folder / relative).stat() for relative in sorted(files)}
        except OSError as error:
            what = f"gone ({error.strerror}): the source changed meanwhile"
            raise BismoothError.of(error.filename, what, "leave it at rest and run the same command again") from None
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
        for file in (CONFIG, *companions(self.place)):
            whole.update(f"{file} {sha256(self.folder / file)}\n".encode(errors="surrogateescape"))
        return whole.hexdigest()
