"""The stages of a conversion: choose granularity, carry activations, smooth, quantize, write."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from vllm_w8a8_bismooth import fourbits, grouping
from vllm_w8a8_bismooth.checkpoint.blocks import Block, Run, Stage, Walk
from vllm_w8a8_bismooth.checkpoint.files import Checksum
from vllm_w8a8_bismooth.checkpoint.writer import ShardWriter
from vllm_w8a8_bismooth.conversion.options import check_group_size
from vllm_w8a8_bismooth.conversion.plan import Plan
from vllm_w8a8_bismooth.conversion.preparation import Preparation
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure import narrowing, perturbation, sensitivity, weights
from vllm_w8a8_bismooth.measure.activations import MOMENTS, STREAM, Activations
from vllm_w8a8_bismooth.measure.granularity import Evidence, choose, estimate
from vllm_w8a8_bismooth.measure.logits import Logits, predicts_tokens
from vllm_w8a8_bismooth.measure.passing import Passing
from vllm_w8a8_bismooth.method.balance import rule_of
from vllm_w8a8_bismooth.method.compensate import Compensation, Gram
from vllm_w8a8_bismooth.method.moments import Moments
from vllm_w8a8_bismooth.method.quantize import Loss, quantize_folded
from vllm_w8a8_bismooth.method.rows import Fold, Threads
from vllm_w8a8_bismooth.method.smooth import Smoothing, smooth_block
from vllm_w8a8_bismooth.model.layers import Layer
from vllm_w8a8_bismooth.recipe import INT8

SAMPLE, GRADIENTS, COSTS = "sample", "gradients", "costs"
"""Kinds of state: some of what a block reads, how the predictions depend on it, and what four bits cost its rows."""
CALIBRATE = Stage("calibrate", spends=((STREAM, -1),))
"""Carries activations through all blocks, from the first to the last."""
ANALYZE = Stage("analyze", spends=((SAMPLE, 0), (GRADIENTS, 1)))
"""Measures what each linear costs the predictions, from the last block to the first."""
CARRY = Stage("carry", spends=((STREAM, -1),))
"""Carries activations through the blocks before a part, which other parts hold."""
CONVERT = Stage("convert", spends=((MOMENTS, 0), (STREAM, -1), (COSTS, 0)))
OUTSIDE, HEAD, GRANULARITY, WIDE = "outside", "head", "granularity", "wide"
"""Work that is done once, not for each block."""
_SLAB = 2**24
"""Elements of a head that are in memory at once."""


class Stages:
    """The stages of one conversion, each of which goes on from what an earlier run has done.

    Args:
        ready: what is to be done.
        run: over its source.
        threads: that work on the rows of weights.
    """

    def __init__(self, ready: Preparation, run: Run, threads: Threads):
        self._ready, self._run, self._threads = ready, run, threads
        self._source, self._recipe = ready.source, ready.recipe
        # Rows with four bits are chosen by what compensation leaves, for which it takes how inputs go together.
        correlated = ready.recipe.rounding == "gptq" and ready.recipe.bits is not None
        self._activations = Activations(run, ready.tokens, ready.recipe.compute_dtype, correlated)

    def granularity(self) -> list[set[str]]:
        """Per block, the linears that get per-group scales: by name, by their weights, or by measured errors.

        Raises:
            BismoothError: K of one of them is not a multiple of the group size; or see :meth:`Checkpoint.read`.
        """
        if self._ready.named is not None:
            return self._ready.named
        choose = self._worthwhile if self._recipe.method == "auto" else self._vulnerable
        chosen = [set(names) for names in self._run.once(GRANULARITY, choose)]
        check_group_size(self._source, self._recipe, chosen)
        return chosen

    def _vulnerable(self) -> list[list[str]]:
        """Per block, the linears whose weights INT8 would lose."""
        chosen: list[list[str]] = [[] for _ in self._source.layers]
        walk = self._run.walk(weights.ANALYZE, self._ready.blocks)
        for index, block in walk:
            measured = weights.measure_block(block, self._source.layers[index], self._threads)
            block.record = {linear: measure.column_error for linear, measure in measured.items()}
        for index, errors in walk.records.items():
            chosen[index] = sorted(weights.vulnerable(errors, self._source.layers[index]) - self._ready.ignored[index])
        return chosen

    def _worthwhile(self) -> list[list[str]]:
        """Per block, the linears whose per-group scales pay. What the sites read is kept for the conversion."""
        self._forwards()
        group_size = self._recipe.group_size
        assert group_size is not None
        for block, passing in self._gradients():
            block.record, gradients = sensitivity.measure(passing, group_size)
            block.keep(GRADIENTS, {"gradients": gradients})
        chosen: list[list[str]] = [[] for _ in self._source.layers]
        for entry in self.evidence():
            for full in entry.linears if entry.chosen else ():
                index, name = self._source.place_of(full)
                chosen[index].append(name)
        target, reached = self._recipe.target_kl, self.estimate()
        if target is not None and reached is not None and reached > target:
            raise BismoothError.of(
                f"--target-kl {target:g}",
                f"out of reach: {reached:.2g} nats a token are estimated with groups of {self._recipe.group_size} "
                f"wherever they help, in {self._recipe.group_budget:.0%} of the work at most",
                "give a higher one, a larger --group-budget or a smaller --group-size",
            )
        return chosen

    def wide(self) -> narrowing.Wide | None:
        """Per block, the rows of its linears that have eight bits; ``None`` where all have.

        Raises:
            BismoothError: see :meth:`Checkpoint.read`.
        """
        if self._recipe.bits is None:
            return None
        found = self._run.once(WIDE, self._allotted)
        return [{linear: torch.tensor(rows, dtype=torch.int32) for linear, rows in block.items()} for block in found]

    def _allotted(self) -> list[dict[str, list[int]]]:
        """The rows that are worth eight bits, by what four cost the predictions, or data-free by what they change."""
        recipe, source, ignored = self._recipe, self._source, self._ready.ignored
        assert recipe.bits is not None and recipe.group_size is not None
        if self._ready.tokens is None:
            for index, block in self._run.walk(weights.ANALYZE):
                linears = (name for name in block if source.layers[index].linear_of(name) not in ignored[index])
                found = {name: narrowing.change(block[name], recipe.group_size, self._threads) for name in linears}
                block.keep(COSTS, {str(source.layers[index].linear_of(name)): cost for name, cost in found.items()})
        else:
            self._forwards()
            left = self._run.walk(CALIBRATE).records
            for block, passing in self._gradients():
                found, gradients = narrowing.measure(passing, recipe.group_size, left[block.index])
                block.keep(COSTS, {name: rows for name, rows in found.items() if name not in ignored[block.index]})
                block.keep(GRADIENTS, {"gradients": gradients})
        kept = [self._run.state(COSTS, index) for index in range(len(source.layers))]
        columns = [{linear: shape[1] for linear, shape in layer.linears.items()} for layer in source.layers]
        wide = narrowing.allot(kept, columns, recipe.bits, recipe.group_size)
        return [{linear: rows.tolist() for linear, rows in block.items()} for block in wide]

    def _forwards(self) -> None:
        """Carry activations through all blocks, and keep some of what each one reads."""
        for index, block in self._run.walk(CALIBRATE):
            block.keep(SAMPLE, {"hidden": perturbation.sample(self._activations.calibration(index))})
            moments = self._activations.read_by(block, self._threads)
            block.record = self._left(block, moments)

    def _left(self, block: Block, moments: Mapping[str, Moments]) -> dict[str, float]:
        """By linear, what compensation will leave of its outputs' error, where that is known by now."""
        if not self._activations.grams:
            return {}
        layer, smoothing = self._source.layers[block.index], self._smooth(block, moments)
        compensations = Compensations(layer, self._activations.grams)
        found = {linear: compensations.of(linear, smoothing.fold(linear)) for linear in layer.linears}
        return {linear: compensation.left() for linear, compensation in found.items() if compensation is not None}

    def _gradients(self) -> Iterator[tuple[Block, Passing]]:
        """From the last block to the first: the block, and what passes through it. The gradients of what it reads are
        to be kept."""
        count = len(self._source.layers)
        for index, block in self._run.walk(ANALYZE, self._backwards()):
            calibration = self._activations.calibration(count)
            if index == count - 1:
                final = perturbation.sample(calibration)
                logits = Logits(self._source, self._run.device, final.dtype)
                gradients = logits.gradients(final, sensitivity.DRAWS)
                del logits  # as large as the embedding
            else:
                gradients = self._run.state(GRADIENTS, index + 1)["gradients"]
            hidden = self._run.state(SAMPLE, index)["hidden"]
            smoothing = self._smooth(block, self._activations.recall(block))
            yield block, Passing(calibration, index, block, smoothing, hidden, gradients)

    def _backwards(self) -> range:
        return range(len(self._source.layers) - 1, -1, -1)

    def evidence(self) -> list[Evidence]:
        """What was measured of every unit and made of it. Empty where granularity is not chosen by it."""
        recipe, source = self._recipe, self._source
        if recipe.method != "auto":
            return []
        assert recipe.group_budget is not None
        records, compensated = self._run.walk(ANALYZE, self._backwards()).records, recipe.rounding == "gptq"
        costs = [
            {
                unit: {way: sensitivity.cost(of_way, compensated) for way, of_way in ways.items()}
                for unit, ways in records[index].items()
                if not set(sensitivity.measured_units(layer)[unit]) & ignored
            }
            for index, (layer, ignored) in enumerate(zip(source.layers, self._ready.ignored, strict=True))
        ]
        works = [{linear: source.work(i, linear) for linear in layer.linears} for i, layer in enumerate(source.layers)]
        return choose(costs, source.layers, works, recipe.group_budget, recipe.target_kl, source.names)

    def estimate(self) -> float | None:
        """The KL divergence to the source that the evidence lets expect, in nats a token; ``None`` without any."""
        evidence = self.evidence()
        return estimate(evidence) if evidence and predicts_tokens(self._source) else None

    def carry(self) -> dict[str, str]:
        """Carry activations through the blocks before a part; returns those blocks' checksums."""
        walk = self._run.walk(CARRY, range(self._ready.blocks.start if self._recipe.smoothing else 0))
        for _, block in walk:
            self._activations.carry(block, self._threads)
        return walk.checksums

    def outside(self, writer: ShardWriter) -> dict[str, str]:
        """Pass what is outside the blocks through, in pieces; returns the tensors' checksums."""
        checkpoint, head = self._source.checkpoint, self._source.names.head
        names = [
            n for n in self._source.outside_with(self._ready.blocks) if not (self._recipe.head == INT8 and n == head)
        ]
        return self._run.once(OUTSIDE, lambda: {name: writer.copy_tensor(name, checkpoint) for name in names}, writer)

    def head(self, writer: ShardWriter) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Round the language model's head, a slab of rows in memory at a time, if the recipe says so.

        Returns:
            Its checksum, and what is to be reported of it, both by name; nothing where it stays in float.
        """
        name = self._source.names.head
        if self._recipe.head != INT8 or name not in self._source.outside_with(self._ready.blocks):
            return {}, {}
        found = self._run.once(HEAD, lambda: self._round(name, writer), writer)
        return {name: found["checksum"]}, {name.removesuffix(".weight"): found["linear"]}

    def _round(self, name: str, writer: ShardWriter) -> dict[str, Any]:
        """Write a matrix outside the blocks per-channel, each weight rounded for itself: calibration sees no logits."""
        checkpoint, digest = self._source.checkpoint, Checksum()
        rows, columns = checkpoint.headers[name].shape
        loss, step = Loss(columns, self._run.device), max(1, _SLAB // columns)
        for start in range(0, rows, step):
            weight = checkpoint.rows(name, start, min(step, rows - start), digest).to(self._run.device)
            loss.add(quantize_folded(weight, Fold(), take=partial(_add, writer, name, start), threads=self._threads))
        self._check_range(name, loss.power)
        entry = {"group_size": None, "column_error": loss.column_error(), "sqnr": loss.sqnr()}
        return {"checksum": digest.hexdigest(), "linear": entry}

    def convert(self, plan: Plan, writer: ShardWriter) -> Walk:
        """Convert block after block; the records hold ``linears`` and ``sites``, see :class:`outcome.Outcome`."""
        walk = self._run.walk(CONVERT, self._ready.blocks, writer)
        compensated = self._recipe.rounding == "gptq"
        if compensated:  # how inputs go together is not kept by an earlier pass
            self._activations = Activations(self._run, self._ready.tokens, self._recipe.compute_dtype, correlated=True)
        for _, block in walk:
            if self._recipe.smoothing is None:
                smoothing = Smoothing()
            elif self._measured and not compensated:  # the other pass has found out
                smoothing = self._smooth(block, self._activations.recall(block))
            else:
                smoothing = self._smooth(block, self._activations.read_by(block, self._threads))
            linears = self._write(block, smoothing, plan, writer)
            block.record = {"linears": linears, "sites": self._sites(block.index, smoothing)}
        return walk

    @property
    def _measured(self) -> bool:
        """Whether an earlier pass has seen what every block reads."""
        return self._recipe.method == "auto" or (self._recipe.bits is not None and self._ready.tokens is not None)

    def _sites(self, index: int, smoothing: Smoothing) -> list[dict[str, Any]]:
        """What is to be reported of the sites of a block; those of experts that no token was sent to are marked."""
        layer, unread = self._source.layers[index], self._activations.unread if smoothing.sites else []
        experts = {site.name: layer.expert_of(site.producer) for site in layer.sites}
        return [
            asdict(factors) | ({"unread": True} if experts[factors.site] in unread else {})
            for factors in smoothing.sites
        ]

    def _smooth(self, block: Block, moments: Mapping[str, Moments]) -> Smoothing:
        return smooth_block(block, moments, self._source.layers[block.index], rule_of(self._recipe), self._threads)

    def _write(self, block: Block, smoothing: Smoothing, plan: Plan, writer: ShardWriter) -> dict[str, dict[str, Any]]:
        """Fold, quantize and write one block; returns what is to be reported of its linears, by full name."""
        layer, linears = self._source.layers[block.index], {}
        compensations = Compensations(layer, self._activations.grams)
        for name in block:
            full, linear = block.prefix + name, layer.linear_of(name)
            fold = smoothing.fold(name.removesuffix(".weight"))
            if linear is not None and linear not in plan.ignored[block.index]:
                linears[block.prefix + linear] = self._quantize(
                    block[name], full, fold, compensations.of(linear, fold), plan, writer
                )
            elif name in smoothing.vectors:
                writer.add(full, smoothing.vectors[name].cpu())
            else:
                kept = fold.apply(block[name], self._threads) if fold else block[name]
                self._check_range(full, kept)
                writer.add(full, kept.cpu())
            block.release(name)
        return linears

    def _quantize(
        self,
        weight: torch.Tensor,
        name: str,
        fold: Fold,
        compensation: Compensation | None,
        plan: Plan,
        writer: ShardWriter,
    ) -> dict[str, Any]:
        """Write one linear's weight, by its full name; returns what is to be reported of it."""
        index, linear = self._source.place_of(name.removesuffix(".weight"))
        group_size = self._recipe.group_size if linear in plan.grouped[index] else None
        entry: dict[str, Any] = {"group_size": group_size}
        if plan.wide is None:
            take = partial(_add, writer, name, 0)
            loss = quantize_folded(weight, fold, group_size, take, self._threads, compensation)
        else:
            rows, size = plan.wide[index][linear], self._recipe.group_size
            assert size is not None
            if len(rows):
                writer.add(f"{name}_rows", rows)
            wide = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
            wide[rows.long().to(weight.device)] = True
            take = partial(_pack, writer, name, rows, size)
            loss = quantize_folded(weight, fold, size, take, self._threads, compensation, wide)
            four, eight = grouping.row_bits(weight.shape[1], size)
            entry["bits"] = (four * len(weight) + (eight - four) * len(rows)) / weight.numel()
        self._check_range(name, loss.power)
        return {**entry, "column_error": loss.column_error(), "sqnr": loss.sqnr()}

    def _check_range(self, name: str, values: torch.Tensor) -> None:
        """Raises :class:`BismoothError` if a tensor, or what was summed up of it, left the range of its dtype."""
        if not values.isfinite().all():
            smoothed = " after smoothing" if self._recipe.smoothing else ""
            raise BismoothError.of(
                name,
                f"holds values beyond 1e19{smoothed}, whose squares fp32 cannot hold",
                "no sound model has such weights, repair them",
            )


class Compensations:
    """How the linears of one block are rounded, by what they read: one a site, made when its first linear is due.

    Args:
        layer: the block's.
        grams: of its sites, emptied on the way. Linears of other sites are rounded to nearest.
    """

    def __init__(self, layer: Layer, grams: dict[str, Gram]):
        self._sites = {consumer: site.name for site in layer.sites for consumer in site.consumers}
        self._grams = grams
        self._made: dict[str, Compensation] = {}

    def of(self, linear: str, fold: Fold) -> Compensation | None:
        """For a linear with this fold, whose columns are those of the whole site."""
        site = self._sites.get(linear)
        if site in self._grams:
            gram = self._grams.pop(site)
            self._made[site] = Compensation.of(gram if fold.columns is None else gram.scaled(1 / fold.columns))
        return self._made.get(site) if site is not None else None


def _add(writer: ShardWriter, name: str, first: int, start: int, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Write rows of a quantized weight, int8 ``[n, K]``, and scales, fp32 ``[n, G]``, from ``first + start`` on."""
    writer.add_rows(name, first + start, codes.cpu())
    writer.add_rows(f"{name}_scale", first + start, scale.cpu())


def _pack(
    writer: ShardWriter,
    name: str,
    wide: torch.Tensor,
    group_size: int,
    start: int,
    codes: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """:func:`_add` for rows of four bits; int32 ``wide`` ``[n]`` are those of the whole weight that have eight."""
    first, last = (int(each) for each in torch.searchsorted(wide, torch.tensor([start, start + len(codes)])))
    stored = fourbits.pack(codes.cpu(), wide[first:last] - start, group_size)
    for part in ("packed", "multiplier", "offset"):
        writer.add_rows(f"{name}_{part}", start, getattr(stored, part))
    if last > first:
        writer.add_rows(f"{name}_low", first, stored.low)
    writer.add_rows(f"{name}_scale", start, scale.cpu())
