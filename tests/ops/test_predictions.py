"""What the cost model of ``csrc/cuda/layout.h`` says of our kernels, beside what others measured of vLLM's: the table
in docs/results.md."""

import shutil

import pytest

from tests.support.emulation import CHANNEL, DEVICES, ROOT, Kernels, compile_library

if not shutil.which("g++"):
    pytest.skip("no g++ to compile the model for the host", allow_module_level=True)

CLOCKS = {"H100": 1755, "A100": 1410}  # MHz, the boost clocks behind the data sheets' peaks
PEAKS = {"H100": 1979, "A100": 624}  # int8 TOPS, dense, of the data sheets
MEASURED = [  # GPU, N, K, int8 TOPS of vLLM's cutlass_scaled_mm by M, who measured
    ("H100", 4096, 8192, {128: 312, 512: 939, 1024: 1252, 2048: 1321}, "sglang #3035"),
    ("H100", 8192, 21760, {128: 590, 512: 1323, 1024: 1356, 2048: 1323}, "sglang #3035"),
    ("H100", 12288, 4096, {1: 4.28}, "vllm #5514"),
    ("H100", 22016, 4096, {1: 4.51}, "vllm #5514"),
    ("H100", 4096, 11008, {1: 4.31}, "vllm #5514"),
    ("A100", 4096, 8192, {256: 242, 1024: 381, 2048: 460}, "sglang #2752"),
    ("A100", 8192, 21760, {1: 2.64, 1024: 489, 2048: 487}, "sglang #2752"),
]


@pytest.fixture(scope="module")
def table() -> list[str]:
    kernels = Kernels(compile_library(ROOT / "tests/csrc/gemm.cpp"))
    lines = []
    for gpu, n, k, rates, source in MEASURED:
        for m, measured in rates.items():
            index, _, split, clocks = kernels.choose(m, n, k, CHANNEL, *DEVICES[gpu])
            tile, predicted = kernels.tiles[index], 2 * m * n * k / clocks * CLOCKS[gpu] / 1e6
            name = f"{'wgmma' if tile.wgmma else 'mma'} {tile.tokens} x {tile.weights}"
            name += f", K in {split}" if split > 1 else ""
            tops = [
                f"{each:.0f}" if m > 16 else f"{each:.2f} ({each / 2 / m:.2f} TB/s)" for each in (measured, predicted)
            ]
            lines.append(
                f"| {gpu} | {n} | {k} | {m} | {' | '.join(tops)} | {predicted / measured:.2f} | {name} | {source} |"
            )
    return lines


def test_results_have_what_the_model_says(table):
    text = (ROOT / "docs/results.md").read_text()
    assert not [line for line in table if line not in text], "\n".join(table)


def test_the_model_is_no_daydream(table):
    """Nothing comes near the data sheet, of which mma.sync attains three quarters."""
    for gpu, _, _, _, _, predicted, *_ in (line[2:-2].split(" | ") for line in table):
        assert float(predicted.split()[0]) < PEAKS[gpu] * {"H100": 0.9, "A100": 0.76}[gpu]
