"""Our operations compiled by Triton for devices that are not here, through the launches of the package itself.

Nothing is loaded or run: a driver says which device there would be, and every launch ends when its code is there. What
was compiled is kept in ``build/triton`` for the next run of the same sources.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parents[3]
os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build/triton")

import triton  # noqa: E402  which reads the variable
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from vllm_w8a8_bismooth.ops.triton import experts, product, quantization, tiles  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
    "sm_75": ("cuda", 75, 32),
    "gfx1030": ("hip", "gfx1030", 32),
}


class Driver:
    """Of a device that is only known by its target."""

    utils = SimpleNamespace(get_device_properties=lambda index: {"multiprocessor_count": 132})

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> object:
        return self.target.arch

    def get_current_stream(self, device: object) -> int:
        return 0


@dataclass
class Code:
    """What was compiled of a kernel.

    Attributes:
        kernel: its name, with what it was compiled for in words.
        listing: PTX, or AMD's assembly.
        machine: SASS of `scaled_mm`, which experts share a tile with, or AMD's assembly once more.
        memory: bytes of local memory, stack or scratch a thread, and registers spilled: all that should be 0.
        shared: bytes of shared memory.
    """

    kernel: str
    listing: str
    machine: str
    memory: list[int]
    shared: int


_compiled: list = []
_run = JITFunction.run


def _only_compile(self: JITFunction, *arguments, grid, warmup, **options):
    kernel = _run(self, *arguments, grid=grid, warmup=True, **options)
    _compiled.append(kernel)
    return kernel


JITFunction.run = _only_compile


def _read(kernel, words: str) -> Code:
    if "amdgcn" in kernel.asm:
        listing = machine = kernel.asm["amdgcn"]
        found = re.findall(r"(?:ScratchSize|[sv]gpr_spill_count|private_segment_fixed_size): +(\d+)", listing)
    else:
        listing = kernel.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            machine = _dump("-sass", file.name) if kernel.metadata.name == "_product" else ""  # it takes long
            found = re.findall(r"(?:STACK|LOCAL):(\d+)", _dump("-res-usage", file.name))
    name = f"{kernel.metadata.name} {words}"
    return Code(name, listing, machine, [int(number) for number in found], kernel.metadata.shared)


def _dump(*arguments: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", *arguments], capture_output=True, text=True, check=True).stdout


def _aim(target: str) -> None:
    driver.set_active(Driver(GPUTarget(*TARGETS[target])))


def family(target: str) -> str | None:
    return tiles.family(*TARGETS[target][:2])


def table() -> dict[str, int]:
    """Targets with products -> how many tiles they have."""
    return {target: len(tiles.TILES[name]) for target in TARGETS if (name := family(target))}


LANES = {"mma": 32, "wgmma": 32, "tcgen05": 32, "mfma": 64, "wmma": 32, "dpas": 16}


def tokens() -> dict[str, list[set[int]]]:
    """Family -> the sizes of its tiles, in tokens, per-channel and with groups."""
    return {
        name: [{tile.tokens for tile in table if tile.fits(groups, LANES[name])} for groups in (1, 2)]
        for name, table in tiles.TILES.items()
    }


def choices(target: str, cases: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Tokens and weights of the tile for M, N and a number of groups."""
    _aim(target)
    return [(tile.tokens, tile.weights) for tile in (tiles.choose(*case) for case in cases)]


def unsupported(target: str) -> str:
    _aim(target)
    return tiles.unsupported(4096)


def products(target: str, first: int, last: int) -> list[Code]:
    """``scaled_mm`` and the products of experts, by the tiles ``first`` to ``last - 1`` of the target's table."""
    _aim(target)
    choose, found = tiles.choose, []
    for tile in tiles.TILES[family(target)][first:last]:
        tiles.choose = lambda *_, tile=tile: tile
        for groups, a_groups in ((1, 1), (32, 32), (32, 1)):
            if not tile.fits(groups, TARGETS[target][2]):
                continue
            _compiled.clear()
            a, b = (torch.empty(rows, 4096, dtype=torch.int8) for rows in (300, 512))
            scales = torch.empty(300, a_groups), torch.empty(groups, 512).t()
            product.scaled_mm(a, b, *scales, torch.bfloat16, torch.empty(512, dtype=torch.bfloat16))
            if a_groups == groups:
                # The first half of ops.experts; the second takes the same kernel.
                pairs = experts.Sorted.of(torch.zeros(8, 2, dtype=torch.int32), 4, tile.tokens)
                stacked = torch.empty(4, 512, 4096, dtype=torch.int8), torch.empty(4, groups, 512).transpose(1, 2)
                experts._multiply(a, scales[0], pairs.readers, *stacked, pairs, 16, torch.bfloat16)
            words = f"{tile}, {groups} and {a_groups} groups"
            found += [_read(kernel, words) for kernel in _compiled]
    tiles.choose = choose
    return found


def sort_without_values() -> list[tuple[int, ...]]:
    """The shapes of experts' list of places, made of a tensor that has no values: asking for one would fail."""
    pairs = experts.Sorted.of(torch.empty(7, 2, dtype=torch.int32, device="meta"), 4, 16)
    return [tuple(getattr(pairs, name).shape) for name in ("readers", "places", "starts", "owners", "before")]


def quantizations(target: str) -> list[Code]:
    """All three, of rows as models have them, and the sum over experts."""
    return list(_quantizations(target))


def _quantizations(target: str) -> Iterator[Code]:
    _aim(target)
    for channels, group, dtype in (
        (4096, None, torch.bfloat16),
        (14336, 128, torch.float16),
        (28672, None, torch.float32),
    ):
        _compiled.clear()
        x, wide, gain = (torch.empty(3, n, dtype=dtype) for n in (channels, 2 * channels, channels))
        quantization.quantize_activations(x, group)
        quantization.silu_mul_quantize(wide, group)
        quantization.rms_norm_quantize(x, gain, gain[0], 1e-6, group)
        yield from (_read(kernel, f"{channels} channels, groups of {group}, {dtype}") for kernel in _compiled)
