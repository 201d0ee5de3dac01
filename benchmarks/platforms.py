"""Who serves which layers on which platform, and what shows that it works: tables of docs/serving.md, from the rules.

They are put there by :mod:`benchmarks.tables`.
"""

from collections.abc import Iterator

from vllm_w8a8_bismooth.ops import COMPILED, REFERENCE, TRITON
from vllm_w8a8_bismooth.ops.gate import Ruling
from vllm_w8a8_bismooth.serving import servers
from vllm_w8a8_bismooth.serving.servers import Platform

NO_PRODUCT = "Triton has no INT8 product for it"
FAILED, OFF = Ruling("auto", "the self-test did not pass"), Ruling("off", "BISMOOTH_KERNELS=off")
PLATFORMS = {
    "x86 CPU": ("cpu", Platform("cpu", COMPILED, COMPILED, REFERENCE)),
    "x86 CPU, off": ("cpu", Platform("cpu", REFERENCE, REFERENCE, REFERENCE, ruling=OFF)),
    "CPU, nothing compiled": ("cpu", Platform("cpu", REFERENCE, REFERENCE, REFERENCE)),
    "NVIDIA 8.0 to 9.0, self-test passed": ("nvidia", Platform("cuda", COMPILED, COMPILED, TRITON, 90, planned=True)),
    "NVIDIA 8.0 to 9.0, passed, BISMOOTH_PLAN=off": ("nvidia", Platform("cuda", COMPILED, COMPILED, TRITON, 90)),
    "NVIDIA 8.0 to 9.0, not passed": ("nvidia", Platform("cuda", TRITON, TRITON, TRITON, 90, ruling=FAILED)),
    "NVIDIA 8.0 to 9.0, off": ("nvidia", Platform("cuda", TRITON, TRITON, TRITON, 90, ruling=OFF)),
    "NVIDIA 8.0 to 9.0, nothing compiled": ("nvidia", Platform("cuda", TRITON, TRITON, TRITON, 90)),
    "NVIDIA 10.0 and above, self-test passed": (
        "nvidia",
        Platform("cuda", COMPILED, COMPILED, TRITON, 120, planned=True),
    ),
    "NVIDIA 10.0 and above, not passed, or off": ("nvidia", Platform("cuda", TRITON, TRITON, TRITON, 120, ruling=OFF)),
    "NVIDIA 10.0 and above, nothing compiled": ("nvidia", Platform("cuda", TRITON, TRITON, TRITON, 120)),
    "NVIDIA 7.5": ("nvidia", Platform("cuda", TRITON, TRITON, TRITON, 75, NO_PRODUCT)),
    "AMD Instinct from MI100, Radeon from RDNA 3 (ROCm)": ("amd", Platform("cuda", TRITON, TRITON, TRITON)),
    "other AMD (ROCm)": ("amd", Platform("cuda", TRITON, TRITON, TRITON, unsupported=NO_PRODUCT)),
    "Intel XPU": ("intel", Platform("xpu", TRITON, TRITON, TRITON)),
    "any GPU, nothing compiled, no Triton": ("nvidia", Platform("cuda", REFERENCE, REFERENCE, REFERENCE, 90)),
}
"""In words -> who makes it, and what the rules know of it."""

MAKERS = {"cpu": "a CPU", "nvidia": "NVIDIA", "amd": "AMD", "intel": "Intel XPU"}
_INTERPRETED, _SELECTED = "bit for bit in Triton's interpreter", "vLLM selects it on a pretended GPU"
PROVEN = {
    ("cpu", "our kernel"): "all tests, bit for bit at each level; vLLM engines",
    (
        "nvidia",
        "our kernel",
    ): "bit for bit in an emulation of PTX, machine code read; its self-test, on that; **never run**",
    ("nvidia", "our Triton kernel"): f"{_INTERPRETED}; compiles for 8.0, 9.0, 10.0, 12.0, **never run**",
    ("amd", "our Triton kernel"): f"{_INTERPRETED}; compiles for gfx942, gfx1100; {_SELECTED}; **never run**",
    ("intel", "our Triton kernel"): f"{_INTERPRETED}; {_SELECTED}; never compiled, **never run**",
}
"""Maker and kernel -> what shows that it works."""
BY_ITSELF = {
    servers.STOCK: "by vLLM; no test here",
    servers.STOCK_EXPERTS: "by vLLM; tests of the check that every scale arrived",
    servers.REFUSED: "tests of the message",
    "the torch reference": "it defines the numbers; on a GPU a warning says that it serves",
}
"""Kernel -> what shows that it works, whoever makes the platform."""


def layers() -> Iterator[tuple[str, ...]]:
    """Platform, and who serves each kind of layer there."""
    for words, (_, platform) in PLATFORMS.items():
        yield words, *(rule(platform).kernel for rule in servers.KINDS.values())


def proofs() -> Iterator[tuple[str, str]]:
    """Who serves anything, with the maker of the platform where it matters, and what shows that it works."""
    serving = dict.fromkeys(
        (maker, kernel)
        for maker, platform in PLATFORMS.values()
        for rule in servers.KINDS.values()
        for kernel in rule(platform).kernel.split(servers.OR)
    )
    for maker, kernel in serving:
        if kernel not in BY_ITSELF:
            yield f"{kernel} on {MAKERS[maker]}", PROVEN[maker, kernel]
    yield from BY_ITSELF.items()
