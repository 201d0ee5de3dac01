"""The compiled CPU kernels: every instruction-set level that this CPU runs equals the reference bit for bit."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from setup import CPU_FLAGS, CPU_LEVELS
from tests.support import rows
from tests.support.compiler import build
from vllm_w8a8_bismooth import fourbits, grouping, ops
from vllm_w8a8_bismooth.ops import reference, whole

ROOT = Path(__file__).parents[2]
INCLUDES = [ROOT / "csrc", ROOT / "tests/csrc"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = ["amx", "avx512_vnni", "avx_vnni", "avx512", "avx2", "portable"]

level = getattr(torch.ops.w8a8_bismooth, "_cpu_level", None)
pytestmark = pytest.mark.skipif(level is None, reason="the CPU kernels are not built (see setup.py)")


@pytest.fixture(params=LEVELS)
def at_level(request):
    best = level("")
    try:
        level(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    level(best)


def test_the_best_level_is_in_use():
    flags = Path("/proc/cpuinfo").read_text()
    expected = next(n for n in LEVELS if {"amx": "amx_int8", "avx512": "avx512bw", "portable": ""}.get(n, n) in flags)
    assert ops.has_kernel("cpu") and level("") == expected
    assert ops.has_kernel("cpu", "silu_mul_quantize") and not ops.has_kernel("cpu", "rms_norm_quantize")
    with pytest.raises(RuntimeError, match="no level 'sse9'"):
        level("sse9")


# One strategy for shapes, tails of every kind included: 16 channels, 4 and 64 and 512 k, 6 and 16 and 128 tokens.
shapes = st.fixed_dictionaries(
    {
        "m": st.one_of(st.integers(0, 40), st.sampled_from([127, 129, 260])),
        "n": st.one_of(st.integers(1, 150), st.sampled_from([64, 128])),
        "groups": st.integers(1, 4),
        "width": st.one_of(st.integers(1, 140), st.sampled_from([32, 64, 128, 255, 256, 520, 1100])),
        "activation_groups": st.booleans(),
        "low": st.sampled_from([-128, 127]),  # 127: the largest sums
        "packed": st.booleans(),
        "scales_by_group": st.booleans(),
        "biased": st.booleans(),
        "dtype": st.sampled_from(DTYPES),
        "seed": st.integers(0, 2**31),
    }
)


@settings(max_examples=60)
@given(case=shapes)
def check_product(case):
    generator = torch.Generator().manual_seed(case["seed"])
    m, n, groups, k = case["m"], case["n"], case["groups"], case["groups"] * case["width"]
    a, b = (torch.randint(case["low"], 128, (r, k), generator=generator, dtype=torch.int8) for r in (m, n))
    a_scale = torch.rand(m, groups if case["activation_groups"] else 1, generator=generator)
    b_scale = torch.rand(n, groups, generator=generator)
    bias = torch.randn(n, generator=generator).to(case["dtype"]) if case["biased"] else None
    expected = reference.scaled_mm(a, b, a_scale, b_scale, case["dtype"], bias)
    if case["scales_by_group"]:
        b_scale = b_scale.t().contiguous().t()
    if case["packed"]:
        b = ops.pack_weight(b, case["width"])
    assert torch.equal(ops.scaled_mm(a, b, a_scale, b_scale, case["dtype"], bias), expected)


def test_product_equals_the_reference(at_level):
    check_product()


@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_experts_equal_those_of_portable_code(at_level, group, tokens):
    """Packed experts, of which each takes another number of tokens."""
    generator = torch.Generator().manual_seed(tokens)
    weights = [torch.randint(-127, 128, (4, n, 256), generator=generator, dtype=torch.int8) for n in (512, 256)]
    packed = [torch.stack([ops.pack_weight(expert, group) for expert in weight]) for weight in weights]
    w13_scale, w2_scale = (torch.rand(4, n, 256 // (group or 256), generator=generator) * 1e-3 for n in (512, 256))
    x = torch.randn(tokens, 256, generator=generator).bfloat16()
    shares = torch.rand(tokens, 2, generator=generator)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(tokens)])
    arguments = x, shares, chosen, packed[0], w13_scale, packed[1], w2_scale, "silu", group
    found = ops.experts(*arguments)
    level("portable")
    assert torch.equal(found, ops.experts(*arguments)) and found.abs().sum() > 0


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 9),
    groups=st.integers(1, 3),
    width=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-40, 30),
    seed=st.integers(0, 2**31),
)
def check_quantization(tokens, groups, width, dtype, exponent, seed):
    x = torch.randn(tokens, groups * width, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    (codes, scale), expected = (
        ops.quantize_activations(x.to(dtype), width),
        reference.quantize_activations(x.to(dtype), width),
    )
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])


def test_quantization_equals_the_reference(at_level):
    check_quantization()


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 9),
    groups=st.integers(1, 3),
    width=st.one_of(st.integers(1, 200), st.integers(255, 520)),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-8, 8),
    seed=st.integers(0, 2**31),
)
def check_silu_mul(tokens, groups, width, dtype, exponent, seed):
    x = torch.randn(tokens, 2 * groups * width, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    (codes, scale), expected = (
        ops.silu_mul_quantize(x.to(dtype), width),
        reference.silu_mul_quantize(x.to(dtype), width),
    )
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])


def test_silu_and_quantization_equal_the_reference(at_level):
    check_silu_mul()


@settings(max_examples=60)
@given(
    tokens=st.one_of(st.integers(0, 20), st.sampled_from([127, 129, 260])),
    channels=st.integers(1, 80),
    groups=st.integers(1, 3),
    width=st.one_of(st.integers(1, 140), st.sampled_from([255, 520])),
    grouped=st.booleans(),
    silu_mul=st.booleans(),
    biased=st.booleans(),
    packed=st.booleans(),
    contiguous=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def check_linear(tokens, channels, groups, width, grouped, silu_mul, biased, packed, contiguous, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    k, group_size = groups * width, width if grouped else None
    x = (torch.randn(tokens, (k << silu_mul) + 1, generator=generator) * 3).to(dtype)[:, :-1]
    weight = torch.randint(-127, 128, (channels, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(channels, groups, generator=generator)
    bias = torch.randn(channels, generator=generator).to(dtype) if biased else None
    codes, a_scale = (reference.silu_mul_quantize if silu_mul else reference.quantize_activations)(x, group_size)
    expected = reference.scaled_mm(codes, weight, a_scale, scale, dtype, bias)
    x, weight = x.contiguous() if contiguous else x, ops.pack_weight(weight, width) if packed else weight
    assert torch.equal(ops.linear(x, weight, scale, group_size, bias, silu_mul), expected)


def test_a_linear_in_one_equals_the_reference(at_level):
    assert ops.has_kernel("cpu", "linear")
    check_linear()


# Of eight bits: no rows, few, many, or all; whole blocks of 16 or not.
rows_of = {
    "tokens": st.one_of(st.integers(0, 40), st.sampled_from([96, 127, 129, 260])),
    "n": st.one_of(st.integers(1, 150), st.sampled_from([64, 128])),
    "group_size": st.sampled_from(grouping.OF_FOUR_BITS),
    "groups": st.integers(1, 9),
    "share": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "biased": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=60)
@given(silu_mul=st.booleans(), contiguous=st.booleans(), **rows_of)
def check_linear_rows(tokens, n, group_size, groups, share, silu_mul, biased, contiguous, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    codes, wide = rows.weight(n, groups, group_size, share, generator)
    x = (torch.randn(tokens, (codes.shape[1] << silu_mul) + 1, generator=generator) * 3).to(dtype)[:, :-1]
    scale = torch.rand(n, 1, generator=generator)
    bias = torch.randn(n, generator=generator).to(dtype) if biased else None
    a, a_scale = (reference.silu_mul_quantize if silu_mul else reference.quantize_activations)(x, None)
    expected = reference.scaled_mm(a, codes, a_scale, scale, dtype, bias)
    packed = ops.pack_rows(fourbits.pack(codes, wide, group_size))
    stored = scale[packed.order.long()]
    assert torch.equal(ops.linear_rows(x.contiguous() if contiguous else x, packed, stored, bias, silu_mul), expected)
    assert torch.equal(ops.scaled_mm_rows(a, packed, a_scale, stored, dtype, bias), expected)


def test_rows_of_four_bits_equal_the_reference(at_level):
    assert ops.has_kernel("cpu", "linear_rows") and ops.has_kernel("cpu", "scaled_mm_rows")
    check_linear_rows()


@settings(max_examples=20)
@given(**rows_of)
def test_rows_of_four_bits_are_composed_elsewhere(tokens, n, group_size, groups, share, biased, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    codes, wide = rows.weight(n, groups, group_size, share, generator)
    p = ops.pack_rows(fourbits.pack(codes, wide, group_size))
    x, scale = torch.randn(tokens, codes.shape[1], generator=generator).to(dtype), torch.rand(n, 1, generator=generator)
    bias = torch.randn(n, generator=generator).to(dtype) if biased else None
    a, a_scale = reference.quantize_activations(x, None)
    expected, stored = reference.scaled_mm(a, codes, a_scale, scale, dtype, bias), scale[p.order.long()]
    assert torch.equal(whole.linear_rows(x, p.eight, p.four, p.steps, stored, p.order, bias), expected)
    found = whole.scaled_mm_rows(a, a_scale, p.eight, p.four, p.steps, stored, p.order, dtype, bias)
    assert torch.equal(found, expected)


@given(n=rows_of["n"], group_size=rows_of["group_size"], groups=st.integers(1, 4), share=rows_of["share"],
       seed=rows_of["seed"])  # fmt: skip
def test_packing_of_rows_can_be_undone(n, group_size, groups, share, seed):
    codes, wide = rows.weight(n, groups, group_size, share, torch.Generator().manual_seed(seed))
    packed = ops.pack_rows(fourbits.pack(codes, wide, group_size))
    assert torch.equal(ops.unpack_rows(packed), codes)
    assert torch.equal(packed.order.sort().values, torch.arange(n, dtype=torch.int32))
    eight, four = len(packed.eight), len(packed.four)
    assert eight == -(-len(wide) // 16) and four == max(-(-n // 16) - eight, 0)
    assert packed.four.nbytes + packed.steps.nbytes == four * (8 * codes.shape[1] + 32 * groups)


def damaged_rows():
    """Message -> fields of a weight ``[40, 64]`` that do not fit its others, or its scales."""
    codes, wide = rows.weight(40, 2, 32, 0.5, torch.Generator().manual_seed(0))
    good = ops.pack_rows(fourbits.pack(codes, wide[:15], 32))
    order, far = good.order, good.order.clone()
    far[7] = 40
    return good, [
        ({"order": far}, "order has numbers outside 0 to 39"),
        ({"order": -order}, "order has numbers outside 0 to 39"),
        ({"order": order.long()}, "not what pack_rows makes"),
        ({"order": torch.stack([order, order], dim=1)[:, 0]}, "not what pack_rows makes"),
        ({"four": good.four[:1]}, "not what pack_rows makes"),
        ({"four": good.four.view(torch.int8)}, "not what pack_rows makes"),
        ({"eight": good.eight[:, :8]}, "not what pack_rows makes"),
        ({"eight": torch.cat([good.eight] * 4)}, "not what pack_rows makes"),
        ({"eight": good.eight.transpose(2, 3).contiguous().transpose(2, 3)}, "not what pack_rows makes"),
        ({"eight": good.eight[0]}, "must be 4-D"),
        ({"steps": good.steps[:1]}, "not what pack_rows makes"),
        ({"steps": good.steps[:, :0]}, "K = 64 is not 0 groups"),
        ({"steps": torch.cat([good.steps] * 2, dim=1)}, "K = 64 is not 4 groups"),
        ({"b_scale": torch.ones(39, 1)}, "not what pack_rows makes"),
        ({"b_scale": torch.ones(40, 2)}, "and the scales .N, 1."),
        ({"b_scale": torch.ones(40, 1, dtype=torch.float64)}, "scales must be fp32"),
        ({"bias": torch.ones(39)}, "bias must be"),
    ]


def test_rows_that_do_not_fit_are_refused():
    good, cases = damaged_rows()
    right = {**vars(good), "b_scale": torch.ones(40, 1), "bias": None}
    linear, multiply = torch.ops.w8a8_bismooth.linear_rows, torch.ops.w8a8_bismooth.scaled_mm_rows
    x, codes, scale = torch.ones(2, 64), torch.ones(2, 64, dtype=torch.int8), torch.ones(2, 1)
    for fields, message in [({}, None), *cases]:
        for call in (
            lambda given=right | fields: linear(x, **given),
            lambda given=right | fields: multiply(codes, scale, out_dtype=torch.bfloat16, **given),
        ):
            if message is None:
                call()
                continue
            with pytest.raises(RuntimeError, match=message):
                call()
    with pytest.raises(ValueError, match="expected .M, K., .N, K., .N, 1."):
        ops.linear_rows(torch.ones(2, 32), good, torch.ones(40, 1))
    with pytest.raises(ValueError, match="expected .M, K., .N, K., .N, 1."):
        ops.scaled_mm_rows(codes, good, scale, torch.ones(40, 2), torch.bfloat16)
    with pytest.raises(ValueError, match="a_scale is"):
        ops.scaled_mm_rows(codes, good, torch.ones(2, 2), torch.ones(40, 1), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_of_every_half(at_level, dtype):
    """Each a group of its own, whose scale is then its magnitude; NaN and infinity included."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(1, -1).view(dtype)
    x = torch.cat([gate, torch.ones_like(gate)], dim=1)
    _, scale = ops.silu_mul_quantize(x, 1)
    _, expected = reference.silu_mul_quantize(x, 1)
    assert torch.equal(scale.nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_quantized_and_rounded_as_in_torch(at_level, dtype):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    codes, scale = ops.quantize_activations(halves.view(-1, 1), 1)
    _, expected = reference.quantize_activations(halves.view(-1, 1), 1)
    assert torch.equal(scale.nan_to_num(1e30), expected.nan_to_num(1e30))
    assert codes.flatten()[halves.isfinite() & (halves.abs() > 4e-37)].abs().eq(127).all()
    # Rounding of the result: between, on and beside the halves.
    wide = halves[halves.isfinite()].float()
    values = torch.cat([wide, wide * (1 + 2.0**-9), wide * (1 + 2.0**-12), torch.tensor([float("nan"), float("inf")])])
    one = torch.ones(1, 1)
    out = ops.scaled_mm(torch.zeros(1, 4, dtype=torch.int8), torch.zeros(len(values), 4, dtype=torch.int8), one,
                        torch.ones(len(values), 1), dtype, values)  # fmt: skip
    assert torch.equal(out[0].nan_to_num(-7), values.to(dtype).nan_to_num(-7))


@given(n=st.integers(1, 70), groups=st.integers(1, 4), width=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_packing_can_be_undone(n, groups, width, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (n, groups * width), generator=generator, dtype=torch.int8)
    packed = ops.pack_weight(weight, width)
    assert torch.equal(ops.unpack_weight(packed, torch.ones(n, groups), groups * width), weight)
    if n % 16 == 0 and width % 4 == 0:
        assert packed.nbytes == weight.nbytes


def test_a_product_of_nothing_is_the_bias(at_level):
    """K = 0 reads no activations, whose address may be null, as where the product quantizes them itself."""
    none, one, bias = torch.zeros(3, 0, dtype=torch.int8), torch.ones(3, 1), torch.randn(3)
    assert torch.equal(ops.scaled_mm(none, none, one, one, torch.float32, bias), bias.expand(3, 3))


def test_a_wrong_operand_is_refused():
    a, one = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 1)
    packed = ops.pack_weight(torch.zeros(32, 64, dtype=torch.int8), None)
    for b, b_scale, message in [
        (packed, torch.ones(48, 1), "not what pack_weight makes"),
        (packed.view(torch.int8), torch.ones(32, 1), "not what pack_weight makes"),
        (torch.zeros(32, 64), torch.ones(32, 1), "b must be int8"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.scaled_mm(a, b, one, b_scale, torch.bfloat16)
    with pytest.raises(RuntimeError, match="fp32, bf16 or fp16"):
        ops.quantize_activations(torch.zeros(2, 64, dtype=torch.float64), None)
    with pytest.raises(RuntimeError, match="fp32, bf16 or fp16"):
        ops.silu_mul_quantize(torch.zeros(2, 64, dtype=torch.float64), None)
    weight, scale, linear = torch.zeros(32, 64, dtype=torch.int8), torch.ones(32, 2), torch.ops.w8a8_bismooth.linear
    for x, group_size, silu_mul, message in [
        (torch.zeros(2, 64, dtype=torch.float64), 32, False, "fp32, bf16 or fp16"),
        (torch.zeros(2, 63), None, True, "x must be"),
        (torch.zeros(2, 64), 16, False, "expected"),
        (torch.zeros(2, 64), 24, False, "not a multiple of group_size = 24"),
        (torch.zeros(2, 64), 32, True, "b must be int8"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            linear(x, weight, scale, group_size, None, silu_mul)


def test_only_stable_symbols_are_needed():
    """One file serves every torch from 2.11 on, so it may take only torch's stable C interface."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", ROOT / "vllm_w8a8_bismooth/_C.so"], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    libraries = ("@GLIBC_", "@GLIBCXX_", "@CXXABI_", "@GCC_")
    weak = ("_ITM_", "__gmon_start__")
    foreign = [s for s in symbols if not any(tag in s for tag in libraries) and not s.startswith(weak)]
    assert foreign and all(s.startswith(("aoti_torch_", "torch_")) for s in foreign)


@pytest.fixture(scope="module")
def fuzzer():
    """tests/csrc/fuzz_cpu.cpp with every level's kernels, AMX's instructions emulated, sanitizers built in."""
    if not shutil.which("g++"):
        pytest.skip("there is no g++")
    common = ["-std=c++17", "-O1", "-g1", *CPU_FLAGS[1:], "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    levels = {name: flags for name, flags in CPU_LEVELS.items() if name != "amx"}
    levels["amx_emulated"] = ["-DW8A8_EMULATE_AMX"]
    objects = [
        build([*common, *flags, f"-DW8A8_LEVEL={name}", "-c"], [ROOT / "csrc/cpu/kernels.cpp"], INCLUDES)
        for name, flags in levels.items()
    ]
    names = "-DW8A8_LEVELS(X)=" + "".join(f"X({name})" for name in levels)
    return build([*common, names, "-pthread"], [ROOT / "tests/csrc/fuzz_cpu.cpp", *objects], INCLUDES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_fuzz_with_sanitizers(fuzzer, seed):
    done = subprocess.run([fuzzer, str(seed), "60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "amx_emulated" in done.stdout and "portable" in done.stdout


@pytest.mark.slow
def test_the_fuzzer_catches_a_mistake(tmp_path):
    """The same program with a kernel that forgets to offset its sums must fail."""
    source = (ROOT / "csrc/cpu/kernels.cpp").read_text()
    assert source.count("base - 128u") == 1
    (tmp_path / "kernels.cpp").write_text(source.replace("base - 128u", "base - 127u"))
    flags = ["-std=c++17", "-O1", *CPU_FLAGS[1:], "-DW8A8_LEVEL=portable", "-DW8A8_LEVELS(X)=X(portable)", "-pthread"]
    sources = [tmp_path / "kernels.cpp", ROOT / "tests/csrc/fuzz_cpu.cpp"]
    fuzzer = build(flags, sources, [*INCLUDES, ROOT / "csrc/cpu"])
    done = subprocess.run([fuzzer, "0", "60"], capture_output=True, text=True)
    assert done.returncode == 1 and "portable: gemm at" in done.stdout
