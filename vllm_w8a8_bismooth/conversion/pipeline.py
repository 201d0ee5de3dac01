"""The conversion: the stages, block after block, and then the files beside the weights."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.checkpoint.blocks import Run
from vllm_w8a8_bismooth.checkpoint.companions import companions
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, RECIPE, check_space, copy, disk_errors, write_json
from vllm_w8a8_bismooth.checkpoint.journal import Journal, clear
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.writer import ShardWriter
from vllm_w8a8_bismooth.conversion import head, part
from vllm_w8a8_bismooth.conversion.options import already_float
from vllm_w8a8_bismooth.conversion.plan import Plan, full_names
from vllm_w8a8_bismooth.conversion.preparation import Preparation, prepare
from vllm_w8a8_bismooth.conversion.stages import Stages
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.method.rows import Threads
from vllm_w8a8_bismooth.progress import Progress, silent
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report import card, figures, record
from vllm_w8a8_bismooth.report.labels import Labels
from vllm_w8a8_bismooth.report.outcome import Outcome

__all__ = ["complete", "convert", "prepare"]


def convert(ready: Preparation, progress: Progress = silent) -> Outcome:
    """Convert a checkpoint, or some of its blocks, to INT8.

    The destination ends up whole or absent; the source is only read. A run that is killed leaves
    ``<destination>.partial``; the same call goes on from there, and the result is the same byte for byte.

    Args:
        ready: by :func:`preparation.prepare`.
        progress: shows the stages ``calibrate``, ``analyze``, ``carry`` and ``convert``.

    Raises:
        BismoothError: anything wrong with the input; see the modules that do the work.
    """
    source = ready.source
    if ready.reused:
        clear(ready.target)  # of a run that was killed right after its last step
        return _read_back(ready)
    outcome = _outcome(ready)
    outcome.used = ready.used
    threads = Threads()
    with Journal(ready.target, ready.identity) as journal:
        stages = Stages(ready, Run(source, ready.device, journal, progress), threads)
        with threads:
            plan = Plan(source, ready.recipe, stages.granularity(), ready.ignored, stages.wide())
        tensors = plan.tensors(ready.part)
        # The threads end before the shards are closed, into which they write.
        turned, stem = source.checkpoint.turned, ready.stem
        with (
            Drawing(journal.partial, ready) as drawing,
            ShardWriter(journal.partial, ready.destination, tensors, stem, turned) as writer,
            threads,
        ):
            check_space(journal.partial, writer.nbytes + source.checkpoint.companion_nbytes() - journal.nbytes())
            checksums = stages.carry() | stages.outside(writer)
            checksum, outcome.linears = stages.head(writer)
            walk = stages.convert(plan, writer)
            for index, record in walk.records.items():
                outcome.linears |= record["linears"]
                outcome.sites[index] = record["sites"]
            drawing.begin(outcome)
            outcome.files, outcome.written_bytes = writer.finish(), writer.nbytes
        outcome.resumed = walk.resumed
        outcome.notes += [*outcome.unread(), *_unmeasured(ready, outcome)]
        outcome.granularity, outcome.estimated_kl = stages.evidence(), stages.estimate()
        _finish(journal.partial, ready, plan, outcome, checksums | checksum | walk.checksums)
        journal.commit()
    return outcome


class Drawing:
    """Draws the figures of a whole checkpoint while its shards are flushed and hashed. matplotlib, whose import takes
    longer than a block of a small model, comes in while blocks are worked on.

    Use as a context manager, which ends when they are drawn.

    Args:
        folder: to write into.
        ready: what is being done.
    """

    def __init__(self, folder: Path, ready: Preparation):
        self._folder, self._destination = folder, ready.destination
        self._thread = ThreadPoolExecutor(1) if ready.part is None else None
        self._drawn: Future | None = None

    def __enter__(self) -> "Drawing":
        if self._thread is not None:
            self._thread.submit(figures.available)
        return self

    def begin(self, outcome: Outcome) -> None:
        """Draw what was made of the blocks."""
        if self._thread is not None:
            self._drawn = self._thread.submit(card.draw, self._folder, outcome)

    def __exit__(self, kind, error, trace) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        if self._drawn is not None and error is None:
            with disk_errors(self._destination):
                self._drawn.result()


def _outcome(ready: Preparation) -> Outcome:
    """What is known of an outcome from the source and the options alone."""
    source = ready.source
    outcome = Outcome(ready.destination, source.stored_nbytes(ready.part), part=ready.part, blocks=len(source.layers))
    outcome.quantized = source.checkpoint.quantized
    outcome.left_out, outcome.notes = source.checkpoint.left_out(), [*source.notes]
    if source.outside_with(ready.blocks):
        outcome.notes += head.notes_with_values(source.checkpoint, source.tied)
    outcome.ignored = full_names(ready.within(ready.ignored), source.names)
    outcome.already_float, outcome.floats = already_float(source, ready.recipe), source.kept_in_float()
    return outcome


def _unmeasured(ready: Preparation, outcome: Outcome) -> list[str]:
    """A sentence without its full stop on sites inside experts of which calibration could not see what they read."""
    if ready.tokens is None or ready.recipe.smoothing is None:
        return []
    seen = {index: {site["site"] for site in sites} for index, sites in outcome.sites.items()}
    layers = ready.source.layers
    left = [f"{site.name} in block {i}" for i in seen for site in layers[i].sites if site.name not in seen[i]]
    what = "experts that compute something unusual are not taken apart, and what is inside them was not measured"
    return [f"{what}: {len(left)} sites, like {left[0]}, are left as they are"] if left else []


def _read_back(ready: Preparation) -> Outcome:
    """The outcome of the conversion that the destination holds already."""
    outcome = _outcome(ready)
    outcome.reused = True
    if ready.part is None:
        record.read(ready.target, outcome)
        outcome.relabelled = card.relabel(ready.target, ready.labels)
        outcome.labels = card.labels_of(ready.target)
    else:
        part.read(ready.target, outcome)
    return outcome


def _finish(folder: Path, ready: Preparation, plan: Plan, outcome: Outcome, checksums: Mapping[str, str]) -> None:
    """Write what stands beside the shards, unless the source has changed meanwhile."""
    checkpoint = ready.source.checkpoint
    with disk_errors(ready.destination):
        outcome.recipe = ready.recipe
        if ready.part is not None:
            part.write(folder, ready.source, ready.identity, ready.provenance, checksums, outcome)
        else:
            outcome.recipe = replace(ready.recipe, source=checkpoint.fingerprint(checksums))
            complete(folder, ready.source, outcome.recipe, plan, outcome, ready.provenance, ready.labels)
    before, now = ready.identity["source"], checkpoint.signature()
    if changed := [name for name in sorted(now.keys() | before.keys()) if now.get(name) != before.get(name)]:
        remedy = "convert again, with it at rest"
        raise BismoothError.of(checkpoint.folder / changed[0], "changed during the conversion", remedy)


def complete(
    folder: Path,
    source: Source,
    recipe: Recipe,
    plan: Plan,
    outcome: Outcome,
    provenance: Mapping[str, Any],
    labels: Labels,
) -> None:
    """Write everything that stands beside the shards of a whole checkpoint.

    Args:
        folder: to write into.
        source: what was converted; of its tensors only the headers count.
        recipe: with the source's fingerprint.
        plan: of the whole.
        outcome: what was made of each block.
        provenance: where the choices came from, for people.
        labels: for the card.
    """
    place = source.checkpoint.place
    outcome.beside = []
    for file in companions(place):
        target = card.place_of(Path(file))
        copy(place.path / file, folder / target)
        outcome.beside.append(target.as_posix())
    write_json(folder / CONFIG, {**source.checkpoint.config, "quantization_config": plan.config()})
    # the choices first, which are compared on a second run
    chosen = {"recipe": asdict(recipe), "provenance": provenance, "layout": source.basis.json()}
    write_json(folder / RECIPE, chosen, compact=("layout",))
    outcome.labels = card.write(folder, outcome, labels)
