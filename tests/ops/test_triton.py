"""The Triton kernels in Triton's interpreter, bit for bit against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import aside
from vllm_w8a8_bismooth.ops import mixture, reference

pytest.importorskip("triton", "3.9")  # before, its interpreter rounded twice in an fma

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = settings.default.max_examples * 2 // 5


@pytest.fixture(scope="module")
def interpreter():
    with aside.process("tests.support.workers.interpreted", TRITON_INTERPRET="1") as call:
        assert call("interpreted")
        yield call


@pytest.fixture(scope="module")
def run(interpreter):
    """``run(name, *arguments)``: the result of that function of :mod:`ops`."""
    return lambda name, *arguments: interpreter("call", name, *arguments)[0]


def operands(m: int, n: int, k: int, weight_group: int | None, token_scales: bool, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-128, 128, (rows, k), generator=generator, dtype=torch.int8) for rows in (m, n))
    groups = k // (weight_group or k)
    a_scale = torch.rand(m, 1 if token_scales else groups, generator=generator) + 0.01
    b_scale = torch.rand(groups, n, generator=generator).t() + 0.01
    return a, b, a_scale, b_scale


def same(results, expected) -> bool:
    return all(
        r.dtype == e.dtype and torch.equal(r.nan_to_num(7e9), e.nan_to_num(7e9))
        for r, e in zip(results, expected, strict=True)
    )


@settings(max_examples=EXAMPLES)
@given(
    m=st.sampled_from([0, 1, 2, 15, 17, 33, 70, 140]),
    n=st.sampled_from([1, 8, 63, 64, 130]),
    blocks=st.integers(1, 5),
    tail=st.sampled_from([0, 0, 1, 8, 16]),
    group=st.sampled_from([None, 32, 64, 128]),
    token_scales=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from([None, *DTYPES]),
    seed=st.integers(0, 2**31),
)
def test_product(run, m, n, blocks, tail, group, token_scales, dtype, bias, seed):
    k = group * blocks if group else 32 * blocks + tail
    inputs = operands(m, n, k, group, token_scales, seed)
    added = None if bias is None else torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(bias)
    assert same([run("scaled_mm", *inputs, dtype, added)], [reference.scaled_mm(*inputs, dtype, added)])


@pytest.mark.parametrize("group", [1, 5, 24, 48, 96, 160, 256, 320])
def test_product_of_other_groups(run, group):
    """The converter makes none of them, but they are multiplied all the same."""
    inputs = operands(5, 20, 3 * group, group, False)
    assert same([run("scaled_mm", *inputs, torch.bfloat16)], [reference.scaled_mm(*inputs, torch.bfloat16)])


def test_product_of_views(run):
    """Rows with gaps, transposed codes, and one scale expanded over all tokens, as static activations have."""
    a, b, a_scale, b_scale = operands(9, 24, 96, 32, False)
    wide = torch.cat([a, a], dim=1)
    for left in (wide[:, 40:136], a.t().contiguous().t(), a[::2]):
        for right in (b, b.t().contiguous().t()):
            for scale in (a_scale[: len(left)], a_scale[:1, :1].expand(len(left), 1)):
                inputs = left, right, scale, b_scale
                got, want = run("scaled_mm", *inputs, torch.float32), reference.scaled_mm(*inputs, torch.float32)
                assert torch.equal(got, want)


def test_integers_are_exact_at_the_extremes(run):
    a, one = torch.full((2, 28672), 127, dtype=torch.int8), torch.ones(2, 1)
    assert (run("scaled_mm", a, -a, one, one, torch.float32) == -28672 * 127 * 127).all()


def test_sums_that_may_overflow_are_refused(run):
    a, one = torch.zeros(1, 1 << 17, dtype=torch.int8), torch.ones(1, 1)
    with pytest.raises(ValueError, match="K = 131072 is not below 131072"):
        run("scaled_mm", a, a, one, one, torch.float32)
    reason = run("unsupported", 4096, 1 << 17, 128, torch.device("cpu"))
    assert reason.startswith("K = 131072") and run("unsupported", 4100, 4104, None, torch.device("cpu")) == ""


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("tile", [(16, 64, 128, 4, 4), (32, 128, 64, 4, 2), (128, 128, 128, 8, 3)])
def test_no_tile_changes_a_bit(interpreter, tile, group):
    inputs = operands(140, 200, 320, group, False)
    got = interpreter("call_with_tile", tile, "scaled_mm", *inputs, torch.bfloat16)
    assert torch.equal(got, reference.scaled_mm(*inputs, torch.bfloat16))


def activations(m: int, k: int, dtype: torch.dtype, exponent: int, seed: int) -> torch.Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    x[: m // 2, :32] = 0
    return x.to(dtype)


ACTIVATIONS = {
    "m": st.sampled_from([0, 1, 3, 6]),
    "count": st.integers(1, 3),
    "group": st.sampled_from([None, 32, 64, 128, 48]),
    "dtype": st.sampled_from(DTYPES),
    "exponent": st.integers(-6, 3),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=EXAMPLES)
@given(tail=st.sampled_from([0, 3]), **ACTIVATIONS)
def test_quantization(run, m, count, group, dtype, exponent, seed, tail):
    x = activations(m, group * count if group else 40 * count + tail, dtype, exponent, seed)
    assert same(run("quantize_activations", x, group), reference.quantize_activations(x, group))


@settings(max_examples=EXAMPLES // 2)
@given(**ACTIVATIONS)
def test_quantization_after_silu(run, m, count, group, dtype, exponent, seed):
    x = activations(m, 2 * (group or 50) * count, dtype, min(exponent, 2), seed)
    assert same(run("silu_mul_quantize", x, group), reference.silu_mul_quantize(x, group))


@settings(max_examples=EXAMPLES // 2)
@given(added=st.booleans(), **ACTIVATIONS)
def test_quantization_after_the_norm(interpreter, m, count, group, dtype, exponent, seed, added):
    k = (group or 70) * count
    x, residual, gain = (activations(rows, k, dtype, exponent, seed + i) for i, rows in enumerate((m, m, 1)))
    mine, theirs = (residual.clone(), residual.clone()) if added else (None, None)
    got, (_, written, *_) = interpreter("call", "rms_norm_quantize", x, mine, gain[0], 1e-6, group)
    assert same(got, reference.rms_norm_quantize(x, theirs, gain[0], 1e-6, group))
    assert not added or torch.equal(written, theirs)


def test_rows_wider_than_a_program(run):
    x = activations(2, 2 * 20000, torch.bfloat16, 0, 0)
    for group in (None, 20000 // 5):
        assert same(run("silu_mul_quantize", x, group), reference.silu_mul_quantize(x, group))
        assert same(run("quantize_activations", x, group), reference.quantize_activations(x, group))


def test_quantization_of_views(run):
    x = activations(6, 300, torch.float16, 0, 0)
    for view in (x[:, 44:], x[::2, :64], x[:, :128].t().contiguous().t(), x[:5].t()[:64]):
        for group in (None, 1):
            assert same(run("quantize_activations", view, group), reference.quantize_activations(view, group))


def test_bad_numbers_reach_the_scale(run):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, 0.0], [1e-38, -1e-38], [1e-45, 0.0], [inf, 1.0], [nan, 1.0], [-inf, nan], [1.0, -2.0]])
    codes, scale = run("quantize_activations", x, None)
    expected_codes, expected_scale = reference.quantize_activations(x, None)
    assert same([scale], [expected_scale]) and not scale[3:6].isfinite().any()
    assert torch.equal(codes[:3], expected_codes[:3]) and torch.equal(codes[6], expected_codes[6])


def test_silu_of_all_16_bit_numbers(run):
    """In groups of one, whose scales are the values."""
    for dtype in (torch.bfloat16, torch.float16):
        gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        gate = gate[gate.isfinite()].reshape(-1, 64)
        x = torch.cat([gate, torch.ones_like(gate)], dim=1)
        assert same(run("silu_mul_quantize", x, 1), reference.silu_mul_quantize(x, 1))


def mixture_of(tokens, count, k, hidden, inner, group, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (count, 2 * inner, hidden), (count, hidden, inner)
    w13, w2 = (torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8) for shape in shapes)
    scales = [
        torch.rand(*shape[:2], shape[2] // (group or shape[2]), generator=generator) * 1e-2 + 1e-3 for shape in shapes
    ]
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    # Nobody chooses the last expert, and -1 lives elsewhere.
    chosen = torch.rand(tokens, count, generator=generator).argsort(dim=1)[:, :k] - 1
    return x, torch.rand(tokens, k, generator=generator), chosen, w13, scales[0], w2, scales[1]


@settings(max_examples=EXAMPLES // 2)
@given(
    tokens=st.sampled_from([0, 1, 2, 7, 19]),
    count=st.integers(3, 9),
    k=st.integers(1, 3),
    hidden=st.sampled_from([64, 96, 160]),
    group=st.sampled_from([None, 32]),
    token_scales=st.booleans(),
    activation=st.sampled_from(sorted(mixture.ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_experts(run, tokens, count, k, hidden, group, token_scales, activation, dtype, index, seed):
    x, shares, chosen, *weights = mixture_of(tokens, count, k, hidden, 64, group, dtype, seed)
    arguments = x, shares, chosen.to(index), *weights, activation, None if token_scales else group
    got, want = run("experts", *arguments), mixture.experts(*arguments)
    if activation == "silu":
        assert torch.equal(got, want)
    else:  # torch's GELU may differ in the last bit with a value's place in the batch
        assert torch.allclose(got.float(), want.float(), rtol=0.02, atol=0.1)


def test_experts_that_nobody_here_is_asked_for(run):
    x, shares, chosen, *weights = mixture_of(5, 4, 2, 64, 64, None)
    assert (run("experts", x, shares, torch.full_like(chosen, -1), *weights, "silu") == 0).all()


@pytest.mark.parametrize("m", [5, 1, 0])
def test_opcheck(interpreter, m):
    """Schemas and fakes, strides included, fit what Triton's kernels return, too."""
    x, gain = torch.randn(m, 128), torch.randn(64)
    a, b, a_scale, b_scale = operands(m, 8, 64, 32, False)
    for name, *arguments in (
        ("quantize_activations", x, 32),
        ("silu_mul_quantize", x, None),
        ("rms_norm_quantize", torch.randn(m, 64), torch.randn(m, 64), gain, 1e-6, 64),
        ("scaled_mm", a, b, a_scale, b_scale, torch.bfloat16, gain[:8]),
        ("experts", *mixture_of(m, 4, 2, 64, 64, 32), "silu", 32),
    ):
        assert set(interpreter("opcheck", name, *arguments).values()) == {"SUCCESS"}
