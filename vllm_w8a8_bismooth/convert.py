"""The conversion: open and audit -> the stages, block after block -> the files beside the weights."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth import __version__, analyze, calibrate, journal, perturb, report
from vllm_w8a8_bismooth.checkpoint import CONFIG, Folder, read_json
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.journal import Journal, disk_errors, partial_folder
from vllm_w8a8_bismooth.part import PART, Part, outline_of
from vllm_w8a8_bismooth.part import write as write_part
from vllm_w8a8_bismooth.plan import Plan, blocks_of, check_space, chosen_by_name, full_names, ignored_by_name, span
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.source import Source
from vllm_w8a8_bismooth.stages import Preparation, Progress, Stages
from vllm_w8a8_bismooth.writer import ShardWriter, copy, write_json

RECIPE = "recipe.json"
_MARKS = {RECIPE: "a whole checkpoint", PART: "a part of a checkpoint"}


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        destination: the written folder.
        granularity: what spoke for and against per-group scales, if that was measured.
        source_bytes, written_bytes: sizes of all tensors.
        linears: full linear name -> ``group_size`` (``None`` = per-channel), ``column_error`` and ``sqnr`` in dB of
            what was written.
        ignored: full names of the linears that were left in float.
        sites: block index -> what was folded at each site.
        files: shard -> SHA-256.
        resumed: blocks that an earlier, interrupted run had done.
        reused: the destination already held this very conversion, and nothing was done.
        part: its blocks, if a part was made; ``None`` is a whole checkpoint.
        blocks: how many the model has.
    """

    destination: Path
    source_bytes: int = 0
    written_bytes: int = 0
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    sites: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    granularity: list[perturb.Evidence] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    resumed: int = 0
    reused: bool = False
    part: range | None = None
    blocks: int = 0

    def vulnerable(self) -> list[str]:
        """Linears whose weights did not survive what was done to them, worst first."""
        bad = [(-entry["column_error"], name) for name, entry in self.linears.items()]
        return [name for error, name in sorted(bad) if -error > analyze.VULNERABLE]


def prepare(
    folder: Path | Folder,
    destination: Path,
    recipe: Recipe,
    text: calibrate.CalibrationText | None,
    device: str,
    blocks: slice | None = None,
) -> Preparation:
    """Open, audit and check everything that :func:`convert` would, of which these are the arguments, and write nothing.

    Raises:
        BismoothError: anything wrong with the input or the destination.
    """
    # realpath, because unlike Path.resolve it survives links in a circle
    place, target, where = Folder.of(folder), Path(os.path.realpath(destination)), device_of(device)
    refuse_overlap(place.path, target)
    for name in (RECIPE, *report.OURS):
        if (place.path / name).exists():
            raise BismoothError(f"{place.path / name}: our own {name} would take its place in the copy; rename it")
    source = Source(place)
    part = None if blocks is None else blocks_of(blocks, len(source.layers))
    recipe = replace(
        recipe,
        calibration=text.sha256 if text is not None else None,
        calibration_tokens=recipe.calibration_tokens if text is not None else None,
    )
    identity = {
        "recipe": asdict(recipe),
        "source": source.checkpoint.signature(),
        "device": where.type,
        "versions": {"vllm_w8a8_bismooth": __version__, "torch": torch.__version__},
    }
    if part is not None:
        identity["blocks"] = span(part)
        reused = _already_a_part(target, identity, part, source)
    else:
        reused = already_converted(target, recipe, source.checkpoint.read_fingerprint)
    if reused:
        return Preparation(target, source, recipe, where, None, [], None, identity, part, reused=True)
    if recipe.method == "auto" and part is not None:
        raise BismoothError(
            "--method auto spends one budget on the blocks of the whole model, of which --blocks sees some: convert on "
            "one machine, or name the linears with --method bismooth --group-size and --group-layers"
        )
    if recipe.method == "auto" and text is None:
        raise BismoothError("--method auto measures what quantization does to activations: give it --calibration FILE")
    ignored = ignored_by_name(source, recipe)
    named = chosen_by_name(source, recipe, ignored)
    tokens = calibrate.tokenize(text, source.checkpoint, recipe.calibration_tokens) if text is not None else None
    return Preparation(target, source, recipe, where, named, ignored, tokens, identity, part)


def convert(
    folder: Path | Folder,
    destination: Path,
    recipe: Recipe,
    text: calibrate.CalibrationText | None = None,
    device: str = "cpu",
    progress: Progress = lambda stage, done, total, written: None,
    blocks: slice | None = None,
) -> Report:
    """Convert a checkpoint, or some of its blocks, to INT8.

    The destination ends up whole or absent; the source is only read.

    A run that is killed leaves ``<destination>.partial``; the same call goes on from there, and the result is the same
    byte for byte.

    Args:
        folder: of a checkpoint in safetensors, of a model type in :data:`architectures.ARCHITECTURES`.
        destination: must be absent, an empty folder, or hold the result of the same conversion.
        recipe: what to do.
        text: calibration text; without it ``bismooth`` estimates the activations from the weights.
        device: torch's name of where blocks are worked on.
        progress: see :data:`Progress`.
        blocks: makes a part of the checkpoint, see :class:`part.Part`, for :func:`merge.merge`.

    Raises:
        BismoothError: anything wrong with the input; see the modules that do the work.
    """
    ready = prepare(folder, destination, recipe, text, device, blocks)
    source, recipe, part = ready.source, ready.recipe, ready.part
    if ready.reused:
        journal.clear(ready.target)  # of a run that was killed right after its last step
        return Report(destination, reused=True, part=part, blocks=len(source.layers))
    folder, signature = source.checkpoint.folder, ready.identity["source"]
    run = Stages(ready, progress)
    done = Report(destination, source.nbytes(part), part=part, blocks=len(source.layers))
    done.ignored = full_names(ready.within(ready.ignored))
    with Journal(ready.target, ready.identity) as diary:
        grouped = ready.named if ready.named is not None else run.granularity(diary)
        plan = Plan(source, recipe, grouped, ready.ignored)
        with ShardWriter(diary.partial, destination, plan.tensors(part), ready.stem) as writer:
            check_space(diary.partial, writer.nbytes - diary.nbytes())
            digests = run.carried(diary) | run.outside(diary, writer)
            for index, record in run.blocks(diary, writer, plan):
                done.linears |= record["linears"]
                done.sites[index] = record["sites"]
                digests |= record["digests"]
                done.resumed += record.get("resumed", False)
            done.files, done.written_bytes = writer.finish(), writer.nbytes
            done.granularity = run.evidence(diary)
        provenance = _provenance(source, text, device)
        with disk_errors(destination):
            if part is not None:
                write_part(diary.partial, source, ready.identity, provenance, digests, done)
            else:
                recipe = replace(recipe, source=source.checkpoint.fingerprint(digests))
                complete(diary.partial, source, recipe, plan, done, provenance)
        now = source.checkpoint.signature()
        if changed := [name for name in sorted(now.keys() | signature.keys()) if now.get(name) != signature.get(name)]:
            raise BismoothError(f"{folder / changed[0]}: changed during the conversion; convert again, with it at rest")
        diary.commit()
    return done


def complete(
    folder: Path, source: Source, recipe: Recipe, plan: Plan, done: Report, provenance: Mapping[str, Any]
) -> None:
    """Write everything that stands beside the shards of a whole checkpoint.

    Args:
        folder: to write into.
        source: what was converted; of its tensors only the headers count.
        recipe: with the source's fingerprint.
        plan: of the whole.
        done: what was made of each block.
        provenance: where the choices came from, for people.
    """
    place = source.checkpoint.place
    for relative in place.side_files():
        copy(place.path / relative, folder / report.place_of(relative))
    write_json(folder / CONFIG, {**source.checkpoint.config, "quantization_config": plan.config()})
    # the choices first, which are compared on a second run
    write_json(folder / RECIPE, {"recipe": asdict(recipe), "provenance": provenance})
    report.write(folder, source, recipe, done, place.hub_id)


def device_of(name: str) -> torch.device:
    """torch's device of that name.

    Raises:
        BismoothError: there is none.
    """
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise BismoothError(f"--device {name}: {str(error).splitlines()[0]}; leave it out to use the CPU") from None
    return device


def refuse_overlap(folder: Path, destination: Path, what: str = "source") -> None:
    """Raises :class:`BismoothError` if what is written would lie in a folder that is read, or around it."""
    read = Path(os.path.realpath(folder))
    for written in (destination, partial_folder(destination)):
        if written == read or written in read.parents or read in written.parents:
            raise BismoothError(f"{written}: overlaps the {what} {folder}; choose a destination beside it")


def _is_free(destination: Path, mark: str) -> bool:
    """Whether nothing is at the destination; raises if what is there lacks the file that marks what is to be there."""
    if destination.is_symlink():
        raise BismoothError(f"{destination}: a link in a circle; remove it or choose another folder")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return True
    found = [name for name in _MARKS if (destination / name).is_file()]
    if mark not in found:
        what = f"holds {_MARKS[found[0]]}" if found else "exists and is no result of bismooth"
        raise BismoothError(f"{destination}: {what}; remove it or choose another folder")
    return False


def _refuse_another(destination: Path, differences: Sequence[str]) -> None:
    if differences:
        more = ["..."] if len(differences) > 10 else []
        raise BismoothError(
            f"{destination}: holds another conversion ({'; '.join([*differences[:10], *more])}); "
            "remove it or choose another folder"
        )


def _already_a_part(destination: Path, identity: Mapping[str, Any], blocks: range, source: Source) -> bool:
    """Whether the destination holds just this part already; raises as :func:`already_converted`."""
    if _is_free(destination, PART):
        return False
    found, outline = Part(destination), outline_of(source)
    if found.blocks != blocks:
        _refuse_another(destination, [f"blocks: {span(found.blocks)} there, {span(blocks)} now"])
    _refuse_another(destination, found.unlike(identity, outline, {}))
    checksums = {name: source.checkpoint.digest(name) for name in found.checksums}
    _refuse_another(destination, found.unlike(identity, outline, checksums))
    return True


def already_converted(destination: Path, recipe: Recipe, fingerprint: Callable[[], str]) -> bool:
    """Whether the destination holds the result of this recipe already, on the source with this fingerprint.

    Raises:
        BismoothError: it holds anything else.
    """
    if _is_free(destination, RECIPE):
        return False
    stored = read_json(destination / RECIPE).get("recipe")
    stored = stored if isinstance(stored, dict) else {}
    differences = replace(recipe, source=stored.get("source")).differences(stored)
    if not differences:  # only then is it worth reading every byte of the source
        differences = replace(recipe, source=fingerprint()).differences(stored)
    _refuse_another(destination, differences)
    return True


def _provenance(source: Source, text: calibrate.CalibrationText | None, device: str) -> dict[str, Any]:
    place = source.checkpoint.place
    return {
        "vllm_w8a8_bismooth": __version__,
        "torch": torch.__version__,
        "source": place.hub_id or place.path.resolve().name,
        "revision": place.revision,
        "calibration": text.path.name if text is not None else None,
        "device": device,
    }
