"""The codes that a weight may be rounded to: INT8 with one scale a row or a group, and 4-bit rows among them.

A 4-bit row has the codes ``q * m + o`` in each group of columns, ``q`` in 0..15, see :mod:`fourbits`. Its scale, steps
and offsets are searched for, so that what rounding to nearest leaves, weighted by how much each column counts, is
least; ranges may be clipped, because a narrower range has finer steps for all that is inside it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_w8a8_bismooth import fourbits

REACH = 1
"""Compensation leaves codes at most so many steps from the nearest. On SmolLM2 that costs INT8 nothing that can be
measured, and what a weight was can still be seen from its code."""
LARGEST = fourbits.LARGEST
WIDEST = 16
"""Largest step of a 4-bit group: with 15 of them a group spans nearly all of INT8's range."""
_SHARES = (1.0, 0.9, 0.8)
"""Of a row's largest magnitude, how much its scale is made for."""
_FINER = 6
"""How many steps are tried in each group: the one that spans all of its range, and finer ones."""


class Grid(Protocol):
    """Codes for some rows ``[n, K]``.

    Attributes:
        groups: of columns, which have codes of their own.
    """

    @property
    def groups(self) -> int: ...

    def step(self, group: int) -> torch.Tensor:
        """fp32 ``[n]``: what code 1 stands for."""

    def nearest(self, column: torch.Tensor, group: int, out: torch.Tensor) -> None:
        """The codes nearest to fp32 ``[n]``."""

    def near(self, column: torch.Tensor, group: int, codes: torch.Tensor) -> None:
        """Move codes, fp32 ``[n]`` by :meth:`nearest` of a weight, towards what compensation has made of it."""


class Even:
    """INT8 codes with fp32 scales ``[n, G]``."""

    def __init__(self, scale: torch.Tensor):
        self._steps = scale.T.contiguous()

    @property
    def groups(self) -> int:
        return len(self._steps)

    def step(self, group: int) -> torch.Tensor:
        return self._steps[group]

    def nearest(self, column: torch.Tensor, group: int, out: torch.Tensor) -> None:
        torch.div(column, self._steps[group], out=out).round_()

    def near(self, column: torch.Tensor, group: int, codes: torch.Tensor) -> None:
        nearest = codes.clone()
        torch.div(column, self._steps[group], out=codes).round_().sub_(nearest).clamp_(-REACH, REACH).add_(nearest)
        codes.clamp_(-LARGEST, LARGEST)


@dataclass(frozen=True)
class Stepped:
    """Codes of 4-bit rows, and of 8-bit ones among them.

    Attributes:
        scale: fp32 ``[n]``.
        multiplier, offset: fp32 ``[G, n]``; 1 and 0 for 8-bit rows.
        least, most: fp32 ``[n]``, the range of q: 0 and 15, for 8-bit rows -127 and 127.
        wide: bool ``[n]``, the 8-bit rows.
    """

    scale: torch.Tensor
    multiplier: torch.Tensor
    offset: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor
    wide: torch.Tensor

    @classmethod
    def search(
        cls, weight: torch.Tensor, scale: torch.Tensor, wide: torch.Tensor, group_size: int, counts: torch.Tensor
    ) -> "Stepped":
        """For some rows.

        Args:
            weight: fp32 ``[n, K]``.
            scale: fp32 ``[n]``, of 8-bit rows.
            wide: bool ``[n]``, which rows have eight bits.
            group_size: of 4-bit rows.
            counts: fp32 ``[K]``, by how much the square of an error in each column counts.
        """
        groups = weight.shape[1] // group_size
        multiplier, offset = torch.ones(groups, len(weight)), torch.zeros(groups, len(weight))
        multiplier, offset = multiplier.to(weight.device), offset.to(weight.device)
        narrow, scale = (~wide).nonzero().view(-1), scale.clone()
        if len(narrow):
            found = _searched(weight[narrow].view(len(narrow), groups, group_size), counts.view(groups, group_size))
            scale[narrow], multiplier[:, narrow], offset[:, narrow] = found
        least = torch.where(wide, -float(LARGEST), 0.0)
        most = torch.where(wide, float(LARGEST), fourbits.LEVELS - 1.0)
        return cls(scale, multiplier, offset, least, most, wide)

    @property
    def groups(self) -> int:
        return len(self.multiplier)

    def step(self, group: int) -> torch.Tensor:
        return self.scale

    def nearest(self, column: torch.Tensor, group: int, out: torch.Tensor) -> None:
        multiplier, offset = self.multiplier[group], self.offset[group]
        torch.div(column, self.scale, out=out).sub_(offset).div_(multiplier).round_().clamp_(self.least, self.most)
        out.mul_(multiplier).add_(offset)

    def near(self, column: torch.Tensor, group: int, codes: torch.Tensor) -> None:
        nearest = codes.clone()
        self.nearest(column, group, codes)
        codes.copy_(torch.where(self.wide, codes.clamp(nearest - REACH, nearest + REACH), codes))

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """fp32 ``[n, K]``: the codes nearest to a weight ``[n, K]``."""
        multiplier, offset = (each.T.unsqueeze(-1) for each in (self.multiplier, self.offset))
        codes = (weight / self.scale.unsqueeze(1)).view(len(weight), self.groups, -1).sub_(offset).div_(multiplier)
        codes = torch.clamp(codes.round_(), self.least.view(-1, 1, 1), self.most.view(-1, 1, 1))
        return codes.mul_(multiplier).add_(offset).view_as(weight)


def _searched(weight: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale ``[n]``, and steps and offsets ``[G, n]``, for 4-bit rows ``[n, G, g]`` whose errors count ``[G, g]``."""
    low, high = weight.aminmax(dim=-1)
    largest, widest = torch.maximum(high, -low).amax(dim=1), (high - low).amax(dim=1)
    best: list[torch.Tensor] = []
    for share in _SHARES:
        scale = share * torch.maximum(largest / LARGEST, widest / ((fourbits.LEVELS - 1) * WIDEST))
        scale[scale == 0] = 1
        error, *found = _of_groups(weight / scale.view(-1, 1, 1), counts)
        entry = [error.sum(dim=1) * scale.square(), scale, *(each.T.contiguous() for each in found)]
        better = entry[0] < best[0] if best else None
        best = entry if better is None else [torch.where(better, *pair) for pair in zip(entry, best, strict=True)]
    return best[1], best[2], best[3]


def _of_groups(values: torch.Tensor, counts: torch.Tensor) -> list[torch.Tensor]:
    """What the best steps and offsets leave, these steps, and these offsets, ``[n, G]`` each, of ``[n, G, g]`` in units
    of the row's scale."""
    low, high = (end.clamp(-LARGEST, LARGEST) for end in values.aminmax(dim=-1))
    top, centre = fourbits.LEVELS - 1, (low + high) / 2
    whole = ((high - low) / top).ceil_()
    best: list[torch.Tensor] = []
    for finer in range(_FINER):
        step = (whole - finer).clamp_(1, WIDEST)
        offset = torch.minimum((centre - top / 2 * step).round_().clamp_(min=-LARGEST), LARGEST - top * step)
        q = ((values - offset.unsqueeze(-1)) / step.unsqueeze(-1)).round_().clamp_(0, top)
        error = q.mul_(step.unsqueeze(-1)).add_(offset.unsqueeze(-1)).sub_(values).square_()
        entry = [torch.einsum("nij,ij->ni", error, counts), step, offset]
        better = entry[0] < best[0] if best else None
        best = entry if better is None else [torch.where(better, *pair) for pair in zip(entry, best, strict=True)]
    return best
