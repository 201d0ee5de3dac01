"""The layer that vLLM builds for the experts of a block, which needs no engine."""

import json

import torch

from tests.support.quantization import STOCK, TOKEN, W8A8, config_class

PREFIX = "model.layers.1.mlp.experts"
CHECKPOINT = STOCK | {
    "config_groups": {"g": {"targets": ["Linear"], "weights": W8A8, "input_activations": TOKEN}},
    "ignore": ["lm_head", r"re:.*mlp\.gate$"],
}


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
        **{key: more.pop(key) for key in ("has_bias", "swiglu_limit", "hidden_dim_unpadded") if key in more},
    )
    config = config_class().from_config(json.loads(json.dumps(checkpoint)))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it builds a model
    try:
        return RoutedExperts(PREFIX, torch.bfloat16, moe, config, expert_map_manager=placed, **more)
    finally:  # which vLLM's own context lacks in 0.26
        torch.set_default_dtype(default)
