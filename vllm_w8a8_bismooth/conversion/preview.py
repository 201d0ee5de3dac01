"""What a conversion would do, known without writing anything."""

from dataclasses import dataclass, field
from pathlib import Path

from vllm_w8a8_bismooth.checkpoint.blocks import finished
from vllm_w8a8_bismooth.checkpoint.files import check_space, free_space
from vllm_w8a8_bismooth.checkpoint.journal import Journal
from vllm_w8a8_bismooth.checkpoint.writer import split
from vllm_w8a8_bismooth.conversion import head
from vllm_w8a8_bismooth.conversion.estimate import needs
from vllm_w8a8_bismooth.conversion.options import already_float
from vllm_w8a8_bismooth.conversion.plan import Plan, evenly, full_names
from vllm_w8a8_bismooth.conversion.preparation import Preparation
from vllm_w8a8_bismooth.conversion.rates import measured as measured_rates
from vllm_w8a8_bismooth.conversion.stages import CARRY, CONVERT, GRANULARITY
from vllm_w8a8_bismooth.measure import calibration, perturbation, sensitivity
from vllm_w8a8_bismooth.measure.arithmetic import faster
from vllm_w8a8_bismooth.measure.used import Used
from vllm_w8a8_bismooth.recipe import BF16
from vllm_w8a8_bismooth.report import card
from vllm_w8a8_bismooth.report.labels import Labels


@dataclass
class Preview:
    """What :func:`pipeline.convert` would do with the same arguments.

    Attributes:
        destination: the folder to be.
        reused: it already holds the result; then what follows is empty, but for the card.
        relabelled: what the card of a reused one would be drawn up anew to say; ``None`` if it stays as it is.
        source_bytes, written_bytes: sizes of all tensors, as they are stored.
        quantized: how the source stores weights in FP8 or FP4; ``None`` if it does not.
        shards: file -> bytes of its tensors.
        grouped: full names of per-group linears; ``None`` if the weights decide, and sizes are those of none.
        ignored: full names of linears that stay in float.
        already_float: see :class:`outcome.Outcome`.
        tokens: of calibration text.
        used: what of the text they come from.
        compute_dtype: in which they will run through the model, as torch calls it.
        part: its first block, and the one behind the last, if a part would be made; ``None`` is a whole checkpoint.
        blocks, resumed: how many are to be converted, and how many of them an interrupted run has done.
        memory_bytes, seconds: see :class:`estimate.Needs`; the time is that of what is still to do.
        free_bytes: on the destination's disk.
        left_out: files of the source that are not copied -> bytes.
        notes: what the user should know of the source.
    """

    destination: Path
    reused: bool
    relabelled: Labels | None = None
    source_bytes: int = 0
    written_bytes: int = 0
    quantized: str | None = None
    shards: dict[str, int] | None = None
    grouped: list[str] | None = None
    ignored: list[str] | None = None
    already_float: list[str] = field(default_factory=list)
    tokens: int | None = None
    used: Used | None = None
    compute_dtype: str | None = None
    part: tuple[int, int] | None = None
    blocks: int = 0
    resumed: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0
    free_bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def preview(ready: Preparation) -> Preview:
    """Check what :func:`pipeline.convert` would before its first write, and say what it would do.

    Raises:
        BismoothError: whatever the conversion would refuse before it reads the weights, or draws up a card anew.
    """
    part = None if ready.part is None else (ready.part.start, ready.part.stop)
    if ready.reused:
        labels = card.labels_to_write(ready.target, ready.labels) if part is None else None
        return Preview(ready.destination, reused=True, relabelled=labels, part=part)
    source, journal = ready.source, Journal(ready.target, ready.identity)
    journal.look()
    grouped = ready.named
    if grouped is None and (known := journal.record(GRANULARITY)) is not None:
        grouped = [set(names) for names in known]
    wide = None if ready.recipe.bits is None else evenly(source, ready.recipe)
    plan = Plan(source, ready.recipe, grouped or [set()] * len(source.layers), ready.ignored, wide)
    tensors = plan.tensors(ready.part)
    files = split(tensors, ready.stem).filename_to_tensors
    shards = {file: sum(tensors[name].nbytes for name in names) for file, names in files.items()}
    written = sum(shards.values())
    check_space(journal.partial, written + source.checkpoint.companion_nbytes() - journal.nbytes())
    tokens = None
    if ready.tokens is not None:
        assert ready.recipe.compute_dtype is not None
        # transformers may refuse the config
        calibration.Calibration(source, ready.tokens, ready.device, ready.recipe.compute_dtype)
        tokens = ready.tokens.numel()
    measured = 0
    if ready.recipe.method == "auto":
        units = max(len(sensitivity.measured_units(layer)) for layer in source.layers)
        measured = perturbation.SAMPLE * (1 + sensitivity.DRAWS + 4 * units)
    elif ready.recipe.bits is not None and tokens is not None:
        measured = perturbation.SAMPLE * (2 + sensitivity.DRAWS)
    resumed = finished(journal, CONVERT, ready.blocks)
    before = range(ready.blocks.start if ready.recipe.smoothing and not resumed else 0)
    left = range(finished(journal, CARRY, before), before.stop)
    compensated, blocks = ready.recipe.rounding == "gptq", ready.blocks[resumed:]
    rates = measured_rates(source, ready.recipe.compute_dtype, faster() if ready.recipe.compute_dtype == BF16 else None)
    need = needs(source, tokens, rates, measured, blocks, left, compensated)
    return Preview(
        destination=ready.destination,
        reused=False,
        source_bytes=source.stored_nbytes(ready.part),
        quantized=source.checkpoint.quantized,
        written_bytes=written,
        shards=shards,
        grouped=None if grouped is None else full_names(ready.within(grouped), ready.source.names),
        ignored=full_names(ready.within(ready.ignored), ready.source.names),
        already_float=already_float(source, ready.recipe),
        tokens=tokens,
        used=ready.used,
        compute_dtype=ready.recipe.compute_dtype,
        part=part,
        blocks=len(ready.blocks),
        resumed=resumed,
        memory_bytes=need.memory_bytes,
        seconds=need.seconds,
        free_bytes=free_space(journal.partial),
        left_out=source.checkpoint.left_out(),
        notes=source.notes + head.notes(source.checkpoint, source.tied),
    )
