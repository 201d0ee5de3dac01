"""The one encoding of per-channel and the one check of divisibility."""

import pytest

from vllm_w8a8_bismooth import grouping


@pytest.mark.parametrize(("columns", "group_size", "count"), [(96, None, 1), (96, 96, 1), (96, 32, 3), (4096, 128, 32)])
def test_scales_of_a_row(columns, group_size, count):
    assert grouping.fits(columns, group_size) and grouping.groups(columns, group_size) == count


@pytest.mark.parametrize(
    ("columns", "group_size", "message"),
    [
        (352, 128, "K = 352 is not a multiple of group_size = 128; 32 would fit"),
        (53248, 8192, "K = 53248 is not a multiple of group_size = 8192; 32, 64, 128, 256, 512, 1024 would fit"),
        (40, 32, "K = 40 is not a multiple of group_size = 32; no usual size would fit"),
        (64, 0, "K = 64 is not a multiple of group_size = 0; 32, 64 would fit"),
        (64, -32, "K = 64 is not a multiple of group_size = -32; 32, 64 would fit"),
    ],
)
def test_sizes_that_do_not_fit(columns, group_size, message):
    assert not grouping.fits(columns, group_size)
    with pytest.raises(ValueError) as error:
        grouping.groups(columns, group_size)
    assert str(error.value) == message


def test_sizes_to_propose():
    assert grouping.fitting(352) == [32] and grouping.fitting(40) == []
    assert grouping.fitting(53248) == list(grouping.SIZES)
