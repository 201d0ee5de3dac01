"""The rule by which timings choose who serves a linear, and the form in which plans are stored."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_w8a8_bismooth.ops import COMPILED, REFERENCE, TRITON
from vllm_w8a8_bismooth.serving.plan import (
    ACTIVATIONS,
    KERNELS,
    LEAD,
    STOCK,
    WEIGHTS,
    Entry,
    Plan,
    Shape,
    fastest,
    load,
    total,
)

RECORDED = Path(__file__).parents[2] / "benchmarks/results/avx512_vnni-amd-epyc-2-cores/gemm.json"
LINEAR = Shape(4096, 4096)
seconds = st.floats(1e-7, 10)
whole = st.fixed_dictionaries(dict.fromkeys(WEIGHTS, seconds))
part = whole.flatmap(lambda times: st.sets(st.sampled_from(list(times))).map(lambda kept: {m: times[m] for m in kept}))
timings = st.dictionaries(st.sampled_from(KERNELS), whole | part)
shapes = st.builds(Shape, *3 * [st.integers(1, 1 << 20)], st.sampled_from(ACTIVATIONS))
entries = st.builds(Entry, timings, st.none() | st.sampled_from(KERNELS))
plans = st.builds(
    Plan, st.dictionaries(shapes, entries, max_size=4), st.none() | st.dictionaries(st.text(), st.integers())
)


def constant(**factors: float) -> dict:
    """Timings that differ by one factor whatever the tokens."""
    return {kernel: {m: factor * 1e-6 * max(m, 256) for m in WEIGHTS} for kernel, factor in factors.items()}


def test_each_number_of_tokens_has_about_the_same_part():
    """Of a kernel on the roofline whose arithmetic takes over at 256 tokens."""
    (times,) = constant(stock=1.0).values()
    parts = [weight * times[m] for m, weight in WEIGHTS.items()]
    assert min(parts) == pytest.approx(max(parts)) and len(parts) == 11


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        (constant(stock=1, compiled=0.98, triton=0.98), STOCK),
        (constant(stock=1, compiled=0.96), COMPILED),
        (constant(stock=1, compiled=0.96, triton=0.95), TRITON),
        (constant(compiled=1, triton=1), COMPILED),
        (constant(compiled=1, triton=0.999, reference=5), TRITON),
        (constant(compiled=0.5) | {STOCK: {}}, COMPILED),
        (constant(stock=1) | {COMPILED: {1: 1e-9}}, STOCK),
        ({COMPILED: {1: 1e-9}, TRITON: {}}, None),
        ({}, None),
    ],
)
def test_the_rule(times, winner):
    assert fastest(times) == winner


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0, -1.0])
def test_what_is_no_time_does_not_serve(broken):
    times = constant(stock=1, compiled=0.5)
    times[COMPILED][64] = broken
    assert fastest(times) == STOCK


@given(timings)
def test_never_slower_than_vllms_own(times):
    kernel = fastest(times)
    sums = {each: total(times[each]) for each in times}
    if kernel is None:
        assert not [each for each in sums.values() if each is not None]
    elif kernel == STOCK:  # nobody saves as much as it takes
        assert all(each is None or each > (1 - LEAD) * sums[STOCK] for name, each in sums.items() if name != STOCK)
    else:
        assert sums[kernel] == min(each for each in sums.values() if each is not None)
        assert sums.get(STOCK) is None or sums[kernel] <= (1 - LEAD) * sums[STOCK]


@given(timings, st.data())
def test_who_gets_faster_is_kept(times, data):
    if (kernel := fastest(times)) is not None:
        faster = {m: each * data.draw(st.floats(0.1, 1)) for m, each in times[kernel].items()}
        assert fastest(times | {kernel: faster}) == kernel


@given(timings, st.data())
def test_who_gets_slower_does_not_win(times, data):
    loser = data.draw(st.sampled_from(KERNELS))
    kernel = fastest(times)
    if loser != kernel and loser in times:
        slower = {m: each * data.draw(st.floats(1, 10)) for m, each in times[loser].items()}
        assert fastest(times | {loser: slower}) != loser


@given(timings, st.randoms())
def test_the_order_of_what_was_timed_does_not_matter(times, random):
    def shuffled(pairs):
        return dict(random.sample(list(pairs.items()), len(pairs)))

    assert fastest(shuffled({kernel: shuffled(each) for kernel, each in times.items()})) == fastest(times)


@settings(max_examples=20)
@given(plans)
def test_a_plan_survives_its_file(plan):
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_what_is_given_goes_before_what_was_measured():
    times = constant(stock=1, compiled=0.5)
    assert Plan({LINEAR: Entry(times)}).kernel(LINEAR) == COMPILED
    assert Plan({LINEAR: Entry(times, STOCK)}).kernel(LINEAR) == STOCK
    assert Plan().kernel(LINEAR) is None
    stored = {"shapes": [{"rows": 4096, "columns": 4096, "kernel": "reference"}]}
    assert Plan.from_json(stored).kernel(LINEAR) == REFERENCE


def row(**more) -> dict:
    return {"shapes": [{"rows": 1, "columns": 1} | more]}


@pytest.mark.parametrize(
    ("stored", "fault"),
    [
        ([], "it is no object with a list of shapes"),
        ({"shapes": [1]}, "shape 0: it is no object"),
        (row(holds=1), "shape 0: 'holds' is unknown"),
        (row(rows=0), "shape 0: rows, columns and groups must be positive integers"),
        (row(columns=True), "shape 0: rows, columns and groups must be positive integers"),
        (row(activations="row"), "shape 0: activations must be one of token, group, tensor"),
        (row(kernel="cutlass"), "shape 0: kernel must be one of stock, compiled, triton, reference"),
        (row(seconds={"stock": {"one": 1}}), "shape 0: seconds must have numbers by tokens by kernel"),
        (row(seconds=[]), "shape 0: seconds must have numbers by tokens by kernel"),
        (row(seconds={"fast": {}}), "shape 0: seconds: 'fast' is no kernel"),
        ({"shapes": 2 * row()["shapes"]}, "shape 1: 1 x 1, activations per token is there twice"),
        (row() | {"holds_for": 1}, "holds_for is no object"),
    ],
)
def test_a_bad_file_is_one_line(stored, fault, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} is no plan of kernels: {fault}')}.*$"):
        load(path)


@pytest.mark.parametrize("text", ["", "{", "\0"])
def test_a_file_that_is_no_json(text, tmp_path):
    with pytest.raises(ValueError, match="no plan of kernels"):
        load(tmp_path / "absent.json")
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="no plan of kernels: Expecting"):
        load(tmp_path / "plan.json")


def test_recorded_timings():
    """Products of LLaMA 3 8B's linears on the two cores of the results, measured up to 1024 tokens.

    What was not measured there is put proportional to the tokens, which is what large products are.
    """
    recorded = json.loads(RECORDED.read_text())["rows"]
    kernels = {"vllm": STOCK, "ours-channel": COMPILED}
    found = {}
    for row in recorded:
        if row["impl"] in kernels:
            times = found.setdefault(Shape(row["N"], row["K"]), {}).setdefault(kernels[row["impl"]], {})
            times[row["M"]] = row["us"] * 1e-6
    assert len(found) == 4
    for shape, times in found.items():
        assert fastest(times) is None  # not yet whole
        for each in times.values():
            each[512] = each[1024] / 2
            each |= {m: each[1024] * m / 1024 for m in (2048, 4096, 8192)}
        saved = 1 - total(times[COMPILED]) / total(times[STOCK])
        assert (fastest(times) == COMPILED) == (saved >= LEAD), (shape, saved)
        assert fastest({STOCK: times[COMPILED], COMPILED: times[STOCK]}) == STOCK, shape
