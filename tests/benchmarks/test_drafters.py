"""Acceptance of drafters is counted by vLLM, and summed up as it says."""

import pytest

from benchmarks.real.drafters import AHEAD, Count, coarsen, measure, summarize
from benchmarks.testbed import PYTHON
from vllm_w8a8_bismooth.checkpoint.layout import Source


def test_figures_are_ratios_of_sums():
    """Three prompts: one with two steps, one with four, and one whose answer ended with its first token."""
    count = Count(drafts=5, drafted=15, accepted=9, positions=[4, 3, 2], answers=[[4, 4], [1, 3, 2, 1], []])
    found = summarize(count)
    assert (found.rate, found.positions, found.covered) == (9 / 15, [4 / 5, 3 / 5, 2 / 5], 5 / 6)
    assert (found.length, found.steps, found.prompts) == (15 / 6, 6, 2)
    assert found.interval == pytest.approx((7 / 4, 8 / 2)), "of two prompts, both draws may be either"
    alike = summarize(Count(drafts=5, drafted=15, accepted=9, positions=[4, 3, 2], answers=[[2, 3]] * 5))
    assert alike.interval == pytest.approx((2.5, 2.5))


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
    asked = PYTHON.heldout_windows(16, 32).tolist()
    count = measure(PYTHON.model, PYTHON.model, asked, tokens=12)
    assert count.drafted == AHEAD * count.drafts and count.accepted == sum(count.positions)
    assert count.positions == sorted(count.positions, reverse=True)
    assert [sum(answer) for answer in count.answers] == [11] * 16, "tokens behind the first"
    found = summarize(count)
    assert 0.9 < found.rate <= 1 and found.covered == 1 and 3 < found.length <= AHEAD + 1
