"""Acceptance of drafters is counted by vLLM, and summed up as it says."""

import pytest

from benchmarks.real import drafters
from benchmarks.real.drafters import AHEAD, Count, coarsen, measure, summarize
from benchmarks.testbed import PYTHON
from vllm_w8a8_bismooth.checkpoint.layout import Source

OFTEN = Count(drafts=10, drafted=30, accepted=24, positions=[9, 8, 7], answered=36)
SELDOM = Count(drafts=30, drafted=90, accepted=12, positions=[6, 4, 2], answered=60)


def test_figures_are_ratios_of_sums():
    found = summarize([OFTEN, SELDOM])
    assert (found.rate, found.length) == (36 / 120, 1 + 36 / 40)
    assert found.positions == [15 / 40, 12 / 40, 9 / 40] and found.tokens_per_step == 96 / 60
    for interval, single in (("rate_interval", "rate"), ("length_interval", "length")):
        extremes = [getattr(summarize([chunk]), single) for chunk in (SELDOM, OFTEN)]
        assert getattr(found, interval) == pytest.approx(extremes), "two chunks, of which both draws may be either"
    alike = summarize([OFTEN] * 5)
    assert alike.rate_interval == pytest.approx((0.8, 0.8))


def test_a_coarse_draft_is_the_model_in_few_bits(tmp_path):
    coarsen(PYTHON.model, tmp_path / "coarse", bits=3)
    before, after = Source(PYTHON.model).checkpoint, Source(tmp_path / "coarse").checkpoint
    linears = [name for name in before.headers if "_proj" in name]
    assert before.headers.keys() == after.headers.keys() and linears
    for name in before.headers:
        old, new = before.read(name), after.read(name)
        if name in linears:
            assert max(len(row.unique()) for row in new) <= 7 and not old.equal(new)
        else:
            assert old.equal(new), name


@pytest.mark.engine
def test_a_model_keeps_nearly_all_that_it_drafted_itself():
    """Not all: one token and several in a step are rounded otherwise, which decides near-ties."""
    asked = PYTHON.heldout_windows(2 * drafters.CHUNK, 32).tolist()
    counts = measure(PYTHON.model, PYTHON.model, asked, tokens=12)
    assert len(counts) == 2 and all(count.answered == 12 * drafters.CHUNK for count in counts)
    for count in counts:
        assert count.drafted == AHEAD * count.drafts and count.accepted == sum(count.positions)
        assert count.positions == sorted(count.positions, reverse=True)
    assert 0.9 < summarize(counts).rate <= 1
