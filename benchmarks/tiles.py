"""Every tile of our GEMM on a GPU, compiled and in Triton, beside the one that is chosen: how good is the choice?

    python -m benchmarks.tiles [--dry] [--json FILE] [--m 1,64] [--shapes REGEX]

``--dry`` goes through the same motions on a CPU and a small shape, with TRITON_INTERPRET=1 through two of Triton's.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from benchmarks import interpreter, record
from benchmarks.gemm import DRY, GROUP, Problem, Weights, layers
from vllm_w8a8_bismooth.ops import timing

TOKENS = [1, 16, 64, 128, 256, 512, 1024, 4096]
SPLITS = (1, 2, 3, 4, 6, 8)


def operands(p: Problem, grouped: bool) -> Callable[[int], tuple]:
    """What a product takes of the index of a copy of the weights."""
    w = p.weights
    a_scale, b_scales = (p.group_scale, w.group_scales) if grouped else (p.token_scale, [w.channel_scale] * w.copies)
    return lambda i: (p.codes, w.codes[i], a_scale, b_scales[i], torch.bfloat16)


def compiled(p: Problem, grouped: bool) -> dict[str, timing.Run]:
    """Of the library: its choice, and on a GPU every tile and split, as ``tile/split``."""
    w, namespace, of = p.weights, torch.ops.w8a8_bismooth, operands(p, grouped)

    def chosen(i: int):  # True: weights at rest, as in the plugin's linear
        return namespace.scaled_mm(*of(i), None, True)

    runs = {"chosen": timing.prepare(chosen, w.copies, w.device)}
    for tile in range(64 if w.device == "cuda" else 0):
        for split in SPLITS:

            def call(i: int, tile=tile, split=split):
                return namespace.scaled_mm_tile(*of(i), None, tile, split, True)

            try:
                call(0)
            except RuntimeError:  # not for this device, granularity or size, or past the last tile
                continue
            runs[f"{tile}/{split}"] = timing.prepare(call, w.copies, w.device)
    return runs


def triton(p: Problem, grouped: bool) -> dict[str, timing.Run]:
    """Of Triton: its choice, and every row of the device's table, as ``tokens x weights x columns, warps, stages``.

    Raises:
        ImportError, RuntimeError: Triton cannot run here.
    """
    w, of, multiply = p.weights, operands(p, grouped), interpreter.operations(p.weights.device)["scaled_mm"]
    from vllm_w8a8_bismooth.ops.triton import tiles

    def by(choose: Callable[..., tiles.Tile]) -> timing.Run:
        def call(i: int):
            rule, tiles.choose = tiles.choose, choose  # where the product asks
            try:
                return multiply(*of(i))
            finally:
                tiles.choose = rule

        call(0)
        return timing.prepare(call, w.copies, w.device)

    device = tiles.current()
    runs = {"chosen": by(tiles.choose)}
    for tile in tiles.TILES[device.family][: 2 if w.device == "cpu" else None]:
        if tile.fits(p.weights.k // GROUP if grouped else 1, device.lanes):
            name = f"{tile.tokens}x{tile.weights}x{tile.columns},{tile.warps},{tile.stages}"
            try:
                runs[name] = by(lambda *_, tile=tile: tile)
            except Exception as error:  # of Triton's: too much shared memory, say
                print(f"! triton {name}: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
    return runs


KERNELS: dict[str, Callable[[Problem, bool], dict[str, timing.Run]]] = {"compiled": compiled, "triton": triton}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--m")
    parser.add_argument("--shapes", default="")
    asked = parser.parse_args()
    if not asked.dry and not torch.cuda.is_available():
        sys.exit("there is no CUDA device")
    tokens, shapes = TOKENS, {name: shape for tp in (1, 4) for name, shape in layers("LLaMA3-70B", tp).items()}
    if asked.dry:
        tokens, shapes = DRY.tokens[1:], dict(list(DRY.layers().items())[:1])  # the interpreter takes its time
    if asked.m:
        tokens = [int(m) for m in asked.m.split(",")]
    kernels, device, copies = dict(KERNELS), "cpu" if asked.dry else "cuda", DRY.copies if asked.dry else 0
    rows, missing, lost = [], {}, {}
    for layer, (n, k) in shapes.items():
        if not re.search(asked.shapes, layer):
            continue
        weights = Weights(n, k, device, copies)
        for m in tokens:
            problem = Problem(m, weights, False)
            for grouped, (name, candidates) in product((False, True), list(kernels.items())):
                try:
                    runs = candidates(problem, grouped)
                except Exception as error:  # whatever Triton raises
                    missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                    print(f"! {name} left out: {missing[name]}", file=sys.stderr)
                    del kernels[name]
                    continue
                us = {
                    name: statistics.median(each)
                    for name, each in timing.times(runs, 0.0 if asked.dry else 0.005).items()
                }
                chosen, order = us.pop("chosen"), sorted(us, key=us.get)
                what = choice(m, n, k, grouped) if name == "compiled" and device == "cuda" else ""
                if order:
                    lost.setdefault(name, []).append(chosen / us[order[0]])
                best = "  ".join(f"{each} {us[each]:.1f}" for each in order[:4])
                kind = "group" if grouped else "channel"
                print(f"{layer:22}{m:6} {name:9}{kind:8} chosen {chosen:8.1f} ({what})  best {best}", flush=True)
                row = {"kernel": name, "layer": layer, "M": m, "N": n, "K": k, "grouped": grouped, "chosen": what}
                rows.append(row | {"chosen us": round(chosen, 2), "us": {each: round(us[each], 2) for each in order}})
            if asked.json:  # after every product: a run that is cut short leaves what it has
                record.write(asked.json, rows, dry=asked.dry, left_out=missing)
    for name, ratios in lost.items():
        print(f"{name}, chosen / best: geomean {statistics.geometric_mean(ratios):.3f}, worst {max(ratios):.3f}")


def choice(m: int, n: int, k: int, grouped: bool) -> str:
    """What the library for GPUs chooses; ``""`` without one."""
    if not hasattr(torch.ops.w8a8_bismooth, "gemm_choice"):
        return ""
    return str(torch.ops.w8a8_bismooth.gemm_choice(m, n, k, GROUP if grouped else None, 0))


if __name__ == "__main__":
    main()
