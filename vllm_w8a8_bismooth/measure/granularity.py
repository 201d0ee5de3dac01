"""Which linears get per-group scales, by what they cost the predictions with and without."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_w8a8_bismooth.measure.sensitivity import CHANNEL, GROUP, measured_units
from vllm_w8a8_bismooth.model.layers import Layer
from vllm_w8a8_bismooth.model.names import Names

_SPENT = "but the budget is spent"


@dataclass(frozen=True)
class Evidence:
    """What speaks for and against per-group scales in one fused linear.

    Attributes:
        unit: full name of the linear that vLLM serves, or of a block's experts.
        linears: full names of its parts.
        per_channel, per_group: what it costs, in nats a token of KL to the source, see :mod:`sensitivity`; where the
            model predicts no tokens, a relative error. ``per_group`` is ``None`` where there can be no groups.
        share: of the whole model's cost, summed over units, that per-group scales would remove.
        work: its share of the multiplications of all linears.
        chosen: whether it gets them.
        reason: in words.
    """

    unit: str
    linears: tuple[str, ...]
    per_channel: float
    per_group: float | None
    share: float
    work: float
    chosen: bool
    reason: str

    @property
    def held_back(self) -> bool:
        """Whether only the budget stood against them."""
        return self.reason.endswith(_SPENT)


def estimate(evidence: Sequence[Evidence]) -> float:
    """What all units cost together, as they were chosen."""
    costs = (entry.per_group if entry.chosen else entry.per_channel for entry in evidence)
    return sum(cost for cost in costs if cost is not None)


def choose(
    costs: Sequence[Mapping[str, Mapping[str, float]]],
    layers: Sequence[Layer],
    works: Sequence[Mapping[str, float]],
    budget: float,
    target: float | None = None,
    names: Names = Names(),  # noqa: B008 (frozen)
) -> list[Evidence]:
    """Decide on granularity, preferring none.

    Per-group kernels take longer by much the same share whatever the shape (docs/results.md), so that what groups cost
    in time is told by multiplications.

    Args:
        costs: per block, unit -> what it costs in the granularities :data:`CHANNEL` and, where it may, :data:`GROUP`.
        layers: of the same blocks.
        works: per block, linear -> multiplications for a token.
        budget: share of all multiplications that may have per-group scales, 0 to 1.
        target: what the units may cost together; groups end where that is reached. ``None`` gives groups to whatever
            removes at least its share.
        names: of the checkpoint.

    Returns:
        One entry a unit, those first whose groups are best spent.
    """
    total = sum(found[CHANNEL] for block in costs for found in block.values()) or 1.0
    all_work = sum(sum(block.values()) for block in works) or 1.0
    candidates = []
    for index, (block, layer) in enumerate(zip(costs, layers, strict=True)):
        for unit, found in block.items():
            parts = measured_units(layer)[unit]
            work = sum(works[index][part] for part in parts) / all_work
            gain = (found[CHANNEL] - found.get(GROUP, found[CHANNEL])) / total
            candidates.append((names.block(index), unit, parts, found, work, gain))
    left, rest, evidence = budget + 1e-9, total, []
    for prefix, unit, parts, found, work, gain in sorted(candidates, key=lambda c: -c[5] / c[4]):
        would = f"would remove {gain:.1%} of the error"
        chosen = False
        if GROUP not in found:
            reason = "K is not a multiple of the group size"
        elif gain <= 0 or (target is None and gain < work):
            reason = f"{would}, too little for {work:.1%} of the work"
        elif target is not None and rest <= target:
            reason = f"{would}, but the target is reached without"
        elif work > left:
            reason = f"{would}, {_SPENT}"
        else:
            chosen, reason = True, f"removes {gain:.1%} of the error for {work:.1%} of the work"
            left, rest = left - work, rest - gain * total
        full = tuple(prefix + part for part in parts)
        evidence.append(Evidence(prefix + unit, full, found[CHANNEL], found.get(GROUP), gain, work, chosen, reason))
    return evidence
