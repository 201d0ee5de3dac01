import re

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_w8a8_bismooth import analyze
from vllm_w8a8_bismooth.architectures import ARCHITECTURES
from vllm_w8a8_bismooth.quantize import Fold, Loss, quantize_folded

LLAMA = ARCHITECTURES["llama"].dense


def error_of(weight: torch.Tensor, group_size: int | None = None) -> float:
    loss = Loss(weight.shape[1])
    for _ in quantize_folded(weight, Fold(), group_size, loss):
        pass
    return loss.column_error()


@given(st.integers(0, 2**31), st.sampled_from([100.0, 1000.0]), st.integers(1, 3))
def test_outlier_columns_are_told_from_healthy_ones(seed, k, count):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 512, generator=generator)
    assert error_of(weight) < analyze.VULNERABLE / 2
    weight[:, torch.randperm(512, generator=generator)[:count]] *= k
    assert error_of(weight) > 2 * analyze.VULNERABLE
    assert error_of(weight, 32) < error_of(weight) * (count + 1) / 16 + 0.02, "only the outliers' groups are spoilt"


def test_zero_columns_do_not_count():
    weight = torch.zeros(4, 64)
    assert error_of(weight) == 0
    weight[:, 0] = 1
    assert error_of(weight) < 1e-6


def test_choice_is_closed_under_fusion():
    errors = {name: 0.01 for name in LLAMA.linears} | {"self_attn.k_proj": 0.3, "mlp.down_proj": 0.06}
    assert analyze.vulnerable(errors, LLAMA) == {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.down_proj",
    }
    assert analyze.named(re.compile(r"layers\.1\.mlp\.up"), "model.layers.1.", LLAMA) == {
        "mlp.up_proj",
        "mlp.gate_proj",
    }
    assert analyze.named(re.compile(r"layers\.1\.mlp\.up"), "model.layers.11.", LLAMA) == set()
