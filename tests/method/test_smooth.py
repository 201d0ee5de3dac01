import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.support.folding import RULE, smoothed_copy
from tests.support.models import MODEL_TYPES, layer_of
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.method.columns import Columns
from vllm_w8a8_bismooth.method.smooth import fold_vector, smooth_block
from vllm_w8a8_bismooth.model.layers import NONE, Site
from vllm_w8a8_bismooth.model.names import Names

STORED = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def extents(draw) -> torch.Tensor:
    """fp32 [48] of magnitudes over eight decades, some of them 0."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = 10.0 ** (torch.rand(48, generator=generator) * 8 - 4)
    values[: draw(st.integers(0, 48))] *= draw(st.sampled_from([0.0, 1.0]))
    return values


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


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([2, 4, 6, 8]))
def test_value_heads_are_shared_by_query_heads(kv_heads, repeat, head_dim):
    s = torch.arange(1.0, kv_heads * head_dim + 1)
    changes = dict(
        hidden_size=8 * kv_heads * repeat,
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * repeat,
        head_dim=head_dim,
    )
    columns = Columns.of(layer_of("llama", **changes).sites[0])
    heads = columns.spread(s)
    assert torch.equal(heads.view(kv_heads, repeat, head_dim), s.view(kv_heads, 1, head_dim).expand(-1, repeat, -1))
    assert torch.equal(columns.gather(heads, "amax"), s)


def test_columns_without_a_channel_are_left_alone():
    columns = Columns.of(Site("", "up", ("down",), rows=((4, 3),), columns=((1, 2), (NONE, 2), (0, 1))))
    assert columns.spread(torch.tensor([2.0, 3.0, 4.0])).tolist() == [3, 4, 1, 1, 2]
    assert columns.gather(torch.tensor([1.0, 2.0, 9.0, 9.0, 5.0]), "sum").tolist() == [5, 1, 2]


@given(extents(), st.integers(0, 2**31))
def test_fold_is_exact_for_norms_that_store_their_gain_less_one(magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    vector = (torch.randn(48, generator=generator) * 0.3).bfloat16().float()
    folded, effective = fold_vector(vector, magnitude.clamp(min=1e-6), torch.bfloat16, offset=1.0)
    assert effective.isfinite().all() and (effective > 0).sum() >= 47
    gain = (folded.double() + 1) * effective.double()
    torch.testing.assert_close(gain, vector.double() + 1, rtol=2.0**-22, atol=0)


CHANGES = {
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "all heads": ("mistral", {"num_key_value_heads": 4}),
    "one head": ("qwen3", {"num_key_value_heads": 1}),
    "steps": ("qwen2_moe", {"decoder_sparse_step": 2, "qkv_bias": False}),
    "biased gemma": ("gemma2", {"attention_bias": True}),
}


@pytest.mark.parametrize("case", [*MODEL_TYPES, *CHANGES])
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_smoothing_preserves_the_function(make_checkpoint, tmp_path, case, dtype):
    model_type, changes = CHANGES.get(case, (case, {}))
    folder = make_checkpoint(model_type, dtype, **changes)
    assert smoothed_copy(folder, tmp_path / "smoothed")
    tokens = torch.randint(0, 160, (2, 40), generator=torch.Generator().manual_seed(2))
    logits = []
    for path in (folder, tmp_path / "smoothed"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
        with torch.no_grad():
            logits.append(model(tokens).logits)
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert error <= 1e-5, float(error)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_routing_does_not_change_at_all(make_checkpoint, tmp_path, model_type):
    """In bf16, the norm's gain times the router's column is the same to the last bit."""
    folder = make_checkpoint(model_type)
    smoothed_copy(folder, tmp_path / "smoothed")
    before, after = Source(folder), Source(tmp_path / "smoothed")
    for index, layer in enumerate(before.layers):
        for router in layer.routers:
            products = []
            for source in (before, after):
                norm = source.checkpoint.read(Names().block(index) + "post_attention_layernorm.weight")
                columns = source.checkpoint.read(f"{Names().block(index)}{router}.weight")
                assert torch.equal(columns.bfloat16().float(), columns.float())
                products.append(norm.double() * columns.double())
            assert torch.equal(*products)


def test_sites_without_ranges_stay():
    smoothing = smooth_block({}, {}, layer_of("llama"), RULE)
    assert not smoothing.folds and not smoothing.vectors and not smoothing.sites
