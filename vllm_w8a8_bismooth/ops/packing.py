"""Weights in the order in which the CPU kernels read them."""

import torch
from torch.nn.functional import pad

from vllm_w8a8_bismooth import grouping

LANES, DEPTH = 16, 4  # channels of a block; k of one dot product step
OFFSET = 128  # x86's byte dot products want one unsigned operand


def pack_weight(weight: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """The bytes of ``weight``, each offset by 128, as blocks of 16 channels by 4 k.

    Args:
        weight: int8 ``[N, K]``.
        group_size: columns that share a scale; ``None`` is per-channel.

    Returns:
        uint8 ``[N / 16, K / 4, 16, 4]``; N is padded to 16 and each group's share of K to 4, with the byte for zero.

    Raises:
        ValueError: K is not a multiple of ``group_size``.
    """
    rows, columns = weight.shape
    groups = grouping.groups(columns, group_size)
    width = columns // groups
    split = (weight.view(torch.uint8) ^ OFFSET).reshape(rows, groups, width)
    split = pad(split, (0, -width % DEPTH, 0, 0, 0, -rows % LANES), value=OFFSET)
    return split.reshape(-1, LANES, groups * -(-width // DEPTH), DEPTH).transpose(1, 2).contiguous()


def unpack_weight(packed: torch.Tensor, weight_scale: torch.Tensor, columns: int) -> torch.Tensor:
    """The int8 ``[N, K]`` that :func:`pack_weight` was given.

    Args:
        packed: what it returned.
        weight_scale: ``[N, 1]`` or ``[N, G]``.
        columns: K.
    """
    rows, groups = weight_scale.shape
    width = columns // groups
    split = packed.transpose(1, 2).reshape(packed.shape[0] * LANES, groups, -1)
    return (split[:rows, :, :width] ^ OFFSET).reshape(rows, columns).view(torch.int8)
