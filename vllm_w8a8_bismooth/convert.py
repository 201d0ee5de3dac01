"""The conversion: open and audit -> the stages, block after block -> the files beside the weights."""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth import __version__, analyze, calibrate, journal, perturb, report
from vllm_w8a8_bismooth.checkpoint import CONFIG, Folder, read_json
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.journal import Journal, disk_errors, partial_folder
from vllm_w8a8_bismooth.plan import Plan, check_space, chosen_by_name, full_names, ignored_by_name
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.source import Source
from vllm_w8a8_bismooth.stages import Preparation, Progress, Stages
from vllm_w8a8_bismooth.writer import ShardWriter, copy, write_json

RECIPE = "recipe.json"


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

    def vulnerable(self) -> list[str]:
        """Linears whose weights did not survive what was done to them, worst first."""
        bad = [(-entry["column_error"], name) for name, entry in self.linears.items()]
        return [name for error, name in sorted(bad) if -error > analyze.VULNERABLE]


def prepare(
    folder: Path | Folder, destination: Path, recipe: Recipe, text: calibrate.CalibrationText | None, device: str
) -> Preparation:
    """Open, audit and check everything that :func:`convert` would, of which these are the arguments, and write nothing.

    Raises:
        BismoothError: anything wrong with the input or the destination.
    """
    # realpath, because unlike Path.resolve it survives links in a circle
    place, target, where = Folder.of(folder), Path(os.path.realpath(destination)), device_of(device)
    _refuse_overlap(place.path, target)
    source = Source(place)
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
    if already_converted(target, recipe, source):
        return Preparation(target, source, recipe, where, None, [], None, identity, reused=True)
    if recipe.method == "auto" and text is None:
        raise BismoothError("--method auto measures what quantization does to activations: give it --calibration FILE")
    ignored = ignored_by_name(source, recipe)
    named = chosen_by_name(source, recipe, ignored)
    tokens = calibrate.tokenize(text, source.checkpoint, recipe.calibration_tokens) if text is not None else None
    return Preparation(target, source, recipe, where, named, ignored, tokens, identity)


def convert(
    folder: Path | Folder,
    destination: Path,
    recipe: Recipe,
    text: calibrate.CalibrationText | None = None,
    device: str = "cpu",
    progress: Progress = lambda stage, done, total, written: None,
) -> Report:
    """Convert a checkpoint to INT8. The destination ends up whole or absent; the source is only read.

    A run that is killed leaves ``<destination>.partial``; the same call goes on from there, and the result is the same
    byte for byte.

    Args:
        folder: of a checkpoint in safetensors, of a model type in :data:`architectures.ARCHITECTURES`.
        destination: must be absent, an empty folder, or hold the result of the same conversion.
        recipe: what to do.
        text: calibration text; without it ``bismooth`` estimates the activations from the weights.
        device: torch's name of where blocks are worked on.
        progress: see :data:`Progress`.

    Raises:
        BismoothError: anything wrong with the input; see the modules that do the work.
    """
    ready = prepare(folder, destination, recipe, text, device)
    source, recipe = ready.source, ready.recipe
    if ready.reused:
        journal.clear(ready.target)  # of a run that was killed right after its last step
        return Report(destination, reused=True)
    folder, signature = source.checkpoint.folder, ready.identity["source"]
    run = Stages(ready, progress)
    done = Report(destination, source_bytes=source.nbytes(), ignored=full_names(ready.ignored))
    with Journal(ready.target, ready.identity) as diary:
        grouped = ready.named if ready.named is not None else run.granularity(diary)
        plan = Plan(source, recipe, grouped, ready.ignored)
        tensors = plan.tensors()
        with ShardWriter(diary.partial, destination, tensors) as writer:
            check_space(diary.partial, writer.nbytes - diary.nbytes())
            digests = run.outside(diary, writer)
            for index, record in run.blocks(diary, writer, plan):
                done.linears |= record["linears"]
                done.sites[index] = record["sites"]
                digests |= record["digests"]
                done.resumed += record.get("resumed", False)
            done.files, done.written_bytes = writer.finish(), writer.nbytes
            done.granularity = run.evidence(diary)
        recipe = replace(recipe, source=source.checkpoint.fingerprint(digests))
        with disk_errors(destination):
            for relative in source.checkpoint.place.side_files():
                copy(folder / relative, diary.partial / report.place_of(relative))
            write_json(diary.partial / CONFIG, {**source.checkpoint.config, "quantization_config": plan.config()})
            write_json(diary.partial / RECIPE, _record(recipe, source, text, device))
            report.write(diary.partial, source, recipe, done, source.checkpoint.place.hub_id)
        now = source.checkpoint.signature()
        if changed := [name for name in sorted(now.keys() | signature.keys()) if now.get(name) != signature.get(name)]:
            raise BismoothError(f"{folder / changed[0]}: changed during the conversion; convert again, with it at rest")
        diary.commit()
    return done


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


def _refuse_overlap(folder: Path, destination: Path) -> None:
    source = Path(os.path.realpath(folder))
    for written in (destination, partial_folder(destination)):
        if written == source or written in source.parents or source in written.parents:
            raise BismoothError(f"{written}: overlaps the source {folder}; choose a destination beside it")
    for name in (RECIPE, *report.OURS):
        if (source / name).exists():
            raise BismoothError(f"{source / name}: our own {name} would take its place in the copy; rename it")


def already_converted(destination: Path, recipe: Recipe, source: Source) -> bool:
    """Whether the destination holds the result of this recipe on this source already.

    Raises:
        BismoothError: it holds anything else.
    """
    if destination.is_symlink():
        raise BismoothError(f"{destination}: a link in a circle; remove it or choose another folder")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    if not (destination / RECIPE).is_file():
        raise BismoothError(f"{destination}: exists and is no result of bismooth; remove it or choose another folder")
    stored = read_json(destination / RECIPE).get("recipe")
    stored = stored if isinstance(stored, dict) else {}
    differences = replace(recipe, source=stored.get("source")).differences(stored)
    if not differences:  # only then is it worth reading every byte of the source
        checkpoint = source.checkpoint
        fingerprint = checkpoint.fingerprint({name: checkpoint.digest(name) for name in checkpoint.headers})
        differences = replace(recipe, source=fingerprint).differences(stored)
    if differences:
        raise BismoothError(
            f"{destination}: holds another conversion ({'; '.join(differences)}); remove it or choose another folder"
        )
    return True


def _record(recipe: Recipe, source: Source, text: calibrate.CalibrationText | None, device: str) -> dict[str, Any]:
    """recipe.json: the choices first (compared on a second run), then where they came from."""
    place = source.checkpoint.place
    return {
        "recipe": asdict(recipe),
        "provenance": {
            "vllm_w8a8_bismooth": __version__,
            "torch": torch.__version__,
            "source": place.hub_id or place.path.resolve().name,
            "revision": place.revision,
            "calibration": text.path.name if text is not None else None,
            "device": device,
        },
    }
