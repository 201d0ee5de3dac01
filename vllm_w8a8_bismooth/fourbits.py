"""INT8 rows in four bits a weight: how they are stored, and what they stand for.

A 4-bit row *is* an INT8 row. In each group of columns its codes are ``q * m + o`` with ``q`` in 0..15, so that an
integer step ``m``, an integer offset ``o`` and four bits a weight give them back (the two-level scales of QServe,
arXiv 2405.04532, kept exact). Rows of eight bits stand between them (MixLLM, arXiv 2412.14590): their upper half is
where 4-bit rows have ``q``, and their lower half apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from vllm_w8a8_bismooth import MARKER, grouping

LEVELS = 16
LARGEST = 127
"""Magnitude of a code."""
WIDE_MULTIPLIER, WIDE_OFFSET = LEVELS, -128
"""What 8-bit rows have for a step and an offset: with their lower half, ``16 q - 128 + low`` is any code."""
_TOGETHER = 2**22  # codes that are made at once


@dataclass(frozen=True)
class Rows:
    """A weight ``[N, K]`` of 4-bit rows and 8-bit ones.

    Attributes:
        packed: uint8 ``[N, K / 2]``: ``q`` of columns 2j (lower half of the byte) and 2j + 1; of 8-bit rows the upper
            half of ``code + 128``.
        multiplier: uint8 ``[N, K / group_size]``, 1 to 254: m.
        offset: int8 ``[N, K / group_size]``: o.
        rows: int32 ``[n]``, ascending: which rows have eight bits.
        low: uint8 ``[n, K / 2]``: the lower half of ``code + 128`` of these, two a byte like ``packed``.
    """

    packed: torch.Tensor
    multiplier: torch.Tensor
    offset: torch.Tensor
    rows: torch.Tensor
    low: torch.Tensor

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, torch.Tensor]) -> "Rows":
        """A weight of a checkpoint, by its full name, ``....weight``; what rows of eight bits have may be absent."""
        packed = tensors[f"{name}_packed"]
        rows = tensors.get(f"{name}_rows", torch.empty(0, dtype=torch.int32))
        low = tensors.get(f"{name}_low", packed[:0])
        return cls(packed, tensors[f"{name}_multiplier"], tensors[f"{name}_offset"], rows, low)

    def codes(self, first: int = 0) -> torch.Tensor:
        """int8 ``[N, K]``.

        Args:
            first: what errors call the first row, where these are some of a weight's.

        Raises:
            ValueError: the tensors do not fit together, or stand for codes beyond [-127, 127].
        """
        self._check()
        count, half = self.packed.shape
        codes = torch.empty(count, 2 * half, dtype=torch.int8, device=self.packed.device)
        step = max(1, _TOGETHER // (2 * half))
        edges = torch.arange(0, count + step, step, dtype=torch.int32, device=self.rows.device)
        passed = torch.searchsorted(self.rows, edges).tolist()
        for number, start in enumerate(range(0, count, step)):
            some = self._codes(slice(start, start + step), slice(*passed[number:][:2]))
            _refuse((some.abs() > LARGEST).any(dim=1), range(first + start, first + count))
            codes[start : start + step] = some
        return codes

    def check(self) -> None:
        """Raise the ValueError of :meth:`codes`, without making all of them: each group's ends show its range."""
        self._check()
        step = max(1, _TOGETHER // (2 * self.packed.shape[1]))
        for start in range(0, len(self.packed), step):
            some = slice(start, start + step)
            multiplier, offset = self.multiplier[some].short(), self.offset[some].short()
            groups = self.packed[some].view(*multiplier.shape, -1)
            low, high = groups & 15, groups >> 4
            least = torch.minimum(low.amin(dim=-1), high.amin(dim=-1)) * multiplier + offset
            most = torch.maximum(low.amax(dim=-1), high.amax(dim=-1)) * multiplier + offset
            beyond = ((least < -LARGEST) | (most > LARGEST)).any(dim=1)
            beyond[self.rows[(self.rows >= start) & (self.rows < start + step)].long() - start] = False
            _refuse(beyond, range(start, len(self.packed)))
        everything = slice(None)
        wide = self.some(self.rows)._codes(everything, everything)
        _refuse((wide.abs() > LARGEST).any(dim=1), self.rows)

    def some(self, numbers: torch.Tensor) -> "Rows":
        """Some rows, in this order; those of eight bits come first, and are all that there are."""
        count, index = len(self.rows), numbers.long()
        rows = torch.arange(count, dtype=self.rows.dtype, device=self.rows.device)
        return Rows(self.packed[index], self.multiplier[index], self.offset[index], rows, self.low)

    def _codes(self, some: slice, among: slice) -> torch.Tensor:
        """int16 ``[n, K]``: what some rows stand for, whose 8-bit ones are ``among`` these."""
        packed, steps = self.packed[some], self.multiplier[some].short().unsqueeze(-1)
        q = split(packed).unflatten(1, (steps.shape[1], -1)).short()
        wide = (q * steps + self.offset[some].short().unsqueeze(-1)).flatten(1)
        wide[self.rows[among].long() - (some.start or 0)] += split(self.low[among])
        return wide

    def _check(self) -> None:
        shapes = {field.name: list(getattr(self, field.name).shape) for field in fields(self)}
        dtypes = {field.name: getattr(self, field.name).dtype for field in fields(self)}
        (count, half), (n, *_) = shapes["packed"], shapes["rows"]
        groups = shapes["multiplier"][-1]
        expected = {
            "packed": [count, half],
            "multiplier": [count, groups],
            "offset": [count, groups],
            "rows": [n],
            "low": [n, half],
        }
        if shapes != expected or not groups or 2 * half % groups or dtypes != DTYPES:
            told = ", ".join(f"{name} {dtypes[name]} {shape}" for name, shape in shapes.items())
            raise ValueError(f"{told} are not the parts of one weight")
        ascending = n == 0 or (
            bool((self.rows.diff() > 0).all()) and int(self.rows[0]) >= 0 and int(self.rows[-1]) < count
        )
        if not ascending:
            raise ValueError(f"the 8-bit rows are not ascending numbers below {count}")
        if not bool((self.multiplier > 0).all()):
            raise ValueError("a multiplier is 0")


def _refuse(beyond: torch.Tensor, numbers: Sequence[int] | torch.Tensor) -> None:
    """Raise a ValueError for the first of some rows, bool ``[n]``, that have these numbers."""
    if beyond.any():
        raise ValueError(f"row {int(numbers[int(beyond.nonzero()[0])])} has codes beyond -{LARGEST} to {LARGEST}")


DTYPES = {
    "packed": torch.uint8,
    "multiplier": torch.uint8,
    "offset": torch.int8,
    "rows": torch.int32,
    "low": torch.uint8,
}
"""Of the parts of :class:`Rows`."""


def steps_of(codes: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest ``m`` and the ``o`` with which each group of codes is ``q * m + o``, whatever the ``q``.

    ``o`` is the smallest code of the group, and ``m`` the greatest common divisor of all distances to it, 1 where all
    codes are the same: one representation of many, always the same.

    Args:
        codes: int8 ``[N, K]`` in [-127, 127].
        group_size: divides K.

    Returns:
        int16 ``[N, K / group_size]`` each.
    """
    groups = codes.view(len(codes), grouping.groups(codes.shape[1], group_size), group_size).short()
    low = groups.amin(dim=-1)
    left = groups - low.unsqueeze(-1)
    while (width := left.shape[-1]) > 1:
        half = width // 2
        left = torch.cat([torch.gcd(left[..., :half], left[..., half : 2 * half]), left[..., 2 * half :]], dim=-1)
    return left.squeeze(-1).clamp_(min=1), low


def fits(codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """bool ``[N]``: which rows of int8 ``[N, K]`` four bits hold."""
    multiplier, offset = steps_of(codes, group_size)
    highest = codes.view(*multiplier.shape, group_size).amax(dim=-1)
    return (highest.short() - offset < LEVELS * multiplier).all(dim=1)


def pack(codes: torch.Tensor, rows: torch.Tensor, group_size: int) -> Rows:
    """Store some rows in four bits, and the others in eight.

    Args:
        codes: int8 ``[N, K]`` in [-127, 127].
        rows: int ``[n]``, ascending: which ones get eight bits.
        group_size: divides K, and is even.

    Raises:
        ValueError: K is not a multiple of ``group_size``, or four bits do not hold a row.
    """
    multiplier, offset = steps_of(codes, group_size)
    split_up = codes.view(*multiplier.shape, group_size).short() - offset.unsqueeze(-1)
    q = (split_up // multiplier.unsqueeze(-1)).view(codes.shape)
    wide = codes[rows.long()].short() + 128
    q[rows.long()], multiplier[rows.long()], offset[rows.long()] = wide >> 4, WIDE_MULTIPLIER, WIDE_OFFSET
    if not bool((q < LEVELS).all()):
        row = int((q >= LEVELS).any(dim=1).nonzero()[0])
        raise ValueError(f"four bits do not hold row {row}")
    return Rows(join(q), multiplier.to(torch.uint8), offset.to(torch.int8), rows.to(torch.int32), join(wide & 15))


def join(q: torch.Tensor) -> torch.Tensor:
    """uint8 ``[N, K / 2]`` of integers ``[N, K]`` in 0..15: the even columns are the lower halves."""
    return (q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8)


def split(packed: torch.Tensor) -> torch.Tensor:
    """uint8 ``[N, K]`` of what :func:`join` made."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def group_size_of(config: Mapping[str, Any]) -> int:
    """Columns that share a step and an offset in a checkpoint, as its ``quantization_config`` says.

    Raises:
        ValueError: it does not say so, or what no conversion writes.
    """
    marker = config.get(MARKER)
    rows = marker.get("rows") if isinstance(marker, dict) else None
    found = rows if isinstance(rows, dict) else {}
    size, mean = found.get("group_size"), found.get("bits")
    if type(size) is not int or size not in grouping.OF_FOUR_BITS:
        sizes = ", ".join(map(str, grouping.OF_FOUR_BITS))
        raise ValueError(f"{MARKER}.rows is {rows!r}; its group_size must be one of {sizes}")
    if isinstance(mean, bool) or not isinstance(mean, int | float) or not 4 <= mean <= 8:
        raise ValueError(f"{MARKER}.rows is {rows!r}; its bits must be a number from 4 to 8")
    return size
