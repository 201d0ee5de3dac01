"""4-bit grids: every code is one that four bits hold, rounding is to the nearest of them, and search pays."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_w8a8_bismooth import fourbits
from vllm_w8a8_bismooth.method.compensate import Compensation, Gram
from vllm_w8a8_bismooth.method.grids import REACH, Stepped
from vllm_w8a8_bismooth.method.quantize import dequantize_weight, quantize_folded, quantize_weight
from vllm_w8a8_bismooth.method.rows import Fold


def weights(n: int, columns: int, seed: int, outliers: float = 0.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, columns, generator=draw) * torch.rand(n, 1, generator=draw).mul(8).exp()
    return weight * torch.where(torch.rand(n, columns, generator=draw) < outliers, 30.0, 1.0)


def grid_of(weight: torch.Tensor, wide: torch.Tensor, group_size: int, counts: torch.Tensor | None = None) -> Stepped:
    _, scale = quantize_weight(weight)
    counts = torch.ones(weight.shape[1]) if counts is None else counts
    return Stepped.search(weight, scale.view(-1), wide, group_size, counts)


@given(
    st.integers(1, 8), st.sampled_from([32, 64]), st.integers(1, 3), st.integers(0, 2**31), st.sampled_from([0, 0.05])
)
def test_codes_are_the_nearest_that_four_bits_hold(n, group_size, groups, seed, outliers):
    weight = weights(n, groups * group_size, seed, outliers)
    wide = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.3
    grid = grid_of(weight, wide, group_size)
    codes = grid.rounded(weight)
    stored = codes.to(torch.int8)
    assert torch.equal(stored.float(), codes) and codes.abs().max() <= 127
    assert fourbits.fits(stored, group_size)[~wide].all()
    for row in range(n):
        if wide[row]:
            assert torch.equal(stored[row : row + 1], quantize_weight(weight[row : row + 1])[0])
            continue
        m, o = (each[:, row].view(-1, 1, 1) for each in (grid.multiplier, grid.offset))
        levels = m * torch.arange(16.0) + o
        assert levels.abs().max() <= 127
        values = (weight[row] / grid.scale[row]).view(groups, group_size, 1)
        least = (values - levels).abs().amin(dim=-1)
        torch.testing.assert_close((values[..., 0] - codes[row].view(groups, -1)).abs(), least, rtol=0, atol=1e-4)
    columns = torch.stack([_nearest(grid, weight, j, group_size) for j in range(weight.shape[1])], dim=1)
    assert torch.equal(columns, codes)


def _nearest(grid: Stepped, weight: torch.Tensor, column: int, group_size: int) -> torch.Tensor:
    out = torch.empty(len(weight))
    grid.nearest(weight[:, column], column // group_size, out)
    return out


def test_what_counts_more_is_rounded_better():
    weight, none = weights(64, 256, 0, 0.02), torch.zeros(64, dtype=torch.bool)
    counts = torch.rand(256, generator=torch.Generator().manual_seed(1)).mul(6).exp()
    left = {}
    for name, searched in {"even": torch.ones(256), "weighted": counts}.items():
        grid = grid_of(weight, none, 64, searched)
        error = dequantize_weight(grid.rounded(weight), grid.scale[:, None]) - weight
        left[name] = float((error.square() * counts).sum() / (weight.square() * counts).sum())
    assert left["weighted"] < 0.95 * left["even"]


def test_all_zero_and_constant_rows():
    weight = torch.zeros(3, 64)
    weight[1], weight[2, 5] = -3.25, 1e-30
    grid = grid_of(weight, torch.zeros(3, dtype=torch.bool), 32)
    back = dequantize_weight(grid.rounded(weight), grid.scale[:, None])
    torch.testing.assert_close(back, weight, rtol=0.01, atol=1e-32)
    assert (back[0] == 0).all() and (back[1] == back[1, 0]).all()


@pytest.mark.parametrize("compensated", [False, True])
def test_a_whole_weight(compensated):
    """Rows of both kinds: 8-bit ones are as without the others, all fit, and compensation gains with 4-bit rows too."""
    draw = torch.Generator().manual_seed(3)
    mixed = torch.randn(2048, 24, generator=draw) @ torch.randn(24, 128, generator=draw)
    inputs = mixed + 0.3 * torch.randn(2048, 128, generator=draw)
    gram = Gram.none(128)
    gram.add(inputs)
    compensation = Compensation.of(gram) if compensated else None
    weight, wide = weights(300, 128, 4), torch.rand(300, generator=draw) < 0.2
    made, steps = torch.empty(300, 128, dtype=torch.int8), torch.empty(300, 1)

    def take(start: int, codes: torch.Tensor, scale: torch.Tensor) -> None:
        made[start : start + len(codes)], steps[start : start + len(codes)] = codes, scale

    loss = quantize_folded(weight, Fold(), 64, take, compensation=compensation, wide=wide)
    assert fourbits.fits(made, 64)[~wide].all()
    nearest, scale = quantize_weight(weight)
    assert torch.equal(steps[wide], scale[wide])
    assert (made[wide].int() - nearest[wide].int()).abs().max() == (REACH if compensated else 0)
    grid = grid_of(weight, wide, 64, None if compensation is None else torch.cat(compensation.weights))
    plain = (dequantize_weight(grid.rounded(weight), grid.scale[:, None]) - weight) @ inputs.T
    here = (dequantize_weight(made, steps) - weight) @ inputs.T
    ratio = (here.square().mean(dim=1) / plain.square().mean(dim=1))[~wide].log().mean().exp()
    if compensation is None:
        assert torch.equal(made.float(), grid.rounded(weight))
    else:
        assert float(ratio) == pytest.approx(compensation.left(), rel=0.3) and ratio < 0.5
    assert loss.written == pytest.approx(float((dequantize_weight(made, steps) - weight).square().sum()), rel=1e-3)
