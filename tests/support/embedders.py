"""Models that end in no language head: embedding models with a projector, classifiers, reward models."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def put(folder: Path, file: str, content: bytes = b"{}") -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)


def projector(
    folder: Path, width: int = 64, name: str = "2_Dense", kind: str = "sentence_transformers.models.Dense"
) -> None:
    """A sentence-transformers model: mean pooling, and a linear from ``width`` to 32 numbers."""
    modules = [("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate([*modules, (name, kind)])
    ]
    put(folder, "modules.json", json.dumps(entries).encode())
    put(folder, "1_Pooling/config.json", b'{"pooling_mode_mean_tokens": true, "word_embedding_dimension": 64}')
    dense(folder, name, width)


def dense(folder: Path, name: str = "2_Dense", width: int = 64, **tensors: torch.Tensor) -> None:
    """The files of a linear from ``width`` to 32 numbers; ``tensors`` are held in the place of its matrix."""
    config = {"in_features": width, "out_features": 32, "bias": False}
    put(folder, f"{name}/config.json", json.dumps(config).encode())
    weight = torch.randn(32, width, generator=torch.Generator().manual_seed(0))
    save_file(tensors or {"linear.weight": weight}, folder / name / "model.safetensors")
