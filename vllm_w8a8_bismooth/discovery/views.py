"""Matrices that the checkpoint has as parts of other tensors, or transposed: experts in a stack, GPT-2's linears.

The record has them as matrices of their own, with the names that vLLM loads them under.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from vllm_w8a8_bismooth.discovery.block import Block, Tie
from vllm_w8a8_bismooth.discovery.record import View
from vllm_w8a8_bismooth.discovery.rules import parts_of
from vllm_w8a8_bismooth.discovery.storage import Region

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Shown:
    """The tensors of a block as the record has them.

    Attributes:
        regions: tensor -> where its values are in the small model.
        shapes: tensor -> shape, in the real model.
        views: tensor, with ``{}`` for an expert's number -> where the real checkpoint has it, if not under its name.
        kept: stacks that stay as they are -> why.
    """

    regions: dict[str, list[Region]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    views: dict[str, View] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, block: Block, regions: Mapping[str, list[Region]], shapes: Shapes, ties: Iterable[Tie]) -> "Shown":
        """Those of a block.

        Args:
            block: of the small model.
            regions: stored tensor inside the block -> where its values are, by names inside the block.
            shapes: stored tensor inside the block -> shape, of the real model.
            ties: that hold in it: they show which rows of a stack are multiplied with which.
        """
        found = cls(kept=_kept(block, regions, shapes, ties))
        for name, shape in shapes.items():
            here = regions.get(name, [])
            region = here[0] if len(here) == 1 and here[0].parameter in block.axes else None
            if region is not None and region.expert is None and len(shape) == 3 and name not in found.kept:
                found._unstack(block, region, shape)
            elif region is not None and len(shape) == 2 and is_turned(block, region):
                found._turn(block, region, shape)
            else:
                found.shapes[name] = shape
                found.regions |= {name: here} if here else {}
        return found

    def _unstack(self, block: Block, region: Region, whole: tuple[int, ...]) -> None:
        """Put the matrices of each expert in the place of their stack."""
        turned, parts = is_turned(block, region), parts_of(region.tensor)
        stack, axis = block.parameters[region.parameter], block.axes[region.parameter]
        (rows, columns), few = (whole[:0:-1] if turned else whole[1:]), stack.shape[2 - axis]
        for number, name in enumerate(parts):
            length, small = rows // len(parts), few // len(parts)
            self.views[name] = View(region.tensor, whole, (number * length, length), turned)
            for expert in range(len(stack)):
                own = name.format(expert)
                self.shapes[own] = (length, columns)
                place = (number * small, small)
                self.regions[own] = [Region(region.parameter, expert, place, own, 0, transposed=axis == 0)]

    def _turn(self, block: Block, region: Region, whole: tuple[int, ...]) -> None:
        """Put a matrix in the place of the same, transposed."""
        rows = block.matrix(block.units(region.parameter)[0]).shape[0]
        columns, wide = whole
        self.views[region.tensor] = View(region.tensor, whole, (0, wide), True)
        self.shapes[region.tensor] = (wide, columns)
        self.regions[region.tensor] = [replace(region, rows=(0, rows), transposed=not region.transposed)]


def is_turned(block: Block, region: Region) -> bool:
    """Whether a stored matrix, or each of a stack, is the transpose of that in the product."""
    return (block.axes[region.parameter] == 0) is not region.transposed


def _kept(block: Block, regions: Mapping[str, list[Region]], shapes: Shapes, ties: Iterable[Tie]) -> dict[str, str]:
    """Stacks of experts that stay in float, as they are -> why; all of a mixture, if one of them must."""
    stacks = {
        name: region
        for name, shape in shapes.items()
        for region in regions.get(name, [])
        if len(shape) == 3 and region.parameter in block.axes and region.expert is None
    }
    reasons = {name: _reason(block, region, ties) for name, region in stacks.items()}
    why = next((reason for reason in reasons.values() if reason), None)
    return dict.fromkeys(stacks, why) if why else {}


def _reason(block: Block, region: Region, ties: Iterable[Tie]) -> str | None:
    parts = parts_of(region.tensor)
    if not parts:
        return "experts stored as one tensor, which vLLM loads only as that"
    if block.bias_of(region.parameter):
        return "experts stored as one tensor, with biases, which vLLM serves in INT8 neither"
    rows = block.parameters[region.parameter].shape[2 - block.axes[region.parameter]]
    later = tuple(range(rows // 2, rows))
    if len(parts) == 2 and not any(tie.producer == region.parameter and tie.rows == later for tie in ties):
        return "experts stored as one tensor, of which it was not found out which rows gate which"
    return None
