"""What four bits cost in each row, and how a budget of bits is spent on rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import emulate
from benchmarks.testbed import BEDS
from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.measure import narrowing
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.measure.logits import Logits
from vllm_w8a8_bismooth.measure.passing import Passing
from vllm_w8a8_bismooth.method.rows import ALONE
from vllm_w8a8_bismooth.method.smooth import Smoothing

BED, CPU = BEDS["headers"], torch.device("cpu")


@pytest.fixture(scope="module")
def measured():
    """Tokens, and per block, what :func:`narrowing.measure` finds on them without smoothing."""
    source, tokens = Source(BED.model), torch.from_numpy(BED.heldout_windows(4)).long()
    calibration, states, blocks = Calibration(source, tokens, CPU), [], []
    for index, inside in enumerate(source.blocks):
        blocks.append({name: source.checkpoint.read(source.names.block(index) + name) for name in inside})
        states.append(calibration.hidden.clone())
        calibration.advance(index, blocks[-1], ALONE)
    gradients = Logits(source, CPU, torch.float32).gradients(calibration.hidden, 4)
    costs = []
    for index in reversed(range(len(blocks))):
        passing = Passing(calibration, index, blocks[index], Smoothing(), states[index], gradients)
        found, gradients = narrowing.measure(passing, 32, {})
        costs.insert(0, found)
    return tokens, costs


@pytest.mark.parametrize("rows", ["all", "most", "least"])
def test_costs_are_the_divergence_of_predictions(measured, rows):
    """Where some rows of all linears are rounded to four bits: the half that costs most, and the other one."""
    tokens, costs = measured
    model, changed, expected = emulate.load(BED.model), emulate.load(BED.model), 0.0
    for index, block in enumerate(costs):
        for linear, cost in block.items():
            weight = changed.model.layers[index].get_submodule(linear).weight.data
            order = cost.argsort(descending=True)
            half = {"all": order, "most": order[: len(order) // 2], "least": order[len(order) // 2 :]}[rows]
            weight[half] += narrowing.error(weight[half], 32)
            expected += float(cost[half].sum())
    with torch.no_grad():
        true, after = (each(input_ids=tokens).logits.log_softmax(-1) for each in (model, changed))
    kl = float((true.exp() * (true - after)).sum(-1).mean())
    assert expected == pytest.approx(kl, rel=0.3)


def test_what_compensation_leaves_is_counted(measured):
    """A linear of which it leaves a tenth costs a tenth."""
    _, costs = measured
    source, tokens = Source(BED.model), torch.from_numpy(BED.heldout_windows(4)).long()
    block = {name: source.checkpoint.read(source.names.block(0) + name) for name in source.blocks[0]}
    calibration = Calibration(source, tokens, CPU)
    hidden = calibration.hidden
    passing = Passing(calibration, 0, block, Smoothing(), hidden, torch.randn(2, *hidden.shape))
    without, _ = narrowing.measure(passing, 32, {})
    found, _ = narrowing.measure(passing, 32, {"mlp.down_proj": 0.1})
    for linear, cost in without.items():
        share = 0.1 if linear == "mlp.down_proj" else 1.0
        torch.testing.assert_close(found[linear], share * cost)


@given(st.data())
def test_a_budget_is_spent_on_what_costs_most(data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 20), st.sampled_from([32, 64, 256])), min_size=1, max_size=6))
    bits = data.draw(st.floats(5.6, 10))
    seed = data.draw(st.integers(0, 2**31))
    draw = torch.Generator().manual_seed(seed)
    costs = [{str(i): torch.rand(n, generator=draw).mul(4).exp()} for i, (n, _) in enumerate(shapes)]
    columns = [{str(i): k} for i, (_, k) in enumerate(shapes)]
    found = narrowing.allot(costs, columns, bits, 32)
    spent, weights, chosen, other = 0, 0, [], []
    for i, (n, k) in enumerate(shapes):
        four, eight = grouping.row_bits(k, 32)
        rows = found[i][str(i)]
        assert rows.dtype == torch.int32 and rows.tolist() == sorted(set(rows.tolist()))
        spent, weights = spent + four * (n - len(rows)) + eight * len(rows), weights + n * k
        worth = costs[i][str(i)] / (eight - four)
        is_wide = torch.zeros(n, dtype=torch.bool).index_fill(0, rows.long(), True)
        chosen, other = chosen + worth[is_wide].tolist(), other + worth[~is_wide].tolist()
    assert spent <= bits * weights
    assert not chosen or not other or min(chosen) >= max(other)
    if other:
        assert (
            spent + max(grouping.row_bits(k, 32)[1] - grouping.row_bits(k, 32)[0] for _, k in shapes) > bits * weights
        )


def test_a_budget_below_four_bits_a_row():
    with pytest.raises(ValueError, match=r"^4\.625$"):
        narrowing.allot([{"a": torch.ones(3)}], [{"a": 256}], 4.5, 32)
