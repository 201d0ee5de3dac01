"""Checkpoints whose INT8 rows are packed in four and eight bits, made of plain ones, and what these lose thereby."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.damage import INDEX, edit_json
from vllm_w8a8_bismooth import fourbits
from vllm_w8a8_bismooth.checkpoint.files import sha256

GROUP = 32
"""Columns that share a step, which divide the widths of the small models."""
MEAN = 4.5
_EVERY = 5  # of these rows one has eight bits


def rounded(codes: torch.Tensor, rows: torch.Tensor, group_size: int = GROUP) -> torch.Tensor:
    """int8 ``[N, K]`` codes that four bits hold, near the given ones; ``rows`` stay as they are."""
    groups = codes.view(len(codes), -1, group_size).int()
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = ((high - low + 14) // 15).clamp(min=1)
    q = ((groups - low) / step).round().int()
    near = (torch.minimum(q, (127 - low) // step) * step + low).view(codes.shape).to(torch.int8)
    near[rows] = codes[rows]
    return near


def wide_rows(name: str, count: int) -> torch.Tensor:
    """The rows of a linear that get eight bits; of ``k_proj``, none."""
    return torch.arange(0 if "k_proj" not in name else count, count, _EVERY)


def is_packed(name: str, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor is the weight of a per-channel linear of a block."""
    scale = tensors.get(f"{name}_scale")
    inside = ".layers." in name and ".experts." not in name
    return inside and tensors[name].dtype == torch.int8 and scale is not None and scale.shape[1] == 1


def parts(name: str, rows: fourbits.Rows) -> dict[str, torch.Tensor]:
    """As a checkpoint has them."""
    found = {"packed": rows.packed, "multiplier": rows.multiplier, "offset": rows.offset}
    found |= {"rows": rows.rows, "low": rows.low} if len(rows.rows) else {}
    return {f"{name}_{part}": tensor.contiguous() for part, tensor in found.items()}


def store(folder: Path, packed: Path, plain: Path, group_size: int = GROUP) -> None:
    """Round the codes of a converted checkpoint so that four bits hold them, and store them both ways.

    Args:
        folder: a conversion, in one shard or in many.
        packed: gets them in rows of four and eight bits.
        plain: gets the same codes as plain INT8.
    """
    for place in (packed, plain):
        shutil.copytree(folder, place)
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        near, small = dict(tensors), {}
        for name, tensor in tensors.items():
            if is_packed(name, tensors):
                rows = wide_rows(name, len(tensor))
                near[name] = rounded(tensor, rows, group_size)
                small |= parts(name, fourbits.pack(near[name], rows, group_size))
            else:
                small[name] = tensor
        save_file(near, plain / shard.name, {"format": "pt"})
        save_file(small, packed / shard.name, {"format": "pt"})
    rows_of = {"bits": MEAN, "group_size": group_size}

    def name_it(config: dict) -> None:
        quantization = config["quantization_config"]
        quantization |= {"quant_method": "w8a8_bismooth", "format": "int4-int8-rows"}
        quantization["bismooth"]["rows"] = rows_of

    edit_json(packed / "config.json", name_it)
    for place in (packed, plain):
        shards = sorted(place.glob("*.safetensors"))
        edit_json(place / "report.json", lambda report, s=shards: report.update(sha256={p.name: sha256(p) for p in s}))
        if (place / INDEX).exists():
            stored = {p.name: load_file(p) for p in shards}
            size = sum(tensor.nbytes for tensors in stored.values() for tensor in tensors.values())
            weight_map = {name: file for file, tensors in stored.items() for name in tensors}
            (place / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))


def change(action: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """What changes the tensors of a checkpoint of one shard."""

    def damage(folder: Path) -> None:
        (shard,) = folder.glob("*.safetensors")
        tensors = load_file(shard)
        action(tensors)
        save_file(tensors, shard)

    return damage
