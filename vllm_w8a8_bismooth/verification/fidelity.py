"""Whether a converted checkpoint still computes what its source does, seen from the two checkpoints alone.

Smoothing divides what feeds a linear and multiplies the linear's columns. What a norm gave up is on record: its old
gain over its new one. What ``v_proj`` or ``up_proj`` gave up is not, but it can be found again: a code ``q`` of step
``d`` stands for the interval ``(q - 1/2) d`` to ``(q + 1/2) d``, so each weight of a row bounds that row's factor, and
a whole row leaves a narrow range. (Compensated rounding goes up to :data:`grids.REACH` steps further, and the
ranges are as much wider.) An empty range means that the row is no rounding of the source's row, whatever was
folded into it. If the ranges of a producer's rows and its consumers' columns do not meet, the two sides do not cancel.

Folds leave the residual stream alone, which other heads and drafters read, too. Outside the blocks every tensor must be
the source's bit for bit. A linear that writes into the stream has no free rows: each column must have one factor that
suits all rows and meets what its producer gave up, so that a scaled row, or all of them, leave no factor. Small factors
hide in the rounding. On small models and SmolLM2, 1.005 showed in codes to the nearest; in compensated ones, 1.05 on a
single row, mostly 1.02, and 1.01 on all rows. Smaller factors may pass, more in rows of four bits (:mod:`likeness`).
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth.checkpoint.companions import companions, loaded
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, RECIPE, read_json, sha256
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError, Problem
from vllm_w8a8_bismooth.method.columns import Columns, indices
from vllm_w8a8_bismooth.method.grids import REACH
from vllm_w8a8_bismooth.method.rows import Threads
from vllm_w8a8_bismooth.model.layers import Layer, Runs, Site
from vllm_w8a8_bismooth.progress import Progress
from vllm_w8a8_bismooth.report.card import place_of
from vllm_w8a8_bismooth.verification.contents import Noted
from vllm_w8a8_bismooth.verification.match import Match, Range, match

_FUNCTION = "this checkpoint computes another function; convert the source again, or name the right one with --against"
_VISIBLE = 0.01  # of a row: what rounding leaves of a factor is less
_SOURCE = "convert the source again, or name the right one with --against"


class Comparison:
    """A converted checkpoint beside its source.

    Args:
        source: what it was made from.
        result: what was made.
        linears: its sound linears, INT8 or float.
        unreadable: its tensors whose values cannot be worked with.

    Attributes:
        problems: the differences, found by the methods.
        sqnr: linear -> SQNR in dB against the folded source, ``None`` where nothing was lost; filled by :meth:`blocks`.
        unscaled: tensors outside the blocks that are the source's, and those that write into the residual stream whose
            rows are not scaled; filled by the methods.
    """

    def __init__(self, source: Source, result: Checkpoint, linears: Collection[str], unreadable: set[str]):
        self.source, self.result = source, result
        self.problems: list[Problem] = []
        self.sqnr: dict[str, float | None] = {}
        self.unscaled: list[str] = []
        before, after = source.checkpoint.headers, result.headers
        self.linears = {
            name
            for name in linears
            if not {f"{name}.weight", f"{name}.weight_scale"} & unreadable
            and f"{name}.weight" in before
            and before[f"{name}.weight"].shape == after[f"{name}.weight"].shape
        }
        self._unreadable = unreadable
        self.reach = _reach(result.folder)

    def fault(self, where: str, what: str, remedy: str) -> None:
        self.problems.append(Problem(where, what, remedy))

    def files(self) -> None:
        """config.json must be equal but for what it says of quantization, side files byte for byte, with none added."""
        before, after = self.source.checkpoint.config, self.result.config
        for key in sorted((before.keys() | after.keys()) - {"quantization_config"}):
            if (old := _said(before, key)) != (new := _said(after, key)):
                self.fault(CONFIG, f"{key} is {new}, in the source {old}", _SOURCE)
        for relative in map(Path, companions(self.source.checkpoint.place)):
            place = place_of(relative)
            copied = self.result.folder / place
            if not copied.is_file():
                self.fault(str(place), f"is absent; the source has {relative}", "copy it from the source")
            elif sha256(copied) != sha256(self.source.checkpoint.folder / relative):
                self.fault(str(place), f"differs from the source's {relative}", "copy it from the source again")
        known = {place_of(Path(file)).as_posix() for file in self.source.checkpoint.place.files()}
        with suppress(BismoothError):  # what is wrong with report.json is said elsewhere
            known |= set(Noted.of(self.result.folder).beside)
        for file in loaded(self.result.place):
            if file not in known:
                what = "is not in the source, and what reads such files would load it"
                self.fault(file, what, "remove it; what a model needs belongs into its source, before the conversion")

    def outside(self, judge: bool, head: bool = False) -> None:
        """Outside the blocks, whose names the audit knows, the same tensors must be there, bit for bit.

        Args:
            judge: whether that also holds for a head in INT8; if not, its SQNR is measured.
            head: whether the language model's is one all the same, and must be the nearest codes of the source's.
        """
        before, after = self.source.checkpoint.headers, self.result.headers
        for name in sorted(set(self.source.outside) - after.keys()):
            self.fault(name, "is in the source, but absent here", "convert the source again")
        some = self.source.outside if not judge else [self.source.names.head] if head else []
        quantized = [name for name in some if name in after and self.quantized(name)]
        new = after.keys() - before.keys() - {f"{name}_scale" for name in quantized}
        for name in sorted(name for name in new if not name.startswith(self.result.names.blocks)):
            self.fault(name, "is not in the source", "remove it or convert the source again")
        for name in self.source.outside:
            if name not in quantized and self.equal(name):
                self.unscaled.append(name)
        with Threads() as threads:
            for name in quantized:
                columns = torch.ones(before[name].shape[1])
                found = match(threads, self.source.checkpoint, self.result, name, columns)
                self.sqnr[name.removesuffix(".weight")] = found.sqnr
                if judge and (bad := found.columns.misses(Range(columns, columns)) | found.columns.empty()).any():
                    what = f"{int(bad.sum())} of {len(bad)} columns ({_first(bad)}) are not the source's, rounded"
                    self.fault(name, what, _SOURCE)
                elif judge:
                    self.unscaled.append(name)

    def quantized(self, name: str) -> bool:
        """Whether a weight is sound INT8 in the result."""
        return name.removesuffix(".weight") in self.linears and self.result.headers[name].dtype == "I8"

    def blocks(self, judge: bool, progress: Progress) -> None:
        """Compare block after block.

        Args:
            judge: whether linears must be roundings of the source's with factors that cancel; if not, their SQNR is
                measured and no more.
            progress: counts blocks in the stage ``compare``.
        """
        with Threads() as threads:
            for index, layer in enumerate(self.source.layers):
                _Block(self, index, layer).compare(threads, judge)
                progress("compare", index + 1, len(self.source.layers), 0)

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

    def equal(self, name: str) -> bool:
        """Whether a tensor that must be the same is so, bit for bit; says so if not."""
        if not self.both(name):
            return False
        pieces = (checkpoint.pieces(name) for checkpoint in (self.source.checkpoint, self.result))
        differing = sum(int((_bits(a) != _bits(b)).sum()) for a, b in zip(*pieces, strict=True))
        if differing:
            total = torch.Size(self.result.headers[name].shape).numel()
            self.fault(name, f"differs from the source's in {differing} of {total} values", _SOURCE)
        return not differing


class _Block:
    """One decoder block of both checkpoints.

    Attributes:
        claims: consumer -> fp32 ``[K]``, by what its columns were multiplied as far as the producer shows.
        free: linear -> the rows that may have been divided to feed another linear.
        cancelled: linears in which each column has one factor for all rows that makes up for what the producer gave up.
    """

    def __init__(self, comparison: Comparison, index: int, layer: Layer):
        self.all, self.index, self.layer = comparison, index, layer
        self.prefix = comparison.source.names.block(index)
        self.source, self.result = comparison.source.checkpoint, comparison.result
        self.linears = [linear for linear in layer.linears if self.prefix + linear in comparison.linears]
        self.claims: dict[str, torch.Tensor] = {}
        self.free: dict[str, Runs] = {}
        self.matches: dict[str, Match] = {}
        self.cancelled: set[str] = set()
        self.norms = {site.producer: site for site in layer.sites if site.producer not in layer.linears}

    def compare(self, threads: Threads, judge: bool) -> None:
        for site in self.layer.sites:
            if site.producer in self.norms:
                gave = self._norm(site)
                if gave is not None:
                    self._claim(site, gave)
            else:
                self.free[site.producer] = tuple(sorted((*self.free.get(site.producer, ()), *site.rows)))
        self._match(threads, [linear for linear in self.linears if linear in self.free])
        for site in self._between_linears():
            self._claim(site, 1 / self._own(site, self.matches[site.producer].factor) ** site.power)
        self._match(threads, [linear for linear in self.linears if linear not in self.free])
        if judge:
            self._judge_linears(threads)
            for site in self.layer.sites:
                self._judge_site(site)
        for name in self.all.source.blocks[self.index]:
            same = self._rest(name, judge) or self.layer.linear_of(name) in self.cancelled
            if same and name.removesuffix(".weight").removesuffix(".bias") in self.layer.writers:
                self.all.unscaled.append(self.prefix + name)

    def _between_linears(self) -> Iterator[Site]:
        return (site for site in self.layer.sites if site.producer in self.matches)

    def _claim(self, site: Site, channels: torch.Tensor) -> None:
        """Expect that the consumers' columns were multiplied by what the channels show."""
        columns = Columns.of(site).spread(channels)
        for consumer in site.consumers:
            claimed = self.claims.get(consumer)
            self.claims[consumer] = columns if claimed is None else claimed * columns

    def _own(self, site: Site, free: torch.Tensor) -> torch.Tensor:
        """The values of a site's channels, of those of all rows of its producer that may be divided."""
        rows = indices(self.free[site.producer])
        return free[torch.searchsorted(rows, indices(site.rows))]

    def _norm(self, site: Site) -> torch.Tensor | None:
        """What a norm gave up: old over new gain, 0 where the gain is 0 and the channel silent."""
        name = f"{self.prefix}{site.producer}.weight"
        if not self.all.both(name):
            return None
        old, new = (checkpoint.read(name).float() + site.offset for checkpoint in (self.source, self.result))
        dead = (new == 0) & (old != 0)
        if dead.any():
            self.all.fault(name, f"has lost the gain of {int(dead.sum())} channels ({_first(dead)})", _FUNCTION)
        return torch.where(new == 0, 0.0, old / new)

    def _match(self, threads: Threads, linears: list[str]) -> None:
        for linear in linears:
            name = f"{self.prefix}{linear}.weight"
            if self.result.headers[name].dtype != "I8" and not self.all.both(name):
                continue
            columns, free = self.claims.get(linear), self.free.get(linear, ())
            columns = torch.ones(self.layer.linears[linear][1]) if columns is None else columns
            found = match(threads, self.source, self.result, name, columns, free, self.all.reach)
            self.matches[linear] = found
            self.all.sqnr[self.prefix + linear] = found.sqnr

    def _judge_linears(self, threads: Threads) -> None:
        for linear, found in self.matches.items():
            four = {f"{what} in four bits": bad for what, bad in found.unlike.items()}
            for what, bad in {"rows": found.rows.empty(), "columns": found.columns.empty(), **four}.items():
                if bad.any():
                    self.all.fault(
                        self.prefix + linear,
                        f"{int(bad.sum())} of {len(bad)} {what} ({_first(bad)}) are no rounding of the source's, "
                        f"whatever factor was folded into them{self._scaled(threads, linear)}",
                        _FUNCTION,
                    )

    def _scaled(self, threads: Threads, linear: str) -> str:
        """What is said of the output rows that a faulty linear has scaled, where they go into the residual stream."""
        if linear not in self.layer.writers or linear not in self.claims:
            return ""
        name = f"{self.prefix}{linear}.weight"
        every = (0, self.source.headers[name].shape[0])
        factor = match(threads, self.source, self.result, name, self.claims[linear], (every,), self.all.reach).factor
        bad = (factor - 1).abs() > _VISIBLE
        if not bad.any():
            return ""
        where, times = f"{int(bad.sum())} of {len(bad)} rows ({_first(bad)})", f"{float(factor[bad][0]):.3g}"
        return f"; {where} write {times} times as much into the residual stream"

    def _judge_site(self, site: Site) -> None:
        """What the producer was divided by must be what its consumers were multiplied by."""
        columns = Columns.of(site)
        if site.producer in self.norms:
            if site.consumers[0] not in self.claims:
                return
            claimed = columns.gather(self.claims[site.consumers[0]], "amax")
            gave = Range(claimed, claimed)
        elif site.producer in self.matches:
            rows = self.matches[site.producer].rows
            low, high = self._own(site, rows.low), self._own(site, rows.high)
            divided = Range(1 / high, torch.where(low > 0, 1 / low, inf))
            self._judge_bias(site, divided)
            gave = Range(divided.low**site.power, divided.high**site.power)
        else:
            return
        for consumer in site.consumers:
            if consumer not in self.matches:
                continue
            got, claimed = self.matches[consumer].columns, self.claims[consumer]
            got = Range(*(torch.where(claimed != 0, claimed * bound, bound) for bound in (got.low, got.high)))
            got = Range(columns.gather(got.low, "amax"), columns.gather(got.high, "amin"))
            bad = gave.misses(got) & (gave.high != 0)
            if bad.any():
                at = int(bad.nonzero()[0])
                self._site_fault(
                    site,
                    f"in {int(bad.sum())} of {len(bad)} channels; {_first(bad)} is divided by {_span(gave, at)} in "
                    f"{site.producer} and multiplied by {_span(got, at)} in {consumer}",
                )
            elif not self.matches[consumer].columns.empty().any():
                self.cancelled.add(consumer)

    def _judge_bias(self, site: Site, gave: Range) -> None:
        """A bias is divided like the rows that it belongs to."""
        name = f"{self.prefix}{site.producer}.bias"
        if name not in self.source.headers or not self.all.both(name):
            return
        divided = indices(site.rows)
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

    def _rest(self, name: str, judge: bool) -> bool:
        """Norms, biases and whatever else passes through; whether it had to be, and is, the same bit for bit."""
        full, module = self.prefix + name, name.removesuffix(".weight").removesuffix(".bias")
        if self.layer.linear_of(name) or full not in self.result.headers:
            return False
        if module in self.norms:
            site = self.norms[module]
            if name == f"{module}.bias" and site.consumers[0] in self.claims:
                gave = Columns.of(site).gather(self.claims[site.consumers[0]], "amax")
                self._rounded(full, torch.where(gave == 0, 0, 1 / gave), "values")
            return False
        if not judge and self.all.quantized(full):
            return False
        if module in self.layer.routers and module in self.claims:
            self._rounded(full, self.claims[module], "columns")
        elif name == f"{module}.bias" and module in self.free:
            self._bias_elsewhere(full, self.free[module])
        else:
            return self.all.equal(full)
        return False

    def _rounded(self, name: str, factors: torch.Tensor, kind: str) -> None:
        """What keeps its dtype, a router's columns or a norm's bias, takes the norm's factor and is rounded once."""
        if not self.all.both(name):
            return
        old, new = (checkpoint.read(name) for checkpoint in (self.source, self.result))
        expected = old.float() * factors
        slack = expected.abs() * torch.finfo(new.dtype).eps + torch.finfo(new.dtype).smallest_normal
        bad = ((new.float() - expected).abs() > slack).reshape(-1, len(factors)).any(dim=0) & (factors != 0)
        if bad.any():
            what = f"{int(bad.sum())} of {len(bad)} {kind} ({_first(bad)}) are not the source's times the norm's factor"
            self.all.fault(name, what, _FUNCTION)

    def _bias_elsewhere(self, name: str, divided: Runs) -> None:
        """Outside the rows that may be divided, a bias stays as it was."""
        if not self.all.both(name):
            return
        old, new = (_bits(checkpoint.read(name)) for checkpoint in (self.source, self.result))
        bad = old != new
        bad[indices(divided)] = False
        if bad.any():
            self.all.fault(name, f"differs from the source's in {int(bad.sum())} values ({_first(bad)})", _SOURCE)


def _reach(folder: Path) -> int:
    """How many steps the codes of a checkpoint may lie from the nearest, by its recipe; the most if it has none."""
    try:
        recipe = read_json(folder / RECIPE)["recipe"]
        return 0 if recipe.get("rounding") != "gptq" else REACH
    except (BismoothError, KeyError, TypeError, AttributeError):
        return REACH


def is_zero(source: Checkpoint, name: str) -> bool:
    """Whether a checkpoint has a tensor of that name in which everything is 0."""
    return name in source.headers and not any(bool(piece.any()) for piece in source.pieces(name))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _first(bad: torch.Tensor) -> str:
    return f"number {int(bad.nonzero()[0])}" if bad.sum() == 1 else f"the first is {int(bad.nonzero()[0])}"


def _span(factors: Range, at: int) -> str:
    low, high = float(factors.low[at]), float(factors.high[at])
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _said(config: Mapping[str, Any], key: str) -> str:
    """A value of a config in a message."""
    return json.dumps(config[key], sort_keys=True) if key in config else "absent"
