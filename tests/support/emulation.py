"""The CUDA GEMM kernels compiled with g++ on the emulated GPU of ``tests/csrc/emulate``, called through ctypes."""

import ctypes
import pathlib
from dataclasses import dataclass

import torch

from tests.support.compiler import build

ROOT = pathlib.Path(__file__).parents[2]
EMULATION = ROOT / "tests/csrc"  # the include path of ``emulate/``
CHANNEL, GROUP_128, GROUP_ANY = range(3)
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++17", "-O2", *WARNINGS, "-ffp-contract=off", "-march=native", "-fPIC", "-shared"]


def compile_library(source: pathlib.Path, *flags: str, include: pathlib.Path = ROOT / "csrc/cuda") -> ctypes.CDLL:
    """``source``, against the kernels in ``include``, as a shared library."""
    return ctypes.CDLL(str(build([*FLAGS, *flags], [source], [include, EMULATION])))


def _fields(kind, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Arguments(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int32, "tile a_groups m n k groups grid whole split bias_type d_type"),
        *_fields(ctypes.c_int64, "a_scale_row a_scale_group b_scale_row b_scale_group"),
        *_fields(ctypes.c_void_p, "a b a_scale b_scale bias d"),
        ("seed", ctypes.c_uint64),
    ]


DEVICES = {  # capability, multiprocessors, shared memory of a CTA, nine tenths of the bytes of memory a clock
    "A100": (80, 108, 166912, 1301),
    "A10": (86, 72, 101376, 319),
    "3090": (86, 82, 101376, 497),
    "L4": (89, 58, 101376, 132),
    "L40S": (89, 142, 101376, 309),
    "4090": (89, 128, 101376, 360),
    "H100": (90, 132, 232448, 1523),
    "H200": (90, 132, 232448, 2182),
    "B200": (100, 148, 232448, 3664),
    "5090": (120, 170, 101376, 670),
}


@dataclass
class Tile:
    index: int
    wgmma: bool
    tokens: int
    weights: int
    cluster: int
    granularities: int
    block: int
    threads: int
    shared: tuple[int, int, int]
    ring: tuple[int, int, int]
    splits: tuple[int, int, int]

    def __str__(self):
        return f"{'wgmma' if self.wgmma else 'mma'}-{self.tokens}x{self.weights}"


class Kernels:
    """A compiled library of kernels."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.run_gemm.restype = ctypes.c_char_p
        library.choose.restype = ctypes.c_double
        library.take_tickets.restype = ctypes.c_int64
        self.tiles = [self._tile(i) for i in range(library.tile_count())]

    def _tile(self, index: int) -> Tile:
        out = (ctypes.c_int * 16)()
        self.library.tile_at(index, out)
        return Tile(index, bool(out[0]), *out[1:7], tuple(out[7:10]), tuple(out[10:13]), tuple(out[13:16]))

    def gemm(self, tile, a, b, a_scale, b_scale, dtype, bias=None, *, whole=None, split=1, grid=0, seed=0):
        """``scaled_mm`` by one kernel, with the first ``whole`` tiles not split.

        Raises RuntimeError on a deadlock or a misuse of the machine. A seed other than 0 shuffles threads, and an odd
        one loads weights before it waits for the previous kernel.
        """
        (m, k), (n, groups) = a.shape, b_scale.shape
        if whole is None:
            whole = 0 if split > 1 else 1 << 30
        whole = min(whole, self.units(m, n, k, tile, 1 << 20, 1)[0])
        d = torch.full((m, n), float("nan"), dtype=dtype)
        arguments = _Arguments(
            *[tile, int(a_scale.shape[1] > 1), m, n, k, groups, grid, whole, split],
            *[FLOATS[bias.dtype] if bias is not None else 0, FLOATS[dtype], *a_scale.stride(), *b_scale.stride()],
            *[a.data_ptr(), b.data_ptr(), a_scale.data_ptr(), b_scale.data_ptr()],
            *[bias.data_ptr() if bias is not None else None, d.data_ptr(), seed],
        )
        error = self.library.run_gemm(ctypes.byref(arguments)).decode()
        if error:
            raise RuntimeError(error)
        return d

    def units(self, m, n, k, tile, whole, split):
        """Number of tiles and the rows (token tile, weight tile, first block, end, split tile, part) of a schedule."""
        token_tiles = -(-m // self.tiles[tile].tokens)
        weight_tiles = -(-n // (self.tiles[tile].weights * self.tiles[tile].cluster))
        tiles = token_tiles * weight_tiles
        whole = min(whole, tiles)
        count = self.library.units(m, n, k, tile, whole, split, None)
        out = (ctypes.c_int * (6 * count))()
        self.library.units(m, n, k, tile, whole, split, out)
        return tiles, [tuple(out[i * 6 : i * 6 + 6]) for i in range(count)]

    def device(self, capability, code, sms, shared):
        """What :meth:`choose` takes of a device whose kernels were compiled for the architecture ``code``."""
        out = (ctypes.c_int * 3)()
        self.library.device(capability, code, sms, shared, out)
        return tuple(out)

    def choose(self, m, n, k, granularity, capability=90, sms=132, shared=232448, memory=0, left_out=(), splits=True):
        """(tile, number of whole tiles, split, predicted clocks); the tile is none of those that are left out.

        ``memory`` is the device's, in bytes a clock; 0 if that is not known.
        """
        out = (ctypes.c_int * 3)()
        mask = sum(1 << tile for tile in set(left_out))
        clocks = self.library.choose(m, n, k, granularity, capability, sms, shared, memory, mask, splits, out)
        return *out, clocks


def problem(m, n, k, groups=1, a_groups=False, bias=None, seed=0):
    """Random int8 operands, scales ``[M, 1 or G]`` and ``[N, G]``, and a bias of the dtype given."""
    random = torch.Generator().manual_seed(seed)
    a = torch.randint(-128, 128, (m, k), generator=random, dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), generator=random, dtype=torch.int8)
    a_scale = torch.rand(m, groups if a_groups else 1, generator=random) * 0.02 + 0.001
    b_scale = torch.rand(n, groups, generator=random) * 0.02 + 0.001
    offset = torch.randn(n, generator=random).to(bias) if bias else None
    return a, b, a_scale, b_scale, offset
