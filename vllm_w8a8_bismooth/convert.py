"""The conversion: open and audit -> choose granularity -> calibrate -> per block: smooth, quantize, write."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth import __version__, analyze, calibrate
from vllm_w8a8_bismooth.architectures import BLOCK, Architecture, architecture_of, audit, sizes_of
from vllm_w8a8_bismooth.checkpoint import CONFIG, Checkpoint, read_json
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.quantize import quantize_weight
from vllm_w8a8_bismooth.recipe import Recipe, group_targets, quantization_config
from vllm_w8a8_bismooth.smooth import smooth_block
from vllm_w8a8_bismooth.writer import CheckpointWriter, partial_folder

RECIPE = "recipe.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PROBLEMS_SHOWN = 8
_BLOCK_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, blocks_done, blocks)``."""


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        destination: the written folder.
        source_bytes, written_bytes: sizes of all tensors.
        linears: full linear name -> ``group_size`` (``None`` = per-channel) and ``column_error`` of what was written.
        sites: block index -> what was folded at each site.
        reused: the destination already held this very conversion, and nothing was done.
    """

    destination: Path
    source_bytes: int = 0
    written_bytes: int = 0
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    sites: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    reused: bool = False

    def vulnerable(self) -> list[str]:
        """Linears whose weights did not survive what was done to them, worst first."""
        bad = [(-entry["column_error"], name) for name, entry in self.linears.items()]
        return [name for error, name in sorted(bad) if -error > analyze.VULNERABLE]


class Source:
    """A checkpoint that passed the audit, with its tensors sorted into blocks.

    Attributes:
        checkpoint, architecture, sizes: see their modules.
        blocks: per block, the names inside it.
        outside: full names of everything else.

    Raises:
        BismoothError: on construction, naming the first problems that the audit found.
    """

    def __init__(self, folder: Path):
        self.checkpoint = Checkpoint(folder)
        self.architecture: Architecture = architecture_of(self.checkpoint.config)
        self.sizes = sizes_of(self.checkpoint.config)
        shapes = {name: header.shape for name, header in self.checkpoint.headers.items()}
        problems = list(islice(audit(self.checkpoint.config, self.architecture, self.sizes, shapes), _PROBLEMS_SHOWN))
        if problems:
            raise BismoothError("\n".join([f"{folder}: {problems[0]}", *(f"  also: {p}" for p in problems[1:])]))
        self.blocks: list[list[str]] = [[] for _ in range(self.sizes["blocks"])]
        self.outside: list[str] = []
        for name in self.checkpoint.headers:
            match = _BLOCK_TENSOR.fullmatch(name)
            if match:
                self.blocks[int(match[1])].append(match[2])
            else:
                self.outside.append(name)

    def read_block(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of one block, by the names inside it, as stored."""
        return {name: self.checkpoint.read(BLOCK.format(index) + name) for name in self.blocks[index]}


def convert(
    folder: Path,
    destination: Path,
    recipe: Recipe,
    text: calibrate.CalibrationText | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Convert a checkpoint to INT8. The destination ends up whole or absent; the source is only read.

    Args:
        folder: local LLaMA, Mistral, Qwen2 or Qwen3 checkpoint in safetensors.
        destination: must be absent, an empty folder, or hold the result of the same conversion.
        recipe: what to do.
        text: calibration text for ``bismooth``; without it the norm gains stand in for the activation ranges.
        progress: see :data:`Progress`.

    Raises:
        BismoothError: anything wrong with the input; see the modules that do the work.
    """
    target = destination.resolve()
    _refuse_overlap(folder, target)
    source = Source(folder)
    recipe = replace(
        recipe,
        source=source.checkpoint.fingerprint(),
        calibration=text.sha256 if text is not None else None,
        calibration_tokens=recipe.calibration_tokens if text is not None else None,
    )
    if already_converted(target, recipe):
        return Report(destination, reused=True)
    grouped = choose_grouped(source, recipe, progress)
    report = Report(destination, source_bytes=sum(map(_nbytes, source.checkpoint.headers.values())))
    with CheckpointWriter(target, output_tensors(source, recipe, grouped)) as writer:
        extents = measure_extents(source, recipe, text, progress) if text is not None else None
        for name in source.outside:
            writer.add(name, source.checkpoint.read(name))
        for index in range(len(source.blocks)):
            tensors, linears, sites = convert_block(
                source, index, recipe, grouped[index], extents[index] if extents is not None else None
            )
            for name, tensor in tensors.items():
                writer.add(name, tensor)
            report.linears |= linears
            report.sites[index] = sites
            progress("convert", index + 1, len(source.blocks))
        for relative in source.checkpoint.side_files():
            writer.copy(folder / relative, relative)
        writer.add_json(CONFIG, {**source.checkpoint.config, "quantization_config": _config(source, recipe, grouped)})
        writer.add_json(RECIPE, _record(recipe, folder, text, report))
        report.written_bytes = writer.commit()
    return report


def convert_block(
    source: Source, index: int, recipe: Recipe, grouped: set[str], extents: Mapping[str, torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Smooth and quantize one decoder block.

    Args:
        source, recipe: see :func:`convert`.
        index: of the block.
        grouped: its per-group linears, by name inside the block.
        extents: activation range of each site, fp32 ``[K]``; ``None`` is data-free.

    Returns:
        The block's tensors by full name, and its entries for ``linears`` and ``sites`` of the :class:`Report`.
    """
    prefix, architecture = BLOCK.format(index), source.architecture
    stored = source.read_block(index)
    block, factors = {name: tensor.float() for name, tensor in stored.items()}, []
    if recipe.method == "bismooth":
        block, factors = smooth_block(
            block,
            extents if extents is not None else norm_gains(block, architecture),
            architecture.sites,
            recipe.alpha,
            source.sizes["head"],
            {name: tensor.dtype for name, tensor in stored.items()},
        )
    tensors, linears = {}, {}
    for name, tensor in block.items():
        linear = architecture.linear_of(name)
        if linear is None:
            tensors[prefix + name] = tensor.to(stored[name].dtype)
            continue
        group_size = recipe.group_size if linear in grouped else None
        codes, scale = quantize_weight(tensor, group_size)
        tensors[prefix + name], tensors[f"{prefix}{name}_scale"] = codes, scale
        error = analyze.column_error(tensor, codes, scale)
        linears[prefix + linear] = {"group_size": group_size, "column_error": error}
    return tensors, linears, [asdict(f) for f in factors]


def _refuse_overlap(folder: Path, destination: Path) -> None:
    source = folder.resolve()
    for written in (destination, partial_folder(destination)):
        if written == source or written in source.parents or source in written.parents:
            raise BismoothError(f"{written}: overlaps the source {folder}; choose a destination beside it")
    if (source / RECIPE).exists():
        raise BismoothError(f"{source / RECIPE}: our own {RECIPE} would take its place in the copy; rename it")


def already_converted(destination: Path, recipe: Recipe) -> bool:
    """Whether the destination holds the result of this recipe already.

    Raises:
        BismoothError: it holds anything else.
    """
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    if not (destination / RECIPE).is_file():
        raise BismoothError(f"{destination}: exists and is no result of bismooth; remove it or choose another folder")
    stored = read_json(destination / RECIPE).get("recipe")
    differences = recipe.differences(stored if isinstance(stored, dict) else {})
    if differences:
        raise BismoothError(
            f"{destination}: holds another conversion ({'; '.join(differences)}); remove it or choose another folder"
        )
    return True


def choose_grouped(source: Source, recipe: Recipe, progress: Progress) -> list[set[str]]:
    """Per block, the linears that get per-group scales: named by the recipe, or found from the weights.

    Raises:
        BismoothError: ``group_layers`` names no linear, or a chosen one's K is not a multiple of ``group_size``.
    """
    architecture, blocks = source.architecture, range(len(source.blocks))
    if recipe.group_size is None:
        return [set() for _ in blocks]
    if recipe.group_layers is not None:
        pattern = re.compile(recipe.group_layers)
        chosen = [analyze.named(pattern, BLOCK.format(i), architecture) for i in blocks]
        if not any(chosen):
            raise BismoothError(
                f"--group-layers {recipe.group_layers!r} names no linear; "
                f"they are called like {BLOCK.format(0)}{next(iter(architecture.linears))}"
            )
    else:
        chosen = []
        for i in blocks:
            errors = {}
            for linear in architecture.linears:
                weight = source.checkpoint.read(f"{BLOCK.format(i)}{linear}.weight").float()
                errors[linear] = analyze.column_error(weight, *quantize_weight(weight))
            chosen.append(analyze.vulnerable(errors, architecture))
            progress("analyze", i + 1, len(blocks))
    for i in blocks:
        for linear in sorted(chosen[i]):
            columns = source.sizes[architecture.linears[linear][1]]
            if columns % recipe.group_size:
                fitting = [g for g in (32, 64, 128, 256, 512, 1024) if columns % g == 0]
                raise BismoothError(
                    f"{BLOCK.format(i)}{linear}: K = {columns} is not a multiple of --group-size {recipe.group_size}; "
                    + (f"{', '.join(map(str, fitting))} would fit" if fitting else "use --method bismooth")
                )
    return chosen


def measure_extents(
    source: Source, recipe: Recipe, text: calibrate.CalibrationText, progress: Progress
) -> list[dict[str, torch.Tensor]]:
    """Calibrated activation ranges: per block, site name -> fp32 ``[K]``."""
    tokens = calibrate.tokenize(text, source.checkpoint, recipe.calibration_tokens)
    return calibrate.activation_extents(
        source.checkpoint,
        source.architecture,
        tokens,
        lambda index: progress("calibrate", index + 1, len(source.blocks)),
    )


def norm_gains(block: Mapping[str, torch.Tensor], architecture: Architecture) -> dict[str, torch.Tensor]:
    """Data-free stand-ins for activation ranges: a norm's output has unit RMS before its gain, which thus is the range.

    Sites that no norm feeds (v -> o, up -> down) have no such proxy and are left out.
    """
    return {
        site.name: block[f"{site.producer}.weight"].abs()
        for site in architecture.sites
        if site.producer in architecture.vectors
    }


def output_tensors(source: Source, recipe: Recipe, grouped: list[set[str]]) -> dict[str, torch.Tensor]:
    """Every tensor of the converted checkpoint as a meta tensor, in writing order."""
    headers = source.checkpoint.headers
    tensors = {n: _meta(headers[n].shape, DTYPES[headers[n].dtype]) for n in source.outside}
    for index, names in enumerate(source.blocks):
        for name in names:
            full = BLOCK.format(index) + name
            header = headers[full]
            linear = source.architecture.linear_of(name)
            if linear is None:
                tensors[full] = _meta(header.shape, DTYPES[header.dtype])
                continue
            rows, columns = header.shape
            groups = columns // recipe.group_size if linear in grouped[index] else 1
            tensors[full] = _meta((rows, columns), torch.int8)
            tensors[f"{full}_scale"] = _meta((rows, groups), torch.float32)
    return tensors


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _nbytes(header) -> int:
    return math.prod(header.shape) * DTYPES[header.dtype].itemsize


def _config(source: Source, recipe: Recipe, grouped: list[set[str]]) -> dict[str, Any]:
    architecture = source.architecture
    targets = group_targets(dict(enumerate(grouped)), architecture)
    return quantization_config(recipe, targets, all(g == set(architecture.linears) for g in grouped), __version__)


def _record(recipe: Recipe, folder: Path, text: calibrate.CalibrationText | None, report: Report) -> dict[str, Any]:
    """recipe.json: the choices first (compared on a second run), then where they came from and what came of them."""
    return {
        "recipe": asdict(recipe),
        "provenance": {
            "vllm_w8a8_bismooth": __version__,
            "torch": torch.__version__,
            "source": folder.resolve().name,
            "calibration": text.path.name if text is not None else None,
        },
        "linears": report.linears,
        "sites": {str(index): sites for index, sites in report.sites.items()},
    }
