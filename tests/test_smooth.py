import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import tiny_model
from vllm_w8a8_bismooth.architectures import ARCHITECTURES, sizes_of
from vllm_w8a8_bismooth.smooth import balance, fold_vector, gather, smooth_block, spread

STORED = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def extents(draw) -> torch.Tensor:
    """fp32 [48] of magnitudes over eight decades, some of them 0."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = 10.0 ** (torch.rand(48, generator=generator) * 8 - 4)
    values[: draw(st.integers(0, 48))] *= draw(st.sampled_from([0.0, 1.0]))
    return values


@given(extents(), extents(), st.floats(0, 1), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_factors_are_normalised_and_ignore_common_scales(activation, weight, alpha, c, d):
    s = balance(activation, weight, alpha)
    assert (s > 0).all() and s.isfinite().all()
    assert s.double().log().mean().abs() < 1e-5
    torch.testing.assert_close(balance(activation * c, weight * d, alpha), s, rtol=1e-5, atol=0)


def test_alpha_one_half_balances_the_two_sides():
    activation, weight = torch.tensor([1.0, 2.0, 1e-3]), torch.tensor([1.0, 0.5, 1e3])
    s = balance(activation, weight, 0.5)
    ratio = (activation / s) / (weight * s)
    torch.testing.assert_close(ratio, ratio[:1].expand(3), rtol=1e-5, atol=0)
    assert s[2] < s[0] < s[1], "the outlier column moves toward the activations"


@given(extents(), st.sampled_from(STORED), st.integers(0, 2**31))
def test_fold_is_exact(magnitude, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    vector = (torch.randn(48, generator=generator)).to(dtype).float()
    s = magnitude.clamp(min=1e-6)
    folded, effective = fold_vector(vector, s, dtype)
    assert folded.dtype == dtype and effective.isfinite().all()
    torch.testing.assert_close(folded.double() * effective.double(), vector.double(), rtol=2.0**-23, atol=0)


def test_fold_gives_up_where_the_dtype_cannot_hold_the_quotient():
    folded, effective = fold_vector(torch.tensor([1.0, 0.0]), torch.tensor([1e-6, 2.0]), torch.float16)
    assert folded.tolist() == [1, 0] and effective.tolist() == [1, 2]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_value_heads_are_shared_by_query_heads(kv_heads, repeat, head_dim):
    s = torch.arange(1.0, kv_heads * head_dim + 1)
    heads = spread(s, repeat, head_dim).view(kv_heads, repeat, head_dim)
    assert torch.equal(heads, s.view(kv_heads, 1, head_dim).expand(-1, repeat, -1))
    assert torch.equal(gather(heads.reshape(-1), repeat, head_dim), s)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {"num_key_value_heads": 1}),
    ],
)
def test_smoothing_preserves_the_function(model_type, changes, dtype):
    model = tiny_model(model_type, **changes).to(dtype).float()  # as stored, computed in fp32
    smoothed = copy.deepcopy(model)
    architecture, sizes = ARCHITECTURES[model_type], sizes_of(model.config.to_dict())
    generator = torch.Generator().manual_seed(1)
    for layer in smoothed.model.layers:
        block = dict(layer.state_dict())
        ranges = {
            site.name: 10.0 ** (torch.rand(block[f"{site.consumers[0]}.weight"].shape[1], generator=generator) * 4 - 2)
            for site in architecture.sites
        }
        new, records = smooth_block(block, ranges, architecture.sites, 0.5, sizes["head"], dict.fromkeys(block, dtype))
        assert [r.site for r in records] == [s.name for s in architecture.sites]
        assert not any(
            torch.equal(new[f"{c}.weight"], block[f"{c}.weight"]) for s in architecture.sites for c in s.consumers
        )
        layer.load_state_dict(new)
    tokens = torch.randint(0, 160, (2, 40), generator=generator)
    with torch.no_grad():
        before, after = model.double()(tokens).logits, smoothed.double()(tokens).logits
    assert (after - before).norm() / before.norm() <= 1e-5 / 10


def test_sites_without_ranges_stay():
    model = tiny_model("llama")
    block = dict(model.model.layers[0].state_dict())
    new, records = smooth_block(block, {}, ARCHITECTURES["llama"].sites, 0.5, 24, {})
    assert not records and all(torch.equal(new[n], block[n]) for n in block)
