"""Quantized activations handed from one layer to the next, through vLLM's own hook for it.

Since 0.30 a linear of vLLM may say which quantized input it takes (``_input_quant_key``), and models that ask
(``maybe_fused_act_quant``: Llama's MLP, and so all models built of it, Pixtral's, Nemotron-H's) then compute activation
and quantization in one kernel, if the registry has one. Before, in other models, and where a LoRA adapter also
needs the input, nothing changes: the linear quantizes its own input.
"""

import torch
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation, as_quantized_activation
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, QuantKey, ScaleDesc

from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.serving import versions

REGISTRY = versions.find("_FUSED_ACT_QUANT")


class Key(QuantKey):
    """Ours alone: unequal to any ``QuantKey`` of vLLM, so that our rows serve our linears and no others."""


def accept_quantized(layer: LinearBase, group_size: int | None) -> None:
    """Let what precedes the layer quantize for it, if this vLLM has the hook and the layer's device our fused kernel.

    Args:
        layer: a linear whose scheme consumes :func:`as_quantized`.
        group_size: channels that share an activation scale; ``None`` is per token.
    """
    if REGISTRY is None or ops.server(layer.weight.device.type, "silu_mul_quantize") == ops.REFERENCE:
        return
    shape = GroupShape.PER_TOKEN if group_size is None else GroupShape(1, group_size)
    layer._input_quant_key = Key(torch.int8, ScaleDesc(torch.float32, static=False, group_shape=shape))
    REGISTRY[SiluAndMul, layer._input_quant_key] = _silu_mul


def as_quantized(layer: LinearBase, x: torch.Tensor | QuantizedActivation) -> QuantizedActivation | None:
    """``x`` if it is quantized, else ``None``: int8 data ``[..., K]``, fp32 scale ``[..., 1]`` or ``[..., G]``.

    Raises:
        AssertionError: x was quantized for another kind of layer (vLLM's check).
    """
    return None if REGISTRY is None else as_quantized_activation(x, getattr(layer, "_input_quant_key", None))


class Unactivated(QuantizedActivation):
    """Gate and up ``[..., 2 K]``, of which the layer's kernel makes its quantized input; ``scale`` means nothing."""


def _silu_mul(x: torch.Tensor, layer: LinearBase) -> QuantizedActivation:
    """The layer's quantized input ``[..., K]``, from ``x [..., 2 K]``, gate then up."""
    channels = x.shape[-1] // 2
    shape = x.shape[:-1] + (channels,)
    if ops.has_kernel(x.device.type, "linear"):
        return Unactivated(data=x, scale=x, orig_dtype=x.dtype, orig_shape=shape, quant_key=layer._input_quant_key)
    codes, scale = ops.silu_mul_quantize(x.reshape(-1, 2 * channels), layer.scheme.activation_group_size)
    return QuantizedActivation(
        data=codes.view(shape),
        scale=scale.view(*shape[:-1], scale.shape[1]),
        orig_dtype=x.dtype,
        orig_shape=shape,
        quant_key=layer._input_quant_key,
    )
