"""What a conversion will write and need, known before the first weight is read or written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_w8a8_bismooth import __version__, grouping
from vllm_w8a8_bismooth.checkpoint.elements import torch_dtype
from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.model.names import Names
from vllm_w8a8_bismooth.recipe import INT8, Recipe, quantization_config


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
                    tensors[full] = torch.empty(shape, dtype=torch.int8)
                    tensors[f"{full}_scale"] = torch.empty(rows, groups, dtype=torch.float32)
        return tensors

    def config(self) -> dict[str, Any]:
        """The ``quantization_config`` to write."""
        return quantization_config(self.recipe, self.grouped, self.ignored, self.source, __version__)


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
