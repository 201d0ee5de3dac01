"""What it costs that a source is in FP8: `bismooth convert` of it, beside the same numbers in BF16.

    python -m benchmarks.fp8 [--blocks N] [--repeats N] [--json FILE]

The checkpoints are random, with blocks of LLaMA3-8B's shape: one in DeepSeek's format (128 x 128 weights share a
scale), and one that holds what it stands for, rounded to BF16. Each conversion is a whole process, as in
:mod:`benchmarks.convert`. Both must give the same shards.
"""

import argparse
import hashlib
import json
import shutil
import statistics
from math import prod
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from benchmarks import record
from benchmarks.convert import BISMOOTH, OURS, WORK, run
from benchmarks.random_llama import SIZES, checkpoint, noise

# No torch here, nor in what is imported: the peak of a child starts from what its parent holds.

BLOCK = 128
ARMS = ("RTN", "data-free")
INDEX = "model.safetensors.index.json"

console = Console()


def _e4m3() -> np.ndarray:
    """fp32 ``[256]``: what each code stands for; 0 in the place of NaN."""
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    return np.where(codes & 127 == 127, 0, np.where(codes & 128, -size, size)).astype(np.float32)


def _nearest(numbers: np.ndarray) -> np.ndarray:
    """Codes of the nearest magnitudes, with signs."""
    levels = _e4m3()[:127]
    places = np.searchsorted((levels[1:] + levels[:-1]) / 2, np.abs(numbers))
    return (places | np.where(numbers < 0, 128, 0)).astype(np.uint8)


def _bf16(numbers: np.ndarray) -> np.ndarray:
    """Rounded to the nearest BF16, ties to even, as ``uint16``."""
    bits = numbers.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file of name -> dtype, and what holds the bytes in the tensor's shape."""
    header, end = {}, 0
    for name, (dtype, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, values in tensors.values():
            file.write(np.ascontiguousarray(values).data)


def make(blocks: int) -> dict[str, Path]:
    """Both sources, by the dtype of their linears."""
    plain = checkpoint(
        WORK / f"8b-bf16-{blocks}", SIZES["llama3-8b"] | {"num_hidden_layers": blocks, "vocab_size": 10240}, noise()
    )
    made = {"FP8": WORK / f"8b-fp8-{blocks}", "BF16": WORK / f"8b-of-fp8-{blocks}"}
    config = json.loads((plain / "config.json").read_text()) | {"dtype": "bfloat16"}
    says = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    for kind, folder in made.items():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
        quantized = {"quantization_config": says} if kind == "FP8" else {}
        (folder / "config.json").write_text(json.dumps(config | quantized, indent=2))
    generator, values = np.random.default_rng(0), _e4m3()
    pool = _nearest(generator.normal(0, 100, 1 << 23))
    index = json.loads((plain / INDEX).read_text())["weight_map"]
    by_file: dict[str, dict[str, dict]] = {}
    for file in sorted({*index.values()}):
        with open(plain / file, "rb") as raw:
            by_file[file] = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
    maps: dict[str, dict[str, str]] = {kind: {} for kind in made}
    for number, (name, file) in enumerate(index.items()):
        entry = by_file[file][name]
        shape = entry["shape"]
        if name.endswith("_proj.weight"):
            start = generator.integers(len(pool), size=-(-prod(shape) // len(pool)))
            codes = np.concatenate([np.roll(pool, each) for each in start])[: prod(shape)].reshape(shape)
            scales = generator.uniform(1e-4, 3e-4, [-(-size // BLOCK) for size in shape]).astype(np.float32)
            numbers = values[codes]
            for row, of_row in enumerate(scales):
                numbers[row * BLOCK : (row + 1) * BLOCK] *= of_row.repeat(BLOCK)[: shape[1]]
            tensors = {
                "FP8": {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("F32", scales)},
                "BF16": {name: ("BF16", _bf16(numbers))},
            }
        else:
            first, last = entry["data_offsets"]
            with open(plain / file, "rb") as raw:
                begin = 8 + int.from_bytes(raw.read(8), "little")
                raw.seek(begin + first)
                stored = np.frombuffer(raw.read(last - first), np.uint16).reshape(shape)
            tensors = {kind: {name: ("BF16", stored)} for kind in made}
        for kind, folder in made.items():
            write(folder / f"model-{number:05}.safetensors", tensors[kind])
            maps[kind] |= dict.fromkeys(tensors[kind], f"model-{number:05}.safetensors")
    for kind, folder in made.items():
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": maps[kind]}))
    shutil.rmtree(plain)
    return made


def conversion(arm: str, source: Path) -> dict:
    """Figures of one conversion from a cached source, and the SHA-256 of its shards."""
    for path in source.iterdir():
        path.read_bytes()
    out = WORK / "output"
    shutil.rmtree(out, ignore_errors=True)
    result = run([BISMOOTH, "convert", str(source), str(out), *OURS[arm]], "fp8")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.safetensors"))]
    shutil.rmtree(out)
    return result | {"shards": digests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    sources, rows = make(arguments.blocks), []
    table = Table("arm", Column("source", no_wrap=True), "wall s", "CPU s", "peak GB")
    for arm in ARMS:
        turns: dict[str, list[dict]] = {kind: [] for kind in sources}
        for _ in range(arguments.repeats):
            for kind, source in sources.items():
                turns[kind].append(conversion(arm, source))
        shards = {json.dumps(result.pop("shards")) for results in turns.values() for result in results}
        for kind, results in turns.items():
            lists = {key: [result[key] for result in results] for key in results[0]}
            median = {key: statistics.median(values) for key, values in lists.items()}
            rows.append({"arm": arm, "source": kind, "same_shards": len(shards) == 1, **lists, "median": median})
            cells = (
                f"{median[key] / unit:.2f}"
                for key, unit in (("seconds", 1), ("cpu_seconds", 1), ("peak_rss_bytes", 1e9))
            )
            table.add_row(arm, kind, *cells)
        if len(shards) != 1:
            console.print(f"[red]{arm}: the shards differ[/red]")
    console.print(table)
    for source in sources.values():
        shutil.rmtree(source)
    if arguments.json:
        record.write(arguments.json, rows, blocks=arguments.blocks)


if __name__ == "__main__":
    main()
