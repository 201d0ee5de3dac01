"""The conversion: open and audit -> the stages, block after block -> the files beside the weights."""

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth import __version__
from vllm_w8a8_bismooth.checkpoint import journal
from vllm_w8a8_bismooth.checkpoint.files import (
    CONFIG,
    Folder,
    check_space,
    copy,
    disk_errors,
    write_json,
)
from vllm_w8a8_bismooth.checkpoint.journal import Journal
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.writer import ShardWriter
from vllm_w8a8_bismooth.convert.destination import RECIPE, already_a_part, already_converted, refuse_overlap
from vllm_w8a8_bismooth.convert.options import chosen_by_name, ignored_by_name
from vllm_w8a8_bismooth.convert.part import write as write_part
from vllm_w8a8_bismooth.convert.plan import Plan, blocks_of, full_names, span
from vllm_w8a8_bismooth.convert.stages import Preparation, Progress, Stages
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.text import CalibrationText, tokenize
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report import card
from vllm_w8a8_bismooth.report.outcome import Report


def prepare(
    folder: Path | Folder,
    destination: Path,
    recipe: Recipe,
    text: CalibrationText | None,
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
    for name in (RECIPE, *card.OURS):
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
        reused = already_a_part(target, identity, part, source)
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
    tokens = tokenize(text, source.checkpoint, recipe.calibration_tokens) if text is not None else None
    return Preparation(target, source, recipe, where, named, ignored, tokens, identity, part)


def convert(
    folder: Path | Folder,
    destination: Path,
    recipe: Recipe,
    text: CalibrationText | None = None,
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
        copy(place.path / relative, folder / card.place_of(relative))
    write_json(folder / CONFIG, {**source.checkpoint.config, "quantization_config": plan.config()})
    # the choices first, which are compared on a second run
    write_json(folder / RECIPE, {"recipe": asdict(recipe), "provenance": provenance})
    card.write(folder, source, recipe, done, place.hub_id)


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


def _provenance(source: Source, text: CalibrationText | None, device: str) -> dict[str, Any]:
    place = source.checkpoint.place
    return {
        "vllm_w8a8_bismooth": __version__,
        "torch": torch.__version__,
        "source": place.hub_id or place.path.resolve().name,
        "revision": place.revision,
        "calibration": text.path.name if text is not None else None,
        "device": device,
    }
