"""What is tried: each kernel at small shapes, and what it must give."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vllm_w8a8_bismooth.ops import kernels, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """A compiled product.

    Attributes:
        index: its number in ``csrc/cuda/layout.h``, or -1 where kernels cannot be called one by one.
        granularity: one of :data:`kernels.GRANULARITIES`.
        tokens, weights: of the tile, or of the tiles that share loads.
        ring: columns of K that are in shared memory at once.
        splits: whether K can be in parts.
    """

    index: int
    granularity: str
    tokens: int
    weights: int
    ring: int
    splits: bool

    @property
    def name(self) -> str:
        """What faults are noted under."""
        return self.granularity if self.index < 0 else f"{self.granularity} tile {self.index}"


class Machine(Protocol):
    """What launches a case on a device. All tensors are on the CPU, before and after.

    Attributes:
        tiles: the products that there are.
        operations: the quantizations that there are.
        processors: tiles that are computed at once, at most.
    """

    tiles: Sequence[Tile]
    operations: Sequence[str]
    processors: int

    def product(
        self,
        tile: Tile,
        split: int,
        a: torch.Tensor,
        b: torch.Tensor,
        a_scale: torch.Tensor,
        b_scale: torch.Tensor,
        dtype: torch.dtype,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """``scaled_mm`` by one tile, with K in so many parts."""

    def quantize(self, operation: str, *arguments: Any) -> Sequence[torch.Tensor]:
        """Codes and scales, and what :func:`residual` says."""

    def together(self) -> Mapping[str, Callable[[], str]]:
        """What takes several launches: name -> a function that does it, and returns what was wrong, or ``""``."""

    def restrict(self, faults: Mapping[str, str]) -> None:
        """Do without what had these faults, by name, from now on."""


def names(machine: Machine) -> list[str]:
    """Of all cases, in their order: the kernels one by one, then several together."""
    return [*(tile.name for tile in machine.tiles), *machine.operations, *machine.together()]


def run(name: str, machine: Machine) -> str:
    """What is wrong with a kernel, or ``""``.

    Raises:
        Exception: whatever a launch raises. The device may be of no use to this process afterwards.
    """
    if tile := next((tile for tile in machine.tiles if tile.name == name), None):
        return _product(tile, machine)
    if name in machine.operations:
        return _quantization(name, machine)
    return machine.together()[name]()


def _shape(tile: Tile) -> tuple[int, int]:
    """K, two turns of the ring and a tail, and groups."""
    least = 2 * tile.ring + 48
    if tile.granularity == kernels.CHANNEL:
        return least, 1
    width = {kernels.GROUP_128: 128, kernels.GROUP_ANY: 96}[tile.granularity]
    groups = -(-least // width)
    return groups * width, groups


def _product(tile: Tile, machine: Machine) -> str:
    """Tokens and weight rows that fill no tile, one token alone, each type of output, K in parts; and more tiles than
    run at once, as the same tokens again and again: some kernels go from tile to tile, or take turns."""
    random = torch.Generator().manual_seed(0)
    (k, groups), n = _shape(tile), 2 * tile.weights + 16
    b = torch.randint(-128, 128, (n, k), generator=random, dtype=torch.int8)
    b_scale = (torch.rand(groups, n, generator=random) * 0.02 + 0.001).t()  # as W8A8Scheme stores them
    offset = torch.randn(n, generator=random)
    for turn, m in enumerate(sorted({1, tile.tokens - 1, tile.tokens + 1})):
        a = torch.randint(-128, 128, (m, k), generator=random, dtype=torch.int8)
        for a_groups in {1, groups}:
            a_scale = torch.rand(m, a_groups, generator=random) * 0.02 + 0.001
            dtype, bias = FLOATS[turn % 3], None if turn == 1 else offset.to(FLOATS[-turn])
            want, near = _expected(a, b, a_scale, b_scale, dtype, bias)
            for split in (1, 2, 3) if tile.splits else (1,):
                got = machine.product(tile, split, a, b, a_scale, b_scale, dtype, bias)
                if wrong := _wrong(got, want, near):
                    return f"{wrong} at M = {m}, N = {n}, K = {k}{f', K in {split} parts' if split > 1 else ''}"
    rounds = math.ceil(2.5 * machine.processors / math.ceil(n / tile.weights))
    got = machine.product(tile, 1, a.repeat(rounds, 1), b, a_scale.repeat(rounds, 1), b_scale, dtype, bias)
    if wrong := next(filter(None, (_wrong(each, want, near) for each in got.split(m))), ""):
        return f"{wrong} among {rounds * m} tokens, N = {n}, K = {k}"
    return ""


def _wrong(got: torch.Tensor, want: torch.Tensor, near: torch.Tensor | float) -> str:
    count = int((~((got.double() - want.double()).abs() <= near)).sum())
    return f"{count} of {got.numel()} numbers are wrong" if count else ""


def _expected(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """What a product must be, and how near: bit for bit per-channel, else up to the order and fusion of fp32 sums."""
    (m, k), (n, groups) = a.shape, b_scale.shape
    if groups == 1:
        return reference.scaled_mm(a, b, a_scale, b_scale, dtype, bias), 0.0
    offset = torch.zeros(n, dtype=torch.float64) if bias is None else bias.double()
    exact, size = offset.expand(m, n).clone(), offset.abs().expand(m, n).clone()
    for g in range(groups):
        columns = slice(g * k // groups, (g + 1) * k // groups)
        scales = a_scale[:, min(g, a_scale.shape[1] - 1), None].double() * b_scale[:, g].double()
        term = (a[:, columns].double() @ b[:, columns].double().t()) * scales
        exact += term
        size += term.abs()
    return exact, size * ((groups + 2) * 2.0**-24) + exact.abs() * torch.finfo(dtype).eps


def _quantization(operation: str, machine: Machine) -> str:
    """Bit for bit, the updated residual too."""
    for arguments in _activations(operation):
        theirs = _copied(arguments)
        want = [*getattr(reference, operation)(*theirs), *residual(operation, theirs)]
        got = machine.quantize(operation, *_copied(arguments))
        if not all(torch.equal(mine, right) for mine, right in zip(got, want, strict=True)):
            x, group_size = arguments[0], arguments[-1]
            groups = f", groups of {group_size}" if group_size else ""
            return f"codes or scales are wrong for x {list(x.shape)} in {x.dtype}{groups}"
    return ""


def residual(operation: str, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """What an operation updates of its arguments."""
    return [arguments[1]] if operation == "rms_norm_quantize" and arguments[1] is not None else []


def _copied(arguments: Sequence[Any]) -> list[Any]:
    return [each.clone() if isinstance(each, torch.Tensor) else each for each in arguments]


def _activations(operation: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of a quantization: one token and several, all types, scales per token and group, zeros, outliers."""
    random = torch.Generator().manual_seed(0)
    for dtype, (rows, channels) in itertools.product(FLOATS, ((1, 4096), (3, 8192), (33, 512))):
        wide = 2 * channels if operation == "silu_mul_quantize" else channels
        x = torch.randn(rows, wide, generator=random) * 10 ** (4 * torch.rand(rows, 1, generator=random) - 2)
        x[:, ::61] *= 30
        x[::5, : channels // 2] = 0
        x, gain = x.to(dtype), torch.randn(channels, generator=random).to(dtype)
        norms = [(None, gain, 1e-5), (x.flip(0), gain, 1e-5)] if operation == "rms_norm_quantize" else [()]
        for norm, group_size in itertools.product(norms, (None, 128, 32)):
            yield x, *norm, group_size
