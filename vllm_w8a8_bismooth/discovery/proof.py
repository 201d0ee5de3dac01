"""Whether sites hold: in each block, with large weights, in all blocks at once on the logits, and at another size."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from vllm_w8a8_bismooth.discovery import instance
from vllm_w8a8_bismooth.discovery.block import SAME, Block, Tie, capture, differ
from vllm_w8a8_bismooth.discovery.search import ties_of
from vllm_w8a8_bismooth.discovery.watch import Unit
from vllm_w8a8_bismooth.progress import Progress

_LARGE, _SAME_LARGE = 30.0, 1e-6
"""Weights so much larger that clamps saturate, and how equal outputs are then."""
_SAME_LOGITS = 1e-7
"""Many blocks amplify the rounding of fp64."""
SEEDS, LENGTHS = (1, 2, 3), (32, 23)
_LONG = 256
"""Tokens, where fewer leave units without a use."""

Kind = tuple


@dataclass(frozen=True)
class Failure:
    """A site that was found and does not hold.

    Attributes:
        tie: what was found.
        why: it is not used.
    """

    tie: Tie
    why: str


class Sample:
    """A small model whose blocks have been run.

    Args:
        model: see :func:`instance.small`.

    Attributes:
        path: of the list of blocks in the model.
        blocks: that took part, in order.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self._generator = torch.Generator().manual_seed(17)
        self._texts = [
            torch.cat([instance.text(length, torch.Generator().manual_seed(seed)) for seed in SEEDS])
            for length in LENGTHS
        ]
        self._length = LENGTHS[0]
        lists = outermost(model)
        _, blocks = self._capture(lists)
        if any((x == 0).all(0).any() for block in blocks for x in block.inputs.values()):
            self._length = _LONG  # so that every unit is alive for some token
            _, blocks = self._capture(lists)
        sizes = {
            name: sum(p.numel() for b in blocks if _list_of(b) == name for p in b.parameters.values()) for name in lists
        }
        self.path = max(lists, key=lambda name: sizes[name], default="")
        self.blocks = [block for block in blocks if _list_of(block) == self.path]
        if not self.blocks:
            raise ValueError("no list of blocks takes part in the forward pass")

    def _capture(self, lists: Sequence[str]) -> tuple[torch.Tensor, list[Block]]:
        text = instance.text(self._length, torch.Generator().manual_seed(SEEDS[0]))
        return capture(self.model, lambda: instance.logits(self.model, text), lists, self._generator)

    def search(self, progress: Progress) -> list[list[Tie]]:
        """The sites of each block. They are searched for once in each kind of block, and tried in the others."""
        known: dict[Kind, list[Tie]] = {}
        found: list[list[Tie]] = []
        for index, block in enumerate(self.blocks):
            kind = kind_of(block)
            if kind in known:
                found.append(holding(block, known[kind], SAME)[0])
            else:
                known[kind] = ties_of(block, [tie for ties in known.values() for tie in ties])
                found.append(known[kind])
            progress("discover", index + 1, len(self.blocks))
        return found

    def shared(self) -> set[int]:
        """Addresses of the parameters that several modules have."""
        owners: dict[int, int] = {}
        for _, p in self.model.named_parameters(remove_duplicate=False):
            owners[p.data_ptr()] = owners.get(p.data_ptr(), 0) + 1
        return {address for address, count in owners.items() if count > 1}

    @contextmanager
    def large(self) -> Iterator[list[Block]]:
        """The blocks as they are with larger matrices; afterwards these are as before."""
        matrices = {id(p): p for block in self.blocks for name in block.axes for p in [block.parameters[name]]}
        saved = {key: p.detach().clone() for key, p in matrices.items()}
        for p in matrices.values():
            p.data.mul_(_LARGE)
        try:
            yield self._capture([self.path])[1]
        finally:
            for key, p in matrices.items():
                p.data.copy_(saved[key])

    @cached_property
    def logits(self) -> list[torch.Tensor]:
        """Of every text, with the model as it is."""
        return [instance.logits(self.model, text) for text in self._texts]

    def logits_change(self, ties: Sequence[tuple[Block, Tie]], texts: int | None = None) -> float:
        """How far folds at these sites, all at once, move the logits of the first so many lengths of texts."""
        saved = {id(p): (p, p.detach().clone()) for b, tie in ties for n in b.touched(tie) for p in [b.parameters[n]]}
        before = self.logits[:texts]
        try:
            for block, tie in ties:
                block.fold(tie)
            return max(
                differ(instance.logits(self.model, text), old)
                for text, old in zip(self._texts[:texts], before, strict=True)
            )
        finally:
            for p, value in saved.values():
                p.data.copy_(value)


def kind_of(block: Block) -> Kind:
    """What blocks have in common that are built alike."""
    return (
        type(block.module).__qualname__,
        tuple((name, tuple(p.shape)) for name, p in block.parameters.items()),
        frozenset(block.inputs),
    )


def outermost(model: torch.nn.Module) -> list[str]:
    """The module lists that are in no other."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    return [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]


def _list_of(block: Block) -> str:
    return block.name.rpartition(".")[0]


def holding(block: Block, ties: Sequence[Tie], within: float) -> tuple[list[Tie], float]:
    """Those that hold alone, if not all do together; and how far all of them at once move the output."""
    change = block.change(ties)
    if change < within:
        return list(ties), change
    good = [tie for tie in ties if block.change([tie]) < within]
    return (good, block.change(good)) if good else ([], 0.0)


@dataclass
class Proven:
    """Sites on their way through what they must pass.

    Attributes:
        left: of each block.
        failures: of each block, what was found and is not left.
        output, large, logits, resized: see :class:`record.Proof`.
    """

    left: list[list[Tie]]
    failures: list[list[Failure]]
    output: float = 0.0
    large: float = 0.0
    logits: float = 0.0
    resized: float | None = None

    def keep(self, index: int, good: Sequence[Tie], why: str) -> None:
        """Leave only these sites of a block."""
        lost = [tie for tie in self.left[index] if not any(tie is other for other in good)]
        self.failures[index] += [Failure(tie, why) for tie in lost]
        self.left[index] = list(good)


def prove(sample: Sample, found: list[list[Tie]], other: Sample | None = None) -> Proven:
    """What is left of the sites found in each block, at this size and in a larger model of the same config."""
    proven = Proven([list(ties) for ties in found], [[] for _ in found])
    shared = sample.shared()
    for index, block in enumerate(sample.blocks):
        own = [tie for tie in proven.left[index] if not _uses(block, tie, shared)]
        proven.keep(index, own, "several modules have one of its parameters")
        unsuspected = [tie for tie in own if not _suspects(block, tie)]
        proven.keep(index, unsuspected, f"nothing was seen to be multiplied with {', '.join(block.unseen)}")
    with sample.large() as blocks:
        for index, block in enumerate(blocks):
            good, change = holding(block, proven.left[index], _SAME_LARGE)
            proven.keep(index, good, "does not hold where weights are large")
            proven.large = max(proven.large, change)
    for index in range(len(found)):
        proven.keep(index, _without_alternatives(proven.left[index]), "its consumers take another site's factor")
    if other is not None:
        _resize(sample, other, proven)
    culprits, proven.logits = _culprits(
        sample, [(index, tie) for index, ties in enumerate(proven.left) for tie in ties]
    )
    for index, block in enumerate(sample.blocks):
        mine = [tie for i, tie in culprits if i == index]
        innocent = [tie for tie in proven.left[index] if not any(tie is guilty for guilty in mine)]
        proven.keep(index, innocent, "changes what later blocks or the head compute")
        proven.output = max(proven.output, block.change(innocent))
    return proven


def _resize(sample: Sample, other: Sample, proven: Proven) -> None:
    """Leave the sites that hold, enlarged, in a larger model too."""
    larger = {block.name: block for block in other.blocks}
    verdicts: dict[Kind, set[int]] = {}
    proven.resized = 0.0
    for index, block in enumerate(sample.blocks):
        ties = proven.left[index]
        kind = (kind_of(block), str(ties))
        if kind not in verdicts and block.name in larger:
            enlarged = {i: more for i, tie in enumerate(ties) if (more := resized(block, larger[block.name], tie))}
            good, change = holding(larger[block.name], list(enlarged.values()), SAME)
            verdicts[kind] = {i for i, more in enlarged.items() if any(more is tie for tie in good)}
            proven.resized = max(proven.resized, change)
        passed = verdicts.get(kind, set())
        why = "its rows and columns do not grow with the widths"
        proven.keep(index, [tie for i, tie in enumerate(ties) if i in passed], why)


def _uses(block: Block, tie: Tie, shared: set[int]) -> bool:
    return any(block.parameters[name].data_ptr() in shared for name in block.touched(tie))


def _suspects(block: Block, tie: Tie) -> bool:
    """Whether a matrix that nothing was multiplied with may read what this gain makes."""
    whole = block.parameters[tie.producer]
    return whole.ndim == 1 and any(whole.numel() in block.parameters[name].shape for name in block.unseen)


def _without_alternatives(ties: Iterable[Tie]) -> list[Tie]:
    """Of several sites behind one column, the first."""
    used: set[tuple[Unit, int]] = set()
    found = []
    for tie in ties:
        if not tie.columns & used:
            found.append(tie)
            used |= tie.columns
    return found


def _culprits(sample: Sample, pairs: list[tuple[int, Tie]]) -> tuple[list[tuple[int, Tie]], float]:
    """The sites that change the logits, all if they only do so together; and how far the others move them."""

    def change(some: Sequence[tuple[int, Tie]], texts: int | None = None) -> float:
        return sample.logits_change([(sample.blocks[index], tie) for index, tie in some], texts) if some else 0.0

    def among(some: list[tuple[int, Tie]]) -> list[tuple[int, Tie]]:
        if change(some, 1) < _SAME_LOGITS:
            return []
        half = len(some) // 2
        return some if len(some) == 1 else [*among(some[:half]), *among(some[half:])]

    moved = change(pairs)
    if moved < _SAME_LOGITS:
        return [], moved
    found = among(pairs)
    left = [pair for pair in pairs if not any(pair[0] == index and pair[1] is tie for index, tie in found)]
    moved = change(left)
    return (found, moved) if moved < _SAME_LOGITS else (pairs, 0.0)


def resized(block: Block, other: Block, tie: Tie) -> Tie | None:
    """The site of a block as it must be in the same block at another size, if its sizes have one ratio.

    Each channel stands for as many consecutive ones: only the innermost part of a dimension, the width, was scaled.
    """
    if tie.producer not in other.parameters or any(unit not in other.inputs for unit in tie.consumers):
        return None
    whole, larger = block.parameters[tie.producer], other.parameters[tie.producer]
    if whole.ndim == 1:
        sizes = {(larger.numel(), whole.numel())}
    else:
        sizes = {
            (other.matrix(other.units(tie.producer)[0]).shape[0], block.matrix(block.units(tie.producer)[0]).shape[0])
        }
    sizes |= {(other.matrix(unit).shape[1], block.matrix(unit).shape[1]) for unit in tie.consumers}
    ratios = {large / small for large, small in sizes}
    ratio = int(max(ratios))
    if ratios != {ratio}:
        return None
    rows = tuple(row * ratio + i for row in tie.rows for i in range(ratio))
    consumers = {
        unit: tuple((row * ratio + i, column * ratio + i) for row, column in pairs for i in range(ratio))
        for unit, pairs in tie.consumers.items()
    }
    return replace(tie, rows=rows, consumers=consumers)
