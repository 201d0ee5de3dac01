"""Weights in the order in which the CPU kernels read them."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from vllm_w8a8_bismooth import fourbits, grouping

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


@dataclass(frozen=True)
class PackedRows:
    """A weight ``[N, K]`` some of whose rows have four bits, in stored order: rows of eight bits, then of four.

    Those of eight bits fill whole blocks, or are all that there are: rows that four bits would hold complete the last.

    Attributes:
        eight: uint8 ``[N8 / 16, K / 4, 16, 4]``, see :func:`pack_weight`.
        four: uint8 ``[N4 / 16, K / 8, 16, 4]``: q of two steps of ``eight``, the first in the lower half of a byte.
        steps: uint8 ``[N4 / 16, K / group_size, 2, 16]``: m and ``o + 128`` of each row of a block.
        order: int32 ``[N]``: which row of the weight a stored one is.
    """

    eight: torch.Tensor
    four: torch.Tensor
    steps: torch.Tensor
    order: torch.Tensor


def pack_rows(rows: fourbits.Rows) -> PackedRows:
    """Rows of a checkpoint, in stored order.

    Raises:
        ValueError: see :meth:`fourbits.Rows.codes`.
    """
    rows.check()
    count, half = rows.packed.shape
    wide = rows.rows.long()
    is_four = torch.ones(count, dtype=torch.bool)
    is_four[wide] = False
    others = is_four.nonzero().view(-1)
    order = torch.cat([wide, others])
    wide, others = order.tensor_split([min(-(-len(wide) // LANES) * LANES, count)])
    q = fourbits.split(rows.packed[others]).view(len(others), half // DEPTH, 2, DEPTH)
    four = _blocks(q[:, :, 0] | q[:, :, 1] << 4, 0)
    m, o = rows.multiplier[others], rows.offset[others].view(torch.uint8) ^ OFFSET
    steps = torch.stack([_blocks(m.unsqueeze(-1), 1), _blocks(o.unsqueeze(-1), OFFSET)], dim=2).squeeze(-1)
    return PackedRows(pack_weight(rows.some(wide).codes(), None), four, steps, order.to(torch.int32))


def _blocks(x: torch.Tensor, value: int) -> torch.Tensor:
    """``[N / 16, S, 16, D]`` of ``[N, S, D]``, filled up with a value."""
    x = pad(x, (0, 0, 0, 0, 0, -len(x) % LANES), value=value)
    return x.unflatten(0, (len(x) // LANES, LANES)).transpose(1, 2).contiguous()


def unpack_rows(packed: PackedRows) -> torch.Tensor:
    """The codes that :func:`pack_rows` was given, int8 ``[N, K]`` in the weight's order."""
    (blocks, steps, *_), groups = packed.four.shape, packed.steps.shape[1]
    q = torch.stack([packed.four & 15, packed.four >> 4], dim=2)  # [blocks, steps, 2, lanes, depth]
    m, o = packed.steps.view(blocks, groups, 1, 2, LANES, 1).unbind(3)
    four = (q.view(blocks, groups, 2 * steps // groups, LANES, DEPTH) * m + o).view(blocks, 2 * steps, LANES, DEPTH)
    stored = torch.cat([packed.eight, four]).transpose(1, 2).reshape(-1, 2 * steps * DEPTH)[: len(packed.order)]
    return torch.empty_like(stored).index_copy_(0, packed.order.long(), stored ^ OFFSET).view(torch.int8)
