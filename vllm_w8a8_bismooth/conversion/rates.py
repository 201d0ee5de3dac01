"""How fast this machine is at what a conversion does, measured in a fraction of a second and without torch."""

import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_w8a8_bismooth.checkpoint.files import Folder
from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.measure.arithmetic import arithmetic, cpu_flags, has_instructions
from vllm_w8a8_bismooth.recipe import BF16, FP32

# What a conversion makes of the machine's rates, from conversions of blocks of LLaMA 3 8B's size on two cores with AMX.
_BYTES_PER_ELEMENT = 0.22  # stored bytes of weights converted while an element is rounded and compared
_SHARE = 0.85  # of the speed of products in fp32 that blocks reach
_FASTER = {"amx_bf16": 3.0}  # blocks in bf16 than blocks in fp32
_FASTER_OTHERWISE = 2.0  # nominal: an instruction takes two numbers at a time

_SECONDS = 0.05  # of one measurement
_SIDE, _BATCH = 64, 16  # of the matrices that are multiplied: so small that libraries use one thread, and no memory
_ROWS, _WIDTH = 64, 1024  # of the weights that are rounded
_PIECE, _PIECES = 2**22, 8  # bytes read at once to time a disk, and how often


@dataclass(frozen=True)
class Rates:
    """What a conversion on a CPU does in a second, all cores together.

    Attributes:
        rounding: bytes of weights, as they are stored, that are smoothed, rounded and written.
        reading: bytes read from the source's disk; infinite where that is not known.
        arithmetic: dtype in which calibration computes, as torch calls it.
        products: floating-point operations of blocks in that dtype.
        precise: the same in fp32.
    """

    rounding: float
    reading: float
    arithmetic: str
    products: float
    precise: float


def measured(source: Layout, compute_dtype: str | None = None, faster: float | None = None) -> Rates:
    """The rates of this machine for a checkpoint. The first call takes about a fifth of a second.

    Args:
        source: whose files are read where they are on this machine.
        compute_dtype: in which calibration computes; ``None`` is what it would be likely to choose.
        faster: how many times the speed of fp32 products of bf16 have, by :func:`arithmetic.faster`, which takes torch;
            ``None`` is a nominal factor for the processor's instructions.
    """
    headers, place = source.checkpoint.headers, source.checkpoint.place
    embedding = headers.get(source.names.embedding)  # which may be one of the problems
    computed = compute_dtype or arithmetic(embedding.dtype if embedding else "BF16", fast=has_instructions)
    cores = len(os.sched_getaffinity(0))
    products = _SHARE * _products() * cores
    if faster is None:
        faster = max((_FASTER[flag] for flag in _FASTER.keys() & cpu_flags()), default=_FASTER_OTHERWISE)
    largest = max(headers.values(), key=lambda header: header.offset + header.nbytes, default=None)
    return Rates(
        rounding=_BYTES_PER_ELEMENT * _elements() * cores,
        reading=_reading(place.path / largest.file) if largest and isinstance(place, Folder) else math.inf,
        arithmetic=computed,
        products=products * {FP32: 1.0, BF16: faster}[computed],
        precise=products,
    )


def _least(work: Callable[[], object]) -> float:
    """Seconds that some work takes, once it is warm; the least, because others may use the machine meanwhile."""
    work()
    times: list[float] = []
    while sum(times) < _SECONDS:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)


@functools.cache
def _products() -> float:
    """Floating-point operations of products of fp32 a second on one core.

    Threads that share a product wait for the slowest of them: on a busy machine that would time the others' work.
    """
    import numpy as np

    rows, weights, out = np.ones((3, _BATCH, _SIDE, _SIDE), np.float32)
    return 2 * _BATCH * _SIDE**3 / _least(lambda: np.matmul(rows, weights, out=out))


@functools.cache
def _elements() -> float:
    """Numbers that one core rounds and compares with what they were in a second."""
    import numpy as np

    weights = np.linspace(-1, 1, _ROWS * _WIDTH, dtype=np.float32).reshape(_ROWS, _WIDTH)
    rounded, codes = np.empty_like(weights), np.empty(weights.shape, np.int8)

    def work() -> None:
        scale = np.abs(weights, out=rounded).max(axis=1, keepdims=True) / np.float32(127)
        codes[:] = np.rint(np.divide(weights, scale, out=rounded), out=rounded)
        difference = np.subtract(np.multiply(rounded, scale, out=rounded), weights, out=rounded)
        np.multiply(difference, difference, out=rounded).sum(axis=0)

    return weights.size / _least(work)


@functools.cache
def _reading(path: Path) -> float:
    """Bytes a second from the end of a file, which are first dropped from memory, so that the disk is what is timed."""
    try:
        with open(path, "rb", buffering=0) as file:
            length = min(_PIECE * _PIECES, os.fstat(file.fileno()).st_size)
            if length < _PIECE:  # the time would be that of opening
                return math.inf
            start = os.fstat(file.fileno()).st_size - length
            os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)
            started, done = time.perf_counter(), 0
            while done < length and time.perf_counter() - started < 2 * _SECONDS:
                if not (piece := os.pread(file.fileno(), _PIECE, start + done)):
                    break
                done += len(piece)
            return done / max(time.perf_counter() - started, 1e-9)
    except OSError:  # whoever reads the tensors says what is wrong
        return math.inf
