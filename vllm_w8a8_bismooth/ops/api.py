"""The operations as callers use them: they check shapes, with messages that name them, and call the registered ops."""

import torch

from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.ops import kernels, packing  # the former registers the ops that this module calls
from vllm_w8a8_bismooth.ops.mixture import ACTIVATIONS
from vllm_w8a8_bismooth.ops.packing import PackedRows
from vllm_w8a8_bismooth.ops.reference import Quantized


def has_kernel(device_type: str, op: str = "scaled_mm") -> bool:
    """Whether a compiled kernel does ``op`` on this kind of device (``cpu``, ``cuda``); see :func:`kernels.server`."""
    return kernels.server(device_type, op) == kernels.COMPILED


def cpu_level() -> str:
    """Which instructions the compiled CPU kernels use here: ``amx``, ``avx512_vnni``, ``avx_vnni``, ``avx512``, ..."""
    return torch.ops.w8a8_bismooth._cpu_level("")


def unsupported(rows: int, columns: int, group_size: int | None, device: torch.device) -> str:
    """Why the device's kernel, compiled or Triton's, does not take a weight, or ``""``.

    Args:
        rows, columns: N and K of the weight.
        group_size: columns that share a weight scale; ``None`` is per-channel.
        device: where the weight is.
    """
    server = kernels.server(device.type, group_size=group_size)
    if server == kernels.TRITON:
        from vllm_w8a8_bismooth.ops.triton import tiles

        with torch.accelerator.device_index(device.index):
            return tiles.unsupported(columns)
    if server == kernels.REFERENCE or device.type != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return torch.ops.w8a8_bismooth.gemm_unsupported(rows, columns, group_size, 10 * major + minor)


def quantize_activations(x: torch.Tensor, group_size: int | None) -> Quantized:
    """See :func:`reference.quantize_activations`.

    Raises:
        ValueError: x is not ``[M, K]`` with K a multiple of ``group_size``.
    """
    if x.dim() != 2:
        raise ValueError(f"x is {list(x.shape)}; it must be [M, K]")
    grouping.groups(x.shape[1], group_size)
    return torch.ops.w8a8_bismooth.quantize_activations(x, group_size)


def rms_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float, group_size: int | None
) -> Quantized:
    """See :func:`reference.rms_norm_quantize`.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if x.dim() != 2:
        raise ValueError(f"x is {list(x.shape)}; it must be [M, K]")
    grouping.groups(x.shape[1], group_size)
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype:
        raise ValueError(f"weight is {list(weight.shape)} {weight.dtype}; expected {list(x.shape[1:])} {x.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {list(residual.shape)} {residual.dtype}; expected {list(x.shape)} {x.dtype}")
    return torch.ops.w8a8_bismooth.rms_norm_quantize(x, residual, weight, epsilon, group_size)


def silu_mul_quantize(x: torch.Tensor, group_size: int | None) -> Quantized:
    """See :func:`reference.silu_mul_quantize`.

    Raises:
        ValueError: x is not ``[M, 2 K]`` with K a multiple of ``group_size``.
    """
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"x is {list(x.shape)}; it must be [M, 2 K]")
    grouping.groups(x.shape[1] // 2, group_size)
    return torch.ops.w8a8_bismooth.silu_mul_quantize(x, group_size)


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    constant_b: bool = False,
) -> torch.Tensor:
    """See :func:`reference.scaled_mm`. On a CPU with a kernel, ``b`` may be packed by :func:`packing.pack_weight`.

    ``constant_b`` promises that no work still under way on the device writes ``b``, ``b_scale`` or ``bias``, so that a
    kernel may load them before the one ahead of it has ended. Without it, it waits first.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check_product(tuple(a.shape), b, tuple(a_scale.shape), b_scale)
    return torch.ops.w8a8_bismooth.scaled_mm(a, b, a_scale, b_scale, out_dtype, bias, constant_b)


def _check_product(a: tuple[int, ...], b: torch.Tensor, a_scale: tuple[int, ...], b_scale: torch.Tensor) -> None:
    """Raise the ValueError of :func:`scaled_mm`, for activations and scales of these shapes."""
    (m, k), (n, groups) = a, b_scale.shape
    fits = b.dim() == 4 or b.shape == (n, k)  # the kernel checks a packed one
    if not fits or k % groups or a_scale not in ((m, 1), (m, groups)):
        raise ValueError(
            f"a {list(a)}, b {list(b.shape)}, a_scale {list(a_scale)}, b_scale {list(b_scale.shape)}: "
            "expected [M, K], [N, K], [M, 1] or [M, G], [N, G] with K a multiple of G"
        )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_size: int | None,
    bias: torch.Tensor | None = None,
    silu_mul: bool = False,
) -> torch.Tensor:
    """W8A8 linear layer: quantize the input, multiply, rescale. In one operation where a kernel does that.

    ``weight``, ``weight_scale`` and ``bias`` are parameters at rest: no work still under way on the device writes them
    (``constant_b`` of :func:`scaled_mm`). Call :func:`scaled_mm` itself with weights that were just computed.

    Args:
        x: ``[..., K]`` float; with ``silu_mul`` ``[..., 2 K]``, gate then up.
        weight: int8 ``[N, K]``, or packed as in :func:`scaled_mm`.
        weight_scale: fp32 ``[N, 1]`` or ``[N, G]``.
        group_size: channels that share an activation scale; ``None`` is per token.
        bias: ``[N]``.
        silu_mul: whether the layer's input is ``silu(gate) * up``, see :func:`silu_mul_quantize`.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: the shapes do not fit together.
    """
    tokens = x.reshape(-1, x.shape[-1])
    if has_kernel(x.device.type, "linear"):
        k = x.shape[-1] // 2 if silu_mul else x.shape[-1]
        scales = len(tokens), grouping.groups(k, group_size)
        _check_product((len(tokens), k), weight, scales, weight_scale)
        out = torch.ops.w8a8_bismooth.linear(tokens, weight, weight_scale, group_size, bias, silu_mul)
    else:
        codes, scale = (silu_mul_quantize if silu_mul else quantize_activations)(tokens, group_size)
        out = scaled_mm(codes, weight, scale, weight_scale, x.dtype, bias, constant_b=True)
    return out.view(*x.shape[:-1], weight_scale.shape[0])


def static_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`linear` with one scale for all activations, known beforehand, so that nothing is to be reduced.

    The quantization is plain torch, for torch.compile to fuse with what computes x:
    ``q = round_half_even(x * (1 / scale))`` in fp32, clamped to [-128, 127]. The code of a NaN is unspecified.

    Args:
        x: ``[..., K]`` float.
        weight: as in :func:`linear`.
        weight_scale: fp32 ``[N, 1]``.
        input_scale: fp32 ``[1, 1]``.
        bias: ``[N]``.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: the shapes do not fit together.
    """
    tokens = x.reshape(-1, x.shape[-1])
    codes = (tokens.float() * input_scale.reciprocal()).round().clamp(-128, 127).to(torch.int8)
    scale = input_scale.expand(tokens.shape[0], 1)
    out = scaled_mm(codes, weight, scale, weight_scale, x.dtype, bias, constant_b=True)
    return out.view(*x.shape[:-1], weight_scale.shape[0])


def linear_rows(
    x: torch.Tensor,
    weight: PackedRows,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    silu_mul: bool = False,
) -> torch.Tensor:
    """:func:`linear`, one scale a token, of a weight with rows of four bits: what it makes of their codes, bit for bit.

    Args:
        x, silu_mul: as in :func:`linear`.
        weight: of :func:`packing.pack_rows`.
        weight_scale: fp32 ``[N, 1]`` in stored order.
        bias: ``[N]`` in the weight's order.

    Returns:
        ``[..., N]`` in x's dtype, in the weight's order.

    Raises:
        ValueError: the shapes do not fit together.
    """
    tokens = x.reshape(-1, x.shape[-1])
    _check_rows(x.shape[-1] // 2 if silu_mul else x.shape[-1], weight, weight_scale)
    out = torch.ops.w8a8_bismooth.linear_rows(
        tokens, weight.eight, weight.four, weight.steps, weight_scale, weight.order, bias, silu_mul
    )
    return out.view(*x.shape[:-1], len(weight.order))


def scaled_mm_rows(
    a: torch.Tensor,
    weight: PackedRows,
    a_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`scaled_mm`, one scale a token, of a weight with rows of four bits; see :func:`linear_rows`.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check_rows(a.shape[1], weight, weight_scale)
    if a_scale.shape != (len(a), 1):
        raise ValueError(f"a_scale is {list(a_scale.shape)}; it must be {[len(a), 1]}")
    return torch.ops.w8a8_bismooth.scaled_mm_rows(
        a, a_scale, weight.eight, weight.four, weight.steps, weight_scale, weight.order, out_dtype, bias
    )


def _check_rows(k: int, weight: PackedRows, weight_scale: torch.Tensor) -> None:
    """Raise the ValueError of :func:`linear_rows`."""
    n = len(weight.order)
    if weight.eight.shape[1] * packing.DEPTH != k or weight_scale.shape != (n, 1):
        raise ValueError(
            f"activations [M, {k}], weight [{n}, {weight.eight.shape[1] * packing.DEPTH}], weight_scale "
            f"{list(weight_scale.shape)}: expected [M, K], [N, K], [N, 1]"
        )


def experts(
    x: torch.Tensor,
    shares: torch.Tensor,
    chosen: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    activation: str,
    group_size: int | None = None,
) -> torch.Tensor:
    """See :func:`mixture.experts`.

    One operation, because how many tokens an expert gets is in the data, which torch.compile cannot trace.

    Raises:
        ValueError: the shapes do not fit together, or the activation is unknown.
    """
    (count, width, w2_groups), (_, rows, w13_groups) = w2_scale.shape, w13_scale.shape
    inner = rows // 2
    fits = x.dim() == 2 and x.shape[1] == width and len(w13_scale) == count and rows == 2 * inner
    for channels, groups in ((width, w13_groups), (inner, w2_groups)):
        fits = fits and groups > 0 and channels % groups == 0
        fits = fits and group_size in (None, channels // groups)
    if not fits:
        raise ValueError(
            f"x {list(x.shape)}, w13_scale {list(w13_scale.shape)}, w2_scale {list(w2_scale.shape)}, group_size = "
            f"{group_size}: expected [T, H], [E, 2 I, G], [E, H, G], with G dividing H and I, and groups of "
            "activations as wide as those of weights"
        )
    if chosen.dim() != 2 or chosen.shape != shares.shape or chosen.shape[0] != x.shape[0]:
        raise ValueError(
            f"x {list(x.shape)}, shares {list(shares.shape)}, chosen {list(chosen.shape)}: expected [T, k]"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r} is unknown; expected one of {', '.join(ACTIVATIONS)}")
    return torch.ops.w8a8_bismooth.experts(x, shares, chosen, w13, w13_scale, w2, w2_scale, activation, group_size)
