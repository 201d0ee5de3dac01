"""Rows in four bits are INT8 rows, packed without loss."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_w8a8_bismooth import fourbits, grouping

WIDE = ("rows", "low")
"""What is absent where no row has eight bits."""


@functools.cache
def documented_decoder() -> Callable:
    """The example of docs/format.md."""
    page = Path(__file__).parents[1] / "docs" / "format.md"
    (code,) = re.findall(r"```python\n(.+?)```", page.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    return names["codes"]


def example(n: int, groups: int, group_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 ``[n, K]`` whose rows four bits hold, but for those whose numbers come second."""
    draw = torch.Generator().manual_seed(seed)
    m = torch.randint(1, 17, (n, groups, 1), generator=draw)
    q = torch.randint(0, 16, (n, groups, group_size), generator=draw)
    o = (torch.rand(n, groups, 1, generator=draw) * (255 - 15 * m)).floor().long() - 127
    codes = (q * m + o).view(n, -1).to(torch.int8)
    rows = torch.rand(n, generator=draw).lt(0.3).nonzero().view(-1)
    codes[rows] = torch.randint(-127, 128, (len(rows), codes.shape[1]), generator=draw).to(torch.int8)
    return codes, rows


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from(grouping.OF_FOUR_BITS), st.integers(0, 2**31))
def test_packing_loses_nothing(n, groups, group_size, seed):
    codes, rows = example(n, groups, group_size, seed)
    stored = fourbits.pack(codes, rows, group_size)
    assert torch.equal(stored.codes(), codes)
    again = fourbits.pack(stored.codes(), rows, group_size)
    for field in fourbits.DTYPES:
        assert torch.equal(getattr(again, field), getattr(stored, field)), field
    parts = {field: getattr(stored, field).numpy() for field in fourbits.DTYPES if len(rows) or field not in WIDE}
    assert np.array_equal(documented_decoder()(**parts), codes.numpy())
    four = torch.ones(n, dtype=torch.bool).index_fill(0, rows, False)
    assert fourbits.fits(codes, group_size)[four].all()
    size = 8 * sum(getattr(stored, field).nbytes for field in fourbits.DTYPES) + 32 * n
    of_four, of_eight = grouping.row_bits(codes.shape[1], group_size)
    assert size == int(four.sum()) * of_four + len(rows) * of_eight


@given(st.lists(st.integers(-127, 127), min_size=32, max_size=32))
def test_steps_are_the_widest_that_hold_the_codes(codes):
    (m,), (o,) = (x.view(-1).tolist() for x in fourbits.steps_of(torch.tensor([codes], dtype=torch.int8), 32))
    distances = [code - min(codes) for code in codes]
    assert o == min(codes) and all(distance % m == 0 for distance in distances)
    assert (
        m == 1
        or not any(all(distance % wider == 0 for distance in distances) for wider in range(m + 1, 255))
        or not any(distances)
    )
    assert bool(fourbits.fits(torch.tensor([codes], dtype=torch.int8), 32)) == (max(distances) < 16 * m)


def test_a_row_that_four_bits_do_not_hold_is_named():
    codes = torch.zeros(3, 64, dtype=torch.int8)
    codes[1, :17] = torch.arange(17, dtype=torch.int8)
    with pytest.raises(ValueError, match="row 1$"):
        fourbits.pack(codes, torch.tensor([], dtype=torch.int32), 32)
    with pytest.raises(ValueError, match="not a multiple"):
        fourbits.pack(codes, torch.tensor([1]), 128)


def damaged():
    good = fourbits.pack(*example(4, 2, 32, 3), 32)
    zero, far = good.multiplier.clone(), good.offset.clone()
    zero[0, 0], far[0, 1] = 0, 127
    rows = torch.tensor([1, 2], dtype=torch.int32)
    low = torch.zeros(2, 32, dtype=torch.uint8)
    return {
        "multiplier is 0": replace(good, multiplier=zero),
        "row 0 has codes beyond": replace(good, offset=far),
        "ascending numbers below 4": replace(good, rows=rows.flip(0), low=low),
        "numbers below 4": replace(good, rows=rows + 2, low=low),
        "not the parts of one weight": replace(good, rows=rows, low=low[:1]),
        r"offset torch.int8 \[4, 1\]": replace(good, offset=far[:, :1]),
        r"packed torch.uint8 \[3": replace(good, packed=good.packed[:3]),
        "rows torch.int64": replace(good, rows=rows.long(), low=low),
    }


def test_many_rows_are_decoded_some_at_a_time(monkeypatch):
    codes, rows = example(50, 2, 32, 5)
    stored = fourbits.pack(codes, rows, 32)
    for together in (1, 64, 7 * 64, 50 * 64):
        monkeypatch.setattr(fourbits, "_TOGETHER", together)
        assert torch.equal(stored.codes(), codes)
    stored.offset[33] = 127
    with pytest.raises(ValueError, match="row 133 has codes beyond"):
        stored.codes(first=100)


@pytest.mark.parametrize("message", damaged())
def test_what_does_not_fit_is_refused(message):
    with pytest.raises(ValueError, match=message):
        damaged()[message].codes()
    with pytest.raises(ValueError, match=message):
        damaged()[message].check()


@given(st.data())
def test_a_check_refuses_what_stands_for_no_codes(data):
    """Of any bytes, with or without making the codes."""
    seed, wide = data.draw(st.integers(0, 2**31)), data.draw(st.integers(0, 3))
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randperm(3, generator=draw)[:wide].sort().values.int()
    stored = fourbits.Rows(
        torch.randint(0, 256, (3, 16), generator=draw).to(torch.uint8),
        torch.randint(1, data.draw(st.sampled_from([3, 10, 256])), (3, 1), generator=draw).to(torch.uint8),
        torch.randint(-128, 30, (3, 1), generator=draw).to(torch.int8),
        rows,
        torch.randint(0, 256, (wide, 16), generator=draw).to(torch.uint8),
    )
    refusals = []
    for look in (stored.codes, stored.check):
        try:
            look()
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) in (0, 2)


def test_some_rows():
    codes, rows = example(9, 2, 32, 5)
    stored = fourbits.pack(codes, rows, 32)
    numbers = torch.cat([rows, torch.tensor([n for n in range(9) if n not in rows][:2])])
    assert torch.equal(stored.some(numbers).codes(), codes[numbers])
