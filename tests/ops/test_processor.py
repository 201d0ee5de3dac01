"""Where others' INT8 products are wrong, and that they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import saturation
from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.ops import processor

REPORT = Path(__file__).parents[2] / "docs/upstream/saturation.md"
OLD, NEW = "flags\t\t: fpu sse4_1 avx avx2 avx512f", "flags\t\t: fpu avx2 avx512f avx512_vnni"


@pytest.mark.parametrize(
    ("cpuinfo", "variables", "expected"),
    [
        (OLD, {}, True),
        (NEW, {}, False),
        ("flags\t\t: fpu avx2 avx_vnni", {}, False),
        (NEW, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, True),
        (NEW, {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, True),
        (NEW, {"DNNL_MAX_CPU_ISA": "AVX2"}, True),
        (NEW, {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, True),  # its VNNI is the other
        (f"{NEW} avx_vnni", {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, False),
        (NEW, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, False),
        ("Features\t: fp asimd asimddp", {}, False),  # Arm
        (None, {}, False),
    ],
)
def test_where_sums_saturate(monkeypatch, tmp_path, cpuinfo, variables, expected):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "cpuinfo"
    if cpuinfo:
        file.write_text(f"processor\t: 0\n{cpuinfo}\n")
    monkeypatch.setattr(processor, "CPUINFO", file)
    assert processor.saturates() == expected


@pytest.mark.slow
@pytest.mark.skipif(not ops.has_kernel("cpu"), reason="the CPU kernels are not built (see setup.py)")
@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE_VNNI"])
def test_vllms_product_is_wrong_without_vnni_and_ours_is_not(limit):
    """As docs/upstream/saturation.md says: when this fails, vLLM has mended it, and README and doctor say too much."""
    rows = saturation.measure(limit, 64, 1024, 0)
    if isinstance(rows, str):
        pytest.skip(rows)
    assert len(rows) == 12 and {row["ours wrong"] for row in rows} == {0.0}
    uniform = [row["stock error"] for row in rows if row["crest"] == 1.73]
    assert min(uniform) > 0.1 if limit == "AVX2" else {row["stock wrong"] for row in rows} == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE_VNNI"])
def test_the_script_of_the_report(vllms_library, tmp_path, limit):
    """Prints what it says there, of this processor with or without VNNI."""
    if limit != "AVX2" and processor.saturates():
        pytest.skip("this processor has no VNNI")
    (script,) = re.findall(r"^```python\n(.*?)^```", REPORT.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "saturation.py").write_text(script)
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": limit}
    command = [sys.executable, tmp_path / "saturation.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    error = float(done.stdout.split()[-1])
    assert 0.18 < error < 0.19 if limit == "AVX2" else error == 0, done.stderr
