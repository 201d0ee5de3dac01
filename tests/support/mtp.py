"""Models with a head that predicts the token behind the next (MTP), as their publishers store it.

The head takes the model for one of bigrams: it hands the next token's embedding to a copy of the model's last block.
Blocks here add little to embeddings, so that the head is often right, and not always. All experts take part, and no
token outshines others in attention: what hesitates there falls otherwise in bf16 when other tokens are beside its own.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.damage import edit_json
from tests.support.families import FAMILIES

COUNT = "num_nextn_predict_layers"
PLACES = {"deepseek_v3": "model.layers.2.", "qwen3_next": "mtp."}
"""Family -> where its head is."""
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_LOUD, _EVEN = 40.0, 0.1
"""Factors of embeddings, and of queries."""


def write(family: str, folder: Path) -> Path:
    """Save a model of the family, its head, and the tokenizer; returns the folder."""
    FAMILIES[family].write(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[_EMBEDDING] *= _LOUD
    for name in tensors:
        if name.endswith("q_b_proj.weight"):
            tensors[name] *= _EVEN
        elif name.endswith("q_norm.weight"):  # whose gain is one more
            tensors[name] = _EVEN * (1 + tensors[name]) - 1
    save_file(tensors | _head(family, tensors), file, metadata={"format": "pt"})
    edit_json(folder / "config.json", lambda config: config.update({COUNT: 1, "num_experts_per_tok": 4}))
    return folder


def _head(family: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    place, count = PLACES[family], 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("model.layers."))
    last, hidden = f"model.layers.{count - 1}.", len(tensors[_NORM])
    block = {name.removeprefix(last): tensor for name, tensor in tensors.items() if name.startswith(last)}
    scale = float(tensors[_EMBEDDING].square().mean().sqrt())
    map_of_both = torch.cat([scale * torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1)
    found: dict[str, torch.Tensor]
    if family == "deepseek_v3":
        gain = torch.ones(hidden)
        found = block | {
            "enorm.weight": gain,
            "hnorm.weight": gain,
            "eh_proj.weight": map_of_both,
            "embed_tokens.weight": tensors[_EMBEDDING],
            "shared_head.norm.weight": tensors[_NORM],
            "shared_head.head.weight": tensors[_HEAD],
        }
    else:
        found = {f"layers.0.{name}": tensor for name, tensor in block.items()} | {
            "pre_fc_norm_embedding.weight": torch.zeros(hidden),  # whose gain is one more
            "pre_fc_norm_hidden.weight": torch.zeros(hidden),
            "fc.weight": map_of_both,
            "norm.weight": tensors[_NORM],
        }
    return {place + name: tensor.clone() for name, tensor in found.items()}
