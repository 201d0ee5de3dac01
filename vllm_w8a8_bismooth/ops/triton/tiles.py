"""Shapes of tiles for each family of devices, and which of them multiplies what: tables and one rule.

Nothing here was measured, because no device was at hand: the shapes follow what the families' matrix instructions
want, and every row compiles, without spilled registers where the compiler says so (``tests/ops/test_triton_code.py``).
No choice changes a number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


@dataclass(frozen=True)
class Tile:
    """What one program of a product computes.

    Attributes:
        tokens, weights: columns and rows of the tile.
        columns: of K in a step; fewer if a group is narrower.
        warps: that share the tile.
        stages: steps whose loads are under way.
    """

    tokens: int
    weights: int
    columns: int
    warps: int
    stages: int

    def fits(self, groups: int, lanes: int) -> bool:
        """Whether a warp of so many lanes has the registers: groups need a second accumulator."""
        return self.tokens * self.weights <= (64 if groups == 1 else 32) * self.warps * lanes

    def launch(self, k: int, groups: int, a_groups: int) -> dict[str, Any]:
        """Keyword arguments of a launch, for K columns in so many groups of weights and of activations."""
        shared, columns = k // groups, self.columns
        while groups > 1 and columns > 32 and shared % columns:
            columns //= 2
        return {
            "WIDTH": None if groups == 1 else shared,
            "A_GROUPED": a_groups > 1,
            "TILE_T": self.tokens,
            "TILE_W": self.weights,
            "TILE_K": columns,
            "WHOLE": shared % columns == 0,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,
        }


_LARGE = (
    Tile(16, 64, 128, 4, 6),
    Tile(16, 128, 128, 4, 5),
    Tile(32, 64, 128, 4, 5),
    Tile(32, 128, 128, 4, 5),
    Tile(64, 64, 128, 4, 5),
    Tile(64, 128, 128, 8, 5),
    Tile(128, 64, 128, 8, 4),
    Tile(128, 128, 128, 8, 4),
)
"""For instructions that take 64 weights at least, and much shared memory."""
TILES: Mapping[str, Sequence[Tile]] = {
    # NVIDIA Ampere, Ada and consumer Blackwell: mma.sync; 99 KiB of shared memory where there is least.
    "mma": (
        Tile(16, 64, 128, 4, 4),
        Tile(16, 128, 128, 4, 4),
        Tile(32, 64, 128, 4, 4),
        Tile(32, 128, 128, 4, 3),
        Tile(64, 64, 128, 4, 3),
        Tile(64, 128, 128, 8, 3),
        Tile(128, 64, 64, 8, 4),
        Tile(128, 128, 64, 8, 4),
    ),
    "wgmma": _LARGE,  # NVIDIA Hopper
    "tcgen05": _LARGE,  # NVIDIA Blackwell of data centres
    # AMD Instinct: MFMA; 64 lanes, and 64 KiB of shared memory
    "mfma": (
        Tile(16, 64, 128, 4, 2),
        Tile(32, 64, 128, 4, 2),
        Tile(64, 64, 128, 4, 2),
        Tile(64, 128, 128, 4, 2),
        Tile(128, 128, 64, 8, 2),
    ),
    # AMD Radeon from RDNA 3 on: WMMA; 64 KiB of shared memory
    "wmma": (
        Tile(16, 64, 64, 4, 2),
        Tile(32, 64, 64, 4, 2),
        Tile(64, 64, 64, 4, 2),
        Tile(64, 128, 64, 8, 2),
        Tile(128, 64, 64, 8, 2),
        Tile(128, 128, 64, 8, 2),
    ),
    # Intel XPU: DPAS; 16 lanes
    "dpas": (
        Tile(16, 64, 64, 4, 2),
        Tile(32, 64, 64, 4, 2),
        Tile(64, 64, 64, 8, 2),
        Tile(64, 128, 64, 16, 2),
        Tile(128, 64, 64, 16, 2),
        Tile(128, 128, 64, 32, 2),
    ),
}
"""Family -> its tiles. Every number of tokens has one that groups fit, see :meth:`Tile.fits`."""


@dataclass(frozen=True)
class Device:
    """What the choice asks of a device.

    Attributes:
        family: a key of :data:`TILES`.
        lanes: threads of a warp.
        processors: programs that run at once, one each.
    """

    family: str
    lanes: int
    processors: int


FAMILIES: Mapping[tuple[str, str], str] = {
    ("cuda", "8"): "mma",
    ("cuda", "9"): "wgmma",
    ("cuda", "100"): "tcgen05",
    ("cuda", "1"): "mma",  # 10.3 and above: Triton multiplies INT8 by mma.sync
    ("hip", "gfx908"): "mfma",
    ("hip", "gfx90a"): "mfma",
    ("hip", "gfx94"): "mfma",
    ("hip", "gfx95"): "mfma",
    ("hip", "gfx11"): "wmma",
    ("hip", "gfx12"): "wmma",
    ("xpu", ""): "dpas",
}
"""Triton's name of a backend and how the architecture begins (90: 9.0) -> key of :data:`TILES`; the first that fits."""


def family(backend: str, architecture: object) -> str | None:
    """The key of :data:`TILES` for one of Triton's targets; ``None`` if it has no INT8 product for that.

    Args:
        backend: ``cuda``, ``hip`` or ``xpu``.
        architecture: compute capability (90: 9.0), or AMD's name (``gfx942``); of an XPU anything.
    """
    name = str(architecture)
    found = (kind for (owner, start), kind in FAMILIES.items() if owner == backend and name.startswith(start))
    return next(found, None)


def unsupported(k: int) -> str:
    """Why the current device has no product over K columns, or ``""``."""
    target = driver.active.get_current_target()
    if family(target.backend, target.arch) is None:
        return f"Triton has no INT8 product for {_name(target)}"
    if k >= 1 << 17:
        return f"K = {k} is not below 131072, where int32 sums may overflow"
    return ""


def _name(target: GPUTarget) -> str:
    if target.backend != "cuda":
        return target.arch
    return f"compute capability {target.arch / 10}; 8.0 (Ampere) is the first"


@cache
def _device(index: int) -> Device:
    """The device of that number, which is the current one."""
    target = driver.active.get_current_target()
    found = family(target.backend, target.arch)
    assert found is not None  # see unsupported
    processors = driver.active.utils.get_device_properties(index)["multiprocessor_count"]
    return Device(found, target.warp_size, processors)


def current() -> Device:
    """The current device, which has products: see :func:`unsupported`."""
    return _device(driver.active.get_current_device())


def choose(m: int, n: int, groups: int) -> Tile:
    """The tile for M tokens and N weight rows on the current device.

    As many tokens as there are, if a tile is so large, whatever N and the groups; and as many weights as fit, and leave
    each processor a tile.
    """
    device = current()
    fitting = [tile for tile in TILES[device.family] if tile.fits(groups, device.lanes)]
    tokens = min((tile.tokens for tile in fitting if tile.tokens >= m), default=max(tile.tokens for tile in fitting))
    narrow, *wider = sorted((tile for tile in fitting if tile.tokens == tokens), key=lambda tile: tile.weights)
    for tile in reversed(wider):
        if -(-m // tokens) * -(-n // tile.weights) >= device.processors:
            return tile
    return narrow
