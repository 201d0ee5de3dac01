"""The CUDA ops on a GPU: numerics on real shapes, graphs, batch invariance, memory checks. Skipped without one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.ops import reference

if not torch.cuda.is_available():
    REASON = "no CUDA device"
elif not ops.has_kernel("cuda"):
    REASON = "no compiled CUDA kernels: python setup.py build_ext --inplace"
else:
    REASON = ""
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON)]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (N, K): LLaMA3-8B, and 70B at TP 1, 2, 4
SHAPES = [
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    *((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    *((5120, 8192), (8192, 4096), (28672, 8192), (8192, 14336)),
    *((2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168)),
]
TOKENS = [1, 3, 8, 16, 17, 33, 64, 65, 128, 200, 257, 1000]
GRANULARITIES = {"channel": (False, False), "group": (True, True), "group, token activations": (True, False)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def operands(m, n, k, granularity="channel", group=128):
    weight_groups, activation_groups = GRANULARITIES[granularity]
    a, b = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda") for rows in (m, n))
    a_scale = torch.rand(m, k // group if activation_groups else 1, device="cuda") * 1e-2 + 1e-3
    b_scale = (torch.rand(k // group if weight_groups else 1, n, device="cuda") * 1e-2 + 1e-3).t()
    return a, b, a_scale, b_scale


def dequantized(codes, scale):
    return codes.double() * scale.double().repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def check_product(out, a, b, a_scale, b_scale, bias=None, columns=64):
    """Against float64, in evenly spread columns."""
    picked = torch.linspace(0, b.shape[0] - 1, min(columns, b.shape[0]), device="cuda").long()
    left, right = dequantized(a, a_scale), dequantized(b[picked], b_scale[picked])
    exact, magnitude = left @ right.t(), left.abs() @ right.abs().t()
    if bias is not None:
        exact, magnitude = exact + bias[picked].double(), magnitude + bias[picked].double().abs()
    got = out[:, picked].double()
    # half a unit of the output's last place (or a subnormal one), and fp32 sums over the groups
    allowed = exact.abs() * torch.finfo(out.dtype).eps * 0.51 + magnitude * 2.0**-21 + torch.finfo(out.dtype).tiny
    assert not ((got - exact).abs() > allowed).any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_product_on_real_shapes(n, k, granularity):
    for m in TOKENS:
        inputs = operands(m, n, k, granularity)
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16) if m % 2 else None
        dtype = torch.float16 if m == 17 else torch.bfloat16
        check_product(ops.scaled_mm(*inputs, dtype, bias), *inputs, bias)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_product_of_many_tokens(granularity):
    for m, n, k in ((4096, 8192, 8192), (8192, 10240, 8192), (8000, 8192, 3584)):
        inputs = operands(m, n, k, granularity)
        check_product(ops.scaled_mm(*inputs, torch.bfloat16), *inputs)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, 384])
def test_product_of_odd_sizes(granularity, group):
    for m, n, groups in ((0, 48, 2), (1, 16, 1), (5, 48, 3), (130, 272, 5), (67, 2064, 2)):
        inputs = operands(m, n, group * groups, granularity, group)
        check_product(ops.scaled_mm(*inputs, torch.bfloat16), *inputs)


def test_integers_at_the_extremes():
    a = torch.full((3, 28672), 127, dtype=torch.int8, device="cuda")
    b = torch.full((64, 28672), -127, dtype=torch.int8, device="cuda")
    one = torch.ones(64, 1, device="cuda")
    assert (ops.scaled_mm(a, b, one[:3], one, torch.float32) == -28672 * 127 * 127).all()


def test_every_tile():
    if not hasattr(torch.ops.w8a8_bismooth, "scaled_mm_tile"):
        pytest.skip("this build has no scaled_mm_tile")
    ran = 0
    for granularity in GRANULARITIES:
        inputs = operands(300, 1040, 1024, granularity)
        for tile in range(64):
            for split in (1, 2, 3):
                try:
                    out = torch.ops.w8a8_bismooth.scaled_mm_tile(*inputs, torch.bfloat16, None, tile, split)
                except RuntimeError as error:  # not for this device or granularity, or past the last tile
                    assert "tile" in str(error), error
                    continue
                check_product(out, *inputs)
                ran += 1
    assert ran > 3


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_token_does_not_depend_on_its_batch(granularity):
    for n, k in ((10240, 8192), (2560, 8192), (8192, 7168)):
        a, b, a_scale, b_scale = operands(512, n, k, granularity)
        whole = ops.scaled_mm(a, b, a_scale, b_scale, torch.bfloat16)
        for m in (1, 7, 16, 63, 128, 300):
            part = ops.scaled_mm(a[:m], b, a_scale[:m], b_scale, torch.bfloat16)
            assert torch.equal(part, whole[:m]), (m, n, k)


def test_the_same_every_time():
    for m in (1, 64, 1024):
        inputs = operands(m, 2560, 8192)
        first = ops.scaled_mm(*inputs, torch.bfloat16)
        assert all(torch.equal(ops.scaled_mm(*inputs, torch.bfloat16), first) for _ in range(20))


def quantization_inputs(rows, channels, dtype):
    x = torch.randn(rows, channels, device="cuda") * 10 ** (4 * torch.rand(rows, 1, device="cuda") - 2)
    x[:, ::61] *= 30
    x[::5, : channels // 2] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 4096, 8192, 14336, 28672, 65536, 16 * 1001])
def test_quantization_equals_the_reference(channels, dtype):
    for rows in (1, 7, 300) if channels <= 8192 else (1, 7):  # the reference runs on the CPU
        for group in (None, 32, 128, 256, 512):
            if group and channels % group:
                continue
            x = quantization_inputs(rows, channels, dtype)
            wide = quantization_inputs(rows, 2 * channels, dtype)
            gain = torch.randn(channels, device="cuda").to(dtype)
            residual = quantization_inputs(rows, channels, dtype)
            pairs = [
                (ops.quantize_activations(x, group), reference.quantize_activations(x.cpu(), group)),
                (ops.silu_mul_quantize(wide, group), reference.silu_mul_quantize(wide.cpu(), group)),
            ]
            for added in (None, residual):
                mine, theirs = (None, None) if added is None else (added.clone(), added.cpu())
                got = ops.rms_norm_quantize(x, mine, gain, 1e-5, group)
                want = reference.rms_norm_quantize(x.cpu(), theirs, gain.cpu(), 1e-5, group)
                pairs.append((got, want))
                assert added is None or torch.equal(mine.cpu(), theirs)
            for (codes, scale), (want_codes, want_scale) in pairs:
                assert torch.equal(scale.cpu(), want_scale) and torch.equal(codes.cpu(), want_codes), (rows, group)


def test_operands_on_other_devices_are_refused():
    x, gain = torch.randn(2, 64, device="cuda"), torch.randn(64, device="cuda")
    for residual, weight in ((x.cpu(), gain), (None, gain.cpu())):
        with pytest.raises(RuntimeError, match="on one device"):
            ops.rms_norm_quantize(x, residual, weight, 1e-5, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_of_every_number(dtype):
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    gate = gate[gate.isfinite()].reshape(-1, 16)
    x = torch.cat([gate, torch.ones_like(gate)], dim=1)
    codes, scale = ops.silu_mul_quantize(x.cuda(), 16)
    want_codes, want_scale = reference.silu_mul_quantize(x, 16)
    assert torch.equal(scale.cpu(), want_scale) and torch.equal(codes.cpu(), want_codes)


def test_the_reference_is_the_same_on_a_gpu():
    x, gain = quantization_inputs(50, 4096, torch.bfloat16), torch.randn(4096, device="cuda").bfloat16()
    for op, arguments in (
        (reference.quantize_activations, (x, 128)),
        (reference.silu_mul_quantize, (x, 128)),
        (reference.rms_norm_quantize, (x, None, gain, 1e-5, 128)),
    ):
        here = op(*arguments)
        there = op(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments))
        assert all(torch.equal(h.cpu(), t) for h, t in zip(here, there, strict=True)), op.__name__


def test_bad_numbers_reach_the_scale():
    x = torch.randn(4, 512, device="cuda").bfloat16()
    for row, bad in enumerate((float("nan"), float("inf"), -float("inf"))):
        x[row, 100] = bad
    for group in (512, 128):
        _, scale = ops.quantize_activations(x, group)
        assert not scale[:3, 0].isfinite().any() and scale[3].isfinite().all()


def test_views_and_no_tokens():
    x = torch.randn(8, 4 * 256, device="cuda").bfloat16()
    for view in (x[:, 256:512], x.flatten()[3 : 3 + 7 * 256].view(7, 256), x[::2, :256], x[:0, :256]):
        got, want = ops.quantize_activations(view, 64), reference.quantize_activations(view.cpu(), 64)
        assert all(torch.equal(g.cpu(), w) for g, w in zip(got, want, strict=True))


def test_opcheck():
    a, b, a_scale, b_scale = operands(4, 32, 256, "group")
    x, gain = torch.randn(4, 256, device="cuda"), torch.randn(256, device="cuda")
    namespace = torch.ops.w8a8_bismooth
    for op, arguments in (
        (namespace.scaled_mm, (a, b, a_scale, b_scale, torch.bfloat16)),
        (namespace.scaled_mm, (a, b, a_scale[:, :1], b_scale, torch.float16, gain[:32], True)),
        (namespace.quantize_activations, (x, 128)),
        (namespace.silu_mul_quantize, (x, 64)),
        (namespace.rms_norm_quantize, (x, x.clone(), gain, 1e-5, 256)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_graph_capture_and_replay():
    """A norm, two linears and a SiLU between, replayed with changed inputs."""
    hidden, middle, m = 2048, 3584, 24
    _, gate_up, _, gate_up_scale = operands(1, 2 * middle, hidden)
    _, down, _, down_scale = operands(1, hidden, middle, "group")
    gain = torch.randn(hidden, device="cuda").bfloat16()

    def block(x, residual):
        codes, scale = ops.rms_norm_quantize(x, residual, gain, 1e-5, None)
        between = ops.scaled_mm(codes, gate_up, scale, gate_up_scale, torch.bfloat16)
        codes, scale = ops.silu_mul_quantize(between, 128)
        return ops.scaled_mm(codes, down, scale, down_scale, torch.bfloat16)

    x, residual = torch.randn(2, m, hidden, device="cuda").bfloat16()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        block(x.clone(), residual.clone())
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(x, residual)
    for _ in range(5):
        fresh_x, fresh_residual = torch.randn(2, m, hidden, device="cuda").bfloat16()
        x.copy_(fresh_x), residual.copy_(fresh_residual)
        graph.replay()
        want = block(fresh_x, fresh_residual)
        assert torch.equal(out, want) and torch.equal(residual, fresh_residual)


def test_weights_written_just_before():
    """At an address that held other weights: without the promise of constant_b, none are loaded too early."""
    a, b, a_scale, b_scale = operands(16, 4096, 4096)
    fresh = [torch.randint_like(b, -127, 128) for _ in range(4)]
    want = [ops.scaled_mm(a, each, a_scale, b_scale, torch.bfloat16) for each in fresh]
    for turn in range(100):
        b.copy_(fresh[turn % 4])
        assert torch.equal(ops.scaled_mm(a, b, a_scale, b_scale, torch.bfloat16), want[turn % 4]), turn


def test_weights_computed_just_before():
    """By our own kernel, which lets its successor start before it writes, and by one of torch's."""
    a, _, a_scale, _ = operands(16, 4096, 4096)
    sources = torch.randn(4, 4096, 4096, device="cuda").bfloat16()
    quantized = [ops.quantize_activations(source, None) for source in sources]
    torch.cuda.synchronize()
    want = [ops.scaled_mm(a, codes, a_scale, scale, torch.bfloat16) for codes, scale in quantized]
    for turn in range(100):
        codes, scale = ops.quantize_activations(sources[turn % 4], None)  # torch's allocator repeats its addresses
        assert torch.equal(ops.scaled_mm(a, codes, a_scale, scale, torch.bfloat16), want[turn % 4]), turn

    x = torch.randint(-63, 64, (5, 4096, 4096), dtype=torch.int8, device="cuda")
    scale, b = quantized[0][1], torch.empty_like(x[0])
    want = [ops.scaled_mm(a, x[4] + each, a_scale, scale, torch.bfloat16) for each in x[:4]]
    for turn in range(100):
        torch.add(x[4], x[turn % 4], out=b)
        assert torch.equal(ops.scaled_mm(a, b, a_scale, scale, torch.bfloat16), want[turn % 4]), turn


def test_constant_weights():
    """With the promise, the same numbers; also where b must be copied first, which breaks the promise for the copy."""
    for granularity in GRANULARITIES:
        for m in (1, 16, 300):
            a, b, a_scale, b_scale = operands(m, 2560, 4096, granularity)
            want = ops.scaled_mm(a, b, a_scale, b_scale, torch.bfloat16)
            unaligned = torch.empty(b.numel() + 1, dtype=torch.int8, device="cuda")[1:].view_as(b).copy_(b)
            torch.cuda.synchronize()
            for weight in (b, unaligned, b.t().contiguous().t()):
                for _ in range(20):
                    got = ops.scaled_mm(a, weight, a_scale, b_scale, torch.bfloat16, constant_b=True)
                    assert torch.equal(got, want)


def test_many_streams():
    inputs = [operands(m, 2560, 8192) for m in (1, 16, 64, 300)]
    want = [ops.scaled_mm(*each, torch.bfloat16) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(ops.scaled_mm(*each, torch.bfloat16))
        torch.cuda.synchronize()
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


SANITIZED = {
    "gemm": """
for m, n, k, groups in ((1, 48, 256, 1), (5, 272, 384, 3), (70, 144, 512, 1), (130, 272, 256, 2), (9, 256, 4096, 1)):
    a, b = (torch.randint(-127, 128, (rows, k), dtype=torch.int8).cuda() for rows in (m, n))
    a_scale, b_scale, bias = torch.rand(m, groups).cuda(), torch.rand(n, groups).cuda(), torch.rand(n).cuda()
    ops.scaled_mm(a, b, a_scale, b_scale, torch.bfloat16)
    ops.scaled_mm(a, b, a_scale[:, :1], b_scale, torch.bfloat16, bias)
""",
    "quantization": """
for m, k in ((1, 8192), (5, 384), (300, 2048)):
    x, residual, gain = (torch.randn(shape).bfloat16().cuda() for shape in ((m, k), (m, k), (k,)))
    for group in (k, k // 2, 32):
        ops.quantize_activations(x, group)
        ops.rms_norm_quantize(x, residual, gain, 1e-5, group)
        if group <= k // 2:
            ops.silu_mul_quantize(x, group)
""",
}


@pytest.mark.parametrize("part", SANITIZED)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool, part):
    places = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    sanitizer = next((place for place in places if place and Path(place).exists()), None)
    if not sanitizer:
        pytest.skip("no compute-sanitizer")
    code = f"import torch\nfrom vllm_w8a8_bismooth import ops\n{SANITIZED[part]}\ntorch.cuda.synchronize()"
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # or torch's large blocks hide what lies outside
        capture_output=True,
        text=True,
        timeout=240,
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
