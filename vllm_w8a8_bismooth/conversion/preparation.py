"""A conversion before its first write: opened, audited, and checked as far as that goes without reading weights."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth import __version__, grouping
from vllm_w8a8_bismooth.checkpoint.basis import GIVEN, Means
from vllm_w8a8_bismooth.checkpoint.files import RECIPE, Folder
from vllm_w8a8_bismooth.checkpoint.journal import NAMES
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.writer import PARTIAL, WHOLE
from vllm_w8a8_bismooth.conversion import head
from vllm_w8a8_bismooth.conversion.destination import Destination, already_a_part, already_converted
from vllm_w8a8_bismooth.conversion.options import chosen_by_name, ignored_by_name
from vllm_w8a8_bismooth.conversion.plan import blocks_of, span
from vllm_w8a8_bismooth.conversion.proposal import name_of
from vllm_w8a8_bismooth.errors import BismoothError, UnknownModel
from vllm_w8a8_bismooth.measure.arithmetic import arithmetic
from vllm_w8a8_bismooth.measure.logits import predicts_tokens
from vllm_w8a8_bismooth.measure.text import CalibrationText, sample
from vllm_w8a8_bismooth.measure.used import Used
from vllm_w8a8_bismooth.model.classes import class_of
from vllm_w8a8_bismooth.recipe import AUTO, GROUP_SIZE, INT8, Recipe, names_of_hashes
from vllm_w8a8_bismooth.report import card
from vllm_w8a8_bismooth.report.labels import Labels

_NONE = Labels()
_ALONE = Means()


@dataclass(frozen=True)
class Preparation:
    """What :func:`pipeline.convert` will do, and :func:`preview.preview` shows.

    Attributes:
        destination, target: the folder to be, as given and resolved.
        source: audited.
        recipe: complete but for the source's fingerprint.
        device: where blocks are worked on.
        named: per block, the per-group linears; ``None`` if the weights decide.
        ignored: per block, the linears that stay in float.
        tokens: int64 ``[windows, length]`` for calibration; ``None`` is data-free.
        identity: what an unfinished run must have in common with this one to be continued.
        provenance: where the choices came from, for people.
        used: what of the calibration text the tokens come from.
        part: the blocks to convert, if the result is to be a part of a checkpoint; ``None`` is all, and the whole.
        labels: for the card of a whole checkpoint.
        reused: the destination already holds the result; then ``named``, ``tokens`` and ``used`` are not known.
    """

    destination: Path
    target: Path
    source: Source
    recipe: Recipe
    device: torch.device
    named: list[set[str]] | None
    ignored: list[set[str]]
    tokens: torch.Tensor | None
    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]
    used: Used | None = None
    part: range | None = None
    reused: bool = False
    labels: Labels = _NONE

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


def prepare(
    folder: str | Path | Folder,
    destination: str | Path,
    recipe: Recipe,
    text: CalibrationText | None = None,
    device: str = "cpu",
    blocks: str | slice | range | None = None,
    labels: Labels = _NONE,
    means: Means = _ALONE,
) -> Preparation:
    """Open, audit and check everything before a conversion, and write nothing.

    Args:
        folder: of a checkpoint in safetensors.
        destination: must be absent, an empty folder, or hold the result of the same conversion.
        recipe: what to do.
        text: calibration text; without it ``bismooth`` estimates the activations from the weights.
        device: torch's name of where blocks are worked on.
        blocks: makes a part of the checkpoint, see :func:`plan.blocks_of` and :class:`part.Part`.
        means: by which the model may be laid out.
        labels: for the card. They are no part of the recipe: a checkpoint is the same with others, but for its card.

    Raises:
        BismoothError: anything wrong with the input or the destination.
        TypeError: an argument is of another kind than it should be.
    """
    if text is not None and not isinstance(text, CalibrationText):
        raise TypeError(f"text must be what measure.text.read_text returns, not {text!r}")
    place, where = Folder.of(folder), device_of(device)
    aim = Destination.of(destination, name_of(place))
    aim.refuse_overlap(place.path)
    aim.check()
    # First, because a result of ours has all the files below, too.
    source = Source(place, replace(means, untied=recipe.head == INT8))
    for name in (RECIPE, *card.OURS):
        if (place.path / name).exists():
            raise BismoothError.of(place.path / name, f"our own {name} would take its place in the copy", "rename it")
    head.check(source, recipe)
    part = None if blocks is None else blocks_of(blocks, len(source.layers))
    if source.unproven is not None and recipe.smoothing is not None:
        recipe, text = _unsmoothed(recipe, source), None
    asked, ignored = recipe, ignored_by_name(source, recipe)
    recipe = replace(
        recipe,
        calibration=text.sha256 if text is not None else None,
        calibration_tokens=recipe.calibration_tokens if text is not None else None,
        compute_dtype=_compute_dtype(recipe, text, source, where, aim),
        rounding=_rounding(recipe, text),
        group_size=_group_size(recipe, source, ignored),
        sites=source.basis.sha256 if source.known_by == GIVEN else None,
    )
    provenance = {
        "vllm_w8a8_bismooth": __version__,
        "torch": torch.__version__,
        "source": place.hub_id or place.path.resolve().name,
        "revision": place.revision,
        "calibration": text.name if text is not None else None,
        "device": device,
    }
    identity = {
        "recipe": asdict(recipe),
        "source": source.checkpoint.signature(),
        "device": where.type,
        "versions": {"vllm_w8a8_bismooth": __version__, "torch": torch.__version__},
        "layout": source.basis.identity,
        NAMES: names_of_hashes(asdict(recipe), provenance),
    }
    if part is not None:
        _check_labels(labels)
        identity["blocks"] = span(part)
        reused = already_a_part(aim, identity, part, source)
    else:
        reused = already_converted(aim, recipe, source, source.checkpoint.read_fingerprint, provenance)
    named, taken = None, None
    if not reused:
        if recipe.method == "auto":
            _check_auto(part, text, recipe, source)
        if recipe.bits is not None:
            _check_rows(part, asked, recipe, source, ignored)
        named = chosen_by_name(source, recipe, ignored)
        if text is not None:
            assert recipe.calibration_tokens is not None
            taken = sample(text, source.checkpoint, recipe.calibration_tokens)
    return Preparation(
        destination=aim.given,
        target=aim.target,
        source=source,
        recipe=recipe,
        device=where,
        named=named,
        ignored=ignored,
        tokens=None if taken is None else taken.tokens,
        identity=identity,
        provenance=provenance,
        used=None if taken is None else taken.used,
        part=part,
        reused=reused,
        labels=labels,
    )


def _unsmoothed(recipe: Recipe, source: Source) -> Recipe:
    """The recipe for a model of which no site is known; notes that it is another one than was asked for.

    Raises:
        BismoothError: transformers has such models, but not this one.
    """
    error = source.unproven
    assert error is not None
    if not isinstance(error, UnknownModel):
        raise error
    if recipe.bits is not None:
        what = "no site of the model is known, and rows of four bits come after smoothing"
        raise BismoothError.of(f"--bits {recipe.bits:g}", what, "leave --bits out, or give --sites")
    grouped = recipe.group_layers is not None
    method = "mixed" if grouped else "rtn"
    choices = {"group_size": recipe.group_size, "group_layers": recipe.group_layers} if grouped else {}
    source.notes.append(
        f"no site is known, so its linears become INT8 without smoothing and calibration (--method {method}), which "
        "outlier columns can make useless"
    )
    return Recipe.of(method, ignore=recipe.ignore, head=recipe.head, **choices)


def _compute_dtype(
    recipe: Recipe, text: CalibrationText | None, source: Source, device: torch.device, aim: Destination
) -> str | None:
    """In which dtype the tokens run through the model: what is asked for, else that of the conversion which is there
    already, finished or not, else the faster one; ``None`` is data-free."""
    if text is None or recipe.compute_dtype != AUTO:
        return None if text is None else recipe.compute_dtype
    embedding = source.checkpoint.headers[source.names.embedding]
    return aim.compute_dtype() or arithmetic(embedding.dtype, device.type)


def _rounding(recipe: Recipe, text: CalibrationText | None) -> str | None:
    """How weights are rounded: what is asked for, else as well as can be; ``None`` for methods that leave no choice.

    Raises:
        BismoothError: there is no calibration, without which nothing can be made up for.
    """
    if recipe.smoothing is None:
        return None
    if recipe.rounding == "gptq" and text is None:
        what = "makes up for errors by what calibration shows"
        raise BismoothError.of("--rounding gptq", what, "leave it out, or --calibration none")
    return recipe.rounding or ("nearest" if text is None else "gptq")


def _group_size(recipe: Recipe, source: Source, ignored: Sequence[set[str]]) -> int | None:
    """Columns per scale, or per step of 4-bit rows: what is asked for; with ``auto`` or ``bits`` else the largest of
    the usual sizes that fits all linears, but for ``bits`` those that stay in float."""
    if not (recipe.method == "auto" or recipe.bits is not None) or recipe.group_size is not None:
        return recipe.group_size
    left = ignored if recipe.bits is not None else [set()] * len(ignored)
    columns = {
        shape[1]
        for layer, names in zip(source.layers, left, strict=True)
        for linear, shape in layer.linears.items()
        if linear not in names
    }
    usual = [size for size in reversed(grouping.SIZES) if size <= GROUP_SIZE]
    return next((size for size in usual if all(grouping.fits(k, size) for k in columns)), GROUP_SIZE)


def _check_auto(part: range | None, text: CalibrationText | None, recipe: Recipe, source: Source) -> None:
    """Raises :class:`BismoothError` where ``--method auto`` lacks what it decides by."""
    if part is not None:
        raise BismoothError.of(
            "--blocks",
            "--method auto spends one budget on the blocks of the whole model, and would see only some",
            "convert on one machine, or name the linears with --method bismooth --group-size and --group-layers",
        )
    if text is None:
        what = "measures what quantization does to activations"
        remedy = "leave out --calibration none, or use --method bismooth"
        raise BismoothError.of("--method auto", what, remedy)
    if recipe.target_kl is not None and not predicts_tokens(source):
        what = f"is a divergence of predicted tokens, and the model is a {class_of(source.checkpoint.config)}"
        raise BismoothError.of("--target-kl", what, "leave it out, or give a --group-budget")


def _check_rows(part: range | None, given: Recipe, recipe: Recipe, source: Source, ignored: Sequence[set[str]]) -> None:
    """Raises :class:`BismoothError` where rows cannot have four bits, or not so few.

    Args:
        given: the recipe, whose group size is what was asked for, or ``None``.
    """
    option, bits, size = f"--bits {recipe.bits:g}", recipe.bits, recipe.group_size
    assert bits is not None and size is not None
    if part is not None:
        what = "one budget is spent on the rows of the whole model, and a part would see only some"
        raise BismoothError.of(f"{option} and --blocks", what, "convert on one machine")
    if any(layer.experts for layer in source.layers):
        what = "the model has experts, whose rows cannot have four bits yet"
        raise BismoothError.of(option, what, "leave --bits out")
    if source.checkpoint.turned:
        what = f"{next(iter(source.checkpoint.turned))} is stored transposed, and such rows cannot have four bits yet"
        raise BismoothError.of(option, what, "leave --bits out")
    four = weights = 0
    for index, layer in enumerate(source.layers):
        for linear, (rows, columns) in layer.linears.items():
            if linear in ignored[index]:
                continue
            if not grouping.fits(columns, size):
                of = f"--group-size {size}" if given.group_size else "128, 64 or 32"
                what = f"K = {columns} is not a multiple of {of}"
                raise BismoothError.of(source.names.block(index) + linear, what, "leave it in float (--ignore)")
            four, weights = four + rows * grouping.row_bits(columns, size)[0], weights + rows * columns
    if four > bits * weights:
        what = (
            f"rows of four bits take {math.ceil(1000 * four / weights) / 1000:g} with their scales, in groups of {size}"
        )
        raise BismoothError.of(option, what, "give more")


def _check_labels(labels: Labels) -> None:
    """Raises :class:`BismoothError` for labels of a part, which has no card."""
    for option, value in {"--base-model": labels.base_model, "--license": labels.license}.items():
        if value is not None:
            raise BismoothError.of(
                "--blocks", f"a part has no card, {option} has no effect", "give it to bismooth merge"
            )


def device_of(name: str) -> torch.device:
    """torch's device of that name.

    Raises:
        BismoothError: there is none.
        TypeError: it is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"device must be a string like 'cuda:1', not {name!r}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise BismoothError.of(f"--device {name}", "not one of cpu, cuda, cuda:1", "leave it out to use the CPU")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        what = str(error).splitlines()[0]
        raise BismoothError.of(f"--device {name}", what, "leave it out to use the CPU") from None
    return device
