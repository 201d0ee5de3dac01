"""What a conversion needs, estimated from headers alone."""

import math
import os
from dataclasses import dataclass

from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.checkpoint.readahead import AHEAD


@dataclass(frozen=True)
class Needs:
    """What a conversion needs: peak memory and disk in bytes, and seconds, a rough guess from nominal rates.

    ``disk_bytes`` is the largest that the destination becomes: the result, and states from which a run can go on.
    """

    source_bytes: int
    written_bytes: int
    memory_bytes: int
    disk_bytes: int
    seconds: float


# As benchmarks/results/avx512_vnni-amd-epyc-2-cores/convert.json has them: they separate minutes from hours, no more.
_BYTES_PER_CORE_SECOND = 1.8e8
_FLOP_PER_CORE_SECOND = 2.8e11
_BASE_MEMORY = 6e8
_ROW_BYTES = 4  # of scales
_CARRIED = 0.25  # of a byte's time if activations are only carried through it; measured on blocks of LLaMA 3 8B's size


def needs(
    source: Layout,
    calibration_tokens: int | None,
    measured_tokens: int = 0,
    cores: int | None = None,
    blocks: range | None = None,
    carried: range = range(0),
) -> Needs:
    """An estimate from headers alone, for a per-channel conversion on a CPU.

    Args:
        source: the checkpoint.
        calibration_tokens: ``None`` is data-free.
        measured_tokens: that pass through each block in fp32, to measure what quantization does there.
        cores: of the CPU; ``None`` is those that this process may use.
        blocks: to convert; ``None`` is all.
        carried: blocks through which activations are only carried.
    """
    blocks = range(len(source.layers)) if blocks is None else blocks
    cores = cores or len(os.sched_getaffinity(0))
    headers, item = source.checkpoint.headers, {"BF16": 2, "F16": 2, "F32": 4}
    chosen = source.checkpoint.config.get("num_experts_per_tok")
    share = min(1, chosen / source.sizes["experts"]) if type(chosen) is int and "experts" in source.sizes else 1
    written, work = sum(headers[name].nbytes for name in source.outside_with(blocks)), 0.0
    for index in (*carried, *blocks):
        layer, converted = source.layers[index], index in blocks
        for name in source.blocks[index]:
            header, linear = headers[source.names.block(index) + name], layer.linear_of(name)
            if linear is None:
                written += header.nbytes * converted
            else:
                elements = math.prod(header.shape)
                work += elements * (share if linear in layer.experts else 1)
                written += (elements + math.prod(header.shape[:1]) * _ROW_BYTES) * converted
    memory, state = _BASE_MEMORY + source.block_nbytes() + AHEAD, 0
    seconds = (source.nbytes(blocks) + _CARRIED * source.nbytes(carried)) / _BYTES_PER_CORE_SECOND / cores
    if calibration_tokens is not None:
        widest = max((item.get(header.dtype, 0) for header in headers.values()), default=0)
        state = widest * calibration_tokens * source.sizes["hidden"]
        memory += state + widest * 3 * 1024 * source.sizes["intermediate"]
        seconds += 2 * work * calibration_tokens / _FLOP_PER_CORE_SECOND / cores
    if measured_tokens:
        memory += 2 * source.block_nbytes()
        seconds += source.nbytes() / _BYTES_PER_CORE_SECOND / cores
        seconds += 2 * work * measured_tokens / (_FLOP_PER_CORE_SECOND / 3) / cores
    disk = written + source.checkpoint.companion_nbytes() + 2 * state
    return Needs(source.nbytes(blocks), written, int(memory), disk, seconds)
