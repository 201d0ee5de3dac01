"""What a conversion is said to need: from headers and rates, and the rates from this machine."""

import math
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm_w8a8_bismooth as b
from benchmarks.convert import WHOLE_70B
from benchmarks.random_llama import checkpoint, hole
from vllm_w8a8_bismooth.checkpoint.files import Folder
from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.checkpoint.reader import Headers
from vllm_w8a8_bismooth.conversion import preview, rates
from vllm_w8a8_bismooth.conversion.estimate import TOGETHER, WIDEST, needs
from vllm_w8a8_bismooth.measure import arithmetic
from vllm_w8a8_bismooth.method import compensate, quantize

RATES = rates.Rates(rounding=1e9, reading=math.inf, arithmetic="bfloat16", products=1e12, precise=1e11)


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Layout:
    """LLaMA 3 70B's headers, in sparse files."""
    folder = checkpoint(tmp_path_factory.mktemp("whole") / "llama", WHOLE_70B, hole)
    return Layout(Headers(Folder(folder)))


def test_seconds_follow_from_rates(layout):
    linears = 68.45e9  # numbers in the blocks' linears
    rounding = layout.nbytes(range(80)) / 1e9
    assert needs(layout, None, RATES).seconds == pytest.approx(rounding)
    calibrated = needs(layout, 1000, RATES)
    assert calibrated.seconds == pytest.approx(rounding + 2 * linears * 1000 / 1e12, rel=1e-3)
    slower = needs(layout, 1000, replace(RATES, arithmetic="float32", products=1e11))
    assert slower.seconds == pytest.approx(rounding + 2 * linears * 1000 / 1e11, rel=1e-3)
    both = needs(layout, 1000, RATES, measured_tokens=100)
    assert both.seconds == pytest.approx(calibrated.seconds + 2 * rounding + 2 * linears * 100 / 1e11, rel=1e-3)


def test_compensation_takes_time_and_memory(layout):
    """Of LLaMA 3 70B's sites: products of inputs, Cholesky's factor and its inverse, and what each column hands on."""
    assert (TOGETHER, WIDEST) == (quantize.TOGETHER, compensate.WIDEST)
    sites = {"o": (8192, 8192), "qkv": (8192, 10240), "gate_up": (8192, 57344), "down": (28672, 8192)}
    widths = {8192: 4096, 28672: 4096}
    products = sum(k * (2 * 1000 * widths[k] + 4 / 3 * widths[k] ** 2 + n * widths[k]) for k, n in sites.values())
    steps = sum(k * n / 256 for k, n in sites.values())
    nearest, made = (needs(layout, 1000, RATES, compensated=compensated) for compensated in (False, True))
    assert made.seconds - nearest.seconds == pytest.approx(80 * (products / 1e11 + 2e-5 * steps), rel=1e-3)
    assert made.memory_bytes - nearest.memory_bytes == 4 * 4096 * (3 * 8192 + 3 * 28672)
    assert needs(layout, None, RATES, compensated=True) == needs(layout, None, RATES)


def test_reading_goes_on_beside_the_work(layout):
    assert needs(layout, None, replace(RATES, reading=2e9)).seconds == pytest.approx(layout.nbytes(range(80)) / 1e9)
    assert needs(layout, None, replace(RATES, reading=1e8)).seconds == pytest.approx(layout.nbytes(range(80)) / 1e8)


def test_fp32_takes_memory(layout):
    """Twice the states, and a copy of the block that runs."""
    narrow, wide = (needs(layout, 16384, replace(RATES, arithmetic=a)).memory_bytes for a in ("bfloat16", "float32"))
    states, inside = 2 * 16384 * 8192, 2 * 3 * 1024 * 28672
    assert wide - narrow == states + inside + 2 * layout.block_nbytes()


@pytest.mark.parametrize(("embedding", "blocks"), [("F32", "BF16"), ("BF16", "F32"), ("BF16", "F16"), ("F32", "F32")])
def test_what_is_copied_follows_from_the_blocks(make_checkpoint, embedding, blocks):
    """Not from the embedding's dtype, which only decides on the arithmetic."""
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    source = make_checkpoint(dtype=dtypes[blocks], sharded=False)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(dtypes[embedding])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found = Layout(Headers(Folder(source)))
    item = 4 if embedding == "F32" else 2
    chosen = replace(RATES, arithmetic="float32" if embedding == "F32" else "bfloat16")
    extra = needs(found, 128, chosen).memory_bytes - needs(found, None, chosen).memory_bytes
    numbers = found.block_nbytes() // dtypes[blocks].itemsize
    assert extra == item * (128 * 64 + 3 * 1024 * 96 + (numbers if embedding != blocks else 0))


def test_rates_are_those_of_this_machine(layout, monkeypatch):
    for function in (rates._products, rates._elements, rates._reading):
        function.cache_clear()
    started = time.perf_counter()
    found = rates.measured(layout)
    first, started = time.perf_counter() - started, time.perf_counter()
    assert rates.measured(layout) == found
    assert time.perf_counter() - started < first < 2, "measured once; half a second on a machine that is at rest"
    assert all(rate > 1e6 for rate in (found.rounding, found.reading, found.products, found.precise))
    monkeypatch.setattr("vllm_w8a8_bismooth.conversion.rates._products", lambda: 1e12)
    seen = {}
    for flags in ((), ("avx512_bf16",), ("avx512_bf16", "amx_bf16")):
        for module in (arithmetic, rates):
            monkeypatch.setattr(module, "cpu_flags", lambda flags=flags: set(flags))
        seen[flags] = rates.measured(layout)
    assert [rate.arithmetic for rate in seen.values()] == ["float32", "bfloat16", "bfloat16"]
    products = [rate.products for rate in seen.values()]
    assert products == sorted(products) and len(set(products)) == 3


def test_what_was_measured_of_bf16_counts(layout, monkeypatch):
    """Also on a machine whose flags say otherwise, and only where it computes in bf16."""
    monkeypatch.setattr(rates, "cpu_flags", lambda: {"amx_bf16"})
    slow, nominal = rates.measured(layout, "bfloat16", faster=0.5), rates.measured(layout, "bfloat16")
    assert slow.arithmetic == nominal.arithmetic == "bfloat16" and slow.precise == nominal.precise
    assert slow.products == 0.5 * slow.precise and nominal.products > nominal.precise
    wide = rates.measured(layout, "float32", faster=0.5)
    assert wide.products == wide.precise == slow.precise


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_a_preview_estimates_with_the_dtype_that_is_asked_for(make_checkpoint, tmp_path, monkeypatch, asked):
    """fp32 takes more memory, and bf16 the time that this machine was seen to take."""
    source, found = make_checkpoint(), {}
    (tmp_path / "text.txt").write_text("one and two and three. " * 100)
    for speed in (0.01, 1.0):
        monkeypatch.setattr(preview, "faster", lambda speed=speed: speed)
        plan = b.preview(source, tmp_path / "out", calibration=tmp_path / "text.txt", compute_dtype=asked)
        found[speed] = plan.seconds
    assert (found[0.01] > found[1.0]) == (asked == "bfloat16")


def test_a_disk_is_timed_where_there_is_something_to_read(make_checkpoint, tmp_path):
    small = Layout(Headers(Folder(make_checkpoint())))
    assert rates.measured(small).reading == math.inf
    (tmp_path / "big").write_bytes(bytes(2**23))
    assert 1e6 < rates._reading(tmp_path / "big") < math.inf
    assert rates._reading(tmp_path / "nothing") == math.inf


def test_measuring_takes_no_torch():
    script = (
        "import sys; from vllm_w8a8_bismooth.conversion import rates; rates._products(), rates._elements()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_fp16_is_computed_in_fp32(make_checkpoint):
    found = rates.measured(Layout(Headers(Folder(make_checkpoint(dtype=torch.float16)))))
    assert found.arithmetic == "float32" and found.products == found.precise
