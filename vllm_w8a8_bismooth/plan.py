"""What a conversion will write and need, known before the first weight is read or written."""

import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth import __version__
from vllm_w8a8_bismooth.architectures import BLOCK
from vllm_w8a8_bismooth.checkpoint import AHEAD
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.recipe import Recipe, quantization_config
from vllm_w8a8_bismooth.source import Layout

TENSOR_PARALLEL = (1, 2, 4, 8, 16)
_GROUP_SIZES = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Plan:
    """A source, what to do with it, and each block's per-group linears, and ignored ones (by name inside it).

    Ignored linears are not quantized; smoothing folds into them all the same.
    """

    source: Layout
    recipe: Recipe
    grouped: Sequence[set[str]]
    ignored: Sequence[set[str]]

    def tensors(self, blocks: range | None = None) -> dict[str, Any]:
        """Every tensor of the result, or of a part with these blocks, without data, in the order in which they come."""
        import torch

        from vllm_w8a8_bismooth.checkpoint import torch_dtype

        source = self.source
        headers = source.checkpoint.headers
        blocks = range(len(source.layers)) if blocks is None else blocks
        outside = source.outside_with(blocks)
        with torch.device("meta"):
            tensors = {n: torch.empty(headers[n].shape, dtype=torch_dtype(headers[n].dtype)) for n in outside}
            for index in blocks:
                for name in source.blocks[index]:
                    full = BLOCK.format(index) + name
                    header, linear = headers[full], source.layers[index].linear_of(name)
                    if linear is None or linear in self.ignored[index]:
                        tensors[full] = torch.empty(header.shape, dtype=torch_dtype(header.dtype))
                        continue
                    rows, columns = header.shape
                    groups = columns // self.recipe.group_size if linear in self.grouped[index] else 1
                    tensors[full] = torch.empty(rows, columns, dtype=torch.int8)
                    tensors[f"{full}_scale"] = torch.empty(rows, groups, dtype=torch.float32)
        return tensors

    def config(self) -> dict[str, Any]:
        """The ``quantization_config`` to write."""
        return quantization_config(self.recipe, self.grouped, self.ignored, self.source.layers, __version__)


def full_names(chosen: Sequence[set[str]]) -> list[str]:
    """Full names of linears that are chosen in each block, in order."""
    return [BLOCK.format(i) + name for i, names in enumerate(chosen) for name in sorted(names)]


def span(blocks: range) -> str:
    """Blocks as ``--blocks`` takes them."""
    return f"{blocks.start}:{blocks.stop}"


def blocks_of(chosen: slice, count: int) -> range:
    """The blocks that ``--blocks`` names, of so many; an open end is the first or the last.

    Raises:
        BismoothError: there are no such blocks.
    """
    start, stop = chosen.start or 0, count if chosen.stop is None else chosen.stop
    if not 0 <= start < stop <= count:
        raise BismoothError(
            f"--blocks {start}:{stop} names no blocks of this model, which are 0:{count}; the last is not included"
        )
    return range(start, stop)


def _named(source: Layout, option: str, expression: str) -> list[set[str]]:
    """Per block, the linears that an option's regular expression finds, with siblings.

    Raises:
        BismoothError: there are none.
    """
    from vllm_w8a8_bismooth import analyze  # which imports torch

    pattern = re.compile(expression)
    chosen = [analyze.named(pattern, BLOCK.format(i), layer) for i, layer in enumerate(source.layers)]
    if not any(chosen):
        raise BismoothError(
            f"{option} {expression!r} names no linear; "
            f"they are called like {BLOCK.format(0)}{next(iter(source.layers[0].linears))}"
        )
    return chosen


def ignored_by_name(source: Layout, recipe: Recipe) -> list[set[str]]:
    """Per block, the linears that the recipe leaves in float.

    Raises:
        BismoothError: ``ignore`` names no linear, all of them, or some of a block's experts and not the others.
    """
    if recipe.ignore is None:
        return [set() for _ in source.layers]
    chosen = _named(source, "--ignore", recipe.ignore)
    if all(names == layer.linears.keys() for names, layer in zip(chosen, source.layers, strict=True)):
        raise BismoothError(f"--ignore {recipe.ignore!r} names every linear; nothing would be left to quantize")
    for i, layer in enumerate(source.layers):
        experts = sorted(chosen[i] & layer.experts)
        if experts and (others := sorted(layer.experts - chosen[i])):
            raise BismoothError(
                f"--ignore {recipe.ignore!r} names {BLOCK.format(i)}{experts[0]} and not {others[0]}: "
                "vLLM serves all experts of a block alike; name all their linears or none"
            )
    return chosen


def chosen_by_name(source: Layout, recipe: Recipe, ignored: Sequence[set[str]]) -> list[set[str]] | None:
    """Per block, the per-group linears that the recipe names; ``None`` if the weights have to tell.

    Raises:
        BismoothError: ``group_layers`` names no linear, an expert, an ignored one, or one whose K is not a multiple of
            ``group_size``.
    """
    if recipe.group_size is None:
        return [set() for _ in source.layers]
    if recipe.group_layers is None:
        return None
    chosen = _named(source, "--group-layers", recipe.group_layers)
    if both := full_names([chosen[i] & names for i, names in enumerate(ignored)]):
        raise BismoothError(
            f"--group-layers {recipe.group_layers!r} and --ignore {recipe.ignore!r} both name {both[0]}, "
            "or a sibling that vLLM fuses with it; leave it out of one"
        )
    for i, layer in enumerate(source.layers):
        if experts := sorted(chosen[i] & layer.experts):
            raise BismoothError(
                f"--group-layers {recipe.group_layers!r} names {BLOCK.format(i)}{experts[0]}: "
                "experts are served per-channel only; leave them out"
            )
    check_group_size(source, recipe, chosen)
    return chosen


def check_group_size(source: Layout, recipe: Recipe, grouped: Sequence[set[str]]) -> None:
    """Raises :class:`BismoothError` if a per-group linear's K is not a multiple of the group size."""
    for i, layer in enumerate(source.layers):
        for linear in sorted(grouped[i]):
            columns = source.sizes[layer.linears[linear][1]]
            if columns % recipe.group_size:
                raise BismoothError(
                    f"{BLOCK.format(i)}{linear}: K = {columns} is not a multiple of --group-size {recipe.group_size}; "
                    f"{_instead(columns)}"
                )


def _instead(columns: int) -> str:
    """What to do where the group size does not divide K."""
    fitting = [g for g in _GROUP_SIZES if columns % g == 0]
    return f"{', '.join(map(str, fitting))} would fit" if fitting else "use --method bismooth"


def parallel_problems(source: Layout, group_size: int | None) -> dict[int, list[str]]:
    """For each tensor-parallel size, why the model cannot be served on so many ranks; empty where it can.

    Args:
        source: the checkpoint.
        group_size: the groups that row-parallel linears would have; only these cut K. ``None`` is per-channel.
    """
    sizes, problems = source.sizes, {}
    for ranks in TENSOR_PARALLEL:
        found = []
        if sizes["heads"] % ranks:
            found.append(f"num_attention_heads = {sizes['heads']} is not a multiple of {ranks}")
        kv_heads = sizes["kv_heads"]
        if kv_heads % ranks and ranks % kv_heads:
            found.append(f"num_key_value_heads = {kv_heads} neither divides {ranks} nor is a multiple of it")
        kinds = {id(layer): layer for layer in source.layers}.values()
        for linear, (_, columns) in sorted(
            {n: layer.linears[n] for layer in kinds for n in layer.row_parallel - layer.experts}.items()
        ):
            width = sizes[columns]
            if width % ranks:
                found.append(f"{linear}: K = {width} is not a multiple of {ranks}")
            elif group_size and width // ranks % group_size:
                share = width // ranks
                found.append(
                    f"{linear}: K / {ranks} = {share} is not a multiple of group_size {group_size}; {_instead(share)}"
                )
        problems[ranks] = found
    return problems


@dataclass(frozen=True)
class Needs:
    """What a conversion needs: peak memory and disk in bytes, and seconds, a rough guess from nominal rates.

    ``disk_bytes`` is the largest that the destination becomes: the result, and states from which a run can go on.
    """

    source_bytes: int
    written_bytes: int
    memory_bytes: int
    disk_bytes: int
    seconds: float


# As benchmarks/results/amd-epyc-2-cores/convert.json has them (AVX-512 BF16); they tell minutes from hours, no more.
_BYTES_PER_CORE_SECOND = 1.8e8
_FLOP_PER_CORE_SECOND = 2.8e11
_BASE_MEMORY = 6e8
_ROW_BYTES = 4  # of scales
_CARRIED = 0.25  # of a byte's time if it only tells of activations; measured on blocks of LLaMA 3 8B's size


def needs(
    source: Layout,
    calibration_tokens: int | None,
    measured_tokens: int = 0,
    cores: int | None = None,
    blocks: range | None = None,
    carried: range = range(0),
) -> Needs:
    """An estimate from headers alone, for a per-channel conversion on a CPU.

    Args:
        source: the checkpoint.
        calibration_tokens: ``None`` is data-free.
        measured_tokens: that pass through each block in fp32, to measure what quantization does there.
        cores: of the CPU; ``None`` is those that this process may use.
        blocks: to convert; ``None`` is all.
        carried: blocks through which activations are only carried.
    """
    blocks = range(len(source.layers)) if blocks is None else blocks
    cores = cores or len(os.sched_getaffinity(0))
    headers, item = source.checkpoint.headers, {"BF16": 2, "F16": 2, "F32": 4}
    chosen = source.checkpoint.config.get("num_experts_per_tok")
    share = min(1, chosen / source.sizes["experts"]) if type(chosen) is int and "experts" in source.sizes else 1
    written, work = sum(headers[name].nbytes for name in source.outside_with(blocks)), 0
    for index in (*carried, *blocks):
        layer, converted = source.layers[index], index in blocks
        for name in source.blocks[index]:
            header, linear = headers[BLOCK.format(index) + name], layer.linear_of(name)
            if linear is None:
                written += header.nbytes * converted
            else:
                elements = math.prod(header.shape)
                work += elements * (share if linear in layer.experts else 1)
                written += (elements + math.prod(header.shape[:1]) * _ROW_BYTES) * converted
    memory, state = _BASE_MEMORY + source.block_nbytes() + AHEAD, 0
    seconds = (source.nbytes(blocks) + _CARRIED * source.nbytes(carried)) / _BYTES_PER_CORE_SECOND / cores
    if calibration_tokens is not None:
        widest = max((item.get(header.dtype, 0) for header in headers.values()), default=0)
        state = widest * calibration_tokens * source.sizes["hidden"]
        memory += state + widest * 3 * 1024 * source.sizes["intermediate"]
        seconds += 2 * work * calibration_tokens / _FLOP_PER_CORE_SECOND / cores
    if measured_tokens:
        memory += 2 * source.block_nbytes()
        seconds += source.nbytes() / _BYTES_PER_CORE_SECOND / cores
        seconds += 2 * work * measured_tokens / (_FLOP_PER_CORE_SECOND / 3) / cores
    return Needs(source.nbytes(blocks), written, int(memory), written + 2 * state, seconds)


def free_space(folder: Path) -> int:
    """Bytes that are free on the disk that holds, or would hold, a folder."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(folder: Path, needed: int, what: str = "result") -> None:
    """Raises :class:`BismoothError` if the disk that will hold ``folder`` has too little room for ``what``."""
    if (free := free_space(folder)) < needed:
        raise BismoothError(
            f"{folder}: the {what} needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; "
            "make room or choose another place"
        )
