"""Checkpoints whose tensors have other names, or lie in other files."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.damage import INDEX, edit_json

SINGLE = "model.safetensors"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replace what the one file of a checkpoint holds."""
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})


def renamed(folder: Path, name_of: Callable[[str], str | None]) -> None:
    """Give every tensor of the one file another name; ``None`` drops it."""
    edit_tensors(folder, lambda tensors: {new: t for name, t in tensors.items() if (new := name_of(name))})


def architecture(folder: Path, name: str) -> None:
    edit_json(folder / "config.json", lambda config: config.update(architectures=[name]))


def bare(name: str) -> str | None:
    """What a tensor of a causal LM is called in its decoder alone."""
    return None if name.startswith("lm_head.") else name.removeprefix("model.")


def in_files(folder: Path, files: list[str], index: bool = False) -> None:
    """Spread the one file's tensors over others."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    shares = {file: sorted(tensors)[i :: len(files)] for i, file in enumerate(files)}
    for file, names in shares.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if index:
        weight_map = {name: file for file, names in shares.items() for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
