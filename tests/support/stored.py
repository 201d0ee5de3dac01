"""Tensors as a checkpoint's files have them, from those that its reader shows; and the other way."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint


def as_stored(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with matrices put back where the files have them: experts into their stacks, GPT-2's transposed."""
    found = {name: tensor for name, tensor in tensors.items() if name not in checkpoint.views}
    for name, view in checkpoint.views.items():
        matrix = tensors[name]
        whole = found.setdefault(view.tensor, torch.full(view.whole, torch.nan, dtype=matrix.dtype))
        slab = whole if view.expert is None else whole[view.expert]
        rows = slab.T if view.transposed else slab
        rows[view.start : view.start + len(matrix)] = matrix
    assert not any(tensor.is_floating_point() and tensor.isnan().any() for tensor in found.values())
    return found


def store_apart(folder: Path, destination: Path) -> Path:
    """The same model with every matrix under its own name, as it is shown."""
    checkpoint = Source(folder).checkpoint
    shutil.copytree(folder, destination, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.headers}
    save_file(tensors, destination / "model.safetensors", {"format": "pt"})
    return destination
