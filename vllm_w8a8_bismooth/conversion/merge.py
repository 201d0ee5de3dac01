"""Parts, each of which a machine converted, become the checkpoint that one machine would have written."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.checkpoint.files import check_space, disk_errors, free_space
from vllm_w8a8_bismooth.checkpoint.journal import Journal, clear, readable
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.writer import NAMES, ShardWriter
from vllm_w8a8_bismooth.conversion import head
from vllm_w8a8_bismooth.conversion.destination import Destination, already_converted
from vllm_w8a8_bismooth.conversion.options import already_float, ignored_by_name
from vllm_w8a8_bismooth.conversion.part import AGAIN, PART, Part
from vllm_w8a8_bismooth.conversion.pipeline import complete
from vllm_w8a8_bismooth.conversion.plan import Plan, full_names, span
from vllm_w8a8_bismooth.conversion.proposal import name_of
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted, Problem
from vllm_w8a8_bismooth.method.rows import Threads
from vllm_w8a8_bismooth.progress import Progress, silent
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report import card, record
from vllm_w8a8_bismooth.report.labels import Labels
from vllm_w8a8_bismooth.report.outcome import Outcome

_NONE = Labels()
_PIECE = 2**22


@dataclass(frozen=True)
class Merger:
    """Parts that fit together, before the first write.

    Attributes:
        destination, target: the folder to be, as given and resolved.
        parts: in the order of their blocks.
        source: what they were made from, but for the values of its tensors.
        recipe: with the source's fingerprint.
        plan: of the whole.
        tensors: of the whole, without data.
        free_bytes: on the destination's disk.
        reused: the destination already holds the result.
        labels: for the card.
    """

    destination: Path
    target: Path
    parts: list[Part]
    source: Source
    recipe: Recipe
    plan: Plan
    tensors: dict[str, Any]
    free_bytes: int
    reused: bool
    labels: Labels

    def relabelled(self) -> Labels | None:
        """What the card of a reused result will be drawn up anew to say; see :func:`card.labels_to_write`."""
        return card.labels_to_write(self.target, self.labels) if self.reused else None

    def nbytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def journal(self) -> Journal:
        """This merge's journal; a merge of other parts never resumes it."""
        return Journal(self.target, {"parts": {span(part.blocks): part.digest for part in self.parts}})


def prepare(folders: Sequence[str | Path], destination: str | Path, labels: Labels = _NONE) -> Merger:
    """Check all that can be checked of parts without reading their tensors, and write nothing.

    Args:
        folders: of the parts, in any order.
        destination: must be absent, an empty folder, or hold the same result.
        labels: for the card of the result.

    Raises:
        BismoothError: with all problems that the parts have.
    """
    if not folders:
        raise BismoothError.of("merge", "no parts were named", "name the folders of all parts")
    parts = _open([Path(folder) for folder in folders])
    first = parts[0]
    place = Destination.of(destination, name_of(first.source().checkpoint.place))
    for part in parts:
        place.refuse_overlap(part.folder, "part")
    place.check()
    _refuse(line for part in parts for line in part.problems())
    _refuse(_unlike(parts))
    source = first.source()
    _refuse(_uncovered(parts, len(source.layers)))
    checksums = {name: digest for part in parts for name, digest in part.checksums.items()}
    fingerprint = source.checkpoint.fingerprint(checksums)
    recipe = replace(first.recipe, source=fingerprint)
    grouped: list[set[str]] = [set() for _ in source.layers]
    for linear, entry in (item for part in parts for item in part.linears.items()):
        if entry["group_size"] is not None:
            index, name = source.place_of(linear)
            grouped[index].add(name)
    plan = Plan(source, recipe, grouped, ignored_by_name(source, recipe))
    _refuse(line for part in parts for line in _strangers(part, plan))
    reused = already_converted(place, recipe, source, lambda: fingerprint, first.provenance)
    target, room = place.target, free_space(place.target)
    ready = Merger(place.given, target, parts, source, recipe, plan, plan.tensors(), room, reused, labels)
    if not reused:
        journal = ready.journal()
        journal.look()
        check_space(journal.partial, ready.nbytes() - journal.nbytes())
    return ready


def merge(ready: Merger, progress: Progress = silent) -> Outcome:
    """Make a checkpoint of its parts. The destination ends up whole or absent; the parts are only read.

    The result is what :func:`pipeline.convert` would have written at once, byte for byte. A run that is killed leaves
    ``<destination>.partial``; the same call goes on from there.

    Args:
        ready: by :func:`prepare`.
        progress: counts shards of the parts.

    Raises:
        BismoothError: a part is damaged.
    """
    source, plan, destination = ready.source, ready.plan, ready.destination
    outcome = Outcome(
        destination,
        source.stored_nbytes(),
        blocks=len(source.layers),
        quantized=source.checkpoint.quantized,
        notes=source.notes + head.notes(source.checkpoint, source.tied),
    )
    outcome.already_float, outcome.floats = already_float(source, ready.recipe), source.kept_in_float()
    if ready.reused:
        clear(ready.target)  # of a run that was killed right after its last step
        outcome.reused = True
        record.read(ready.target, outcome)
        outcome.relabelled = card.relabel(ready.target, ready.labels)
        outcome.labels = card.labels_of(ready.target)
        return outcome
    outcome.ignored, outcome.recipe = full_names(plan.ignored, source.names), ready.recipe
    outcome.used = ready.parts[0].used
    for part in ready.parts:
        outcome.linears |= part.linears
        outcome.sites |= part.sites
    outcome.notes += outcome.unread()
    with ready.journal() as journal:
        with ShardWriter(journal.partial, destination, ready.tensors) as writer:
            _copy_all(ready.parts, journal, writer, progress)
            outcome.files, outcome.written_bytes = writer.finish(), writer.nbytes
        with disk_errors(destination):
            card.draw(journal.partial, outcome)
            complete(journal.partial, source, ready.recipe, plan, outcome, ready.parts[0].provenance, ready.labels)
        journal.commit()
    return outcome


def _open(folders: Sequence[Path]) -> list[Part]:
    """The parts, in the order of their blocks; raises with the problems of all."""
    found: list[Part] = []
    problems: list[Problem] = []
    for folder in folders:
        try:
            found.append(Part(folder))
        except BismoothError as error:
            problems += error.problems
    if problems:
        raise BismoothError(*problems)
    return sorted(found, key=lambda part: (part.blocks.start, part.blocks.stop))


def _refuse(problems: Iterable[Problem]) -> None:
    if found := list(problems):
        raise BismoothError(*found)


def _unlike(parts: Sequence[Part]) -> Iterator[Problem]:
    """Parts that are not of the same conversion as an earlier one."""
    for number, part in enumerate(parts):
        for other in parts[:number]:
            found = part.unlike(other.identity, other.outline, other.checksums)
            if lines := readable(found, {**part.names(), **other.names()}):
                more = f", and {len(lines) - 4} more" if len(lines) > 4 else ""
                yield Problem(
                    str(part.folder),
                    f"of another conversion than {other.folder} ({'; '.join(lines[:4])}{more})",
                    "convert one of them again, with the options and the source of the other",
                )
                break


def _uncovered(parts: Sequence[Part], count: int) -> Iterator[Problem]:
    """Blocks that are in no part, or in two."""
    reached, last = 0, parts[0]
    for part in parts:
        start, stop = part.blocks.start, part.blocks.stop
        if start > reached:
            yield _missing(reached, start)
        elif start < reached:
            blocks = span(range(start, min(stop, reached)))
            what = f"blocks {blocks} are in {last.folder} and in {part.folder}"
            yield Problem("merge", what, "leave one of the parts out")
        if stop > reached:
            reached, last = stop, part
    if reached < count:
        yield _missing(reached, count)


def _missing(start: int, stop: int) -> Problem:
    blocks = span(range(start, stop))
    remedy = f"name the part that holds them too, or convert them with --blocks {blocks}"
    return Problem("merge", f"blocks {blocks} are in none of the parts", remedy)


def _strangers(part: Part, plan: Plan) -> Iterator[Problem]:
    """Tensors that a part's blocks do not have, or have otherwise."""
    expected = {name: (NAMES[t.dtype], list(t.shape)) for name, t in plan.tensors(part.blocks).items()}
    for shard in part.shards:
        for name, entry in part.header(shard)[1].items():
            if expected.pop(name, None) != (entry["dtype"], entry["shape"]):
                yield Problem(str(part.folder / shard), f"tensor {name} is not as {PART} has it", AGAIN)
    for name in expected:
        yield Problem(str(part.folder), f"tensor {name} is in none of its files", AGAIN)


def _copy_all(parts: Sequence[Part], journal: Journal, writer: ShardWriter, progress: Progress) -> None:
    """Copy the tensors of all parts to their places, several shards at a time, but for those that the journal has."""
    shards = [(part, shard) for part in parts for shard in part.shards]
    left = [(part, shard) for part, shard in shards if journal.record(_unit(part, shard)) is None]
    before = len(shards) - len(left)
    progress("merge", before, len(shards), 0)
    with Threads() as threads:
        copied = threads.map(lambda item: _copy(item[0], item[1], writer), left)
        for done, ((part, shard), _) in enumerate(zip(left, copied, strict=True), before + 1):
            writer.then(partial(journal.finish, _unit(part, shard), True))
            progress("merge", done, len(shards), writer.written)


def _unit(part: Part, shard: str) -> str:
    return f"{part.blocks.start}-{shard}"


def _copy(part: Part, shard: str, writer: ShardWriter) -> None:
    """Copy a shard's tensors to their places.

    Raises:
        BismoothError: it is not what was written when the part was made.
        Interrupted: it can no longer be read.
    """
    begin, entries = part.header(shard)
    digest, path = hashlib.sha256(), part.folder / shard
    try:
        with open(path, "rb", buffering=0) as file:
            digest.update(file.read(begin))
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                first, last = entry["data_offsets"]
                for start in range(first, last, _PIECE):
                    piece = file.read(min(_PIECE, last - start))
                    digest.update(piece)
                    writer.add_bytes(name, start - first, memoryview(piece))
    except OSError as error:
        remedy = "run the same command again once it can, it goes on where it stopped"
        raise Interrupted.of(path, f"can no longer be read ({error})", remedy) from None
    if digest.hexdigest() != part.shards[shard]:
        raise BismoothError.of(path, "does not have the SHA-256 that it had when it was written", AGAIN)
