"""Symmetric INT8 quantization of weights, per channel and per group."""

import torch


def quantize_weight(weight: torch.Tensor, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight by round-to-nearest-even on a symmetric grid.

    Args:
        weight: fp32 ``[N, K]``, finite.
        group_size: columns that share one scale; ``None`` means all of them (per-channel).

    Returns:
        int8 ``[N, K]`` in [-127, 127] and fp32 ``weight_scale`` ``[N, K / group_size]`` (``[N, 1]`` per-channel), with
        ``scale = amax / 127``; an all-zero row or group has scale 1 and codes 0.

    Raises:
        ValueError: K is not a multiple of ``group_size``.
    """
    rows, columns = weight.shape
    group_size = group_size or columns
    if columns % group_size:
        raise ValueError(f"K = {columns} is not a multiple of group_size = {group_size}")
    groups = weight.view(rows, columns // group_size, group_size)
    amax = groups.abs().amax(dim=-1)
    scale = amax / amax.new_tensor(127)  # a tensor, because on CUDA torch multiplies by the reciprocal of a scalar
    scale[scale == 0] = 1
    # The clamp matters only where amax / 127 is subnormal and too coarse to hold the ratio 127.
    codes = (groups / scale.unsqueeze(-1)).round_().clamp_(-127, 127)
    return codes.to(torch.int8).view(rows, columns), scale


def dequantize_weight(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The fp32 ``[N, K]`` weight that int8 ``codes`` ``[N, K]`` and fp32 ``scale`` ``[N, G]`` stand for."""
    rows, columns = codes.shape
    groups = codes.view(rows, scale.shape[1], columns // scale.shape[1]).float()
    return (groups * scale.unsqueeze(-1)).view(rows, columns)
