"""What a folder holds."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors; fails if two shards hold the same one."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        loaded = load_file(shard)
        assert not tensors.keys() & loaded.keys()
        tensors |= loaded
    return tensors
