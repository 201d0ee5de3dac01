"""Where an engine's time goes, from what torch's profiler says."""

import json

import torch

from benchmarks import shares, tables
from vllm_w8a8_bismooth import ops


def test_all_of_the_time_is_somebodys():
    """Also what an operation spends in others, and what a range spends around them."""
    x, weight, scale = torch.randn(64, 256), torch.randint(-127, 128, (512, 256), dtype=torch.int8), torch.ones(512, 1)

    def answer() -> float:
        with torch.profiler.record_function("cpp_fused_mean_rsqrt_3"):
            x.softmax(-1)
        ops.linear(x, weight, scale, None)
        ops.quantize_activations(x, None)
        with torch.profiler.record_function("head"):
            torch.nn.functional.linear(x, x)
        return 10.0

    found = shares.profiled(answer)
    assert found["parts"].keys() == {"norms", "linears", "quantization", "head", shares.REST}
    assert all(seconds > 0 for seconds in found["parts"].values())
    assert abs(sum(found["parts"].values()) - 10) < 1e-9 and found["parts"][shares.REST] > 9


def test_the_table_has_the_largest_part_first(tmp_path):
    row = {"model": "m", "level": "avx2", "arm": "ours", "load": "1 request", "seconds": 2.0, "profiled": 4.0}
    rows = [row | {"parts": {"norms": 1.0, "linears": 3.0}}, row | {"arm": "apart", "parts": {"linears": 4.0}}]
    (tmp_path / "shares.json").write_text(json.dumps({"rows": rows}))
    header, _, first, second = tables.shares(tmp_path / "shares.json").splitlines()
    assert header == "| model | level | arm | load | seconds | linears | norms |"
    assert first == "| m | avx2 | ours | 1 request | 2.00 | 75.0% | 25.0% |"
    assert second == "| m | avx2 | apart | 1 request | 2.00 | 100.0% | 0.0% |"
