"""Write the shards of a checkpoint piece by piece."""

import json
import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from vllm_w8a8_bismooth.checkpoint.files import Checksum, disk_errors, sha256, write_json
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint

SHARD_SIZE = "5GB"
WHOLE, PARTIAL = "model", "part"
"""Beginnings of shards' names: of a checkpoint, and of a part of one, which no reader shall take for a checkpoint."""
NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""safetensors' names, in the order in which its own writer lays tensors out: wide dtypes first, so that all align."""


def shard_header(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, dict[str, int]]:
    """What stands before the data of a safetensors file, and each tensor's byte offset in the file.

    The same bytes as :func:`safetensors.torch.save_file` writes with ``metadata={"format": "pt"}``; that function
    needs all tensors in memory.

    Args:
        tensors: name -> tensor, of which shape and dtype count.
    """
    rank = list(NAMES)
    order = sorted(tensors, key=lambda name: (rank.index(tensors[name].dtype), name))
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in order:
        tensor = tensors[name]
        end = begin + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + entries[name]["data_offsets"][0] for name in order}


def split(tensors: Mapping[str, torch.Tensor], stem: str = WHOLE):
    """Which tensors go into which shard: a ``StateDictSplit`` of huggingface_hub. Only shapes and dtypes count."""
    from huggingface_hub import split_state_dict_into_shards_factory

    return split_state_dict_into_shards_factory(  # the one for torch imports all that distributes tensors, and sympy
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )


class ShardWriter:
    """Writes tensors, or rows of them, to their places in shards that are laid out beforehand, from any thread.

    Args:
        folder: to write into.
        destination: as which errors call it.
        tensors: every tensor that will come, as meta tensors, in about the order in which they will come.
        stem: what the names of the shards begin with.
        turned: the matrices that come transposed: their meta tensors are ``[K, N]``, what is added is ``[N, K]``.

    Attributes:
        files: shard -> the names in it.
        nbytes: of all tensors.
        written: bytes of tensors so far.

    Raises:
        Interrupted: from any call, when the disk refuses.
    """

    def __init__(
        self,
        folder: Path,
        destination: Path,
        tensors: Mapping[str, torch.Tensor],
        stem: str = WHOLE,
        turned: Collection[str] = (),
    ):
        self._turned = turned
        self._folder, self._destination = folder, destination
        self._plan, self._stem = split(tensors, stem), stem
        self._tensors = tensors
        self.files: dict[str, list[str]] = self._plan.filename_to_tensors
        self.nbytes: int = self._plan.metadata["total_size"]
        self.written = 0
        self._offsets: dict[str, int] = {}
        self._open: dict[str, int] = {}
        self._turn = threading.Lock()
        self._failed = False
        self._flushing: list[Future] = []
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._thread.shutdown()
        for descriptor in self._open.values():
            os.close(descriptor)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor."""
        expected = self._tensors[name]
        tensor = tensor.T if name in self._turned else tensor
        assert tensor.shape == expected.shape and tensor.dtype == expected.dtype, name
        self._write(name, 0, tensor)

    def add_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write some rows of a matrix, from number ``start`` on."""
        if name not in self._turned:
            self._write(name, start * rows.shape[1], rows)
            return
        count = self._tensors[name].shape[1]
        for number, column in enumerate(rows.T.contiguous()):
            self._write(name, number * count + start, column)

    def copy_tensor(self, name: str, checkpoint: Checkpoint) -> str:
        """Pass a tensor through as it is, without holding the whole; returns its checksum."""
        digest, first = Checksum(), 0
        for piece in checkpoint.pieces(name, digest):
            self._write(name, first, piece)
            first += piece.numel()
        return digest.hexdigest()

    def then(self, action: Callable[[], None]) -> None:
        """Call ``action`` once everything written so far is safe on disk; never behind one that failed.

        A thread waits for the disk; what goes wrong there surfaces in a later call.
        """
        open_now = tuple(self._open.values())

        def flush() -> None:
            if self._failed:
                return
            try:
                for descriptor in open_now:
                    os.fdatasync(descriptor)
                action()
            except BaseException:
                self._failed = True  # what comes behind it must not be noted as safe
                raise

        self._collect(only_done=True)
        self._flushing.append(self._thread.submit(flush))

    def finish(self) -> dict[str, str]:
        """Wait for the disk; returns the SHA-256 of every shard and writes the index."""
        self._collect()
        with disk_errors(self._destination), ThreadPoolExecutor(os.cpu_count()) as pool:
            for file in self.files:
                if not (self._folder / file).exists():  # all its tensors are empty
                    self._lay_out(file)
            if self._plan.is_sharded:
                weight_map = dict(sorted(self._plan.tensor_to_filename.items()))
                index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
                write_json(self._folder / f"{self._stem}.safetensors.index.json", index)
            return dict(zip(self.files, pool.map(sha256, (self._folder / file for file in self.files)), strict=True))

    def _collect(self, only_done: bool = False) -> None:
        """Raise what went wrong in the thread."""
        while self._flushing and (self._flushing[0].done() or not only_done):
            with disk_errors(self._destination):
                self._flushing.pop(0).result()

    def _write(self, name: str, first: int, values: torch.Tensor) -> None:
        view = values.contiguous().view(-1).view(torch.uint8).numpy().data
        self.add_bytes(name, first * values.element_size(), view)

    def add_bytes(self, name: str, first: int, view: memoryview) -> None:
        """Write some of a tensor's bytes, from number ``first`` on."""
        file = self._plan.tensor_to_filename[name]
        # One at a time: a file takes one writer, and the kernel lets the others spin.
        with disk_errors(self._destination), self._turn:
            if file not in self._open:
                self._lay_out(file)
            start, done = self._offsets[name] + first, 0
            while done < len(view):
                done += os.pwrite(self._open[file], view[done:], start + done)
            self.written += len(view)

    def _lay_out(self, file: str) -> None:
        """Open a shard, with its header and full length; what an earlier run wrote into it stays."""
        head, offsets = shard_header({name: self._tensors[name] for name in self.files[file]})
        descriptor = os.open(self._folder / file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, head, 0)
            # Not truncated to this length: filling a hole piece by piece takes several times as long.
            os.posix_fallocate(descriptor, 0, len(head) + sum(self._tensors[name].nbytes for name in self.files[file]))
        except BaseException:
            os.close(descriptor)  # another thread may come here next: it must not find a shard that was never laid out
            raise
        self._offsets |= offsets
        self._open[file] = descriptor
