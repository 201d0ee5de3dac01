"""Which linears get groups, by what they cost: the best spent first, none beyond the budget or the target."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.models import layer_of
from vllm_w8a8_bismooth.measure.granularity import choose, estimate
from vllm_w8a8_bismooth.measure.perturbation import units
from vllm_w8a8_bismooth.measure.sensitivity import CHANNEL, EXPERTS, GROUP
from vllm_w8a8_bismooth.model.layers import Layer
from vllm_w8a8_bismooth.model.names import Names

LLAMA = layer_of("llama")
UNITS = units(LLAMA)
SIZES = {"q": 4, "k": 1, "v": 1, "o": 4, "gate": 8, "up": 8, "down": 8}
WORK = {linear: float(SIZES[linear.partition(".")[2].partition("_")[0]]) for linear in LLAMA.linears}
BLOCK = sum(WORK.values())


def costs_of(blocks: int, size: float = 1.0, **special: tuple[float, float]) -> list[dict[str, dict[str, float]]]:
    """Per block, costs like the units' work that groups halve, but for units ``<name>_<block>``: costs both ways."""
    work = {unit: size * sum(WORK[part] for part in parts) for unit, parts in UNITS.items()}
    found = [{unit: {CHANNEL: work[unit], GROUP: work[unit] / 2} for unit in UNITS} for _ in range(blocks)]
    for where, (channel, group) in special.items():
        name, _, index = where.rpartition("_")
        unit = next(unit for unit in UNITS if unit.endswith(name))
        found[int(index)][unit] = {CHANNEL: channel, GROUP: group}
    return found


def evidence(costs, budget: float = 1.0, target: float | None = None, layer: Layer = LLAMA, work=WORK):
    return choose(costs, [layer] * len(costs), [work] * len(costs), budget, target)


def chosen(costs, budget: float = 1.0, target: float | None = None, **more) -> list[str]:
    return [entry.unit for entry in evidence(costs, budget, target, **more) if entry.chosen]


@st.composite
def measured(draw) -> list[dict[str, dict[str, float]]]:
    size = st.floats(0, 1) | st.sampled_from([0.0, 1e-30, 1e6])
    blocks = draw(st.integers(1, 4))
    both = st.fixed_dictionaries({CHANNEL: size}, optional={GROUP: size})
    return [{unit: draw(both) for unit in UNITS} for _ in range(blocks)]


@given(measured(), st.floats(0, 1), st.none() | st.floats(1e-6, 3))
def test_neither_budget_nor_target_is_passed(costs, budget, target):
    found = evidence(costs, budget, target)
    assert found == evidence(costs, budget, target), "the same every time"
    names = [name for entry in found for name in entry.linears]
    assert sorted(names) == sorted(Names().block(i) + name for i in range(len(costs)) for name in LLAMA.linears)
    assert sum(entry.work for entry in found) == pytest.approx(1)
    picked = [entry for entry in found if entry.chosen]
    assert sum(entry.work for entry in picked) <= budget + 1e-6
    total = sum(of_unit[CHANNEL] for block in costs for of_unit in block.values())
    removed = sum(entry.share for entry in picked) * (total or 1)
    assert estimate(found) == pytest.approx(total - removed, rel=1e-9, abs=1e-9 * total)
    if picked and target is not None:  # without the last one it would not be reached
        assert estimate(found) + picked[-1].share * total > target * (1 - 1e-9) - 1e-9 * total
    for entry in found:
        worth = entry.per_group is not None and entry.share > 0 and (target is not None or entry.share >= entry.work)
        assert entry.chosen <= worth
        assert not entry.chosen or entry.per_group < entry.per_channel
        said = {
            "too little": entry.per_group is not None and not worth,
            "not a multiple of the group size": entry.per_group is None,
        }
        said |= {"removes": entry.chosen} if worth else {}
        assert all((words in entry.reason) == true for words, true in said.items()), entry
        others = "target is reached" in entry.reason or "budget is spent" in entry.reason
        assert others == (worth and not entry.chosen)
    value = [entry.share / entry.work for entry in found]
    assert value == sorted(value, reverse=True), "what is best spent on comes first"


@pytest.mark.parametrize("budget", [0.0, 0.03, 1.0])
def test_equal_costs_need_no_groups(budget):
    assert chosen(costs_of(12), budget) == chosen(costs_of(12, size=0.0), budget) == []


def test_where_the_cost_sits_groups_are_spent():
    assert chosen(costs_of(12, down_proj_3=(90.0, 1.0)), 0.03) == ["model.layers.3.mlp.down_proj"]
    assert chosen(costs_of(12, down_proj_3=(90.0, 89.0)), 0.03) == [], "not where groups do not help"
    assert chosen(costs_of(12, down_proj_3=(90.0, 99.0))) == [], "nor where they harm"
    assert chosen(costs_of(12, down_proj_3=(90.0, 1.0)), 0.0) == []


def test_fused_parts_go_together():
    costs, names = costs_of(12, qkv_proj_0=(90.0, 1.0)), [f"model.layers.0.self_attn.{c}_proj" for c in "qkv"]
    budget = 6 / (12 * BLOCK)
    best = evidence(costs, budget)[0]
    assert best.chosen and best.unit == "model.layers.0.self_attn.qkv_proj" and list(best.linears) == names
    assert best.work == pytest.approx(budget)
    assert chosen(costs, budget * 0.99) == [], "two of the three would be no use"


def test_a_gain_is_held_against_the_work_that_it_takes():
    """The same gain in a small linear is better than in a large one; what does not fit gives way to what does."""
    costs = costs_of(12, gate_up_proj_0=(90.0, 1.0), o_proj_5=(80.0, 1.0))
    assert chosen(costs, 4 / (12 * BLOCK)) == ["model.layers.5.self_attn.o_proj"]
    assert chosen(costs, 20 / (12 * BLOCK)) == ["model.layers.5.self_attn.o_proj", "model.layers.0.mlp.gate_up_proj"]
    assert chosen(costs_of(12, gate_up_proj_0=(900.0, 1.0), o_proj_5=(80.0, 1.0)), 4 / (12 * BLOCK)) == [
        "model.layers.5.self_attn.o_proj"
    ]


def test_no_more_is_spent_than_reaches_the_target():
    costs = costs_of(12, down_proj_3=(90.0, 1.0), down_proj_4=(80.0, 1.0))
    total = estimate(evidence(costs, 0.0))
    assert chosen(costs, target=total) == []
    assert chosen(costs, target=total - 89.0) == ["model.layers.3.mlp.down_proj"]
    assert len(chosen(costs, target=total - 100.0)) == 2
    assert len(chosen(costs, target=total - 169.0)) == 3, "then what would not be worth it without a target"
    assert len(chosen(costs, target=1e-9)) == 12 * len(UNITS), "and everything that helps"
    assert chosen(costs, 8 / (12 * BLOCK), target=1e-9) == ["model.layers.3.mlp.down_proj"], "but for the budget"
    assert "target is reached" in evidence(costs, target=total - 89.0)[1].reason


def test_what_is_said_can_be_checked():
    first, *_, last = evidence(costs_of(12, down_proj_3=(42.0, 0.0)), 0.03)
    total = 42 + 12 * BLOCK - 8
    assert first.share == pytest.approx(42 / total) and (first.per_channel, first.per_group) == (42.0, 0.0)
    assert first.reason == f"removes {42 / total:.1%} of the error for {8 / BLOCK / 12:.1%} of the work"
    assert "too little for" in last.reason and not last.chosen


@pytest.mark.parametrize(
    ("ways", "budget", "chosen", "reason"),
    [
        ({CHANNEL: 18.0, GROUP: 1.0}, 1.0, True, "removes 85.0% of the error for 75.0% of the work"),
        ({CHANNEL: 18.0, GROUP: 1.0}, 0.74, False, "would remove 85.0% of the error, but the budget is spent"),
        ({CHANNEL: 2.0}, 1.0, False, "K is not a multiple of the group size"),
    ],
)
def test_experts_are_one_unit(ways, budget, chosen, reason):
    """All of a block's, or none. They count in the estimate either way."""
    layer = layer_of("mixtral", dense=False)
    assert units(layer).keys() == {"self_attn.qkv_proj", "self_attn.o_proj"}
    costs = [{unit: {CHANNEL: 1.0, GROUP: 0.0} for unit in units(layer)} | {EXPERTS: ways}]
    found = evidence(costs, budget, layer=layer, work=dict.fromkeys(layer.linears, 1.0))
    experts = next(entry for entry in found if entry.unit.endswith(EXPERTS))
    assert set(experts.linears) == {f"model.layers.0.{name}" for name in layer.experts}
    assert experts.work == pytest.approx(12 / 16) and (experts.chosen, experts.reason) == (chosen, reason)
    others = sum(entry.per_group if entry.chosen else entry.per_channel for entry in found if entry is not experts)
    assert estimate(found) == others + ways[GROUP if chosen else CHANNEL]
