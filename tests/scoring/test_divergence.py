"""Figures of a score against calculations by hand, and what must hold of them whatever the models are."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_w8a8_bismooth.scoring import divergence
from vllm_w8a8_bismooth.scoring.divergence import Window, compare, interval, summarize

LOGITS = arrays.arrays(np.float32, (5, 7), elements=st.floats(-60, 60, width=32))
TOKENS = [0, 3, 6, 2, 2, 1]


def log(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def window(kl, same=None, source=None, checkpoint=None) -> Window:
    count = len(kl)
    given = (same or [True] * count, source or [1.0] * count, checkpoint or [1.0] * count)
    return Window(np.array(kl, float), *map(np.array, given))


def test_a_window_by_hand():
    source = np.array([log(0.5, 0.25, 0.25), log(0.1, 0.2, 0.7)], np.float32)
    checkpoint = np.array([log(0.25, 0.25, 0.5), log(0.1, 0.2, 0.7)], np.float32)
    found = compare(source, checkpoint, [9, 2, 1])
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert found.kl == pytest.approx([by_hand, 0], abs=1e-7)
    assert found.same.tolist() == [False, True]
    assert found.source == pytest.approx([math.log(4), math.log(5)])
    assert found.checkpoint == pytest.approx([math.log(2), math.log(5)])


def test_a_text_by_hand():
    windows = [
        window([0.0, 1.0, 2.0], [True, False, True], [1.0, 2.0, 3.0], [1.5, 2.0, 4.0]),
        window([3.0, 9.0, 3.0], [True, True, True], [0.0, 0.0, 0.0], [0.0, 0.0, 1.5]),
    ]
    found = summarize(windows)
    assert found.kl == 3.0 and found.kl_median == 2.5 and found.kl_worst == 9.0 and found.worst == (1, 2)
    assert found.kl_p999 == pytest.approx(9 - 0.005 * 6)  # 0.999 of 5 steps from the first of 6 to the last
    assert found.top1 == pytest.approx(5 / 6)
    assert found.perplexity_source == pytest.approx(math.e) and found.perplexity == pytest.approx(math.exp(1.5))
    assert found.log_ratio == pytest.approx(0.5)
    # Of two windows a quarter of the draws has the first twice, a quarter the second twice: the ends are those.
    assert found.kl_interval == (1.0, 5.0) and found.log_ratio_interval == (0.5, 0.5)
    assert found.top1_interval == pytest.approx((2 / 3, 1.0))


def test_the_interval_is_that_of_a_normal_mean():
    """Of many windows it is 1.96 standard errors to either side."""
    means = np.random.default_rng(1).normal(5, 2, 400)
    low, high = interval(means)
    error = means.std() / 400**0.5
    assert low == pytest.approx(means.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(means.mean() + 1.96 * error, abs=0.1 * error)


def test_one_window_has_no_interval():
    found = summarize([window([1.0, 2.0])])
    assert found.kl_interval is found.top1_interval is found.log_ratio_interval is None


@given(LOGITS, LOGITS)
def test_it_is_never_negative_and_does_not_depend_on_scale(source, checkpoint):
    found = compare(source, checkpoint, TOKENS)
    assert (found.kl >= 0).all() and np.isfinite(found.kl).all()
    shifted = compare(source + np.float32(3), checkpoint, TOKENS)
    assert shifted.kl == pytest.approx(found.kl, abs=1e-3)


@given(LOGITS)
def test_equal_models_are_equal(logits):
    found = summarize([compare(logits, logits, TOKENS)] * 2)
    assert found.kl == found.kl_worst == found.log_ratio == 0 and found.top1 == 1
    assert found.kl_interval == found.log_ratio_interval == (0, 0) and found.top1_interval == (1, 1)
    assert found.perplexity == found.perplexity_source


@given(st.lists(st.floats(0, 10), min_size=2, max_size=40))
def test_the_interval_holds_the_mean_and_is_the_same_again(means):
    values = np.array(means)
    low, high = interval(values)
    assert low - 1e-9 <= values.mean() <= high + 1e-9
    assert values.min() - 1e-9 <= low and high <= values.max() + 1e-9
    assert interval(values) == (low, high)


@given(LOGITS, LOGITS)
def test_pieces_make_no_difference(source, checkpoint):
    whole = compare(source, checkpoint, TOKENS)
    before, divergence._PIECE = divergence._PIECE, 14
    try:
        pieces = compare(source, checkpoint, TOKENS)
    finally:
        divergence._PIECE = before
    for name, values in vars(whole).items():
        assert np.array_equal(values, getattr(pieces, name)), name


def test_what_is_impossible():
    """A token that the source excludes costs nothing; one that only the checkpoint excludes costs everything."""
    source = np.array([[0, -np.inf, 0]], np.float32)
    assert compare(source, source, [0, 2]).kl.tolist() == [0]
    assert compare(source, np.zeros((1, 3), np.float32), [0, 2]).kl == pytest.approx([math.log(1.5)])
    found = summarize([compare(np.zeros((1, 3), np.float32), source, [0, 1])] * 2)
    assert found.kl == math.inf and found.kl_interval is None and found.perplexity == math.inf
    with pytest.raises(ValueError):
        compare(np.full((1, 3), np.nan, np.float32), source, [0, 1])
