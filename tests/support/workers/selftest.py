"""The self-test's own process, but on the emulated GPU of ``tests/csrc``, some of whose kernels are broken.

``python selftest.py '{"tiles": [9, 10], "broken": {"0": {"per-channel tile 9": "wrong"}}}'``: the numbers of the tiles
that the GPU has, and for each GPU which kernels break, and how, see :data:`WAYS`. ``start`` breaks before all else.
"""

import json
import os
import signal
import sys
import time

import torch

from tests.support.emulation import ROOT, Kernels, compile_library
from vllm_w8a8_bismooth.ops import kernels, reference
from vllm_w8a8_bismooth.ops.selftest import cases, machine, process


def fail(message: str) -> None:
    raise RuntimeError(message)


WAYS = {
    "wrong": lambda: None,  # see Emulated.product
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": lambda: time.sleep(1000),
    "exit": lambda: os._exit(7),
    "raise": lambda: fail("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ..."),
    "memory": lambda: fail("CUDA out of memory. Tried to allocate 20.00 MiB"),
}


class Emulated:
    """See :class:`cases.Machine`."""

    operations = machine.QUANTIZATIONS
    processors = 2

    def __init__(self, chosen: list[int], broken: dict[str, str]):
        self.emulation = Kernels(compile_library(ROOT / "tests/csrc/gemm.cpp"))
        self.broken = broken
        self.break_by("start")
        self.tiles = [
            cases.Tile(tile.index, granularity, tile.tokens, width, tile.ring[number], bool(tile.splits[number]))
            for tile in self.emulation.tiles
            for width in (tile.weights * tile.cluster,)
            for number, granularity in enumerate(kernels.GRANULARITIES)
            if tile.index in chosen and tile.granularities >> number & 1
        ]

    def break_by(self, name: str) -> bool:
        """Whether what the kernel of that name gives is to be wrong, if this returns at all."""
        way = self.broken.get(name)
        if way:
            WAYS[way]()
        return way == "wrong"

    def product(self, tile, split, *operands):
        wrong = self.break_by(tile.name)
        out = self.emulation.gemm(tile.index, *operands, split=split, grid=self.processors)
        out[-1, -1] += wrong
        return out

    def quantize(self, operation, *arguments):
        wrong = self.break_by(operation)
        codes, scale = getattr(reference, operation)(*arguments)
        return [codes + wrong, scale, *cases.residual(operation, arguments)]

    def together(self):
        def of(name):
            return lambda: "wrong" if self.break_by(name) else ""

        return {name: of(name) for name in (machine.SPLITS, machine.OVERLAP)}

    def restrict(self, faults):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    process.main(lambda index: Emulated(asked["tiles"], asked["broken"].get(str(index), {})))
