"""Moments are sums over rows, however the rows come."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.moments import CHANNELS, moments, noise, seeds
from vllm_w8a8_bismooth.method.columns import Columns
from vllm_w8a8_bismooth.method.moments import ORDER, Moments, typical
from vllm_w8a8_bismooth.method.rows import Fold, Threads
from vllm_w8a8_bismooth.model.layers import Site


def assert_close(found: Moments, expected: Moments, rtol: float = 1e-6) -> None:
    assert found.rows == expected.rows
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(found.tensors()[name], tensor, rtol=rtol, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@given(seeds, st.lists(st.integers(1, 9), max_size=6), st.floats(0, 6))
def test_rows_may_come_in_any_split(seed, sizes, decades):
    rows = noise(sum(sizes), seed=seed, decades=decades)
    one_by_one, merged = Moments.none(CHANNELS), Moments.none(CHANNELS)
    for piece in rows.split(sizes) if sizes else ():
        one_by_one.add(piece.clone())
        merged.merge(moments(piece))
    if len(rows):
        assert_close(one_by_one, moments(rows))
        assert_close(merged, moments(rows))
    assert one_by_one.rows == merged.rows == len(rows)


@given(seeds, st.floats(0, 6))
def test_sums_are_those_of_rows_of_unit_size(seed, decades):
    rows = noise(20, seed=seed, decades=decades)
    unit = rows.double() / rows.double().square().mean(dim=1, keepdim=True).sqrt()
    assert_close(
        moments(rows),
        Moments(20, rows.abs().amax(dim=0), unit.square().sum(dim=0), (unit**ORDER).sum(dim=0)),
        rtol=1e-5,
    )


@given(seeds, st.floats(-20, 20))
def test_a_row_counts_as_much_as_any_other(seed, exponent):
    rows = noise(3, seed=seed)
    louder = rows * torch.tensor([[1.0], [2.0**exponent], [1.0]])
    found, expected = moments(louder), moments(rows)
    torch.testing.assert_close(found.square, expected.square, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.high, expected.high, rtol=1e-5, atol=0)
    assert torch.equal(found.largest, louder.abs().amax(dim=0))


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
def test_small_channels_are_seen(size):
    """Also where fp32 could not hold their powers."""
    rows = noise(20)
    rows[:, 5] *= size
    unit = rows.double() / rows.double().square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(moments(rows).high, (unit**ORDER).sum(dim=0), rtol=1e-4, atol=0)


def test_rows_of_zeros_count_and_add_nothing():
    found = moments(torch.zeros(3, 4))
    assert found.rows == 3 and not any(t.any() for t in (found.largest, found.square, found.high))


@given(seeds, seeds, st.floats(0, 4))
def test_scaled_is_that_of_scaled_rows_of_the_same_size(seed, other, decades):
    """The row's size is held: of the factor, only what it does inside the row counts."""
    rows = noise(20, seed=seed)
    factor = noise(1, seed=other, decades=decades)[0].abs() + 1e-3
    unit = rows.double() / rows.double().square().mean(dim=1, keepdim=True).sqrt() * factor
    expected = Moments(
        20, (rows * factor).abs().amax(dim=0), unit.square().sum(dim=0), unit.abs().pow(ORDER).sum(dim=0)
    )
    assert_close(moments(rows).scaled(factor), expected, rtol=1e-5)
    assert_close(moments(rows).scaled(factor).scaled(1 / factor), moments(rows), rtol=1e-5)


@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_tied_channels_are_summed(seed, heads, repeats, width):
    rows = noise(7, heads * repeats * width, seed, decades=2)
    held = tuple((h * width, width) for h in range(heads) for _ in range(repeats))
    site = Site("v->o", "v", ("o",), rows=((0, heads * width),), columns=held)
    found, tied = moments(rows), moments(rows).tied(Columns.of(site))
    for h in range(heads):
        for c in range(width):
            shared = [h * repeats * width + r * width + c for r in range(repeats)]
            at = h * width + c
            assert tied.largest[at] == found.largest[shared].max()
            torch.testing.assert_close(tied.square[at], found.square[shared].sum(), rtol=1e-12, atol=0)
            torch.testing.assert_close(tied.high[at], found.high[shared].sum(), rtol=1e-12, atol=0)
    assert tied.rows == 7 and len(tied.square) == heads * width


@given(seeds, st.integers(0, CHANNELS))
def test_dead_channels_are_taken_as_typical(seed, dead):
    values = noise(1, seed=seed, decades=8)[0].abs() + 1e-9
    values[:dead] = 0
    seen = values[dead:].median() if dead < CHANNELS else torch.tensor(1.0)
    assert torch.equal(typical(values)[dead:], values[dead:]) and (typical(values)[:dead] == seen).all()


def test_rms_is_positive_whatever_came():
    rows = noise(50, 6)
    rows[:, 2] = 0
    rms = moments(rows).rms()
    alive = [0, 1, 3, 4, 5]
    assert rms[2] == rms[alive].median() and rms.dtype == torch.float32
    torch.testing.assert_close(rms[alive].double().square().sum(), torch.tensor(6.0).double(), rtol=1e-5, atol=0)
    assert (Moments.none(4).rms() == 1).all() and (moments(torch.zeros(3, 4)).rms() == 1).all()


@given(seeds, st.integers(0, 9))
def test_tensors_are_read_back(seed, rows):
    found = moments(noise(rows, seed=seed, decades=4)) if rows else Moments.none(CHANNELS)
    again = Moments.of(found.tensors(), "cpu")
    assert again.rows == rows
    assert all(torch.equal(a, b) for a, b in zip(found.tensors().values(), again.tensors().values(), strict=True))


@pytest.mark.parametrize("columns", [False, True])
def test_of_a_folded_weight(columns, monkeypatch):
    """Output channels count by the size of what they make of the activations; threads and pieces do not show."""
    weight, basis = noise(40, seed=1, decades=2), noise(1, seed=2, decades=2)[0].abs() + 0.01
    factors = noise(1, seed=3, decades=4)[0].abs() + 0.01 if columns else torch.ones(CHANNELS)
    folded = weight * factors
    expected = moments(folded * basis).scaled(1 / basis)
    fold = Fold(rows=torch.rand(40) + 0.5, columns=factors if columns else None)  # a row's factor is part of its size
    found = fold.moments(weight, basis)
    torch.testing.assert_close(found.square, expected.square, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.high, expected.high, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.largest, fold.column_extent(weight), rtol=1e-6, atol=0)
    monkeypatch.setattr("vllm_w8a8_bismooth.method.rows._PIECE", 3 * CHANNELS)
    monkeypatch.setattr("vllm_w8a8_bismooth.method.rows._SLAB", 9 * CHANNELS)
    with Threads() as threads:
        assert_close(fold.moments(weight, basis, threads), found, rtol=1e-6)
        rms = fold.row_norms(weight, threads)
    torch.testing.assert_close(rms, fold.apply(weight).norm(dim=1), rtol=1e-6, atol=0)
