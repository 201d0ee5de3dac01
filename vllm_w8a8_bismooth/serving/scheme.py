"""W8A8 linears in vLLM: parameters that its loader can shard, and a forward on our ops."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from vllm_w8a8_bismooth import grouping, ops
from vllm_w8a8_bismooth.serving import fusion, servers

logger = init_logger("vllm.w8a8_bismooth")

# How vLLM's loader calls the parts of a merged attention projection.
_QKV: Mapping[object, int] = {"q": 0, "k": 1, "v": 2}


class W8A8Scheme(CompressedTensorsScheme):
    """INT8 weights per channel or per group, INT8 activations per token, per token and group, or by a fixed scale.

    Args:
        weight_group_size: columns that share a weight scale; ``None`` is per-channel.
        activation_group_size: channels that share an activation scale; ``None`` is per token.
        per_tensor: the checkpoint has one weight scale a linear; it becomes per-channel on loading.
        static: the checkpoint has an activation scale for each linear, ``input_scale``.
        fused: last part of a merged linear's name -> those of its parts, as the checkpoint names them, for messages.
        announced: the log already has who serves.
    """

    def __init__(
        self,
        weight_group_size: int | None,
        activation_group_size: int | None,
        per_tensor: bool = False,
        static: bool = False,
        fused: Mapping[str, Sequence[str]] = MappingProxyType({}),
        announced: bool = False,
    ):
        self.weight_group_size = weight_group_size
        self.activation_group_size = activation_group_size
        self.per_tensor = per_tensor
        self.static = static
        self._fused = fused
        self._announced = announced

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # Turing, the first with INT8 tensor cores

    def create_weights(
        self,
        layer: LinearBase,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable,
        **kwargs,
    ) -> None:
        """Register int8 ``weight [N, K]`` and fp32 ``weight_scale [N, 1]`` or ``[N, K / g]``; N and K are this rank's.

        Per-linear scalars (``input_scale``, ``weight_scale`` per tensor) become one entry per part of a fused linear.

        Raises:
            ValueError: this rank's share of K is not a multiple of the group size.
        """
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        groups = self._groups(layer, columns, self.weight_group_size)
        layer.logical_widths = output_partition_sizes
        weight_loader = self._checking(weight_loader, layer)
        self._create_codes(layer, rows, columns, weight_loader)

        def scale_of_each() -> PerTensorScaleParameter:
            return PerTensorScaleParameter(data=_unset(len(output_partition_sizes)), weight_loader=weight_loader)

        if self.static:
            layer.register_parameter("input_scale", scale_of_each())
        if self.per_tensor:
            scale = scale_of_each()
        elif self.weight_group_size is None:
            scale = ChannelQuantScaleParameter(data=_unset(rows, 1), output_dim=0, weight_loader=weight_loader)
        else:
            scale = GroupQuantScaleParameter(
                data=_unset(rows, groups), input_dim=1, output_dim=0, weight_loader=weight_loader
            )
        layer.register_parameter("weight_scale", scale)

    def _create_codes(self, layer: LinearBase, rows: int, columns: int, weight_loader: Callable) -> None:
        """Register what the checkpoint has of the codes."""
        weight = torch.empty(rows, columns, dtype=torch.int8)
        layer.register_parameter(
            "weight", ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=weight_loader)
        )

    def _groups(self, layer: LinearBase, columns: int, group_size: int | None) -> int:
        """Groups of this rank's columns.

        Raises:
            ValueError: there is no whole number of them.
        """
        try:
            return grouping.groups(columns, group_size)
        except ValueError as error:
            raise ValueError(
                f"{getattr(layer, 'prefix', 'linear')}: {error}. K is this rank's share of the input: "
                "use a smaller tensor parallel size or group size"
            ) from None

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that scales arrived, and lay weights and scales out for the kernels.

        On CPU, ``weight`` becomes what :func:`ops.pack_weight` makes of it, in the same amount of memory, and
        :func:`ops.unpack_weight` gives the logical ``[N, K]``; vLLM's reloading packs anew. ``weight_scale`` becomes or
        stays ``[N, 1]`` or ``[N, K / g]``, the latter stored group by group. Fused linears keep the
        largest of their ``input_scale``, which calibration makes equal, as fp32 ``[1, 1]``.

        Raises:
            ValueError: a scale is missing from the checkpoint, or is not finite, or that of activations not positive;
                the device's kernel does not take this rank's shape.
        """
        weight, scale = layer.weight.data, layer.weight_scale.data
        device = weight.device.type
        kind = "per-channel" if self.weight_group_size is None else f"per-group ({self.weight_group_size})"
        static = " with static activations" if self.static else ""
        if not self._announced:
            servers.announce(logger, f"{kind} linears{static}", device, self.weight_group_size)
        self._check_arrived(layer, "weight_scale", scale.isfinite(), "not finite")
        if self.per_tensor:
            widths = torch.tensor(layer.logical_widths, device=scale.device)
            scale = scale.repeat_interleave(widths).unsqueeze(1)
        replace_parameter(layer, "weight_scale", torch.nn.Parameter(scale.t().contiguous().t(), requires_grad=False))
        if self.static:
            input_scale = layer.input_scale.data
            self._check_arrived(layer, "input_scale", input_scale.isfinite() & (input_scale > 0), "not positive")
            largest = torch.nn.Parameter(input_scale.max().reshape(1, 1), requires_grad=False)
            replace_parameter(layer, "input_scale", largest)
        rows, columns = weight.shape
        if reason := ops.unsupported(rows, columns, group_size=self.weight_group_size, device=weight.device):
            compiled = "use a smaller tensor parallel size, or do without the compiled kernels (BISMOOTH_KERNELS=off)"
            remedy = compiled if ops.has_kernel(device) else "convert the model per-channel"
            raise ValueError(f"{getattr(layer, 'prefix', 'linear')}: {reason}; {remedy}")
        if device == "cpu" and ops.has_kernel(device):
            packed = ops.pack_weight(weight, self.weight_group_size)
            replace_parameter(layer, "weight", torch.nn.Parameter(packed, requires_grad=False))
        if not self.static:
            fusion.accept_quantized(layer, self.activation_group_size)

    def apply_weights(
        self, layer: LinearBase, x: "torch.Tensor | fusion.QuantizedActivation", bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Maps ``[..., K]``, floats or quantized by what precedes the layer, to ``[..., N]`` in the floats' dtype."""
        if self.static:
            return ops.static_linear(x, layer.weight, layer.weight_scale, layer.input_scale, bias)
        if (given := fusion.as_quantized(layer, x)) is None:
            return ops.linear(x, layer.weight, layer.weight_scale, self.activation_group_size, bias)
        if isinstance(given, fusion.Unactivated):
            group_size = self.activation_group_size
            return ops.linear(given.data, layer.weight, layer.weight_scale, group_size, bias, silu_mul=True)
        codes, scale = given.data.flatten(0, -2), given.scale.flatten(0, -2)
        out = ops.scaled_mm(codes, layer.weight, scale, layer.weight_scale, given.orig_dtype, bias, constant_b=True)
        return out.view(*given.orig_shape[:-1], out.shape[1])

    def _checking(self, weight_loader: Callable, layer: LinearBase) -> Callable:
        """Wraps the loader: tensors of another shape than the layer's raise a ValueError that names them.

        vLLM's own takes the part of a larger tensor that it has room for, and otherwise fails a bare assertion.
        """

        @functools.wraps(weight_loader)
        def load(parameter: torch.Tensor, loaded: torch.Tensor, *shard, **more) -> None:
            own, part = own_name(layer, parameter), next(iter((*shard, *more.values())), None)
            if own is not None and (rows := stored_rows(layer, part)) is not None:
                columns = layer.embedding_dim if isinstance(layer, VocabParallelEmbedding) else layer.input_size
                expected = self._stored_shape(own, rows, columns)
                if list(loaded.shape) != expected and not (expected == [1] and loaded.dim() == 0):
                    raise ValueError(
                        f"{self._stored_name(layer, own, part)} has shape {list(loaded.shape)}, but config.json makes "
                        f"it {expected}; they are not of one model, convert it again"
                    )
            return weight_loader(parameter, loaded, *shard, **more)

        return load

    def _stored_shape(self, parameter: str, rows: int, columns: int) -> list[int]:
        """What the checkpoint has for a parameter of a linear ``[rows, columns]``."""
        if parameter == "input_scale" or (parameter == "weight_scale" and self.per_tensor):
            return [1]
        return [rows, grouping.groups(columns, self.weight_group_size) if parameter == "weight_scale" else columns]

    def _check_arrived(self, layer: LinearBase, parameter: str, good: torch.Tensor, fault: str) -> None:
        """Raise a ValueError that names the first tensor of the checkpoint with a value that is not ``good``.

        ``good`` is bool ``[N, ...]`` with a value for each row, or ``[parts]`` for each part of a merged linear.
        """
        bad = (~good).reshape(len(good), -1).any(dim=1).nonzero()
        if not len(bad):
            return
        ends = torch.tensor(layer.logical_widths).cumsum(0) if good.dim() > 1 else torch.arange(1, len(good) + 1)
        part = int(torch.searchsorted(ends, int(bad[0]), right=True))
        raise ValueError(
            f"{self._stored_name(layer, parameter, part)} holds values that are missing or {fault}; "
            "the checkpoint is incomplete or corrupt, convert it again"
        )

    def _stored_name(self, layer: LinearBase, parameter: str, part: int | str | None) -> str:
        """The name of a parameter, or of that part of a merged one, in the checkpoint."""
        is_head = isinstance(layer, VocabParallelEmbedding)  # which vLLM 0.26 does not tell its name
        module, dot, last = getattr(layer, "prefix", "lm_head" if is_head else "linear").rpartition(".")
        parts = self._fused.get(last, ())
        index = _QKV.get(part, part)
        if isinstance(index, int) and index < len(parts):
            last = parts[index]
        return f"{module}{dot}{last}.{parameter}"


def own_name(layer: torch.nn.Module, parameter: torch.Tensor) -> str | None:
    """What a layer calls its parameter."""
    return next((name for name, known in layer.named_parameters() if known is parameter), None)


def stored_rows(layer: LinearBase | VocabParallelEmbedding, part: Any) -> int | None:
    """Rows that the checkpoint has of a vLLM linear or head, or of that part; ``None`` where that is not known."""
    if isinstance(layer, VocabParallelEmbedding):  # a head, which has further rows in memory
        return layer.org_vocab_size
    sizes = getattr(layer, "output_sizes", [layer.output_size])
    if hasattr(layer, "total_num_kv_heads"):  # whose output_sizes count each replica of a key or value head
        heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
        sizes = [n * size for n, size in zip(heads, (layer.head_size, layer.head_size, layer.v_head_size), strict=True)]
    if part is None:
        return sum(sizes)
    if isinstance(part, tuple):  # several in one tensor
        return sum(sizes[index] for index in part)
    index = _QKV.get(part, part)
    return sizes[index] if isinstance(index, int) else None


def _unset(*shape: int) -> torch.Tensor:
    """fp32 NaN: vLLM does not notice a scale that the checkpoint lacks, so it must stand out after loading."""
    return torch.full(shape, float("nan"), dtype=torch.float32)
