"""Work on the rows of a stored weight, some at a time, on all cores."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from vllm_w8a8_bismooth.method.moments import Moments

_PIECE = 2**19  # elements worked on at once: a few of its fp32 copies fit a core's cache
_SLAB = 2**23  # elements that a thread takes at once; their codes are written at once


Item = TypeVar("Item")
Result = TypeVar("Result")


class Memory(threading.local):
    """What one thread works in, used again and again: faulting in fresh pages takes longer than the work on them."""

    def __init__(self) -> None:
        self._buffers: dict = {}

    def get(self, role: str, rows: int, like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An uninitialized ``[rows, K]`` on the device of ``like`` ``[N, K]``; it holds until the role is asked for."""
        size = rows * like.shape[1]
        buffer = self._buffers.get((role, like.device))
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(max(size, _PIECE), dtype=dtype, device=like.device)
            self._buffers[role, like.device] = buffer
        return buffer[:size].view(rows, like.shape[1])


class Threads:
    """Work on a weight's rows, some at a time, on all cores: torch's own threads would meet after each small step.

    Use as a context manager. A GPU is given its work by the calling thread alone, as is everything outside the context.
    """

    def __init__(self) -> None:
        self._memory = Memory()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Threads":
        cores = torch.get_num_threads()
        count = cores + 1  # some wait for the disk
        barrier = threading.Barrier(count)

        def begin() -> None:
            torch.get_num_threads()  # without a first look, a thread later takes over what everybody has
            torch.set_num_threads(1)
            barrier.wait()

        self._pool = ThreadPoolExecutor(count)
        for begun in [self._pool.submit(begin) for _ in range(count)]:
            begun.result()
        torch.set_num_threads(cores)  # part of what a thread sets is everybody's
        return self

    def __exit__(self, *exception) -> None:
        assert self._pool is not None
        self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Call ``work`` on each item; yields the results in order."""
        return map(work, items) if self._pool is None else self._pool.map(work, items)

    def alone(self, work: Callable[[], Result]) -> Result:
        """Call ``work`` in one of the threads, where torch shares nothing out: after each of many small steps its own
        threads would meet, which takes milliseconds where others use the machine."""
        return work() if self._pool is None else self._pool.submit(work).result()

    def over(
        self,
        weight: torch.Tensor,
        fold: "Fold",
        work: Callable[[int, int, Iterator[tuple[int, torch.Tensor]], Memory], Result],
        least: int = 1,
    ) -> Iterator[Result]:
        """Share the rows of a stored weight out, a slab a call; yields the results in order.

        ``work(first row, rows, pieces, memory)`` is given the slab's folded rows in pieces, each with its first row
        within the slab; a piece holds until the next one. Row by row that is the folding of the whole at once. A piece
        has ``least`` rows or more, if there are so many.
        """
        step, slab = (max(least, size // max(1, weight.shape[1])) for size in (_PIECE, _SLAB))
        slab -= slab % step

        def pieces(start: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
            for first in range(start, end, step):
                stored = weight[first : min(first + step, end)]
                piece = self._memory.get("piece", len(stored), weight).copy_(stored)
                if fold.rows is not None:
                    piece /= fold.rows[first : first + len(stored)].unsqueeze(1)
                if fold.columns is not None:
                    piece *= fold.columns
                yield first - start, piece

        def one(start: int) -> Result:
            end = min(start + slab, len(weight))
            return work(start, end - start, pieces(start, end), self._memory)

        starts = range(0, len(weight), slab)
        return map(one, starts) if weight.is_cuda else self.map(one, starts)


ALONE = Threads()
"""The calling thread."""


@dataclass(frozen=True)
class Fold:
    """What smoothing does to one ``[N, K]`` weight: ``W[n, k] / rows[n] * columns[k]``, each fp32 or absent."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def __bool__(self) -> bool:
        """Whether it does anything."""
        return self.rows is not None or self.columns is not None

    def __mul__(self, other: "Fold") -> "Fold":
        """Both, one after the other."""
        rows, columns = (
            mine if its is None else its if mine is None else mine * its
            for mine, its in ((self.rows, other.rows), (self.columns, other.columns))
        )
        return Fold(rows, columns)

    def apply(self, weight: torch.Tensor, threads: Threads = ALONE) -> torch.Tensor:
        """The whole folded weight, in its own dtype."""
        folded = torch.empty_like(weight)

        def work(start: int, rows: int, pieces: Iterator[tuple[int, torch.Tensor]], memory: Memory) -> None:
            for first, piece in pieces:
                folded[start + first : start + first + len(piece)] = piece

        for _ in threads.over(weight, self, work):
            pass
        return folded

    def column_extent(self, weight: torch.Tensor, threads: Threads = ALONE) -> torch.Tensor:
        """fp32 ``[K]``: largest magnitude of each column of the folded weight."""

        def work(start: int, rows: int, pieces: Iterator[tuple[int, torch.Tensor]], memory: Memory) -> torch.Tensor:
            return torch.stack([piece.abs_().amax(dim=0) for _, piece in pieces]).amax(dim=0)

        return torch.stack(list(threads.over(weight, self, work))).amax(dim=0)

    def moments(self, weight: torch.Tensor, basis: torch.Tensor, threads: Threads = ALONE) -> Moments:
        """Column moments of the folded weight; each row is scaled by its RMS after column k is multiplied by basis[k].

        ``basis`` is fp32 ``[K]``.
        """
        scaled = Fold(self.rows, basis if self.columns is None else self.columns * basis)

        def work(start: int, rows: int, pieces: Iterator[tuple[int, torch.Tensor]], memory: Memory) -> Moments:
            found = Moments.none(weight.shape[1], weight.device)
            for _, piece in pieces:
                found.add(piece)
            return found

        total = Moments.none(weight.shape[1], weight.device)
        for part in threads.over(weight, scaled, work):  # in order, so that the sums are the same every time
            total.merge(part)
        return total.scaled(1 / basis)

    def row_norms(self, weight: torch.Tensor, threads: Threads = ALONE) -> torch.Tensor:
        """fp32 ``[N]``: Euclidean norm of each row of the folded weight, the size of what it makes of unit noise."""
        found = torch.empty(len(weight), device=weight.device)

        def work(start: int, rows: int, pieces: Iterator[tuple[int, torch.Tensor]], memory: Memory) -> None:
            for first, piece in pieces:
                found[start + first : start + first + len(piece)] = piece.square_().sum(dim=1).sqrt_()

        for _ in threads.over(weight, self, work):
            pass
        return found
