import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.ops import reference

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


def test_opcheck():
    a, b, a_scale, b_scale, bias = operands(4, 8, 64, 2, 2)
    for group_size in (32, 64):
        torch.library.opcheck(torch.ops.w8a8_bismooth.quantize_activations.default, (torch.randn(4, 64), group_size))
    for arguments in ((a, b, a_scale, b_scale, torch.bfloat16, bias), (a, b, a_scale[:, :1], b_scale, torch.float32)):
        torch.library.opcheck(torch.ops.w8a8_bismooth.scaled_mm.default, arguments)


def test_compiles_without_breaks_or_recompiles():
    _, weight, _, weight_scale, _ = operands(1, 16, 64, 2, 2)
    counter = CompileCounter()
    compiled = torch.compile(ops.linear, fullgraph=True, dynamic=True, backend=counter)
    for m in (5, 3, 17, 64):  # not 2, the number of groups: the compiler would take the two for one size
        x = torch.randn(m, 64, generator=torch.Generator().manual_seed(m))
        assert torch.equal(compiled(x, weight, weight_scale, 32), ops.linear(x, weight, weight_scale, 32))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.quantize_activations(torch.ones(2, 40), 32), "multiple of group_size = 32"),
        (lambda: ops.quantize_activations(torch.ones(40), 40), "must be"),
        (lambda: ops.scaled_mm(*operands(2, 3, 40, 3, 1)[:4], torch.float32), "multiple of G"),
        (lambda: ops.scaled_mm(*operands(2, 3, 64, 1, 2)[:4], torch.float32), "expected"),
    ],
)
def test_shapes_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()
