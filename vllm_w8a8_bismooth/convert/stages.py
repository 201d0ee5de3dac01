"""The stages of a conversion, block after block: choose granularity, calibrate, smooth, quantize, write."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth.checkpoint.architectures import BLOCK, inside
from vllm_w8a8_bismooth.checkpoint.journal import Journal
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.readahead import AHEAD, ReadAhead
from vllm_w8a8_bismooth.checkpoint.writer import PARTIAL, WHOLE, ShardWriter
from vllm_w8a8_bismooth.convert.options import check_group_size
from vllm_w8a8_bismooth.convert.plan import Plan
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure import calibration, perturbation, weights
from vllm_w8a8_bismooth.measure.prior import Prior
from vllm_w8a8_bismooth.method.balance import rule_of
from vllm_w8a8_bismooth.method.moments import Moments
from vllm_w8a8_bismooth.method.quantize import quantize_folded
from vllm_w8a8_bismooth.method.rows import Threads
from vllm_w8a8_bismooth.method.smooth import Smoothing, smooth_block
from vllm_w8a8_bismooth.recipe import Recipe

_OUTSIDE, _GRANULARITY = "outside", "granularity"

Progress = Callable[[str, int, int, int], None]
"""Called as ``progress(stage, blocks_done, blocks, bytes_written)``; the bytes are those of this run."""


@dataclass(frozen=True)
class Preparation:
    """A conversion before its first write: all that can be checked without reading the weights is checked.

    Attributes:
        target: the resolved destination.
        source: audited.
        recipe: complete but for the source's fingerprint.
        device: where blocks are worked on.
        named: per block, the per-group linears; ``None`` if the weights have to tell.
        ignored: per block, the linears that stay in float.
        tokens: int64 ``[windows, length]`` for calibration; ``None`` is data-free.
        identity: what an unfinished run must have in common with this one to be continued.
        part: the blocks to convert, if the result is to be a part of a checkpoint; ``None`` is all, and the whole.
        reused: the destination already holds the result; then ``named``, ``ignored`` and ``tokens`` are not known.
    """

    target: Path
    source: Source
    recipe: Recipe
    device: torch.device
    named: list[set[str]] | None
    ignored: list[set[str]]
    tokens: torch.Tensor | None
    identity: dict[str, Any]
    part: range | None = None
    reused: bool = False

    @property
    def blocks(self) -> range:
        """The blocks to convert."""
        return range(len(self.source.layers)) if self.part is None else self.part

    def within(self, names: Sequence[set[str]]) -> list[set[str]]:
        """Linears of each block, without those of blocks that are not to be converted."""
        return [chosen if index in self.blocks else set() for index, chosen in enumerate(names)]

    @property
    def stem(self) -> str:
        """What the names of the shards begin with."""
        return WHOLE if self.part is None else PARTIAL


class Stages:
    """The stages of one conversion, each of which goes on from what the journal says is done."""

    def __init__(self, ready: Preparation, progress: Progress):
        self.source, self.recipe, self.device, self.progress = ready.source, ready.recipe, ready.device, progress
        self.tokens, self.ignored, self.chosen = ready.tokens, ready.ignored, ready.blocks

    def granularity(self, diary: Journal) -> list[set[str]]:
        """Per block, the linears that get per-group scales because weights, or measured errors, call for them."""
        known = diary.record(_GRANULARITY)
        if known is None:
            known = self.worth(diary) if self.recipe.method == "auto" else self.vulnerable()
            diary.finish(_GRANULARITY, known)
        chosen = [set(names) for names in known]
        check_group_size(self.source, self.recipe, chosen)
        return chosen

    def vulnerable(self) -> list[list[str]]:
        """Per block, the linears whose weights INT8 would lose."""
        known: list[list[str]] = [[] for _ in self.source.layers]
        for done, (index, measured) in enumerate(weights.blocks(self.source, self.device, chosen=self.chosen), 1):
            errors = {linear: measure.column_error for linear, measure in measured.items()}
            known[index] = sorted(weights.vulnerable(errors, self.source.layers[index]) - self.ignored[index])
            self.progress("analyze", done, len(self.chosen), 0)
        return known

    def worth(self, diary: Journal) -> list[list[str]]:
        """Per block, the linears whose per-group scales pay. What the sites read is kept for the conversion."""
        source, first = self.source, len(list(self.measured(diary)))
        group_size = self.recipe.group_size
        variants = {
            perturbation.CHANNEL: perturbation.Variant(),
            perturbation.GROUP: perturbation.Variant(group_size=group_size),
        }
        activity = self.activity(diary, first)
        with self.reader(range(first, len(source.layers))) as reader, Threads() as threads:
            for index in range(first, len(source.layers)):
                block = _Lent(reader, BLOCK.format(index), source.blocks[index], self.device)
                hidden = perturbation.sample(activity)
                smoothing = self.smooth(diary, activity, index, block, threads)
                errors = perturbation.measure(activity, index, block, smoothing, hidden, variants)
                for name in block:
                    block.drop(name)
                diary.finish(_measured(index), errors)
                diary.forget(_stream(index - 1))
                self.progress("analyze", index + 1, len(source.layers), 0)
        diary.forget(_stream(len(source.layers) - 1))
        per_block: list[list[str]] = [[] for _ in source.layers]
        for entry in self.evidence(diary):
            for index, name in map(inside, entry.linears if entry.chosen else ()):
                per_block[index].append(name)
        return per_block

    def measured(self, diary: Journal) -> Iterator[dict[str, dict[str, float]]]:
        """What quantization does to the units of each block, as far as an earlier pass got."""
        return _records(diary, map(_measured, range(len(self.source.layers))))

    def evidence(self, diary: Journal) -> list[perturbation.Evidence]:
        """What was measured of every unit and made of it. Empty where granularity is not chosen by it."""
        if self.recipe.method != "auto":
            return []
        layers = self.source.layers
        open_units = [
            {unit: found for unit, found in errors.items() if not set(perturbation.units(layer)[unit]) & ignored}
            for errors, layer, ignored in zip(self.measured(diary), layers, self.ignored, strict=True)
        ]
        return perturbation.choose(open_units, layers, self.recipe.group_budget)

    def activity(self, diary: Journal, first: int) -> calibration.Calibration | Prior | None:
        """What tells of the activations from block ``first`` on; ``None`` if nothing has to, or the journal knows.

        Raises:
            BismoothError: its state behind an earlier run's last block is gone.
        """
        source = self.source
        if self.recipe.smoothing is None or diary.record(_GRANULARITY) is not None or first == self.chosen.stop:
            return None
        if self.tokens is None:
            activity = Prior(source, self.device)
        else:
            activity = calibration.Calibration(source, self.tokens, self.device)
        if first:
            activity.hidden = self.state(diary, _stream(first - 1))["hidden"].to(self.device)
        return activity

    @staticmethod
    def state(diary: Journal, unit: str) -> dict[str, torch.Tensor]:
        """A state that must be there."""
        if (state := diary.state(unit)) is None:
            raise BismoothError(
                f"{diary.partial}: the state {unit} of an earlier run is gone, from which it would go on; "
                "run the same command again, which starts anew"
            )
        return state

    def reader(self, blocks: range) -> ReadAhead:
        """Reads these blocks."""
        source = self.source
        names = [BLOCK.format(i) + name for i in blocks for name in source.blocks[i]]
        return ReadAhead(source.checkpoint, names, source.block_nbytes() + AHEAD)

    def carried(self, diary: Journal) -> dict[str, str]:
        """Carry activations through the blocks before a part, which other parts hold; returns their checksums."""
        before = range(self.chosen.start if self.recipe.smoothing else 0)
        records = list(_records(diary, map(_carried, before)))
        first = len(records)
        if first < len(before):
            activity = self.activity(diary, first)
            with self.reader(before[first:]) as reader, Threads() as threads:
                for index in before[first:]:
                    block = _Lent(reader, BLOCK.format(index), self.source.blocks[index], self.device)
                    activity.advance(index, block, threads)
                    for name in block:
                        block.drop(name)
                    records.append({name: reader.digests.pop(name) for name in block.full_names()})
                    diary.keep(_stream(index), {"hidden": activity.hidden.cpu()})
                    diary.finish(_carried(index), records[-1])
                    diary.forget(_stream(index - 1))
                    self.progress("carry", index + 1, len(before), 0)
        return {name: digest for record in records for name, digest in record.items()}

    def outside(self, diary: Journal, writer: ShardWriter) -> dict[str, str]:
        """Pass what is outside the blocks through, in pieces; returns the tensors' checksums."""
        digests = diary.record(_OUTSIDE)
        if digests is None:
            digests = {}
            for name in self.source.outside_with(self.chosen):
                digests[name] = writer.copy_tensor(name, self.source.checkpoint)
            writer.then(partial(diary.finish, _OUTSIDE, digests))
        return digests

    def blocks(self, diary: Journal, writer: ShardWriter, plan: Plan) -> Iterator[tuple[int, dict[str, Any]]]:
        """Convert block after block; yields each one's index and record: linears, sites, digests of its tensors."""
        source, start = self.source, self.chosen.start
        first = start
        for first, record in enumerate(_records(diary, map(_unit, self.chosen)), start + 1):
            yield first - 1, {**record, "resumed": True}
        self.progress("convert", first - start, len(self.chosen), writer.written)
        activity = self.activity(diary, first)
        with self.reader(range(first, self.chosen.stop)) as reader, Threads() as threads:
            for index in range(first, self.chosen.stop):
                block = _Lent(reader, BLOCK.format(index), source.blocks[index], self.device)
                smoothing = self.smooth(diary, activity, index, block, threads)
                record = self.convert_block(index, block, smoothing, plan, writer, threads)
                record["digests"] = {name: reader.digests.pop(name) for name in block.full_names()}
                writer.then(partial(diary.finish, _unit(index), record))
                for done in (_unit(index), _stream(index - 1)):  # a run would go on from this block's stream
                    writer.then(partial(diary.forget, done))
                self.progress("convert", index + 1 - start, len(self.chosen), writer.written)
                yield index, record

    def smooth(
        self,
        diary: Journal,
        activity: calibration.Calibration | Prior | None,
        index: int,
        block: Mapping[str, torch.Tensor],
        threads: Threads,
    ) -> Smoothing:
        """The smoothing of a block, by what its sites read, which is kept until the block is converted."""
        if self.recipe.smoothing is None:
            return Smoothing()
        if activity is not None and diary.state(_stream(index)) is None:
            moments = activity.advance(index, block, threads)
            kept = {f"{site}/{name}": t for site, found in moments.items() for name, t in found.tensors().items()}
            diary.keep(_unit(index), {name: tensor.cpu() for name, tensor in kept.items()})
            diary.keep(_stream(index), {"hidden": activity.hidden.cpu()})
        else:
            sites: dict[str, dict[str, torch.Tensor]] = {}
            for key, tensor in self.state(diary, _unit(index)).items():
                site, _, name = key.rpartition("/")
                sites.setdefault(site, {})[name] = tensor
            moments = {site: Moments.of(tensors, self.device) for site, tensors in sites.items()}
            if activity is not None:
                activity.hidden = self.state(diary, _stream(index))["hidden"].to(self.device)
        source = self.source
        layer, offset = source.layers[index], source.architecture.offset
        return smooth_block(block, moments, layer, source.sizes, rule_of(self.recipe), offset, threads)

    def convert_block(
        self,
        index: int,
        block: "_Lent",
        smoothing: Smoothing,
        plan: Plan,
        writer: ShardWriter,
        threads: Threads,
    ) -> dict[str, Any]:
        """Quantize one block and hand it to the writer; returns what is to be reported of it."""
        source, layer, prefix = self.source, self.source.layers[index], BLOCK.format(index)
        linears = {}
        for name in source.blocks[index]:
            linear, fold = layer.linear_of(name), smoothing.fold(name.removesuffix(".weight"))
            if linear is not None and linear not in plan.ignored[index]:
                group_size = self.recipe.group_size if linear in plan.grouped[index] else None
                take = partial(self.take, writer, prefix + name)
                loss = quantize_folded(block[name], fold, group_size, take, threads)
                self.check_range(prefix + name, loss.power)
                linears[prefix + linear] = {
                    "group_size": group_size,
                    "column_error": loss.column_error(),
                    "sqnr": loss.sqnr(),
                }
            elif name in smoothing.vectors:
                writer.add(prefix + name, smoothing.vectors[name].cpu())
            else:
                kept = fold.apply(block[name], threads) if fold else block[name]
                self.check_range(prefix + name, kept)
                writer.add(prefix + name, kept.cpu())
            block.drop(name)
        return {"linears": linears, "sites": [asdict(site) for site in smoothing.sites]}

    @staticmethod
    def take(writer: ShardWriter, name: str, start: int, codes: torch.Tensor, scale: torch.Tensor) -> None:
        """Write some rows of a quantized weight."""
        writer.add_rows(name, start, codes.cpu())
        writer.add_rows(f"{name}_scale", start, scale.cpu())

    def check_range(self, name: str, values: torch.Tensor) -> None:
        """Raises :class:`BismoothError` if a tensor, or what was summed up of it, left the range of its dtype."""
        if not values.isfinite().all():
            smoothed = " after smoothing" if self.recipe.smoothing else ""
            raise BismoothError(
                f"tensor {name} holds values beyond 1e19{smoothed}, whose squares fp32 cannot hold; no sound model has "
                "such weights, repair it"
            )


class _Lent(Mapping[str, torch.Tensor]):
    """The stored tensors of a block by name inside it, read when first asked for, on the device, until dropped."""

    def __init__(self, reader: ReadAhead, prefix: str, names: list[str], device: torch.device):
        self._reader, self._prefix, self._names, self._device = reader, prefix, names, device
        self._tensors: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._tensors:
            self._tensors[name] = self._reader.take(self._prefix + name).to(self._device)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def full_names(self) -> list[str]:
        return [self._prefix + name for name in self._names]

    def drop(self, name: str) -> None:
        self[name]  # whoever drops without a look has still been given it
        del self._tensors[name]
        self._reader.release(self._prefix + name)


def _unit(index: int) -> str:
    return f"block-{index:05d}"


def _stream(index: int) -> str:
    return f"stream-{index:05d}"


def _measured(index: int) -> str:
    return f"measured-{index:05d}"


def _carried(index: int) -> str:
    return f"carried-{index:05d}"


def _records(diary: Journal, units: Iterable[str]) -> Iterator[Any]:
    """The records of consecutive units of work, as far as an earlier run got."""
    for unit in units:
        if (record := diary.record(unit)) is None:
            return
        yield record


@dataclass(frozen=True)
class Done:
    """What an earlier run left.

    Attributes:
        grouped: the per-group linears that it chose; ``None`` if it did not.
        carried: blocks before the part through which it carried activations.
        blocks: blocks that it finished.
    """

    grouped: list[set[str]] | None
    carried: int
    blocks: int


def done_before(diary: Journal, chosen: range) -> Done:
    """What an earlier run left that was to convert these blocks."""
    known = diary.record(_GRANULARITY)
    return Done(
        None if known is None else [set(names) for names in known],
        len(list(_records(diary, map(_carried, range(chosen.start))))),
        len(list(_records(diary, map(_unit, chosen)))),
    )
