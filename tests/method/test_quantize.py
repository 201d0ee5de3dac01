import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_w8a8_bismooth.method.quantize import dequantize_weight, quantize_weight


@st.composite
def weights(draw) -> torch.Tensor:
    """fp32 [N, K], K a multiple of 32, over many magnitudes, with zero rows and outlier columns."""
    rows, groups = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, groups * 32, generator=generator) * 10.0 ** draw(st.integers(-30, 30))
    weight[:, draw(st.integers(0, groups * 32 - 1))] *= draw(st.sampled_from([0.0, 1.0, 1000.0]))
    if draw(st.booleans()):
        weight[draw(st.integers(0, rows - 1))] = 0
    return weight


@given(weights(), st.sampled_from([None, 32]))
def test_error_is_at_most_half_a_step(weight, group_size):
    codes, scale = quantize_weight(weight, group_size)
    step = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    error = (codes.double() * step - weight.double()).abs()
    # Division by the fp32 scale may land a hair beyond the tie: 127 * 2^-24 of a step.
    assert (error <= step * (0.5 + 1e-5)).all()


@given(weights(), st.sampled_from([None, 32]))
def test_codes_fill_the_symmetric_range(weight, group_size):
    codes, scale = quantize_weight(weight, group_size)
    groups = codes.int().view(*scale.shape, -1).abs().amax(dim=-1)
    zero = weight.view(*scale.shape, -1).abs().amax(dim=-1) == 0
    assert ((groups == 127) | zero).all()
    assert (scale[zero] == 1).all() and (groups[zero] == 0).all()


@given(weights())
def test_one_group_is_per_channel(weight):
    assert all(map(torch.equal, quantize_weight(weight, weight.shape[1]), quantize_weight(weight)))


@given(weights(), st.integers(-20, 20))
def test_powers_of_two_move_into_the_scale(weight, exponent):
    assume((weight * 2.0**exponent).isfinite().all())
    codes, scale = quantize_weight(weight)
    scaled_codes, scaled = quantize_weight(weight * 2.0**exponent)
    used = weight.abs().amax(dim=1) > 0
    assert torch.equal(codes, scaled_codes) and torch.equal(scaled[used], scale[used] * 2.0**exponent)


def test_ties_round_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    codes, scale = quantize_weight(weight)
    assert scale.item() == 1 and codes.tolist() == [[127, 0, 2, 2, 0, -2]]
    assert torch.equal(dequantize_weight(codes, scale), codes.float())


def test_group_size_must_divide():
    with pytest.raises(ValueError, match="K = 96 is not a multiple of group_size = 64"):
        quantize_weight(torch.ones(2, 96), 64)
