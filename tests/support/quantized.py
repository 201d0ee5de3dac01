"""Checkpoints whose weights are stored in FP8 or MXFP4, and the numbers that these stand for, by plain loops."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.contents import tensors_of
from tests.support.damage import INDEX, edit_json

BLOCK = (48, 40)
"""Which divides no width of the tiny models."""
_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
_TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}


def _compressed(strategy: str, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**_WEIGHTS, "strategy": strategy, **more}, "input_activations": _TOKEN}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "model.layers.1.mlp.down_proj"],
    }


@dataclass(frozen=True)
class Format:
    """A format of FP8.

    Attributes:
        config: the ``quantization_config``.
        block: of a shape ``(N, K)``: rows and columns that share a scale.
        shape: of the scales, from that of their grid.
        suffix: what follows a weight's name in that of its scales.
        scales: their dtype.
        beside: further tensors beside each weight.
    """

    config: dict[str, Any]
    block: Callable[[tuple[int, int]], tuple[int, int]]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda grid: grid
    suffix: str = "_scale"
    scales: torch.dtype = torch.float32
    beside: tuple[str, ...] = ()


def _whole(shape: tuple[int, int]) -> tuple[int, int]:
    return shape


def _row(shape: tuple[int, int]) -> tuple[int, int]:
    return 1, shape[1]


FORMATS = {
    "deepseek": Format(
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [*BLOCK], "activation_scheme": "dynamic"},
        lambda shape: BLOCK,
        suffix="_scale_inv",
    ),
    "vllm": Format(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        _whole,
        shape=lambda grid: (),
        beside=("input_scale",),
    ),
    "mistral": Format(
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False},
        _whole,
        shape=lambda grid: (),
        suffix="_scale_inv",
        scales=torch.bfloat16,
        beside=("activation_scale",),
    ),
    "fbgemm": Format({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, _row),
    "compressed-tensors, tensor": Format(
        _compressed("tensor"), _whole, shape=lambda grid: (1,), scales=torch.bfloat16, beside=("input_scale",)
    ),
    "compressed-tensors, channel": Format(_compressed("channel"), _row, scales=torch.bfloat16),
    "compressed-tensors, block": Format(_compressed("block", block_structure=[*BLOCK]), lambda shape: BLOCK),
}


def quantize(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """E4M3 codes of a float ``[N, K]``, their scales, and the fp32 numbers that both stand for."""
    rows, columns = weight.shape
    high, wide = format.block((rows, columns))
    codes, numbers = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    grid = [[(slice(i, i + high), slice(j, j + wide)) for j in range(0, columns, wide)] for i in range(0, rows, high)]
    scales = torch.tensor([[float(weight[place].abs().max()) / 448 for place in line] for line in grid])
    scales = scales.to(format.scales)
    for line, of_line in zip(grid, scales.float(), strict=True):
        for place, scale in zip(line, of_line, strict=True):
            codes[place] = (weight[place].float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            numbers[place] = codes[place].float() * scale
    return codes, scales.reshape(format.shape(tuple(scales.shape))), numbers


def store(source: Path, folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Store the linears of a checkpoint's blocks, but for one, in FP8, the scales in a file of their own.

    Args:
        source: a checkpoint in float.
        folder: of the new one.
        name: of a format in :data:`FORMATS`.
        dtype: of what the result is to be compared with, and of the config.

    Returns:
        A checkpoint in float with the same numbers, rounded to ``dtype``.
    """
    plain, format = folder.with_name(f"{folder.name}-in-float"), FORMATS[name]
    stored, apart, numbers = {}, {}, {}
    for tensor, values in tensors_of(source).items():
        stored[tensor] = numbers[tensor] = values
        if ".layers." in tensor and values.dim() == 2 and tensor != "model.layers.1.mlp.down_proj.weight":
            stored[tensor], apart[tensor + format.suffix], exact = quantize(values, format)
            numbers[tensor] = exact.to(dtype)
            apart |= {f"{tensor.removesuffix('weight')}{name}": torch.ones(()) for name in format.beside}
    for place, files in ((folder, {"a": stored, "b": apart}), (plain, {"a": numbers})):
        place.mkdir()
        for side in source.iterdir():
            if side.is_file() and side.suffix != ".safetensors" and side.name != INDEX:
                (place / side.name).write_bytes(side.read_bytes())
        edit_json(place / "config.json", lambda config: config.update(dtype=str(dtype).removeprefix("torch.")))
        weight_map = {}
        for file, tensors in files.items():
            save_file(tensors, place / f"model-{file}.safetensors", {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, f"model-{file}.safetensors")
        (place / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=format.config))
    return plain
