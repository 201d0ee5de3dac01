"""Random LLaMA checkpoints of any size, written tensor by tensor: in little memory, and without torch.

With the pathology of LLaMA3-70B, if asked for: see :func:`planted`.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from benchmarks.testbed import PYTHON

SHARD_BYTES = 5e9

Fill = Callable[[BinaryIO, str, tuple[int, ...]], object]
"""Called with an open file, a tensor's name and shape: writes that many bf16 numbers, or passes over their place."""


def tensors(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a LLaMA."""
    hidden, middle, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for index in range(config["num_hidden_layers"]):
        yield from ((f"model.layers.{index}.{name}.weight", shape) for name, shape in block.items())
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def shards(named: Iterable[tuple[str, tuple[int, ...]]]) -> list[dict[str, tuple[int, ...]]]:
    """Tensors in order, a new shard whenever the next one would not fit."""
    result, room = [], 0
    for name, shape in named:
        room -= 2 * prod(shape)
        if room < 0 or not result:
            result.append({})
            room = SHARD_BYTES - 2 * prod(shape)
        result[-1][name] = shape
    return result


def noise() -> Fill:
    """Fills linears from a normal distribution (deviation 0.02) around 0, norms from one around 1.

    Numbers are drawn once and then taken from random places of that pool, as fast as a disk can write.
    """
    generator = np.random.default_rng(0)
    pool = _bf16(generator.normal(0.0, 0.02, 1 << 23))
    piece = len(pool) // 2

    def fill(file: BinaryIO, name: str, shape: tuple[int, ...]) -> None:
        if len(shape) == 1:
            file.write(_bf16(generator.normal(1.0, 0.02, *shape)))
            return
        for done in range(0, prod(shape), piece):
            start = generator.integers(piece)
            file.write(pool[start : start + min(piece, prod(shape) - done)])

    return fill


READERS = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}
PLANTED_BLOCKS, OUTLIERS, DOUBLINGS = (0, 1, 3), 3, 10


def planted() -> Fill:
    """Does what :func:`noise` does, with the outlier columns of LLaMA3-70B in blocks 0, 1 and 3.

    There, three channels of each norm have a gain 1024 times smaller, and the columns that read them weights 1024 times
    larger (``norm`` of :mod:`benchmarks.testbed.plant`). That only moves exponents: the model computes, to the last
    bit, what it would without.
    """
    plain = noise()

    def fill(file: BinaryIO, name: str, shape: tuple[int, ...]) -> None:
        found = re.search(r"layers\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+)\.weight", name)
        block, kind = (int(found[1]), found[2]) if found else (-1, "")
        norm = next((norm for norm, readers in READERS.items() if kind == norm or kind in readers), None)
        if norm is None or block not in PLANTED_BLOCKS:
            plain(file, name, shape)
            return
        plain(numbers := BytesIO(), name, shape)
        bits = np.frombuffer(numbers.getbuffer(), np.uint16).reshape(shape)
        chosen = np.random.default_rng([block, list(READERS).index(norm)]).permutation(shape[-1])[:OUTLIERS]
        exponents = np.uint16(DOUBLINGS << 7)  # of bf16: behind 7 bits of mantissa
        columns = bits[..., chosen]
        moved = columns - exponents if kind == norm else columns + exponents
        bits[..., chosen] = np.where(columns & 0x7F80, moved, columns)  # zeros stay zeros
        file.write(bits)

    return fill


def _bf16(numbers: np.ndarray) -> np.ndarray:
    """Cut to bf16: the upper halves of fp32, as ``uint16``."""
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def hole(file: BinaryIO, name: str, shape: tuple[int, ...]) -> None:
    """Leaves a sparse file's hole where the numbers would be."""
    file.seek(2 * prod(shape), os.SEEK_CUR)


def checkpoint(folder: Path, sizes: dict, fill: Fill) -> Path:
    """Make a bf16 LLaMA with the test bed's tokenizer, tensor by tensor, unless it is there."""
    if folder.exists():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(PYTHON.model, partial, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((PYTHON.model / "config.json").read_text()) | sizes
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    weight_map = {}
    parts = shards(tensors(config))
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_shard(partial / name, part, fill)
        weight_map |= dict.fromkeys(part, name)
    total = sum(2 * prod(shape) for part in parts for shape in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    partial.rename(folder)
    return folder


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], fill: Fill) -> None:
    """One safetensors file: length of the header, header, numbers."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            fill(file, name, shape)
        file.truncate()  # a hole at the end belongs to the file
