"""Smaller configs: widths divided, counts kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_w8a8_bismooth.discovery import widths
from vllm_w8a8_bismooth.discovery.record import each, runs

LLAMA = dict(
    model_type="llama", hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=8,
    num_hidden_layers=32, vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5, pad_token_id=31999,
)  # fmt: skip


def test_widths_are_divided_and_counts_kept():
    small = widths.shrunk(LLAMA, 32, experts=4)
    kept = {"num_attention_heads", "num_key_value_heads", "num_hidden_layers", "rms_norm_eps", "model_type"}
    assert {key: small[key] for key in kept} == {key: LLAMA[key] for key in kept}
    assert (small["hidden_size"], small["intermediate_size"], small["vocab_size"]) == (128, 344, widths.VOCABULARY)
    assert small["pad_token_id"] < widths.RESERVED and small["max_position_embeddings"] <= 256


def test_heads_that_no_entry_names_limit_the_factor():
    assert widths.factors(LLAMA)[0] == 32  # heads of 128 channels keep four
    assert widths.factors({**LLAMA, "head_dim": 64})[0] == 16
    assert widths.factors({**LLAMA, "hidden_size": 4544, "num_attention_heads": 71})[0] == 16
    assert widths.factors(LLAMA)[-1] == 1


@given(st.integers(4, 64), st.integers(2, 16), st.integers(1, 40), st.integers(1, 8))
def test_every_factor_that_is_tried_divides_a_regular_config(head, factor, heads, times):
    config = dict(hidden_size=head * factor * heads, num_attention_heads=heads, intermediate_size=head * factor * times)
    tried = widths.factors(config)
    assert tried[-1] == 1 and len(set(tried)) == len(tried)
    assert all(config["intermediate_size"] % f == 0 and config["hidden_size"] // heads % f == 0 for f in tried)


def test_mixtures_are_small_and_choose_every_expert():
    mixture = dict(
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        n_shared_experts=2,
        moe_intermediate_size=64,
    )
    assert widths.shrunk(mixture, 8, experts=4) == dict(
        n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1, n_shared_experts=2, moe_intermediate_size=8
    )


def test_rotary_entries_follow_the_heads():
    rope = dict(mrope_section=[16, 24, 24], short_factor=[1.0] * 64, rope_theta=1e4)
    small = widths.shrunk(dict(rope_parameters=rope), 16, experts=1)["rope_parameters"]
    assert sum(small["mrope_section"]) == 4 and len(small["short_factor"]) == 4 and small["rope_theta"] == 1e4


def test_towers_become_small_and_a_text_model_inside_is_shrunk():
    config = dict(
        text_config=dict(LLAMA), vision_config=dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16)
    )
    small = widths.shrunk(config, 16, experts=1)
    assert small["text_config"]["hidden_size"] == 256
    assert small["vision_config"] == dict(hidden_size=144, num_hidden_layers=1, num_attention_heads=1)


@pytest.mark.parametrize("blocks", [1, 3])
def test_fewer_blocks_cut_what_is_said_of_each(blocks):
    config = dict(num_hidden_layers=4, layer_types=["a", "b", "a", "b"], intermediate_size=[64, 96, 64, 96])
    small = widths.shrunk(config, 8, experts=1, blocks=blocks)
    assert small["num_hidden_layers"] == blocks and small["layer_types"] == ["a", "b", "a"][:blocks]
    assert small["intermediate_size"] == [8, 12, 8][:blocks]


@given(st.lists(st.integers(0, 50)))
def test_runs_are_the_indices(indices):
    assert list(each(runs(indices))) == indices
    assert all(
        first + length != then for (first, length), (then, _) in zip(runs(indices), runs(indices)[1:], strict=False)
    )
