"""vLLM's own INT8 product on CPUs against exact integers, at each level of instructions, and ours beside it.

    python -m benchmarks.saturation [--dry | --engines] [--json FILE]

ONEDNN_MAX_CPU_ISA says which instructions oneDNN may use, in a process for each level; ours are switched to the same
level. Codes have the crest factor (largest value over root mean square) that is given: 1.73 is uniform noise, 4.5 that
of normally distributed weights. Times are of both in turns, one thread.
``--dry`` goes through the same motions on small shapes. ``--engines`` measures what it does to a model instead: the KL
divergence of the python bed's converted checkpoints from their source, in real vLLM at the same level, in fp32, as
oneDNN limited to AVX2 has no product in bf16. vLLM is told that there is no AMX, for which it has a kernel of its own.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import gemm, record, score
from benchmarks.compare import distance
from benchmarks.testbed import PYTHON

LEVELS = {limit: level for level, (limit, _) in reversed(gemm.LEVELS.items())}
"""oneDNN's limit -> our level."""
CRESTS = (1.73, 2.5, 3.5, 4.5)
TOKENS = (1, 16, 128)
NO_AMX = "import torch\n\ntorch.cpu._is_amx_tile_supported = lambda: False\n"


def codes(rows: int, columns: int, crest: float, generator: torch.Generator) -> torch.Tensor:
    """``[rows, columns]`` int8, whose largest magnitude, 127, is ``crest`` times the root mean square of a row."""
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    low, high = 0.0, 50.0  # clipping a normal distribution lowers its crest factor, down to 1
    while high - low > 1e-6:
        middle = (low + high) / 2
        clipped = x.clamp(-middle, middle)
        reached = middle / float(clipped.square().mean().sqrt())
        low, high = (middle, high) if reached < crest else (low, middle)
    return (x.clamp(-low, low) * (127 / low)).round().to(torch.int8)


def child(rows: int, columns: int, seconds: float) -> None:
    """Print the rows of the level that the environment sets, as JSON."""
    from vllm import _custom_ops as vllm_ops
    from vllm.platforms import current_platform

    from vllm_w8a8_bismooth import ops
    from vllm_w8a8_bismooth.ops import timing

    current_platform.import_kernels()
    limit = os.environ["ONEDNN_MAX_CPU_ISA"]
    try:
        torch.ops.w8a8_bismooth._cpu_level(LEVELS[limit])
    except RuntimeError as error:
        print(json.dumps(str(error).splitlines()[0]))
        return
    torch.set_num_threads(1)
    generator, found = torch.Generator().manual_seed(0), []
    scale = torch.ones(rows, 1)
    for crest in CRESTS:
        weights = codes(rows, columns, crest, generator)
        handler = vllm_ops.create_onednn_scaled_mm(weights.t(), scale, torch.float32, True, False)
        packed = ops.pack_weight(weights, None)
        for tokens in TOKENS:
            x, ones = codes(tokens, columns, crest, generator), torch.ones(tokens, 1)
            out = torch.empty(tokens, rows)
            exact = x.double() @ weights.double().t()

            def stock(_: int, x=x, ones=ones, out=out, handler=handler) -> torch.Tensor:
                return vllm_ops.onednn_scaled_mm(handler, x, out, ones, None, None, None)

            def ours(_: int, x=x, ones=ones, packed=packed) -> torch.Tensor:
                return torch.ops.w8a8_bismooth.scaled_mm(x, packed, ones, scale, torch.float32, None, True)

            calls = {"stock": stock, "ours": ours}
            times = timing.times({name: timing.prepare(call, 1, "cpu") for name, call in calls.items()}, seconds)
            row = {"limit": limit, "level": LEVELS[limit], "crest": crest, "m": tokens, "n": rows, "k": columns}
            for name, call in calls.items():
                error = call(0).double() - exact
                row[f"{name} error"] = float(error.norm() / exact.norm())
                row[f"{name} wrong"] = float((error != 0).double().mean())
                row[f"{name} us"] = statistics.median(times[name])
            ratios = [theirs / mine for theirs, mine in zip(times["stock"], times["ours"], strict=True)]
            found.append(row | {"x stock": statistics.median(ratios)})
    print(json.dumps(found))


def measure(limit: str, *extent: object) -> list[dict] | str:
    """The rows of a level, or why there are none."""
    command = [sys.executable, "-m", "benchmarks.saturation", "--child", *map(str, extent)]
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": limit, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def engines(windows: int) -> list[dict]:
    """KL of checkpoints by vLLM's own product and by ours, where oneDNN has VNNI and where it has not."""
    import vllm_w8a8_bismooth as bismooth

    tokens, rows = PYTHON.heldout_windows(windows), []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        bismooth.convert(PYTHON.model, work / "RTN", method="rtn")
        bismooth.convert(PYTHON.model, work / "calibrated", calibration=PYTHON.calibration)
        (work / "sitecustomize.py").write_text(NO_AMX)
        for limit in ("AVX2", "AVX512_CORE_VNNI"):
            variables = {"ONEDNN_MAX_CPU_ISA": limit, "PYTHONPATH": scratch}
            (source,) = score.each([PYTHON.model], tokens, work / "source.log", variables, "float32")
            for arm, (switch, kernel) in itertools.product(
                ("RTN", "calibrated"), {"off": "vLLM's", "auto": "ours"}.items()
            ):
                more = variables | {"BISMOOTH_KERNELS": switch}
                (found,) = score.each([work / arm], tokens, work / f"{arm}.log", more, "float32")
                row = {"limit": limit, "arm": arm, "kernel": kernel, **distance(source, found, tokens).as_dict()}
                print(f"{limit:17} {arm:10} {kernel:6} KL {row['kl']:.2e} +- {row['kl_error']:.0e}")
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--engines", type=int, nargs="?", const=32, metavar="WINDOWS", help="of 256 tokens; 32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(int(asked.child[0]), int(asked.child[1]), asked.child[2])
        return
    if asked.engines:
        rows = engines(asked.engines)
        if asked.json:
            record.write(asked.json, rows)
        return
    extent = (64, 1024, 0) if asked.dry else (4096, 4096, 1)
    rows, missing = [], {}
    for limit in LEVELS:
        found = measure(limit, *extent)
        if isinstance(found, str):
            missing[limit] = found
            print(f"{limit}: {found}", file=sys.stderr)
            continue
        rows += found
        for row in found:
            words = (
                f"{name} {row[f'{name} error']:.1%} ({row[f'{name} wrong']:.1%} wrong)" for name in ("stock", "ours")
            )
            print(
                f"{limit:17} crest {row['crest']:<4} M {row['m']:<3} {', '.join(words)}, x stock {row['x stock']:.2f}"
            )
    if asked.json:
        record.write(asked.json, rows, left_out=missing, dry=asked.dry)


if __name__ == "__main__":
    main()
