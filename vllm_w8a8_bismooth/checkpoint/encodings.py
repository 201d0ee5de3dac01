"""How weights are stored in FP8, FP4 and packed INT8, and the numbers that they stand for."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from vllm_w8a8_bismooth.errors import BismoothError

if TYPE_CHECKING:
    import torch

GROUP = 32
"""Numbers of MXFP4 that share an exponent, in half as many bytes."""
_TOGETHER = 2**19  # elements that are decoded at once, or a unit
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Fetch = Callable[[str, int, tuple[int, ...]], "torch.Tensor"]
"""Reads elements of a stored tensor in its own dtype: its name, the first one, the shape to give them."""


class Encoding(Protocol):
    """How a tensor is stored that appears as another.

    Attributes:
        is_float: whether it appears as floats, else as int8.
        codes: name of the stored tensor in whose place it appears.
        parts: names of all that it is stored in.
        shape: as it appears; none of it is 0.
        unit: how many of its elements, one behind the other, are decoded together. It consists of whole units.
    """

    is_float: ClassVar[bool]

    @property
    def codes(self) -> str: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def unit(self) -> int: ...

    def words(self) -> str | None:
        """What people call it; ``None`` for INT8, which is what it appears as."""

    def decode(self, fetch: Fetch, first: int, count: int) -> "torch.Tensor":
        """fp32 or int8 ``[count, ...]``: units from number ``first`` on. Each code times its scale is rounded once, to
        fp32."""


@dataclass(frozen=True)
class Fp8:
    """A matrix ``[N, K]`` of E4M3 codes, with a scale for each block of ``block`` rows and columns.

    A row, or the whole matrix, is a block too. Those at the lower and the right edge may be cut.
    """

    codes: str
    scales: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    is_float: ClassVar[bool] = True

    @property
    def parts(self) -> tuple[str, ...]:
        return self.codes, self.scales

    @property
    def unit(self) -> int:
        return self.shape[1]

    def words(self) -> str:
        rows, columns = self.block
        known = {(1, self.shape[1]): "row", self.shape: "matrix"}
        return f"FP8 with a scale for each {known.get(self.block, f'block of {rows} x {columns}')}"

    def decode(self, fetch: Fetch, first: int, count: int) -> "torch.Tensor":
        (high, wide), columns = self.block, self.shape[1]
        across = math.ceil(columns / wide)
        top, bottom = first // high, math.ceil((first + count) / high)
        scales = fetch(self.scales, top * across, (bottom - top, across)).float()
        if across > 1:
            scales = scales.repeat_interleave(wide, dim=1)[:, :columns]
        values = _looked_up(_e4m3(), fetch(self.codes, first * columns, (count, columns))).view(count, columns)
        if high == 1:
            return values.mul_(scales)
        for place in range(top, bottom):
            values[max(0, place * high - first) : (place + 1) * high - first] *= scales[place - top]
        return values


@dataclass(frozen=True)
class Mxfp4:
    """Experts ``[E, K, N]`` as gpt-oss stores them: transposed, in bytes ``[E, N, K / 32, 16]`` of two E2M1 codes, the
    lower half first, with an exponent of two, plus 127, for each 32 codes: ``[E, N, K / 32]``."""

    codes: str
    scales: str
    shape: tuple[int, ...]
    is_float: ClassVar[bool] = True

    @property
    def parts(self) -> tuple[str, ...]:
        return self.codes, self.scales

    @property
    def unit(self) -> int:
        return self.shape[1] * self.shape[2]

    def words(self) -> str:
        return "MXFP4"

    def decode(self, fetch: Fetch, first: int, count: int) -> "torch.Tensor":
        import torch

        _, columns, rows = self.shape
        groups = columns // GROUP
        start, stored = first * rows * groups, (count, rows, groups)
        powers = _looked_up(_e8m0(), fetch(self.scales, start, stored))
        values = _looked_up(_e2m1(), fetch(self.codes, start * GROUP // 2, (*stored, GROUP // 2))).view(torch.float32)
        values.view(-1, GROUP).mul_(powers.view(-1, 1))
        experts = torch.empty(count, columns, rows)
        for expert, transposed in zip(experts, values.view(count, rows, columns), strict=True):
            expert.copy_(transposed.T)
        return experts


PACKED, MULTIPLIER, OFFSET, WIDE, LOW = "_packed", "_multiplier", "_offset", "_rows", "_low"
"""What is behind a weight's name in those of the parts of :class:`PackedRows`."""
_WHOLE = "download the shard again"


@dataclass(frozen=True)
class PackedRows:
    """An INT8 matrix ``[N, K]`` of rows in four bits and in eight, see :mod:`fourbits`.

    Attributes:
        weight: its name, with which those of its parts begin.
        groups: of a row.
        wide: how many rows have eight bits.
    """

    weight: str
    shape: tuple[int, ...]
    groups: int
    wide: int
    is_float: ClassVar[bool] = False

    @property
    def codes(self) -> str:
        return self.weight + PACKED

    @property
    def parts(self) -> tuple[str, ...]:
        ends = (PACKED, MULTIPLIER, OFFSET, *((WIDE, LOW) if self.wide else ()))
        return tuple(self.weight + end for end in ends)

    @property
    def unit(self) -> int:
        return self.shape[1]

    def words(self) -> None:
        return None

    def decode(self, fetch: Fetch, first: int, count: int) -> "torch.Tensor":
        """int8 ``[count, K]``: rows from number ``first`` on.

        Raises:
            BismoothError: what is stored stands for no such rows.
        """
        from vllm_w8a8_bismooth import fourbits

        half, groups = self.shape[1] // 2, (count, self.groups)
        start = first * self.groups
        multiplier = fetch(self.weight + MULTIPLIER, start, groups)
        if not multiplier.all():
            row, group = (multiplier == 0).nonzero()[0].tolist()
            what = f"holds a multiplier of 0 at [{first + row}, {group}]"
            raise BismoothError.of(self.weight + MULTIPLIER, what, _WHOLE)
        offset, packed = fetch(self.weight + OFFSET, start, groups), fetch(self.codes, first * half, (count, half))
        rows, low = self._wide(fetch, first, count)
        try:
            return fourbits.Rows(packed, multiplier, offset, rows, low).codes(first)
        except ValueError as error:
            raise BismoothError.of(self.codes, str(error), _WHOLE) from None

    def _wide(self, fetch: Fetch, first: int, count: int) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Which of some rows have eight bits, counted from the first of them, and their lower halves."""
        import torch

        half = self.shape[1] // 2
        if not self.wide:
            return torch.empty(0, dtype=torch.int32), torch.empty(0, half, dtype=torch.uint8)
        rows, beyond = fetch(self.weight + WIDE, 0, (self.wide,)), self.shape[0]
        wrong = (rows < 0) | (rows >= beyond)
        wrong[1:] |= rows.diff() <= 0
        if wrong.any():
            at = int(wrong.nonzero()[0])
            what = f"holds {int(rows[at])} at [{at}], which are not ascending numbers below {beyond}"
            raise BismoothError.of(self.weight + WIDE, what, _WHOLE)
        start, end = (int(torch.searchsorted(rows, edge)) for edge in (first, first + count))
        return rows[start:end] - first, fetch(self.weight + LOW, start * half, (end - start, half))


def decode_into(values: "torch.Tensor", encoding: Encoding, fetch: Fetch, first: int) -> None:
    """Fill a ``[n]`` with the elements of a tensor from number ``first`` on, some units at a time.

    Floats that are not fp32 are rounded once more.
    """
    unit, end = encoding.unit, first + len(values)
    step, beyond = max(1, _TOGETHER // unit), math.ceil(end / unit)
    for start in range(first // unit, beyond, step):
        decoded = encoding.decode(fetch, start, min(step, beyond - start)).reshape(-1)
        begin = start * unit
        here = slice(max(first, begin), min(end, begin + len(decoded)))
        values[here.start - first : here.stop - first] = decoded[here.start - begin : here.stop - begin]


def _looked_up(table: "torch.Tensor", codes: "torch.Tensor") -> "torch.Tensor":
    """What a table has for each byte. (torch's own conversion of FP8 takes five times as long.)"""
    import torch

    return table.index_select(0, codes.view(torch.uint8).view(-1).int())


@functools.cache
def _e4m3() -> "torch.Tensor":
    """fp32 ``[256]``."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@functools.cache
def _e2m1() -> "torch.Tensor":
    """``[256]`` of 64 bits, which are two fp32: the numbers in both halves of a byte, the lower one first."""
    import torch

    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    return torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1).view(torch.int64).view(-1)


@functools.cache
def _e8m0() -> "torch.Tensor":
    """fp32 ``[256]``: powers of two, and NaN."""
    import torch

    powers = 2.0 ** (torch.arange(256, dtype=torch.float64) - 127)
    powers[255] = math.nan
    return powers.float()
