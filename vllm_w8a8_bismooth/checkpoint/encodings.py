"""How weights are stored in FP8 and FP4, and the numbers that they stand for."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

GROUP = 32
"""Numbers of MXFP4 that share an exponent, in half as many bytes."""
_TOGETHER = 2**19  # elements that are decoded at once, or a unit
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Fetch = Callable[[str, int, tuple[int, ...]], "torch.Tensor"]
"""Reads elements of a stored tensor in its own dtype: its name, the first one, the shape to give them."""


class Encoding(Protocol):
    """How a float tensor is stored.

    Attributes:
        codes, scales: names of the stored tensors.
        shape: of the float tensor; none of it is 0.
        unit: how many of its elements, one behind the other, are decoded together. It consists of whole units.
    """

    @property
    def codes(self) -> str: ...

    @property
    def scales(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def unit(self) -> int: ...

    def words(self) -> str:
        """What people call it."""

    def decode(self, fetch: Fetch, first: int, count: int) -> "torch.Tensor":
        """fp32 ``[count, ...]``: units from number ``first`` on. Each code times its scale is rounded once, to fp32."""


@dataclass(frozen=True)
class Fp8:
    """A matrix ``[N, K]`` of E4M3 codes, with a scale for each block of ``block`` rows and columns.

    A row, or the whole matrix, is a block too. Those at the lower and the right edge may be cut.
    """

    codes: str
    scales: str
    shape: tuple[int, ...]
    block: tuple[int, int]

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


def decode_into(values: "torch.Tensor", encoding: Encoding, fetch: Fetch, first: int) -> None:
    """Fill a float ``[n]`` with the elements of a tensor from number ``first`` on, some units at a time.

    What is not fp32 is rounded once more.
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
