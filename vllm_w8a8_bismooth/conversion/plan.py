"""What a conversion will write and need, known before the first weight is read or written."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_w8a8_bismooth import __version__, grouping
from vllm_w8a8_bismooth.checkpoint.elements import torch_dtype
from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.conversion.quantization import quantization_config
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.model.names import Names
from vllm_w8a8_bismooth.recipe import INT8, Recipe

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Plan:
    """A source, what to do with it, and each block's per-group linears, and ignored ones (by name inside it).

    Ignored linears are not quantized; smoothing folds into them all the same.

    Attributes:
        wide: with 4-bit rows, per block, linear -> int32 ``[n]``, ascending: its rows of eight bits.
    """

    source: Layout
    recipe: Recipe
    grouped: Sequence[set[str]]
    ignored: Sequence[set[str]]
    wide: "Sequence[Mapping[str, torch.Tensor]] | None" = None

    def tensors(self, blocks: range | None = None) -> dict[str, Any]:
        """Every tensor of the result, or of a part with these blocks, without data, in the order in which they come.

        Those that the source has transposed, under their own names, are so here, too.
        """
        import torch

        source = self.source
        headers, turned = source.checkpoint.headers, source.checkpoint.turned
        blocks = range(len(source.layers)) if blocks is None else blocks
        outside = source.outside_with(blocks)
        with torch.device("meta"):
            tensors = {n: torch.empty(headers[n].shape, dtype=torch_dtype(headers[n].dtype)) for n in outside}
            if (head := source.names.head) in outside and self.recipe.head == INT8:
                tensors[head] = torch.empty(headers[head].shape, dtype=torch.int8)
                tensors[f"{head}_scale"] = torch.empty(headers[head].shape[0], 1, dtype=torch.float32)
            for index in blocks:
                for name in source.blocks[index]:
                    full = source.names.block(index) + name
                    header, linear = headers[full], source.layers[index].linear_of(name)
                    shape = header.shape[::-1] if full in turned else header.shape
                    if linear is None or linear in self.ignored[index]:
                        tensors[full] = torch.empty(shape, dtype=torch_dtype(header.dtype))
                        continue
                    rows, columns = header.shape
                    size = self.recipe.group_size if linear in self.grouped[index] else None
                    groups = grouping.groups(columns, size)
                    if self.wide is None:
                        tensors[full] = torch.empty(shape, dtype=torch.int8)
                    else:
                        tensors |= self._packed(full, rows, columns, len(self.wide[index][linear]))
                    tensors[f"{full}_scale"] = torch.empty(rows, groups, dtype=torch.float32)
        return tensors

    def _packed(self, name: str, rows: int, columns: int, wide: int) -> dict[str, Any]:
        """The tensors of a weight with 4-bit rows, but for its scale."""
        import torch

        groups = grouping.groups(columns, self.recipe.group_size)
        found = {
            f"{name}_packed": torch.empty(rows, columns // 2, dtype=torch.uint8),
            f"{name}_multiplier": torch.empty(rows, groups, dtype=torch.uint8),
            f"{name}_offset": torch.empty(rows, groups, dtype=torch.int8),
        }
        if wide:
            found[f"{name}_rows"] = torch.empty(wide, dtype=torch.int32)
            found[f"{name}_low"] = torch.empty(wide, columns // 2, dtype=torch.uint8)
        return found

    def config(self) -> dict[str, Any]:
        """The ``quantization_config`` to write."""
        return quantization_config(self.recipe, self.grouped, self.ignored, self.source, __version__)


def evenly(source: Layout, recipe: Recipe) -> "list[dict[str, torch.Tensor]]":
    """:attr:`Plan.wide` before it is known which rows are worth eight bits: as many in each linear, for the sizes."""
    import torch

    assert recipe.bits is not None and recipe.group_size is not None
    found: list[dict[str, torch.Tensor]] = []
    for layer in source.layers:
        found.append({})
        for linear, (rows, columns) in layer.linears.items():
            four, eight = grouping.row_bits(columns, recipe.group_size)
            count = int(rows * (recipe.bits * columns - four) / (eight - four))
            found[-1][linear] = torch.arange(min(max(count, 0), rows), dtype=torch.int32)
    return found


def full_names(chosen: Sequence[set[str]], names: Names) -> list[str]:
    """Full names of linears that are chosen in each block, in order."""
    return [names.block(i) + name for i, linears in enumerate(chosen) for name in sorted(linears)]


def span(blocks: range) -> str:
    """Blocks as ``--blocks`` takes them."""
    return f"{blocks.start}:{blocks.stop}"


def blocks_of(chosen: str | slice | range, count: int) -> range:
    """The blocks that ``--blocks`` names, of so many; an open end is the first or the last.

    Args:
        chosen: ``42:84``, ``:42`` or ``84:``, or the same as a slice; the last one is not included.
        count: how many blocks the model has.

    Raises:
        BismoothError: there are no such blocks.
    """
    if isinstance(chosen, str):
        if not (match := re.fullmatch(r"(?a:(\d*):(\d*))", chosen)):
            remedy = "write 42:84 for the blocks 42 to 83"
            raise BismoothError.of(f"--blocks {chosen}", f"{chosen!r} are no blocks", remedy)
        chosen = slice(*(int(end) if end else None for end in match.groups()))
    if not isinstance(chosen, slice | range) or chosen.step not in (None, 1):
        raise TypeError(f"blocks must be a string like '42:84', or a range, not {chosen!r}")
    start, stop = chosen.start or 0, count if chosen.stop is None else chosen.stop
    if not 0 <= start < stop <= count:
        what = f"names no blocks of this model, which are 0:{count}"
        raise BismoothError.of(f"--blocks {start}:{stop}", what, "choose among them; the last one is not included")
    return range(start, stop)
