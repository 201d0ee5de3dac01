"""Times of interleaved calls, on a CPU or, by replayed graphs, on a GPU."""

import os
import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[int], object]  # with the index of the copy of the data to use
Run = Callable[[int], float]  # with the number of the turn; returns the seconds of a call

_LEAST_TURNS = 5


def cache_bytes(device: str) -> int:
    """Size of the largest cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), 32 << 20)
    except (ValueError, OSError):
        return 32 << 20


def copies_against_caches(device: str, size: int) -> int:
    """How many copies of ``size`` bytes, used in turn, keep the caches from holding one until it is used again."""
    return -(-2 * cache_bytes(device) // size) + 1


def prepare(call: Call, copies: int, device: str, clock: Callable[[], float] = time.perf_counter) -> Run:
    """Make a call ready to be timed.

    Args:
        call: called with 0 to ``copies - 1`` in turn.
        copies: of the data.
        device: ``cpu``, or ``cuda``, where calls are captured into a graph.
        clock: seconds, on a CPU.
    """
    return _on_cpu(call, copies, clock) if device == "cpu" else _on_cuda(call, copies)


def times(runs: dict[str, Run], seconds: float) -> dict[str, list[float]]:
    """Time runs in turns, so that what the machine does beside falls on all of them alike.

    Args:
        runs: of :func:`prepare`, by name.
        seconds: to spend, about; every run has at least five turns.

    Returns:
        Microseconds of a call in each turn, by name.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    names, turn, end = list(runs), 0, time.perf_counter() + seconds
    while turn < _LEAST_TURNS or time.perf_counter() < end:
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(runs[name](turn) * 1e6)
        turn += 1
    return found


def median(call: Call, device: str, seconds: float) -> float:
    """Microseconds of one call alone."""
    return statistics.median(times({"": prepare(call, 1, device)}, seconds)[""])


def _on_cpu(call: Call, copies: int, clock: Callable[[], float]) -> Run:
    def run(turn: int) -> float:
        start = clock()
        call(turn % copies)
        return clock() - start

    run(0)
    return run


def _on_cuda(call: Call, copies: int) -> Run:
    """A graph of enough calls, over all copies, to take about two milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        call(0)
        start.record()
        for i in range(3):
            call(i % copies)
        end.record()
        end.synchronize()
        once = start.elapsed_time(end) / 3
        count = min(max(copies, round(2 / max(once, 1e-3)), 2), max(copies, 100))
        # Not torch.cuda.graph(), which collects garbage and empties the cache of memory each time.
        graph.capture_begin()
        try:
            for i in range(count):
                call(i % copies)
        finally:  # also after an error, or every later capture would fail
            graph.capture_end()

    def run(turn: int) -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count / 1e3

    run(0)
    return run
