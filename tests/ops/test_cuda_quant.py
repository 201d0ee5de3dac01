"""The CUDA quantization kernels, compiled unchanged by g++ and run on the host emulation, against the torch reference:
codes, scales and the updated residual are equal bit for bit."""

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.emulation import ROOT, compile_library
from vllm_w8a8_bismooth.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = 1e-5


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the kernels for the host")
    return load(ROOT / "csrc/cuda")


def load(include: Path) -> ctypes.CDLL:
    library = compile_library(ROOT / "tests/csrc/quant.cpp", include=include)
    library.quantize.restype = ctypes.c_char_p
    return library


def run(kernels, source, x, group, residual=None, gain=None, epsilon=EPSILON, items=0, threads=0, seed=0):
    """Codes and scales as the kernels give them; ``residual`` is updated."""
    channels = x.shape[1] // (2 if source == "silu" else 1)
    codes = torch.full((x.shape[0] + 1, channels), 99, dtype=torch.int8)  # one row more, to see writes past the end
    scales = torch.full((x.shape[0] + 1, channels // group), -1.0)
    number = {torch.float32: b"f", torch.bfloat16: b"b", torch.float16: b"h"}[x.dtype]

    def at(tensor):
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    error = kernels.quantize(
        *(ctypes.c_char(source[:1].encode()), ctypes.c_char(number)),
        *(at(x), at(residual), at(gain), ctypes.c_float(epsilon), at(codes), at(scales)),
        *(x.shape[0], channels, group, items, threads, ctypes.c_uint64(seed)),
    )
    assert error is None, error.decode()
    assert (codes[-1] == 99).all() and (scales[-1] == -1).all()
    return codes[:-1], scales[:-1]


def expected(source, x, group, residual=None, gain=None, epsilon=EPSILON):
    if source == "rms":
        return reference.rms_norm_quantize(x, residual, gain, epsilon, group)
    return (reference.silu_mul_quantize if source == "silu" else reference.quantize_activations)(x, group)


def operands(source, rows, channels, dtype, seed, spread=3.0, residual=True):
    """Activations with outlier channels, zero groups and a wide range between tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        values = torch.randn(shape, generator=generator)
        values *= 10 ** (spread * (torch.rand(shape[0], 1, generator=generator) - 0.5))
        values[:, ::7] *= 20
        values[::3, : min(32, shape[-1] // 2)] = 0
        return values.to(dtype)

    x = draw(rows, channels * (2 if source == "silu" else 1))
    if source != "rms":
        return dict(x=x)
    gain = torch.randn(channels, generator=generator).to(dtype)
    return dict(x=x, gain=gain, residual=draw(rows, channels) if residual else None)


def clone(inputs):
    return {name: tensor if tensor is None else tensor.clone() for name, tensor in inputs.items()}


def check(kernels, source, group, inputs, **launch):
    ours, theirs = clone(inputs), clone(inputs)
    codes, scales = run(kernels, source, group=group, **ours, **launch)
    want_codes, want_scales = expected(source, group=group, **theirs)
    assert torch.equal(scales, want_scales)
    assert torch.equal(codes, want_codes)
    if inputs.get("residual") is not None:
        assert torch.equal(ours["residual"], theirs["residual"])


@pytest.mark.parametrize("source", ["plain", "silu", "rms"])
@settings(max_examples=60)
@given(data=st.data())
def test_equal_to_the_reference(kernels, source, data):
    group = data.draw(st.sampled_from([16, 32, 48, 64, 96, 128, 256, 384, 512, 1024]))
    count = data.draw(st.integers(1, max(1, 3072 // group)))
    channels = group * count
    per_token = data.draw(st.booleans())
    rows, dtype, seed = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 999))
    items, threads = data.draw(st.sampled_from([(0, 0), (1, 32), (1, 96), (4, 32), (4, 64), (4, 512), (1, 512)]))
    inputs = operands(source, rows, channels, dtype, seed, residual=data.draw(st.booleans()))
    check(kernels, source, channels if per_token else group, inputs, items=items, threads=threads, seed=seed)


@pytest.mark.parametrize("seed", range(1, 21))
@pytest.mark.parametrize("source", ["plain", "silu", "rms"])
def test_any_order_of_threads(kernels, source, seed):
    group = [1536, 512, 128, 32, 384][seed % 5]
    inputs = operands(source, 2, 1536, DTYPES[seed % 3], seed)
    check(kernels, source, group, inputs, items=(1, 4)[seed % 2], threads=(64, 192)[seed % 2], seed=seed)


@pytest.mark.parametrize(
    ("source", "channels", "group"),
    [
        ("plain", 8192, 8192),  # LLaMA3-70B: o_proj,
        ("rms", 8192, 8192),  # qkv and gate_up,
        ("silu", 28672, 28672),  # down,
        ("silu", 28672, 128),
        ("silu", 14336, 128),
        ("rms", 16384, 128),  # the widest norm held in registers,
        ("rms", 20480, 20480),  # and wider ones
        ("rms", 65536, 512),
        ("plain", 65536, 65536),
        ("silu", 40960, 1024),
    ],
)
@pytest.mark.parametrize("rows", [1, 300])
def test_shapes_of_models_under_the_launch_plan(kernels, source, channels, group, rows):
    dtype = torch.bfloat16 if group != 1024 else torch.float32
    inputs = operands(source, rows, channels, dtype, 1)
    if rows == 1:
        return check(kernels, source, group, inputs)
    items, threads = plan(kernels, rows, channels, limit=512 if source == "rms" or dtype == torch.float32 else 896)
    few = {name: tensor if tensor is None or tensor.dim() == 1 else tensor[:1] for name, tensor in inputs.items()}
    check(kernels, source, group, few, items=items, threads=threads)  # one row is as good as all


def plan(kernels, rows: int, channels: int, limit: int) -> tuple[int, int]:
    items, threads = ctypes.c_int(), ctypes.c_int()
    kernels.plan(ctypes.c_int64(rows), channels, limit, ctypes.byref(items), ctypes.byref(threads))
    return items.value, threads.value


@given(rows=st.integers(1, 10**6), vectors=st.integers(1, 2**15), limit=st.sampled_from([512, 896, 1024]))
def test_plan_fits_a_block(kernels, rows, vectors, limit):
    items, threads = plan(kernels, rows, 8 * vectors, limit)
    assert items in (1, 4) and threads % 32 == 0 and 32 <= threads <= limit
    assert items * threads >= vectors or threads == limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_of_every_number(kernels, dtype):
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    gate = gate[gate.isfinite()].reshape(-1, 16)
    x = torch.cat([gate, torch.ones_like(gate)], dim=1)
    check(kernels, "silu", 16, dict(x=x), items=1, threads=32)


@pytest.mark.parametrize("source", ["plain", "silu", "rms"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_reaches_the_scale(kernels, source, bad):
    inputs = operands(source, 2, 512, torch.bfloat16, 3)
    inputs["x"][1, 200] = bad
    for group in (512, 128, 64):
        _, scales = run(kernels, source, group=group, **clone(inputs))
        _, want = expected(source, group=group, **clone(inputs))
        assert torch.equal(scales.isfinite(), want.isfinite()) and not scales[1].isfinite().all()
        assert torch.equal(scales[0], want[0])


def test_zeros_and_tiny_numbers(kernels):
    x = torch.zeros(3, 64)
    x[1] = 1e-38
    x[2, 5], x[2, 6] = 3.8e-37, -1e-38
    check(kernels, "plain", 32, dict(x=x))
    assert run(kernels, "plain", x, 32)[0][2, 5] == 127


MUTATIONS = {
    "no barrier after the squares": (r"    __syncthreads\(\);\n    const int count", "    const int count"),
    "no barrier after the magnitudes": (r"    __syncthreads\(\);\n    if \(groups.token\)", "    if (groups.token)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_emulation_catches(tmp_path, name):
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the kernels for the host")
    shutil.copytree(ROOT / "csrc/cuda", tmp_path / "cuda")
    source = tmp_path / "cuda/quant.cuh"
    changed, count = re.subn(*MUTATIONS[name], source.read_text())
    assert count == 1
    source.write_text(changed)
    broken = load(tmp_path / "cuda")
    inputs = operands("rms", 2, 1536, torch.bfloat16, 0)
    want = expected("rms", group=1536, **clone(inputs))
    wrong = 0
    for seed in range(1, 21):
        codes, scales = run(broken, "rms", group=1536, **clone(inputs), items=1, threads=192, seed=seed)
        wrong += not (torch.equal(codes, want[0]) and torch.equal(scales, want[1]))
    assert wrong
