"""What this machine's processor does to others' INT8 products."""

import os
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_ANY = {"avx_vnni", "avx512_vnni"}
_PERMITTED: dict[str, set[str]] = {
    **dict.fromkeys(("SSE41", "AVX", "AVX2", "AVX512_CORE"), set()),
    **dict.fromkeys(("AVX2_VNNI", "AVX2_VNNI_2"), {"avx_vnni"}),
}
"""Value of oneDNN's variable -> the kinds of VNNI that it leaves; with others, any."""


def saturates() -> bool:
    """Whether oneDNN, which vLLM's own INT8 product on CPUs calls, sums pairs of products in 16 bits that saturate.

    It does where an x86 processor has no VNNI, or the environment keeps it from that (oneDNN issue 717, measured in
    docs/upstream/saturation.md). ``False`` where nothing says which instructions there are.
    """
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return bool(flags) and not _PERMITTED.get(limit.upper(), _ANY) & {*flags}
