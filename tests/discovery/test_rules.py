"""What stays in float: each rule, by the matrix that it is for."""

from dataclasses import replace

import pytest

from vllm_w8a8_bismooth.discovery.rules import Matrix, reason

PLAIN = Matrix("mlp.up_proj.weight", (96, 64), 96, 64, False, "Linear", frozenset({"up_proj", "gate_proj"}))
UNSEEN = dict(rows=0, columns=0)


def test_a_linear_becomes_int8():
    assert reason(PLAIN) is None
    assert reason(replace(PLAIN, name="mlp.gate.weight")) is None  # a gate where there are no experts


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(name="mlp.gate.weight", beside=frozenset({"gate", "experts"})), "a router"),
        (dict(name="mlp.router.classifier.weight"), "a router"),
        (dict(name="mlp.gate.weight", rows=8, counted=True), "a router or gate"),
        (dict(name="mlp.experts.gate_up_proj", shape=(4, 96, 64)), "experts stored as one tensor"),
        (dict(name="mlp.experts.up_proj_bias", shape=(4, 96), **UNSEEN), "biases"),
        (dict(name="mixer.conv1d.weight", shape=(96, 1, 4), owner="Conv1d", **UNSEEN), "a convolution"),
        (dict(name="mixer.A_log", owner="MambaMixer", **UNSEEN), "a state-space parameter"),
        (dict(name="attn.q_norm.weight", owner="CohereLayerNorm", **UNSEEN), "a norm's gain"),
        (dict(name="mlp.other.weight", **UNSEEN), "nothing was seen"),
        (dict(name="mamba.in_proj.weight", beside=frozenset({"in_proj", "x_proj", "dt_proj"})), "a Mamba-1 mixer"),
        (dict(name="self_attn.indexer.wk.weight"), "index of sparse attention"),
        (dict(name="per_layer_projection.weight"), "per-layer embeddings"),
        (dict(name="ffn.experts.mlp.w1"), "no linear's"),
        (dict(columns=72), "no multiple of 16"),
        (dict(rows=8), "tiny"),
    ],
)
def test_each_rule_has_its_matrix(changes, why):
    assert why in (reason(replace(PLAIN, **changes)) or "")
