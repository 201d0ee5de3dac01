from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from tests.support import rows
from vllm_w8a8_bismooth import fourbits, ops
from vllm_w8a8_bismooth.ops import api, reference, whole

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(m: int, n: int, k: int, weight_groups: int, activation_groups: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-127, 128, (rows, k), generator=generator, dtype=torch.int8) for rows in (m, n))
    a_scale = torch.rand(m, activation_groups, generator=generator) + 0.01
    b_scale = torch.rand(n, weight_groups, generator=generator) + 0.01
    return a, b, a_scale, b_scale, torch.randn(n, generator=generator)


@given(
    tokens=st.integers(0, 5),
    groups=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-4, 4),
    seed=st.integers(0, 2**31),
)
def test_activations_match_the_definition(tokens, groups, dtype, exponent, seed):
    x = torch.randn(tokens, groups * 32, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    x[: tokens // 2, :32] = 0
    x = x.to(dtype)
    codes, scale = ops.quantize_activations(x, 32)
    wide = x.float().numpy().reshape(tokens, groups, 32)
    amax = np.abs(wide).max(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.rint(wide * (np.float32(127) / amax)[..., None])
    expected = np.nan_to_num(expected).astype(np.int8).reshape(tokens, groups * 32)
    assert np.array_equal(codes.numpy(), expected)
    assert np.array_equal(scale.numpy(), amax / np.float32(127))


def test_activations_without_a_usable_scale():
    tiny, inf, nan = 1e-38, float("inf"), float("nan")
    x = torch.tensor([[0.0, 0.0], [tiny, -tiny], [inf, 1.0], [nan, 1.0], [1.0, -2.0]])
    codes, scale = ops.quantize_activations(x, 2)
    assert codes[:2].eq(0).all() and codes[4].tolist() == [64, -127]
    out = ops.scaled_mm(codes, torch.ones(1, 2, dtype=torch.int8), scale, torch.ones(1, 1), torch.float32)
    assert out[:2].eq(0).all() and out[2:4].isnan().all() and out[4].isfinite().all()


@given(
    tokens=st.integers(0, 4),
    channels=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    added=st.booleans(),
    exponent=st.integers(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_norm_matches_exact_arithmetic(tokens, channels, dtype, added, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(2, tokens, channels, generator=generator) * 10.0**exponent).to(dtype)
    gain = torch.randn(channels, generator=generator).to(dtype)
    summed = residual.clone() if added else None
    codes, scale = ops.rms_norm_quantize(x, summed, gain, 1e-6, None)
    z = (x.float() + residual.float()).to(dtype) if added else x
    assert not added or torch.equal(summed, z)
    exact = z.double() * (z.double().square().mean(1, keepdim=True) + 1e-6).rsqrt() * gain.double()
    step = torch.finfo(dtype).eps + 2.0**-21
    assert ((codes * scale - exact).abs() <= scale * 0.5001 + exact.abs() * step + torch.finfo(dtype).tiny).all()


@given(
    tokens=st.integers(0, 4),
    channels=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-3, 2),
    seed=st.integers(0, 2**31),
)
def test_silu_mul_matches_exact_arithmetic(tokens, channels, dtype, exponent, seed):
    x = (torch.randn(tokens, 2 * channels, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent).to(dtype)
    codes, scale = ops.silu_mul_quantize(x, None)
    gate, up = x.double().chunk(2, dim=1)
    exact = gate / (1 + (-gate).exp()) * up
    slack = exact.abs() * (2 * torch.finfo(dtype).eps + 2.0**-20) + (torch.finfo(dtype).tiny + 2e-36) * (1 + up.abs())
    assert ((codes * scale - exact).abs() <= scale * 0.5001 + slack).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_is_that_of_torch_for_nearly_all_16_bit_numbers(dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()].float()
    ours, torchs = reference.silu(x).to(dtype), torch.nn.functional.silu(x).to(dtype)
    assert (ours != torchs).sum() <= 8  # 3 and 1 where it was counted: torch's exponential depends on the machine
    assert torch.allclose(ours, torchs, rtol=torch.finfo(dtype).eps, atol=2e-36)


def test_silu_at_the_ends():
    inf, nan = float("inf"), float("nan")
    out = reference.silu(torch.tensor([0.0, 1e-45, 88.0, 3.4e38, inf, -87.0, -88.0, -3.4e38, -inf, nan]))
    assert out[:5].tolist() == pytest.approx([0.0, 0.0, 88.0, 3.4e38, inf])
    assert -1.5e-36 < out[5] < -1.4e-36 and out[6:8].tolist() == [0.0, 0.0] and out[8:].isnan().all()


FLOATS = st.floats(width=32, min_value=-(2.0**40), max_value=2.0**40)


@given(a=FLOATS, b=FLOATS, c=FLOATS)
def test_fma_rounds_once(a, b, c):
    out = reference._fma(torch.tensor([a]), b, torch.tensor([c]))[0].item()
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    neighbours = [np.nextafter(np.float32(out), np.float32(side)) for side in (-np.inf, np.inf)]
    error = abs(Fraction(out) - exact)
    assert all(error <= abs(Fraction(float(n)) - exact) for n in neighbours if np.isfinite(n))


def test_fma_where_rounding_twice_would_be_wrong():
    # 1 + 2^-23 + 2^-24 - 2^-70: a double drops the last term, and the tie then goes up to the even neighbour.
    a, b, c = 2.0**-24 * (1 + 2.0**-23), 1 - 2.0**-23, 1 + 2.0**-23
    assert reference._fma(torch.tensor([a]), b, torch.tensor([c])).item() == c
    assert torch.tensor([a * b + c], dtype=torch.float32).item() != c


@given(count=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_sums_follow_the_tree(count, seed):
    x = torch.randn(3, count, generator=torch.Generator().manual_seed(seed))

    def tree(values):
        if len(values) == 1:
            return values[0]
        return tree([np.float32(a + b) for a, b in zip(values[::2], values[1::2], strict=True)])

    padded = np.zeros((3, 1 << (count - 1).bit_length()), dtype=np.float32)
    padded[:, :count] = x.numpy()
    assert reference._tree_sum(x).tolist() == [float(tree(list(row))) for row in padded]


@given(
    m=st.integers(0, 40),
    n=st.integers(1, 40),
    groups=st.integers(1, 4),
    width=st.sampled_from([1, 5, 32, 64]),
    per_token=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_product_matches_exact_arithmetic(m, n, groups, width, per_token, biased, seed):
    a, b, a_scale, b_scale, bias = operands(m, n, groups * width, groups, 1 if per_token else groups, seed)
    out = ops.scaled_mm(a, b, a_scale, b_scale, torch.float32, bias if biased else None)
    exact = torch.zeros(m, n, dtype=torch.float64)
    magnitude = torch.zeros(m, n, dtype=torch.float64)
    for g in range(groups):
        columns = slice(g * width, (g + 1) * width)
        partial = (a[:, columns].long() @ b[:, columns].long().t()).double()
        term = partial * a_scale[:, min(g, a_scale.shape[1] - 1), None].double() * b_scale[:, g].double()
        exact, magnitude = exact + term, magnitude + term.abs()
    if biased:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    assert ((out.double() - exact).abs() <= magnitude * 2.0**-22).all()


def test_a_token_does_not_depend_on_its_batch():
    a, b, a_scale, b_scale, bias = operands(7, 9, 64, 1, 1)
    whole = ops.scaled_mm(a, b, a_scale, b_scale, torch.bfloat16, bias)
    singles = [ops.scaled_mm(a[i : i + 1], b, a_scale[i : i + 1], b_scale, torch.bfloat16, bias) for i in range(7)]
    assert torch.equal(whole, torch.cat(singles))


def test_integers_are_exact_at_the_extremes():
    k = 28672  # LLaMA3-70B's widest: 28672 * 127^2 needs 29 bits
    a = torch.full((2, k), 127, dtype=torch.int8)
    one = torch.ones(2, 1)
    out = reference._int_matmul(a, -a)
    assert (out == -k * 127 * 127).all()
    assert ops.scaled_mm(a, -a, one, one, torch.float32)[0, 0] == -k * 127 * 127


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_keeps_shape_and_dtype(dtype):
    _, weight, _, weight_scale, bias = operands(1, 12, 64, 2, 2)
    out = ops.linear(torch.randn(3, 5, 64, dtype=dtype), weight, weight_scale, 32, bias.to(dtype))
    assert out.shape == (3, 5, 12) and out.dtype == dtype


def test_no_group_size_is_the_whole_row():
    """In the kernels where they are built, and in the reference."""
    x, gain = torch.randn(5, 96), torch.randn(96)
    for module in (ops, reference):
        calls = (
            lambda size: module.quantize_activations(x, size),  # noqa: B023
            lambda size: module.rms_norm_quantize(x, None, gain, 1e-6, size),  # noqa: B023
            lambda size: module.silu_mul_quantize(torch.cat([x, x], dim=1), size),  # noqa: B023
        )
        for call in calls:
            (codes, scale), (same, also) = call(None), call(96)
            assert scale.shape == (5, 1) and torch.equal(codes, same) and torch.equal(scale, also)
    weight = torch.randint(-128, 128, (20, 96), dtype=torch.int8)
    assert torch.equal(ops.pack_weight(weight, None), ops.pack_weight(weight, 96))


@pytest.mark.parametrize("m", [4, 1, 0])
def test_opcheck(m):
    """Schemas, fakes with their strides, and tracing with sizes as symbols."""
    a, b, a_scale, b_scale, bias = operands(m, 8, 64, 2, 2)
    for group_size in (None, 32, 64):
        torch.library.opcheck(torch.ops.w8a8_bismooth.quantize_activations.default, (torch.randn(m, 64), group_size))
        torch.library.opcheck(torch.ops.w8a8_bismooth.silu_mul_quantize.default, (torch.randn(m, 128), group_size))
        for residual in (None, torch.randn(m, 64)):
            arguments = (torch.randn(m, 64), residual, torch.randn(64), 1e-6, group_size)
            torch.library.opcheck(torch.ops.w8a8_bismooth.rms_norm_quantize.default, arguments)
    for arguments in (
        (a, b, a_scale, b_scale, torch.bfloat16, bias),
        (a, b, a_scale[:, :1], b_scale, torch.float32),
        (a, b, a_scale, b_scale.t().contiguous().t(), torch.float32, None, True),
    ):
        torch.library.opcheck(torch.ops.w8a8_bismooth.scaled_mm.default, arguments)
    for channels, silu_mul in ((64, False), (128, True)):
        arguments = (torch.randn(m, channels, dtype=torch.bfloat16), b, b_scale, 32, bias, silu_mul)
        torch.library.opcheck(torch.ops.w8a8_bismooth.linear.default, arguments)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.w8a8_bismooth.experts.default, mixture(dtype))


def mixture(dtype: torch.dtype) -> tuple:
    """Four experts, two of them for each of three tokens; the last is idle, and one lives elsewhere."""
    w13, w2 = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((4, 96, 64), (4, 64, 48)))
    scales = torch.full((4, 96, 1), 1e-3), torch.full((4, 64, 1), 1e-3)
    chosen = torch.tensor([[0, 2], [2, 1], [-1, 0]])
    return torch.randn(3, 64).to(dtype), torch.rand(3, 2), chosen, w13, scales[0], w2, scales[1], "silu"


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (0, torch.randn(3, 32), r"x \[3, 32\]"),
        (1, torch.rand(3, 1), r"shares \[3, 1\]"),
        (2, torch.zeros(2, 2, dtype=torch.long), r"chosen \[2, 2\]"),
        (4, torch.ones(4, 96, 3), r"w13_scale \[4, 96, 3\]"),
        (4, torch.ones(4, 95, 1), r"w13_scale \[4, 95, 1\]"),
        (6, torch.ones(4, 64, 5), r"w2_scale \[4, 64, 5\]"),
        (8, 32, "group_size = 32"),
        (7, "relu", "activation = 'relu' is unknown; expected one of silu"),
    ],
)
def test_experts_that_do_not_fit_together(argument, value, message):
    arguments = [*mixture(torch.float32), None]
    assert ops.experts(*arguments).shape == (3, 64)
    arguments[argument] = value
    with pytest.raises(ValueError, match=message):
        ops.experts(*arguments)


def test_experts_compile_for_any_number_of_tokens():
    """In one graph: which experts work is only known to the operation."""
    counter = CompileCounter()
    compiled = torch.compile(ops.experts, backend=counter, fullgraph=True, dynamic=True)
    x, shares, chosen, *rest = mixture(torch.bfloat16)
    for times in (1, 3):
        arguments = (x.repeat(times, 1), shares.repeat(times, 1), chosen.repeat(times, 1), *rest)
        assert torch.equal(compiled(*arguments), ops.experts(*arguments))
    assert counter.frame_count == 1


def rows_of_four_bits() -> tuple[ops.PackedRows, torch.Tensor]:
    """A weight ``[40, 64]`` and its scales."""
    draw = torch.Generator().manual_seed(0)
    return ops.pack_rows(fourbits.pack(*rows.weight(40, 2, 32, 0.3, draw), 32)), torch.rand(40, 1, generator=draw)


@pytest.mark.parametrize("m", [5, 1])
def test_fakes_have_the_strides_of_the_outputs(m):
    """Also of what is not contiguous itself, or packed."""
    a, b, a_scale, b_scale, _ = operands(m, 16, 64, 2, 2)
    x = torch.randn(m, 256)[:, :128]
    namespace, calls = torch.ops.w8a8_bismooth, []
    calls += [(namespace.quantize_activations, (x, 32)), (namespace.silu_mul_quantize, (x.t().contiguous().t(), 32))]
    calls += [(namespace.rms_norm_quantize, (x, None, torch.randn(128), 1e-6, None))]
    calls += [(namespace.scaled_mm, (a.t().contiguous().t(), b, a_scale, b_scale, torch.bfloat16))]
    if ops.has_kernel("cpu"):
        calls += [(namespace.scaled_mm, (a, ops.pack_weight(b, 32), a_scale, b_scale, torch.bfloat16))]
    calls += [(namespace.linear, (x[:, :64], b, b_scale, 32)), (namespace.linear, (x, b, b_scale, None, None, True))]
    p, scale = rows_of_four_bits()
    calls += [(namespace.linear_rows, (x, p.eight, p.four, p.steps, scale, p.order, None, True))]
    stored = p.eight, p.four, p.steps, scale, p.order
    calls += [(namespace.scaled_mm_rows, (a, torch.ones(m, 1), *stored, torch.bfloat16))]
    for op, arguments in calls:
        with FakeTensorMode() as mode:
            faked = op(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in arguments))
        for fake, real in zip(tree_leaves(faked), tree_leaves(op(*arguments)), strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_only_linear_promises_constant_weights(monkeypatch):
    """The op itself waits for what writes its weights, unless it is told otherwise."""
    promises = []

    def spy(a, b, a_scale, b_scale, out_dtype, bias, constant_b):
        promises.append(constant_b)
        return reference.scaled_mm(a, b, a_scale, b_scale, out_dtype, bias, constant_b)

    monkeypatch.setattr(torch.ops.w8a8_bismooth, "scaled_mm", spy)
    monkeypatch.setattr(api, "has_kernel", lambda *_: False)
    a, b, a_scale, b_scale, _ = operands(2, 4, 64, 1, 1)
    for promise in (False, True):
        assert ops.scaled_mm(a, b, a_scale, b_scale, torch.float32, constant_b=promise).shape == (2, 4)
    ops.scaled_mm(a, b, a_scale, b_scale, torch.float32)
    ops.linear(torch.randn(2, 64), b, b_scale, None)
    whole.linear(torch.randn(2, 64), b, b_scale, None)
    assert promises == [False, True, False, True, True]
    schema = torch._C._get_schema("w8a8_bismooth::scaled_mm", "")
    assert schema.arguments[-1].name == "constant_b" and schema.arguments[-1].default_value is False


@pytest.mark.parametrize("group_size", [None, 32])
def test_compiles_without_breaks_or_recompiles(group_size):
    _, weight, _, weight_scale, _ = operands(1, 16, 64, 2, 2)
    counter = CompileCounter()
    compiled = torch.compile(ops.linear, fullgraph=True, dynamic=True, backend=counter)
    for m in (5, 3, 17, 64):  # not 2, the number of groups: the compiler would take the two for one size
        x = torch.randn(m, 64, generator=torch.Generator().manual_seed(m))
        assert torch.equal(
            compiled(x, weight, weight_scale, group_size), ops.linear(x, weight, weight_scale, group_size)
        )
    assert counter.frame_count == 1


def test_rows_of_four_bits_compile_without_breaks_or_recompiles():
    counter = CompileCounter()
    compiled = torch.compile(ops.linear_rows, fullgraph=True, dynamic=True, backend=counter)
    weight, scale = rows_of_four_bits()
    for m in (5, 3, 17):
        x = torch.randn(m, 64, generator=torch.Generator().manual_seed(m))
        assert torch.equal(compiled(x, weight, scale), ops.linear_rows(x, weight, scale))
    assert counter.frame_count == 1


def test_fused_ops_compile_and_update_the_residual():
    gain = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def block(x, residual):
        codes, scale = ops.rms_norm_quantize(x, residual, gain, 1e-6, None)
        y = codes * scale
        return residual, *ops.silu_mul_quantize(y, 32)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (5, 3, 17):
        x, residual = torch.randn(2, m, 64, generator=torch.Generator().manual_seed(m))
        ours, theirs = residual.clone(), residual.clone()
        for got, want in zip(compiled(x, ours), block(x, theirs), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(ours, theirs) and not torch.equal(ours, residual)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.quantize_activations(torch.ones(2, 40), 32), "multiple of group_size = 32"),
        (lambda: ops.quantize_activations(torch.ones(40), None), "must be"),
        (lambda: ops.quantize_activations(torch.ones(2, 40), 0), "multiple of group_size = 0"),
        (lambda: ops.silu_mul_quantize(torch.ones(2, 96), 32), "K = 48 is not a multiple of group_size = 32"),
        (lambda: ops.silu_mul_quantize(torch.ones(2, 97), None), r"\[M, 2 K\]"),
        (lambda: ops.pack_weight(torch.ones(2, 40, dtype=torch.int8), 32), "K = 40"),
        (lambda: ops.rms_norm_quantize(torch.ones(2, 48), None, torch.ones(48), 1e-6, 32), "group_size = 32"),
        (lambda: ops.rms_norm_quantize(torch.ones(2, 64), None, torch.ones(32), 1e-6, 32), "weight is"),
        (lambda: ops.rms_norm_quantize(torch.ones(2, 64), torch.ones(1, 64), torch.ones(64), 1e-6, 32), "residual is"),
        (lambda: ops.scaled_mm(*operands(2, 3, 40, 3, 1)[:4], torch.float32), "multiple of G"),
        (lambda: ops.scaled_mm(*operands(2, 3, 64, 1, 2)[:4], torch.float32), "expected"),
    ],
)
def test_shapes_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()
