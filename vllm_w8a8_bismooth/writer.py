"""Write a checkpoint so that it is either whole or absent."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from vllm_w8a8_bismooth.checkpoint import INDEX
from vllm_w8a8_bismooth.errors import BismoothError

SHARD_SIZE = "5GB"
_LOCK = ".bismooth.lock"


@contextmanager
def _disk_errors(destination: Path) -> Iterator[None]:
    """Turns an OSError, or the SafetensorError that wraps one, into a message for the user."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BismoothError(
            f"{destination}: cannot be written ({error}); nothing was left there. Check space and permissions"
        ) from None


def partial_folder(destination: Path) -> Path:
    """Where a checkpoint grows until it is whole: ``<destination>.partial``."""
    return destination.with_name(destination.name + ".partial")


class CheckpointWriter:
    """Collects tensors into shards under ``<destination>.partial`` and renames that folder on :meth:`commit`.

    Use as a context manager: left without a commit, by an error or an interrupt, it removes what it wrote. A lock file
    in the folder tells a live run from the remains of a killed one, and both from a folder that is not ours.

    Args:
        destination: a folder that does not exist yet, or an empty one.
        tensors: every tensor that will come, as meta tensors, in about the order in which they will come.

    Raises:
        BismoothError: the destination cannot be created, another run is writing it, ``<destination>.partial`` is not
            ours, or the disk fills up.
    """

    def __init__(self, destination: Path, tensors: Mapping[str, torch.Tensor]):
        from huggingface_hub import split_torch_state_dict_into_shards

        self.destination = destination
        self.partial = partial_folder(destination)
        self._plan = split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
        )
        self._tensors = tensors
        self._file_of = self._plan.tensor_to_filename
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._missing = set(tensors)
        self._committed = False

    def __enter__(self) -> "CheckpointWriter":
        with _disk_errors(self.destination):
            self.partial.mkdir(parents=True, exist_ok=True)
            if any(self.partial.iterdir()) and not (self.partial / _LOCK).is_file():
                raise BismoothError(f"{self.partial}: exists and is not ours; remove it or choose another destination")
            self._lock = open(self.partial / _LOCK, "w")  # noqa: SIM115 (held until the end of the run)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BismoothError(f"{self.destination}: another conversion is writing it; stop one of them") from None
            for path in self.partial.iterdir():  # the remains of a killed run
                if path.name != _LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self

    def __exit__(self, *exception) -> None:
        if not self._committed:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.close()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; its shard is written as soon as it is complete."""
        from safetensors.torch import save_file

        expected = self._tensors[name]
        assert tensor.shape == expected.shape and tensor.dtype == expected.dtype, name
        self._missing.remove(name)
        file = self._file_of[name]
        waiting = self._waiting.setdefault(file, {})
        waiting[name] = tensor.contiguous()
        if len(waiting) == len(self._plan.filename_to_tensors[file]):
            with _disk_errors(self.destination):
                save_file(waiting, self.partial / file, metadata={"format": "pt"})
                # safetensors leaves 0600, which a server under another user could not read: follow the umask
                (self.partial / file).chmod(self.partial.stat().st_mode & 0o666)
            del self._waiting[file]

    def add_json(self, name: str, value: Mapping) -> None:
        """Write a small JSON file, keys in the order given."""
        with _disk_errors(self.destination):
            (self.partial / name).write_text(json.dumps(value, indent=2) + "\n")

    def copy(self, source: Path, relative: Path) -> None:
        """Copy a side file byte for byte."""
        with _disk_errors(self.destination):
            target = self.partial / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def commit(self) -> int:
        """Write the index, flush everything to disk and give the folder its name; returns the bytes of all tensors."""
        assert not self._missing, sorted(self._missing)[:3]
        size = self._plan.metadata["total_size"]
        if self._plan.is_sharded:
            self.add_json(INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(self._file_of.items()))})
        with _disk_errors(self.destination):
            for path in self.partial.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            os.replace(self.partial, self.destination)
            self._committed = True
            (self.destination / _LOCK).unlink()  # after the rename: a partial folder without it would not be ours
        return size
