"""Experts in vLLM's own layer, which needs no engine, and three kinds of mixtures in real ones."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import gelu, silu

from tests.test_serving import STOCK, TOKEN, W8A8, config_class
from vllm_w8a8_bismooth.quantize import dequantize_weight, quantize_weight

PREFIX = "model.layers.1.mlp.experts"
CHECKPOINT = STOCK | {
    "config_groups": {"g": {"targets": ["Linear"], "weights": W8A8, "input_activations": TOKEN}},
    "ignore": ["lm_head", r"re:.*mlp\.gate$"],
}
ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": partial(gelu, approximate="tanh")}


def vllms_layer(
    experts: int = 4,
    hidden: int = 64,
    inner: int = 96,
    top: int = 2,
    rank: tuple[int, int] = (0, 1),
    expert_parallel: bool = False,
    activation: str = "silu",
    checkpoint: dict = CHECKPOINT,
    **more,
):
    """What vLLM builds for the experts of one block on one of several ranks, still without weights."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.utils.torch_utils import set_default_torch_dtype

    alone = (0, 1)
    (tp_rank, tp_size), (ep_rank, ep_size) = (alone, rank) if expert_parallel else (rank, alone)
    parallel = FusedMoEParallelConfig(
        tp_rank=tp_rank,
        tp_size=tp_size,
        ep_rank=ep_rank,
        ep_size=ep_size,
        use_ep=expert_parallel,
        **dict.fromkeys(("pcp_rank", "dp_rank"), 0),
        **dict.fromkeys(("pcp_size", "dp_size", "sp_size"), 1),
        all2all_backend="allgather_reducescatter",
        enable_eplb=False,
    )
    placed = ExpertMapManager(64, top, experts, 0, None, parallel, "linear", enable_eplb=False)
    moe = FusedMoEConfig(
        num_experts=experts,
        num_logical_experts=experts,
        num_local_experts=placed.local_num_experts,
        experts_per_token=top,
        hidden_dim=hidden,
        intermediate_size=inner,
        activation=MoEActivation.from_str(activation),
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        **{key: more.pop(key) for key in ("has_bias", "swiglu_limit") if key in more},
    )
    config = config_class().from_config(json.loads(json.dumps(checkpoint)))
    with set_default_torch_dtype(torch.bfloat16):  # as vLLM does while it builds a model
        return RoutedExperts(PREFIX, torch.bfloat16, moe, config, expert_map_manager=placed, **more)


def stored(experts: int, hidden: int, inner: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The experts' tensors, as a checkpoint holds them, by their names inside the block's experts."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for expert in range(experts):
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            codes, scale = quantize_weight(torch.randn(shape, generator=generator) / shape[1] ** 0.5, None)
            tensors |= {f"{expert}.{name}_proj.weight": codes, f"{expert}.{name}_proj.weight_scale": scale}
    return tensors


def loaded(tensors: dict[str, torch.Tensor], **settings):
    """vLLM's layer after its loader and what vLLM calls behind it."""
    layer = vllms_layer(**settings)
    list(layer.load_weights(tensors.items()))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def run(layer, x, shares, chosen) -> torch.Tensor:
    return layer.forward_modular(x, shares, chosen.int())


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What a token is after its quantization, in fp64."""
    scale = x.double().abs().amax(dim=-1, keepdim=True) / 127
    return (x.double() / scale).nan_to_num().round() * scale


def emulated(tensors, x, shares, chosen, activation: str = "silu") -> torch.Tensor:
    """Token by token with dequantized weights, in fp64 but for the roundings that a dense MLP has."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (row, names, parts) in enumerate(zip(x, chosen, shares, strict=True)):
        for expert, share in zip(names.tolist(), parts, strict=True):
            weight = partial(weight_of, tensors, expert)
            gate, up = (torch.mv(weight(name), rounded(row)).to(x.dtype) for name in ("gate", "up"))
            out[token] += share.double() * (weight("down") @ rounded(ACTIVATIONS[activation](gate) * up))
    return out


def weight_of(tensors: dict[str, torch.Tensor], expert: int, name: str) -> torch.Tensor:
    linear = f"{expert}.{name}_proj.weight"
    return dequantize_weight(tensors[linear], tensors[f"{linear}_scale"]).double()


def routing(tokens: int, experts: int, top: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random shares and choices; an expert is never chosen twice."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator).topk(top)
    return scores.values.softmax(-1), scores.indices


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Where two values lie on both sides of a rounding boundary, a code differs by one of 127."""
    assert found.isfinite().all() and found.shape == expected.shape
    assert len(found) == 0 or (found.double() - expected).abs().max() <= 0.02 * expected.abs().max()


@given(
    tokens=st.integers(0, 9),
    experts=st.integers(1, 6),
    width=st.sampled_from([32, 40, 64]),
    inner=st.sampled_from([16, 36, 96]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_a_layer_is_the_sum_of_its_experts(tokens, experts, width, inner, dtype, activation, seed, data):
    """From one token, which leaves experts idle, to several for each; widths that packing pads."""
    top = data.draw(st.integers(1, experts))
    tensors = stored(experts, width, inner, seed)
    layer = loaded(tensors, experts=experts, hidden=width, inner=inner, top=top, activation=activation)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    shares, chosen = routing(tokens, experts, top, seed)
    out = run(layer, x, shares, chosen)
    assert out.dtype == dtype and out.shape == x.shape
    assert_close(out, emulated(tensors, x, shares, chosen, activation))


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_add_up(expert_parallel, ranks):
    """As vLLM's own loader cuts them: 5 experts are unevenly spread, and some tokens have none on a rank."""
    tensors, (shares, chosen) = stored(5, 64, 96), routing(7, 5, 2, 1)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    parts = []
    for rank in range(ranks):
        layer = loaded(tensors, experts=5, rank=(rank, ranks), expert_parallel=expert_parallel)
        parts.append(run(layer, x, shares, chosen))
    whole = run(loaded(tensors, experts=5), x, shares, chosen)
    if expert_parallel:  # only the order of fp32 sums differs
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
    else:  # each rank quantizes its part of the inner channels by its own range: nothing that the whole does
        share = 96 // ranks
        for rank, part in enumerate(parts):
            mine = slice(rank * share, (rank + 1) * share)
            slices = {
                n: t[:, mine] if "down" in n and "scale" not in n else t[mine] if "down" not in n else t
                for n, t in tensors.items()
            }
            assert_close(part, emulated(slices, x, shares, chosen))
        assert (sum(parts) - whole).abs().max() < 0.05 * whole.abs().max()


def test_a_token_does_not_see_the_others():
    """Alone, in other company, and with its experts in another order: the same bits."""
    layer = loaded(stored(6, 64, 96), experts=6, top=3)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    shares, chosen = routing(50, 6, 3, 0)
    whole = run(layer, x, shares, chosen)
    for token in range(50):
        mine = slice(token, token + 1)
        assert torch.equal(run(layer, x[mine], shares[mine].flip(1), chosen[mine].flip(1)), whole[mine])
    assert torch.equal(run(layer, x.flip(0), shares.flip(0), chosen.flip(0)).flip(0), whole)


def test_routing_weights_on_the_input():
    """Llama 4 multiplies the one expert's input; what comes out of it is then not multiplied again."""
    tensors, (shares, chosen) = stored(4, 64, 96), routing(5, 4, 1, 0)
    x, shares = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), shares * 0.3
    layer = loaded(tensors, top=1, apply_router_weight_on_input=True)
    assert_close(run(layer, x, shares, chosen), emulated(tensors, x * shares, torch.ones_like(shares), chosen))
