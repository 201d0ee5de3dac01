"""Every tile and split of our GEMM on a GPU, beside the one that the library chooses: how good is the choice?

python -m benchmarks.tiles [--json FILE] [--m 1,64] [--shapes REGEX]
"""

import argparse
import re
import statistics
import sys
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.gemm import GROUP, Problem, Weights, layers
from vllm_w8a8_bismooth.ops import timing

TOKENS = [1, 16, 64, 128, 256, 512, 1024, 4096]
SPLITS = (1, 2, 3, 4, 6, 8)


def candidates(p: Problem, grouped: bool) -> dict[str, timing.Run]:
    w, namespace = p.weights, torch.ops.w8a8_bismooth
    a_scale, b_scales = (p.group_scale, w.group_scales) if grouped else (p.token_scale, [w.channel_scale] * w.copies)

    def chosen(i: int):  # True: weights at rest, as in the plugin's linear
        return namespace.scaled_mm(p.codes, w.codes[i], a_scale, b_scales[i], torch.bfloat16, None, True)

    runs = {"chosen": timing.prepare(chosen, w.copies, "cuda")}
    for tile in range(64):
        for split in SPLITS:

            def call(i: int, tile=tile, split=split):
                arguments = (p.codes, w.codes[i], a_scale, b_scales[i], torch.bfloat16, None)
                return namespace.scaled_mm_tile(*arguments, tile, split, True)

            try:
                call(0)
            except RuntimeError:  # not for this device, granularity or size, or past the last tile
                continue
            runs[f"{tile}/{split}"] = timing.prepare(call, w.copies, "cuda")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--m")
    parser.add_argument("--shapes", default="")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device")
    tokens = [int(m) for m in asked.m.split(",")] if asked.m else TOKENS
    rows, lost = [], []
    shapes = {name: shape for tp in (1, 4) for name, shape in layers("LLaMA3-70B", tp).items()}
    for layer, (n, k) in shapes.items():
        if not re.search(asked.shapes, layer):
            continue
        weights = Weights(n, k, "cuda")
        for m in tokens:
            problem = Problem(m, weights, False)
            for grouped in (False, True):
                times = timing.times(candidates(problem, grouped), 0.005)
                us = {name: statistics.median(each) for name, each in times.items()}
                chosen, order = us.pop("chosen"), sorted(us, key=us.get)
                lost.append(chosen / us[order[0]])
                what = torch.ops.w8a8_bismooth.gemm_choice(m, n, k, GROUP if grouped else None, 0)
                best = "  ".join(f"{name} {us[name]:.1f}" for name in order[:4])
                print(
                    f"{layer:22}{m:6} {'group' if grouped else 'channel':8} chosen {chosen:8.1f} ({what})  best {best}"
                )
                rows.append(
                    {"layer": layer, "M": m, "N": n, "K": k, "grouped": grouped, "chosen": what, "chosen us": chosen}
                )
                rows[-1]["us"] = {name: round(us[name], 2) for name in order}
        if asked.json:
            record.write(asked.json, rows)
    print(f"chosen / best: geomean {statistics.geometric_mean(lost):.3f}, worst {max(lost):.3f}")


if __name__ == "__main__":
    main()
