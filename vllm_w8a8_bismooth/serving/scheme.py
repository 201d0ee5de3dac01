"""W8A8 linears in vLLM: parameters that its loader can shard, and a forward on our ops."""

from collections.abc import Callable

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from vllm_w8a8_bismooth import ops

logger = init_logger("vllm.w8a8_bismooth")


class W8A8Scheme(CompressedTensorsScheme):
    """INT8 weights per channel or per group, INT8 activations per token, per token and group, or by a fixed scale.

    Args:
        weight_group_size: columns that share a weight scale; ``None`` is per-channel.
        activation_group_size: channels that share an activation scale; ``None`` is per token.
        per_tensor: the checkpoint has one weight scale a linear; it becomes per-channel on loading.
        static: the checkpoint has an activation scale for each linear, ``input_scale``.
    """

    def __init__(
        self,
        weight_group_size: int | None,
        activation_group_size: int | None,
        per_tensor: bool = False,
        static: bool = False,
    ):
        self.weight_group_size = weight_group_size
        self.activation_group_size = activation_group_size
        self.per_tensor = per_tensor
        self.static = static

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # Turing, the first with INT8 tensor cores

    def create_weights(
        self,
        layer: torch.nn.Module,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable,
        **kwargs,
    ) -> None:
        """Register int8 ``weight [N, K]`` and fp32 ``weight_scale [N, 1]`` or ``[N, K / g]``; N and K are this rank's.

        What is one of each linear has one of each fused linear here: ``weight_scale`` per tensor, and ``input_scale``.

        Raises:
            ValueError: this rank's share of K is not a multiple of the group size.
        """
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        layer.logical_widths = output_partition_sizes
        weight = torch.empty(rows, columns, dtype=torch.int8)
        layer.register_parameter(
            "weight", ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=weight_loader)
        )

        def scale_of_each() -> PerTensorScaleParameter:
            return PerTensorScaleParameter(data=_unset(len(output_partition_sizes)), weight_loader=weight_loader)

        if self.static:
            layer.register_parameter("input_scale", scale_of_each())
        if self.per_tensor:
            scale = scale_of_each()
        elif self.weight_group_size is None:
            scale = ChannelQuantScaleParameter(data=_unset(rows, 1), output_dim=0, weight_loader=weight_loader)
        else:
            if columns % self.weight_group_size:
                raise ValueError(
                    f"{getattr(layer, 'prefix', 'linear')}: K = {columns} on this rank is not a multiple of "
                    f"group_size = {self.weight_group_size}; use a smaller tensor parallel size or group size"
                )
            scale = GroupQuantScaleParameter(
                data=_unset(rows, columns // self.weight_group_size),
                input_dim=1,
                output_dim=0,
                weight_loader=weight_loader,
            )
        layer.register_parameter("weight_scale", scale)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that scales arrived, and lay weights and scales out for the kernels.

        On CPU, ``weight`` becomes what :func:`ops.pack_weight` makes of it, in the same amount of memory, and
        :func:`ops.unpack_weight` gives the logical ``[N, K]``; vLLM's reloading packs anew. ``weight_scale`` becomes or
        stays ``[N, 1]`` or ``[N, K / g]``, the latter stored group by group. Of fused linears' ``input_scale``, which
        calibration makes equal, the largest is kept, as fp32 ``[1, 1]``.

        Raises:
            ValueError: a scale is missing from the checkpoint, or is not finite, or that of activations not positive;
                the device's kernel does not take this rank's shape.
        """
        weight, scale = layer.weight.data, layer.weight_scale.data
        device = weight.device.type
        compiled = ops.has_kernel(device)
        logger.info_once(
            "w8a8_bismooth: %s linears%s run on %s",
            "per-channel" if self.weight_group_size is None else f"per-group ({self.weight_group_size})",
            " with static activations" if self.static else "",
            f"the {device} kernel" if compiled else "the torch reference",
        )
        if not bool(scale.isfinite().all()):
            raise ValueError(
                f"{getattr(layer, 'prefix', 'linear')}.weight_scale holds values that are missing or not finite; "
                "the checkpoint is incomplete or corrupt, convert it again"
            )
        if self.per_tensor:
            widths = torch.tensor(layer.logical_widths, device=scale.device)
            scale = scale.repeat_interleave(widths).unsqueeze(1)
        replace_parameter(layer, "weight_scale", torch.nn.Parameter(scale.t().contiguous().t(), requires_grad=False))
        if self.static:
            input_scale, name = layer.input_scale.data, getattr(layer, "prefix", "linear")
            if not bool((input_scale.isfinite() & (input_scale > 0)).all()):
                raise ValueError(
                    f"{name}.input_scale is {input_scale.tolist()}, so it is missing or not positive; "
                    "the checkpoint is incomplete or corrupt, convert it again"
                )
            largest = torch.nn.Parameter(input_scale.max().reshape(1, 1), requires_grad=False)
            replace_parameter(layer, "input_scale", largest)
        if compiled:
            if reason := ops.unsupported(*weight.shape, groups=scale.shape[1], device=weight.device):
                raise ValueError(
                    f"{getattr(layer, 'prefix', 'linear')}: {reason}; use a smaller tensor parallel size, or install "
                    "without the CUDA kernels (BISMOOTH_CUDA=0)"
                )
            if device == "cpu":
                packed = ops.pack_weight(weight, groups=scale.shape[1])
                replace_parameter(layer, "weight", torch.nn.Parameter(packed, requires_grad=False))

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``[..., K]`` to ``[..., N]`` in x's dtype."""
        if self.static:
            return ops.static_linear(x, layer.weight, layer.weight_scale, layer.input_scale, bias)
        return ops.linear(x, layer.weight, layer.weight_scale, self.activation_group_size or x.shape[-1], bias)


def _unset(*shape: int) -> torch.Tensor:
    """fp32 NaN: vLLM does not notice a scale that the checkpoint lacks, so it must stand out after loading."""
    return torch.full(shape, float("nan"), dtype=torch.float32)
