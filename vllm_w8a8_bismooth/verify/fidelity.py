"""Whether a converted checkpoint still computes what its source does, told from the two checkpoints alone.

Smoothing divides what feeds a linear and multiplies the linear's columns. What a norm gave up is on record: its old
gain over its new one. What ``v_proj`` or ``up_proj`` gave up is not, but it can be found again: a code ``q`` of step
``d`` stands for the interval ``(q - 1/2) d`` to ``(q + 1/2) d``, so each weight of a row bounds that row's factor, and
a whole row leaves a narrow range. An empty range means that the row is no rounding of the source's row, whatever was
folded into it. If the ranges of a producer's rows and its consumers' columns do not meet, the two sides do not cancel.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, log10
from typing import Any

import torch

from vllm_w8a8_bismooth.checkpoint.architectures import BLOCK, Layer, Site
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, sha256
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.method.quantize import dequantize_weight
from vllm_w8a8_bismooth.method.rows import Threads
from vllm_w8a8_bismooth.method.smooth import gather, rows_of, spread
from vllm_w8a8_bismooth.report.card import place_of

_PIECE = 2**20  # elements worked on at once
_HALF = 0.5 + 2e-4  # of a step: fp32 rounds the division before the code is
_ROOM = 1e-5  # relative, between factors that are equal but for fp32
_FUNCTION = "this checkpoint computes another function; convert the source again"
_SOURCE = "convert the source again, or name the right one with --against"


@dataclass
class Range:
    """Factors that are possible, fp32 ``[n]`` each. They are positive."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def unknown(cls, n: int) -> "Range":
        return cls(torch.full((n,), -inf), torch.full((n,), inf))

    def narrow(self, low: torch.Tensor, high: torch.Tensor) -> None:
        self.low, self.high = torch.maximum(self.low, low), torch.minimum(self.high, high)

    def empty(self) -> torch.Tensor:
        """bool ``[n]``: no factor is possible."""
        return (self.low > self.high) | (self.high <= 0)

    def misses(self, other: "Range") -> torch.Tensor:
        """bool ``[n]``: the two ranges have nothing in common, though neither is empty."""
        low, high = torch.maximum(self.low, other.low), torch.minimum(self.high, other.high)
        return (low - high > _ROOM * high.abs()) & ~self.empty() & ~other.empty()


@dataclass
class Match:
    """How one ``[N, K]`` linear, INT8 or float, relates to its source's weight times the column factors claimed.

    Attributes:
        rows: factors of the free rows, ``[n]``.
        factor: fp32 ``[n]``, the least-squares estimate of the same.
        columns: factors of the columns over and above the claimed ones, from the other rows; ``[K]``.
        sqnr: in dB, of the stored against the folded weight; ``None`` where nothing was lost.
    """

    rows: Range
    factor: torch.Tensor
    columns: Range
    sqnr: float | None


def match(
    threads: Threads, source: Checkpoint, result: Checkpoint, name: str, columns: torch.Tensor, free: slice
) -> Match:
    """Compare a linear with its source, a few rows a thread in memory at a time.

    Args:
        threads: that do the work.
        source, result: the two checkpoints.
        name: of the weight, in both.
        columns: fp32 ``[K]`` factors claimed for the columns; 0 where nothing is known and nothing depends on it.
        free: the rows that may have been divided by factors yet unknown.
    """
    rows, width = source.headers[name].shape
    silent = (columns == 0).nonzero().view(-1)
    step = max(1, _PIECE // width)
    found = Match(Range.unknown(free.stop - free.start), torch.ones(free.stop - free.start), Range.unknown(width), None)

    def compare(start: int) -> tuple[Range, float, float]:
        """Columns' factors, power and error of some rows; the rows' own factors go to their places."""
        count, possible = min(step, rows - start), Range.unknown(width)
        claimed = source.rows(name, start, count).float() * columns
        stored, half = _stored(result, name, start, count)
        stored[:, silent] = 0
        inverse = claimed.reciprocal()
        middle, reach = stored * inverse, half * inverse.abs()
        low, high = middle - reach, middle.add_(reach)
        if not low.isfinite().all():
            nothing = inverse.isinf()  # weights of 0 tell nothing, but no factor makes anything else of them
            low[nothing], high[nothing] = -inf, inf
            low[(claimed == 0) & (stored != 0)] = inf
        first, last = (min(max(edge - start, 0), count) for edge in (free.start, free.stop))
        for fixed in (slice(0, first), slice(last, count)):
            if fixed.start < fixed.stop:
                possible.narrow(low[fixed].amax(dim=0), high[fixed].amin(dim=0))
        if first < last:
            mine, of = slice(first, last), slice(start + first - free.start, start + last - free.start)
            found.rows.low[of], found.rows.high[of] = low[mine].amax(dim=1), high[mine].amin(dim=1)
            estimate = (stored[mine] * claimed[mine]).sum(dim=1) / claimed[mine].square().sum(dim=1)
            found.factor[of] = torch.where(estimate.isfinite() & (estimate > 0), estimate, 1.0)
            claimed[mine] *= found.factor[of].unsqueeze(1)
        return possible, float(claimed.square().sum()), float(stored.sub_(claimed).square_().sum())

    power = error = 0.0
    for possible, more_power, more_error in threads.map(compare, range(0, rows, step)):
        found.columns.narrow(possible.low, possible.high)
        power, error = power + more_power, error + more_error
    found.sqnr = 10 * log10(power / error) if error > 0 and power > 0 else None
    return found


def _stored(result: Checkpoint, name: str, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows of a linear, fp32 ``[n, K]``, and how far from each value may lie what was rounded to it."""
    rows = result.rows(name, start, count)
    if rows.is_floating_point():
        dtype, stored = torch.finfo(rows.dtype), rows.float()
        return stored, stored.abs() * (dtype.eps / 2 + _ROOM) + dtype.eps * dtype.smallest_normal
    scale = result.rows(f"{name}_scale", start, count).float()
    half, width = scale * _HALF, rows.shape[1] // scale.shape[1]
    return dequantize_weight(rows, scale), half.repeat_interleave(width, dim=1) if scale.shape[1] > 1 else half


class Comparison:
    """A converted checkpoint beside its source.

    Args:
        source: what it was made from.
        result: what was made.
        linears: its sound linears, INT8 or float -> their entry of the report, to which ``sqnr`` is added.
        unreadable: its tensors whose values cannot be worked with.
        fault: called with where, what and remedy for each difference.
    """

    def __init__(
        self,
        source: Source,
        result: Checkpoint,
        linears: Mapping[str, dict[str, Any]],
        unreadable: set[str],
        fault: Callable[..., None],
    ):
        self.source, self.result, self.fault = source, result, fault
        before, after = source.checkpoint.headers, result.headers
        self.linears = {
            name: entry
            for name, entry in linears.items()
            if not {f"{name}.weight", f"{name}.weight_scale"} & unreadable
            and f"{name}.weight" in before
            and before[f"{name}.weight"].shape == after[f"{name}.weight"].shape
        }
        self._unreadable = unreadable

    def files(self) -> None:
        """config.json must be equal but for what it says of quantization, side files byte for byte."""
        before, after = self.source.checkpoint.config, self.result.config
        for key in sorted((before.keys() | after.keys()) - {"quantization_config"}):
            old, new = (json.dumps(config.get(key, "absent"), sort_keys=True) for config in (before, after))
            if old != new:
                self.fault(CONFIG, f"{key} is {new}, in the source {old}", _SOURCE)
        for relative in self.source.checkpoint.place.side_files():
            place = place_of(relative)
            copied = self.result.folder / place
            if not copied.is_file():
                self.fault(str(place), f"is absent; the source has {relative}", "copy it from the source")
            elif sha256(copied) != sha256(self.source.checkpoint.folder / relative):
                self.fault(str(place), f"differs from the source's {relative}", "copy it from the source again")

    def outside(self) -> None:
        """Outside the blocks, whose names the audit knows, the same tensors must be there, bit for bit."""
        before, after = self.source.checkpoint.headers, self.result.headers
        for name in sorted(set(self.source.outside) - after.keys()):
            self.fault(name, "is in the source, but absent here", "convert the source again")
        for name in sorted(name for name in after.keys() - before.keys() if not name.startswith(BLOCK.format("")[:-1])):
            self.fault(name, "is not in the source", "remove it or convert the source again")
        for name in self.source.outside:
            self._equal(name)

    def blocks(self, judge: bool, progress: Callable[[str, int, int], None]) -> None:
        """Compare block after block.

        Args:
            judge: whether linears must be roundings of the source's with factors that cancel; if not, their SQNR is
                measured and no more.
            progress: called as ``progress("compare", done, blocks)``.
        """
        with Threads() as threads:
            for index, layer in enumerate(self.source.layers):
                _Block(self, index, layer).compare(threads, judge)
                progress("compare", index + 1, len(self.source.layers))

    def both(self, name: str) -> bool:
        """Whether both checkpoints have the tensor in one shape and dtype, fit to be read; says so if not."""
        before, after = self.source.checkpoint.headers[name], self.result.headers.get(name)
        if after is None or name in self._unreadable:
            return False
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            here, there = (f"{header.dtype} {list(header.shape)}" for header in (after, before))
            self.fault(name, f"is {here}, in the source {there}", _SOURCE)
            return False
        return True

    def _equal(self, name: str) -> None:
        if not self.both(name):
            return
        pieces = (checkpoint.pieces(name) for checkpoint in (self.source.checkpoint, self.result))
        differing = sum(int((_bits(a) != _bits(b)).sum()) for a, b in zip(*pieces, strict=True))
        if differing:
            total = torch.Size(self.result.headers[name].shape).numel()
            self.fault(name, f"differs from the source's in {differing} of {total} values", _SOURCE)


class _Block:
    """One decoder block of both checkpoints.

    Attributes:
        claims: consumer -> fp32 ``[K]``, by what its columns were multiplied as far as the producer tells.
        free: linear -> the rows that may have been divided to feed another linear.
    """

    def __init__(self, comparison: Comparison, index: int, layer: Layer):
        self.all, self.index, self.layer, self.prefix = comparison, index, layer, BLOCK.format(index)
        self.source, self.result = comparison.source.checkpoint, comparison.result
        self._head = comparison.source.sizes["head"]
        self.linears = [linear for linear in layer.linears if self.prefix + linear in comparison.linears]
        self.claims: dict[str, torch.Tensor] = {}
        self.free: dict[str, slice] = {}
        self.matches: dict[str, Match] = {}
        self.folded = {f"{site.producer}.weight" for site in layer.sites if site.producer in layer.vectors}

    def compare(self, threads: Threads, judge: bool) -> None:
        for site in self.layer.sites:
            if site.producer in self.layer.vectors:
                gave = self._norm(f"{self.prefix}{site.producer}.weight")
                self.claims |= {consumer: gave for consumer in site.consumers if gave is not None}
            else:
                start, width = rows_of(site, self.layer, self.all.source.sizes)
                self.free[site.producer] = slice(start, start + width)
        self._match(threads, [linear for linear in self.linears if linear in self.free])
        for site in self._between_linears():
            self.claims |= {c: self._spread(1 / self.matches[site.producer].factor, c) for c in site.consumers}
        self._match(threads, [linear for linear in self.linears if linear not in self.free])
        if judge:
            self._judge_linears()
            for site in self.layer.sites:
                self._judge_site(site)
        for name in self.all.source.blocks[self.index]:
            self._rest(name, judge)

    def _between_linears(self) -> Iterator[Site]:
        return (site for site in self.layer.sites if site.producer in self.matches)

    def _columns(self, linear: str) -> int:
        return self.all.source.sizes[self.layer.linears[linear][1]]

    def _spread(self, rows: torch.Tensor, consumer: str) -> torch.Tensor:
        """One value for each column of the consumer, from one for each row that feeds it."""
        shared = self._columns(consumer) // len(rows)
        return spread(rows, shared, self._head) if shared > 1 else rows

    def _norm(self, name: str) -> torch.Tensor | None:
        """What a norm gave up: old over new gain, 0 where the gain is 0 and the channel silent."""
        if not self.all.both(name):
            return None
        offset = self.all.source.architecture.offset
        old, new = (checkpoint.read(name).float() + offset for checkpoint in (self.source, self.result))
        dead = (new == 0) & (old != 0)
        if dead.any():
            self.all.fault(name, f"has lost the gain of {int(dead.sum())} channels ({_first(dead)})", _FUNCTION)
        return torch.where(new == 0, 0.0, old / new)

    def _match(self, threads: Threads, linears: list[str]) -> None:
        for linear in linears:
            name = f"{self.prefix}{linear}.weight"
            if self.result.headers[name].dtype != "I8" and not self.all.both(name):
                continue
            columns, free = self.claims.get(linear), self.free.get(linear, slice(0, 0))
            columns = torch.ones(self._columns(linear)) if columns is None else columns
            found = self.matches[linear] = match(threads, self.source, self.result, name, columns, free)
            self.all.linears[self.prefix + linear]["sqnr"] = found.sqnr

    def _judge_linears(self) -> None:
        for linear, found in self.matches.items():
            for what, bad in (("rows", found.rows.empty()), ("columns", found.columns.empty())):
                if bad.any():
                    self.all.fault(
                        self.prefix + linear,
                        f"{int(bad.sum())} of {len(bad)} {what} ({_first(bad)}) are no rounding of the source's, "
                        "whatever factor was folded into them",
                        _FUNCTION,
                    )

    def _judge_site(self, site: Site) -> None:
        """What the producer was divided by must be what its consumers were multiplied by."""
        if site.producer in self.layer.vectors:
            if site.consumers[0] not in self.claims:
                return
            gave = Range(self.claims[site.consumers[0]], self.claims[site.consumers[0]])
        elif site.producer in self.matches:
            rows = self.matches[site.producer].rows
            gave = Range(1 / rows.high, torch.where(rows.low > 0, 1 / rows.low, inf))
            self._judge_bias(site, gave)
        else:
            return
        for consumer in site.consumers:
            if consumer not in self.matches:
                continue
            got, claimed = self.matches[consumer].columns, self.claims[consumer]
            got = Range(*(torch.where(claimed != 0, claimed * bound, bound) for bound in (got.low, got.high)))
            shared = len(claimed) // len(gave.low)
            if shared > 1:  # query heads that read one value head
                got = Range(gather(got.low, shared, self._head), -gather(-got.high, shared, self._head))
            bad = gave.misses(got) & (gave.high != 0)
            if bad.any():
                at = int(bad.nonzero()[0])
                self._site_fault(
                    site,
                    f"in {int(bad.sum())} of {len(bad)} channels; {_first(bad)} is divided by {_span(gave, at)} in "
                    f"{site.producer} and multiplied by {_span(got, at)} in {consumer}",
                )

    def _judge_bias(self, site: Site, gave: Range) -> None:
        """A bias is divided like the rows that it belongs to."""
        name = f"{self.prefix}{site.producer}.bias"
        if name not in self.source.headers or not self.all.both(name):
            return
        divided = self.free[site.producer]
        old, new = (checkpoint.read(name).float()[divided] for checkpoint in (self.source, self.result))
        factor = torch.where(new == 0, 1.0, old / new)
        bad = gave.misses(Range(factor, factor)) & (old != 0) | ((old == 0) != (new == 0))
        if bad.any():
            at = int(bad.nonzero()[0])
            self._site_fault(
                site,
                f"in {int(bad.sum())} of {len(bad)} channels; {_first(bad)} is divided by {_span(gave, at)} in "
                f"{site.producer}.weight and goes from {float(old[at]):.4g} to {float(new[at]):.4g} in its bias",
            )

    def _site_fault(self, site: Site, what: str) -> None:
        where = f"block {self.index}, {site.name}"
        self.all.fault(where, f"the two sides of {site.name} in block {self.index} do not cancel {what}", _FUNCTION)

    def _rest(self, name: str, judge: bool) -> None:
        """Norms, biases and whatever else passes through."""
        full, module = self.prefix + name, name.removesuffix(".weight").removesuffix(".bias")
        if self.layer.linear_of(name) or name in self.folded or full not in self.result.headers:
            return
        if module in self.layer.routers and module in self.claims:
            self._router(full, self.claims[module])
        elif name == f"{module}.bias" and module in self.free:
            self._bias_elsewhere(full, self.free[module])
        else:
            self.all._equal(full)

    def _router(self, name: str, columns: torch.Tensor) -> None:
        """A router keeps its dtype; its columns take the norm's factor and are rounded once."""
        if not self.all.both(name):
            return
        old, new = (checkpoint.read(name) for checkpoint in (self.source, self.result))
        expected = old.float() * columns
        slack = expected.abs() * torch.finfo(new.dtype).eps + torch.finfo(new.dtype).smallest_normal
        bad = ((new.float() - expected).abs() > slack).any(dim=0) & (columns != 0)
        if bad.any():
            self.all.fault(
                name,
                f"{int(bad.sum())} of {len(bad)} columns ({_first(bad)}) are not the source's times the norm's factor",
                _FUNCTION,
            )

    def _bias_elsewhere(self, name: str, divided: slice) -> None:
        """Outside the rows that may be divided, a bias stays as it was."""
        if not self.all.both(name):
            return
        old, new = (_bits(checkpoint.read(name)) for checkpoint in (self.source, self.result))
        bad = old != new
        bad[divided] = False
        if bad.any():
            self.all.fault(name, f"differs from the source's in {int(bad.sum())} values ({_first(bad)})", _SOURCE)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def _first(bad: torch.Tensor) -> str:
    return f"number {int(bad.nonzero()[0])}" if bad.sum() == 1 else f"the first is {int(bad.nonzero()[0])}"


def _span(factors: Range, at: int) -> str:
    low, high = float(factors.low[at]), float(factors.high[at])
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
