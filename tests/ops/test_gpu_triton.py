"""Our Triton kernels on a GPU, whoever serves there, bit for bit against the reference. Skipped without one."""

import pytest
import torch

from vllm_w8a8_bismooth.ops import mixture, reference

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SHAPES = [(1, 64, 256), (3, 192, 512), (16, 128, 1024), (33, 272, 384), (65, 128, 4096), (130, 2064, 512), (0, 64, 256)]


@pytest.fixture(scope="module")
def operations():
    pytest.importorskip("triton")
    from benchmarks import interpreter

    return interpreter.operations(DEVICE)


def there(arguments):
    return [each.to(DEVICE, copy=True) if isinstance(each, torch.Tensor) else each for each in arguments]


def check(operation, exact, *arguments):
    """Both write the residual of a norm, which is then compared, too."""
    mine = there(arguments)
    got, want = operation(*mine), exact(*arguments)
    pairs = list(zip(got, want, strict=True)) if isinstance(want, tuple) else [(got, want)]
    pairs += [(one, other) for one, other in zip(mine, arguments, strict=True) if isinstance(one, torch.Tensor)]
    assert all(one.dtype == other.dtype and torch.equal(one.cpu(), other) for one, other in pairs)


def scales(rows: int, groups: int) -> torch.Tensor:
    """``[rows, G]``, rows fastest."""
    return (torch.rand(groups, rows) + 0.01).t()


@pytest.mark.parametrize("group", [None, 128, 64])
@pytest.mark.parametrize("token_scales", [True, False])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_product(operations, m, n, k, token_scales, group):
    torch.manual_seed(0)
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    groups = k // (group or k)
    bias = torch.randn(n).bfloat16() if m % 2 else None
    inputs = a, b, scales(m, 1 if token_scales else groups), scales(n, groups)
    check(operations["scaled_mm"], reference.scaled_mm, *inputs, torch.bfloat16, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("k", [256, 4096, 14336])
def test_quantizations(operations, k, group, dtype):
    torch.manual_seed(0)
    x, residual, wide = (torch.randn(7, width).mul(3).to(dtype) for width in (k, k, 2 * k))
    x[:2, :128] = 0
    gain = torch.randn(k).to(dtype)
    check(operations["quantize_activations"], reference.quantize_activations, x, group)
    check(operations["silu_mul_quantize"], reference.silu_mul_quantize, wide, group)
    for added in (None, residual):
        check(operations["rms_norm_quantize"], reference.rms_norm_quantize, x, added, gain, 1e-6, group)


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("tokens", [1, 37])
def test_experts(operations, tokens, group):
    torch.manual_seed(0)
    count, width, inner, top = 4, 256, 128, 2
    shares, chosen = torch.rand(tokens, count).softmax(dim=1).topk(top)
    w13, w2 = (
        torch.randint(-127, 128, (count, *size), dtype=torch.int8) for size in ((2 * inner, width), (width, inner))
    )
    w13_scale, w2_scale = (
        torch.stack([scales(rows, k // (group or k)) * 1e-2 for _ in range(count)])
        for _, rows, k in (w13.shape, w2.shape)
    )
    x = torch.randn(tokens, width).bfloat16()
    arguments = x, shares, chosen.int(), w13, w13_scale, w2, w2_scale, "silu", group
    check(operations["experts"], mixture.experts, *arguments)


def test_a_graph_holds_them(operations):
    """Captured once, replayed on other numbers."""
    torch.manual_seed(0)
    b, b_scale = torch.randint(-127, 128, (256, 512), dtype=torch.int8), scales(256, 4)
    x = torch.randn(5, 512).bfloat16()
    place, weight, scale = there([x, b, b_scale])

    def call() -> torch.Tensor:
        codes, scales = operations["quantize_activations"](place, 128)
        return operations["scaled_mm"](codes, weight, scales, scale, torch.bfloat16)

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for factor in (1, -3):
        place.copy_(factor * x)
        graph.replay()
        codes, token_scale = reference.quantize_activations(factor * x, 128)
        assert torch.equal(out.cpu(), reference.scaled_mm(codes, b, token_scale, b_scale, torch.bfloat16))
