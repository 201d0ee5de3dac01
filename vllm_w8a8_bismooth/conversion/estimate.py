"""What a conversion needs, estimated from headers and from how fast the machine is."""

import math
from dataclasses import dataclass

from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.checkpoint.readahead import AHEAD
from vllm_w8a8_bismooth.conversion.rates import Rates
from vllm_w8a8_bismooth.recipe import BF16, FP32


@dataclass(frozen=True)
class Needs:
    """What a conversion needs: peak memory and disk in bytes, and seconds, from measured rates: a guess.

    ``disk_bytes`` is the largest that the destination becomes: the result, and states from which a run can go on.
    """

    source_bytes: int
    written_bytes: int
    memory_bytes: int
    disk_bytes: int
    seconds: float


_BASE_MEMORY = 6e8
SCALE_BYTES = 4
TOGETHER, WIDEST = 256, 4096  # as in quantize.py and compensate.py, which import torch
_STEP = 2e-5  # seconds of a column of TOGETHER rows beside its products, two cores at work
_CARRIED = 0.25  # of a byte's time if activations are only carried through it; measured on blocks of LLaMA 3 8B's size


def needs(
    source: Layout,
    calibration_tokens: int | None,
    rates: Rates,
    measured_tokens: int = 0,
    blocks: range | None = None,
    carried: range = range(0),
    compensated: bool = False,
) -> Needs:
    """An estimate for a per-channel conversion on a CPU.

    Args:
        source: the checkpoint.
        calibration_tokens: ``None`` is data-free.
        rates: of the machine.
        measured_tokens: that pass through each block in fp32, to measure what quantization does there.
        blocks: to convert; ``None`` is all.
        carried: blocks through which activations are only carried.
        compensated: whether weights are rounded with :mod:`method.compensate`, after calibration.
    """
    blocks = range(len(source.layers)) if blocks is None else blocks
    headers, item = source.checkpoint.headers, {BF16: 2, FP32: 4}[rates.arithmetic]
    written, work = sum(headers[name].nbytes for name in source.outside_with(blocks)), 0.0
    for index in (*carried, *blocks):
        layer, converted = source.layers[index], index in blocks
        for name in source.blocks[index]:
            header, linear = headers[source.names.block(index) + name], layer.linear_of(name)
            if linear is None:
                written += header.nbytes * converted
            else:
                elements = math.prod(header.shape)
                work += source.work(index, linear)
                written += (elements + math.prod(header.shape[:1]) * SCALE_BYTES) * converted
    memory, state = _BASE_MEMORY + source.block_nbytes() + AHEAD, 0
    passed = source.nbytes(carried) if carried else 0
    seconds = (source.nbytes(blocks) + _CARRIED * passed) / rates.rounding
    read = source.stored_nbytes(blocks) + (source.stored_nbytes(carried) if carried else 0)
    if calibration_tokens is not None:
        state = item * calibration_tokens * source.sizes["hidden"]
        memory += state + item * 3 * 1024 * source.sizes["intermediate"]
        memory += item * _copied(source, {BF16: "BF16", FP32: "F32"}[rates.arithmetic])
        seconds += 2 * work * calibration_tokens / rates.products
    if compensated and calibration_tokens is not None:
        seconds += sum(_compensation(source, index, calibration_tokens, rates) for index in blocks)
        seconds += 2 * work * calibration_tokens / rates.products if measured_tokens else 0  # activations once more
        memory += _compensation_nbytes(source)
    if measured_tokens:
        memory += 2 * source.block_nbytes()
        read += 2 * source.stored_nbytes()  # forwards, and backwards
        seconds += 2 * source.nbytes() / rates.rounding + 2 * work * measured_tokens / rates.precise
    disk = written + source.checkpoint.companion_nbytes() + 2 * state
    # The source is read while blocks are worked on.
    return Needs(source.stored_nbytes(blocks), written, int(memory), disk, max(seconds, read / rates.reading))


def _inputs(source: Layout, index: int) -> list[tuple[int, int]]:
    """Of each site of a block: how many channels K its linears read, and how many rows these have."""
    layer = source.layers[index]
    found = []
    for site in layer.sites:
        shapes = [layer.linears[consumer] for consumer in site.consumers if consumer in layer.linears]
        found.append((shapes[0][1], sum(rows for rows, _ in shapes)))
    return found


def _compensation(source: Layout, index: int, tokens: int, rates: Rates) -> float:
    """Seconds that error-compensating rounding adds to a block."""
    products, steps = 0.0, 0
    for columns, rows in _inputs(source, index):
        width = columns / math.ceil(columns / WIDEST)
        products += columns * (2 * tokens * width + 4 / 3 * width**2 + rows * width)
        steps += columns * math.ceil(rows / TOGETHER)
    return products / rates.precise + steps * _STEP


def _compensation_nbytes(source: Layout) -> int:
    """Memory that it takes in the largest block: of each site what its inputs have in common, and twice that of one."""
    sizes = (
        [4 * columns * math.ceil(columns / math.ceil(columns / WIDEST)) for columns, _ in _inputs(source, index)]
        for index in range(len(source.layers))
    )
    return max((sum(block) + 2 * max(block) for block in sizes if block), default=0)


def _copied(source: Layout, dtype: str) -> int:
    """How many numbers of a block are copied to be run, because they are stored in another dtype; of the largest."""
    headers = source.checkpoint.headers
    blocks = ([headers[source.names.block(i) + name] for name in inside] for i, inside in enumerate(source.blocks))
    return max(sum(math.prod(header.shape) for header in block if header.dtype != dtype) for block in blocks)
