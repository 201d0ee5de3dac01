"""The routed experts of mixtures in vLLM: by our ops, or, per-channel on a GPU, by vLLM's own method, with checks."""

from types import MethodType
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    FusedMoeWeightScaleSupported,
    RoutedExperts,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 import (  # noqa: E501
    CompressedTensorsW8A8Int8MoEMethod,
)
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from vllm_w8a8_bismooth import grouping, ops
from vllm_w8a8_bismooth.serving import servers

logger = init_logger("vllm.w8a8_bismooth")

_SERVED = {"weights": ("channel", "static"), "input_activations": ("token", "dynamic")}


def method_of(config: CompressedTensorsConfig, layer: RoutedExperts, prefix: str) -> FusedMoEMethodBase | None:
    """The method for a layer's experts if they are quantized; ``None`` leaves them, in float, to vLLM.

    Ours on every CPU, with vLLM's AMX kernels or without: the numbers are then those of the other linears, whatever
    the processor. On GPUs as :mod:`servers` says: vLLM's own per-channel, ours per-group.

    Args:
        config: the checkpoint's.
        layer: the experts' layer, before it has weights.
        prefix: its name, as in ``model.layers.0.mlp.experts``.

    Raises:
        ValueError: the experts' schemes differ, or their common one is none that vLLM or this package serves here.
    """
    config._add_fused_moe_to_target_scheme_map()  # as vLLM does: a "Linear" target holds for experts, too
    experts = [f"{prefix}.{expert}" for expert in range(layer.global_num_experts)]
    schemes = {f"{e}.{name}": config.get_scheme_dict(layer, f"{e}.{name}") for e in experts for name in _linears(layer)}
    (first, scheme), *others = schemes.items()
    if other := next((name for name, another in others if another != scheme), None):  # vLLM looks at one expert alone
        raise ValueError(
            f"{first} and {other} differ in quantization_config; vLLM serves all experts of a layer alike: "
            "convert again with all of them per-channel or all per-group, or leave all of them in float"
        )
    if not scheme:
        return None
    weights, inputs = scheme["weights"], scheme["input_activations"]
    for side, (whole, when) in _SERVED.items():
        served = [whole] + ([f"group of {weights.group_size}"] if weights.group_size else [])
        served = [f"8-bit int, symmetric, per {way}, {when}" for way in served]
        if (found := _describe(scheme[side])) not in served:
            raise ValueError(
                f"{prefix}: quantization_config gives the experts {side} that are {found}; served are experts with "
                f"{' or '.join(served)}: convert again with the experts per-channel, or leave them in float"
            )
    rule = servers.experts_per_group if weights.group_size else servers.experts
    platform = servers.settle(logger)
    who = rule(platform)
    if who.kernel == servers.REFUSED:
        raise ValueError(f"{prefix}: per-group experts cannot be served here: {who.reason}")
    if who.kernel == servers.STOCK_EXPERTS:
        try:
            return StockExperts(weights, inputs, layer.moe_config)
        except NotImplementedError as error:  # vLLM has INT8 experts for some CPUs only
            if platform.device != "cpu":
                raise
            logger.warning_once("w8a8_bismooth: vLLM's own method does not serve experts on this CPU: %s", error)
    return Experts(layer.moe_config, weights.group_size, inputs.group_size)


class Experts(FusedMoEMethodBase):
    """INT8 experts, per-channel or per-group, on :func:`ops.experts`.

    Tensor parallelism cuts w13 along its rows and w2 along its columns, expert parallelism the list of experts; the
    loader of vLLM's layer does both, and its runner adds up the ranks' results and those of shared experts.

    Args:
        moe: vLLM's description of the layer.
        weight_group_size: columns that share a weight scale; ``None`` is per-channel.
        activation_group_size: channels that share an activation scale; ``None`` is per token.
    """

    def __init__(self, moe: FusedMoEConfig, weight_group_size: int | None, activation_group_size: int | None):
        super().__init__(moe)
        self.weight_group_size = weight_group_size
        self.activation_group_size = activation_group_size

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Register int8 ``w13_weight [E, 2 I, H]``, ``w2_weight [E, H, I]``, fp32 ``*_weight_scale [E, rows, 1]``
        or ``[E, rows, columns / g]``.

        Raises:
            ValueError: the model wants of its experts what :func:`ops.experts` does not do, or this rank's share of
                columns is not a multiple of the group size.
        """
        _check_served(layer)
        supported = FusedMoeWeightScaleSupported
        way = supported.CHANNEL if self.weight_group_size is None else supported.GROUP
        attributes["weight_loader"] = MethodType(_load, layer)
        for name, rows, columns in (
            ("w13", 2 * intermediate_size_per_partition, hidden_size),
            ("w2", hidden_size, intermediate_size_per_partition),
        ):
            weight = torch.empty(num_experts, rows, columns, dtype=torch.int8)
            groups = _groups(layer, columns, self.weight_group_size)
            scale = torch.full((num_experts, rows, groups), float("nan"), dtype=torch.float32)  # see check_scales
            for suffix, data, more in (("weight", weight, {}), ("weight_scale", scale, {"quant_method": way.value})):
                parameter = torch.nn.Parameter(data, requires_grad=False)
                set_weight_attrs(parameter, attributes | more)
                layer.register_parameter(f"{name}_{suffix}", parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check that scales arrived, and lay weights out for the kernel: as :class:`W8A8Scheme` does, stacked.

        Raises:
            ValueError: see :func:`check_scales`.
        """
        device = layer.w13_weight.device.type
        servers.announce(logger, "experts", device, self.weight_group_size)
        check_scales(layer)
        for name in ("w13_weight_scale", "w2_weight_scale"):  # group by group, as W8A8Scheme stores them
            scale = getattr(layer, name).data
            replace_parameter(layer, name, scale.transpose(1, 2).contiguous().transpose(1, 2))
        if device == "cpu" and ops.has_kernel(device):
            for name in ("w13_weight", "w2_weight"):
                replace_parameter(layer, name, _packed(getattr(layer, name).data, self.weight_group_size))

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """``None``: that description is for vLLM's own kernels."""
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``, without the shared experts, which the runner adds.

        A rank that holds a part of the experts, or of their channels, returns its part of the sum.
        """
        chosen = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids]
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        return ops.experts(
            x,
            topk_weights,
            chosen,
            layer.w13_weight,
            layer.w13_weight_scale,
            layer.w2_weight,
            layer.w2_weight_scale,
            layer.activation.value,
            self.activation_group_size,
        )


class StockExperts(CompressedTensorsW8A8Int8MoEMethod):
    """vLLM's own method, which takes a scale that the checkpoint lacks for 1, with checks of what it loads."""

    def create_weights(self, layer: RoutedExperts, *args: Any, **attributes: Any) -> None:
        super().create_weights(layer, *args, **attributes | {"weight_loader": MethodType(_load, layer)})
        layer.w13_weight_scale.data.fill_(float("nan"))
        # Some all-to-all backends pad the hidden size; no checkpoint fills those rows.
        layer.w2_weight_scale.data[:, : self.moe.hidden_dim_unpadded].fill_(float("nan"))

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        check_scales(layer)
        super().process_weights_after_loading(layer)


def check_scales(layer: RoutedExperts) -> None:
    """Refuse experts one of whose scales is still the NaN that it was created with, or was stored so.

    Raises:
        ValueError: names the first such expert and its linear.
    """
    *inner, down = _linears(layer)
    parts = dict(zip(inner, layer.w13_weight_scale.chunk(len(inner), dim=1), strict=True))
    for linear, scale in {**parts, down: layer.w2_weight_scale}.items():
        arrived = scale.isfinite().flatten(1).all(dim=1)
        if not bool(arrived.all()):
            local, *more = (~arrived).nonzero().flatten().tolist()
            expert = local if layer.expert_map is None else int((layer.expert_map == local).nonzero())
            raise ValueError(
                f"{layer.layer_name}.{expert}.{linear}.weight_scale holds values that are missing or not finite "
                f"({len(more)} more experts' do, too); the checkpoint is incomplete or corrupt, convert it again"
            )


def _load(layer: RoutedExperts, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
    """What the layer's own ``weight_loader`` does, for matrices of the right shape only.

    That one fills a part of an expert with a smaller tensor, and of a larger one does not say which it was.

    Raises:
        ValueError: names the tensor.
    """
    rows, columns = layer.moe_config.intermediate_size, layer.moe_config.hidden_dim_unpadded
    rows, columns = (columns, rows) if shard_id == "w2" else (rows, columns)
    kind = "weight_scale" if weight_name.endswith("_weight_scale") else weight_name.rpartition("_")[2]
    groups = grouping.groups(columns, getattr(layer.quant_method, "weight_group_size", None))
    expected = {"weight": [rows, columns], "weight_scale": [rows, groups]}.get(kind)
    if expected and loaded_weight.dim() < 3 and list(loaded_weight.shape) != expected:  # 3: of all experts at once
        gate, *up, down = _linears(layer)
        linear = {"w1": gate, "w2": down, "w3": next(iter(up), gate)}[shard_id]
        raise ValueError(
            f"{layer.layer_name}.{expert_id}.{linear}.{kind} has shape {list(loaded_weight.shape)}, but config.json "
            f"makes it {expected}; they are not of one model, convert it again"
        )
    return layer.weight_loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success)


# Some models' loaders ask for it.
_load.supports_moe_loading = RoutedExperts.weight_loader.supports_moe_loading  # type: ignore[attr-defined]


def _check_served(layer: RoutedExperts) -> None:
    moe = layer.moe_config
    obstacles = {
        f"the activation {layer.activation.value}": layer.activation.value not in ops.ACTIVATIONS,
        "a clamped activation": moe.swiglu_limit is not None,
        "biases": moe.has_bias,
        "routing weights on the input, several per token,": layer.apply_router_weight_on_input and layer.top_k > 1,
    }
    if found := [what for what, present in obstacles.items() if present]:
        raise ValueError(
            f"{layer.layer_name}: INT8 experts with {found[0]} are not served by w8a8_bismooth here; leave the "
            "experts in float, or let vLLM try its own method with --quantization compressed-tensors"
        )


def _groups(layer: RoutedExperts, columns: int, group_size: int | None) -> int:
    """Groups in this rank's share of an expert's columns."""
    try:
        return grouping.groups(columns, group_size)
    except ValueError as error:
        raise ValueError(
            f"{layer.layer_name}: {error}. K is this rank's share of the input: use a smaller tensor parallel size, "
            "expert parallelism or a smaller group size"
        ) from None


def _linears(layer: RoutedExperts) -> list[str]:
    """What the checkpoint calls an expert's linears: gate, up (if there is one) and down."""
    names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    return [name for name in names if name is not None]


def _describe(arguments: QuantizationArgs) -> str:
    group = f" of {arguments.group_size}" if arguments.strategy == "group" else ""
    return (
        f"{arguments.num_bits}-bit {arguments.type}, {'' if arguments.symmetric else 'a'}symmetric, "
        f"per {arguments.strategy}{group}, {'dynamic' if arguments.dynamic else 'static'}"
    )


def _packed(weights: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """int8 ``[E, N, K]`` as :func:`ops.pack_weight` lays out each expert's, with one more of them in memory."""
    first = ops.pack_weight(weights[0], group_size)
    packed = first.new_empty(len(weights), *first.shape)
    for weight, place in zip(weights, packed, strict=True):
        place.copy_(ops.pack_weight(weight, group_size))
    return packed
