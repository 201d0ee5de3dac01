"""GEMM of LLaMA's linears: our INT8 kernels, compiled and Triton's, against vLLM's own, CUTLASS's and torch's, on a CPU
or a GPU.

    python -m benchmarks.gemm --device cpu|cuda [--quick | --dry] [--linear] [--json FILE]
                              [--m 1,64] [--shapes REGEX] [--impl REGEX] [--level NAME | --levels]

Times the product alone; with ``--linear`` the quantization of the activations and the product. All implementations run
in one process, in turns, on random data, with weights that alternate between copies, so that no cache holds them.
``--dry`` goes through the same motions on small shapes, with TRITON_INTERPRET=1 through Triton's too; its figures mean
nothing. ``x`` columns are speed relative to vLLM's INT8 kernel: the ratio of the two in a turn, median over the turns.
GB/s counts weights, activations, scales and results once. ``ours-rows`` has four bits a weight, and eight in a tenth of
the rows. On a CPU ``--level`` holds everybody to the instructions of one of our levels: ours, and oneDNN and MKL by
their variables. ``--levels`` does that for each level that this CPU runs, in a process of its own, beside torch's fp32
(without VNNI, bf16 takes many times as long).
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import ceilings, cutlass_baseline, interpreter, record
from vllm_w8a8_bismooth import fourbits, ops
from vllm_w8a8_bismooth.ops import processor, timing

GROUP = 128
STOCK, FP32, ROWS = "vllm", "torch-fp32", "ours-rows"
EIGHT = 0.1
"""Share of the rows that have eight bits where the others have four."""
BYTES = {"torch-bf16": (2, 2), FP32: (4, 4), ROWS: (0.5 + EIGHT / 2 + 2 / GROUP, 1)}
"""Of a weight and of an activation; one each of other implementations."""
LEVELS = {  # ours -> oneDNN's limit, MKL's
    "amx": ("AVX512_CORE_AMX", "AVX512_E4"),
    "avx512_vnni": ("AVX512_CORE_VNNI", "AVX512_E1"),
    "avx512": ("AVX512_CORE", "AVX512"),
    "avx_vnni": ("AVX2_VNNI", "AVX2_E1"),
    "avx2": ("AVX2", "AVX2"),
}
OF_LEVELS = ["--impl", f"^(ours.*|{STOCK}|{FP32})$", "--m", "1,4,16,64,256,1024"]
# hidden size, width of k and v, intermediate size
MODELS = {"LLaMA3-8B": (4096, 1024, 14336), "LLaMA3-70B": (8192, 1024, 28672), "dry": (256, 128, 512)}


@dataclass(frozen=True)
class Extent:
    """How much is measured: which layers, tokens, seconds for each row of the table, copies of the weights."""

    models: tuple[str, ...]
    tps: tuple[int, ...]
    names: str
    tokens: tuple[int, ...]
    seconds: float
    copies: int = 0  # 0: as many as the caches demand

    def layers(self) -> dict[str, tuple[int, int]]:
        """(N, K) by name."""
        found = {}
        for model in self.models:
            for tp in self.tps:
                found |= layers(model, tp)
        return {name: shape for name, shape in found.items() if re.search(self.names, name)}


DRY = Extent(("dry",), (1,), "", (1, 5), 0.0, copies=2)
EXTENTS = {
    "cpu": {
        "full": Extent(("LLaMA3-8B",), (1,), "", (1, 4, 16, 32, 64, 128, 256, 1024), 1.0),
        "quick": Extent(("LLaMA3-8B",), (1,), " (o|down)$", (1, 16, 128), 0.5),
        "dry": DRY,
    },
    "cuda": {
        "full": Extent(("LLaMA3-8B", "LLaMA3-70B"), (1, 2, 4), "", (1, *(2**i for i in range(2, 14))), 0.05),
        "quick": Extent(("LLaMA3-70B",), (1, 4), "", (1, 16, 64, 256, 1024, 4096, 8192), 0.02),
        "dry": DRY,
    },
}


def layers(model: str, tp: int) -> dict[str, tuple[int, int]]:
    """(N, K) of the linears of a decoder layer on one of ``tp`` GPUs."""
    hidden, kv, middle = MODELS[model]
    shapes = {
        "qkv": ((hidden + 2 * kv) // tp, hidden),
        "o": (hidden, hidden // tp),
        "gate_up": (2 * middle // tp, hidden),
        "down": (hidden, middle // tp),
    }
    return {f"{model} tp{tp} {name}": shape for name, shape in shapes.items()}


@dataclass
class Weights:
    """Copies of one linear's random weights, in the forms that the implementations take."""

    n: int
    k: int
    device: str
    copies: int = 0  # as many as the caches demand
    codes: list[torch.Tensor] = field(init=False)

    def __post_init__(self):
        self.copies = self.copies or timing.copies_against_caches(self.device, self.n * self.k)
        self.codes = [
            torch.randint(-127, 128, (self.n, self.k), dtype=torch.int8, device=self.device) for _ in range(self.copies)
        ]
        self.channel_scale = self._scale(1)
        self.group_scales = [self._scale(self.k // GROUP) for _ in range(self.copies)]

        self._made = {}

    def once(self, form: str, make: Callable[[torch.Tensor], object]) -> list:
        """Every copy in another form, made at the first call."""
        if form not in self._made:
            self._made[form] = [make(codes) for codes in self.codes]
        return self._made[form]

    def _scale(self, groups: int) -> torch.Tensor:
        """``[N, G]``, N fastest, as the plugin keeps it."""
        return (torch.rand(groups, self.n, device=self.device) * 1e-3 + 1e-3).t()

    def floats(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return self.once(str(dtype), lambda codes: torch.randn(codes.shape, device=self.device, dtype=dtype))

    def rows(self) -> list[ops.PackedRows]:
        """Random ones of their own: four bits hold few of the codes."""
        return self.once(ROWS, lambda codes: ops.pack_rows(random_rows(*codes.shape)))


@dataclass
class Problem:
    """One product: ``m`` tokens times the weights."""

    m: int
    weights: Weights
    linear: bool

    def __post_init__(self):
        # The activations of as many calls: they come from the kernel before, so L2 may hold them, but no CPU core's L1.
        w = self.weights
        self.x = torch.randn(self.m, w.k, device=w.device, dtype=torch.bfloat16)
        self.codes, self.token_scale = ops.quantize_activations(self.x, None)
        _, self.group_scale = ops.quantize_activations(self.x, GROUP)

    def bytes(self, weight: float, activation: int) -> float:
        n, k = self.weights.n, self.weights.k
        return n * k * weight + self.m * k * activation + 2 * self.m * n + 4 * (self.m + n)


def random_rows(n: int, k: int) -> fourbits.Rows:
    eight = torch.arange(n)[torch.rand(n) < EIGHT]
    m, o = (torch.full((n, k // GROUP), each) for each in (8, -60))
    m[eight], o[eight] = fourbits.WIDE_MULTIPLIER, fourbits.WIDE_OFFSET
    q, low = (torch.randint(256, (count, k // 2), dtype=torch.uint8) for count in (n, len(eight)))
    return fourbits.Rows(q, m.byte(), o.to(torch.int8), eight.int(), low | 0x11)  # of which no code is -128


# Implementations: from a problem to a call that takes the index of a copy of the weights and returns D.


def ours(weight_groups: bool, activation_groups: bool) -> Callable[[Problem], timing.Call]:
    def prepare(p: Problem) -> timing.Call:
        w = p.weights
        b_scale, b = w.group_scales if weight_groups else [w.channel_scale] * w.copies, w.codes
        if w.device == "cpu" and ops.has_kernel("cpu"):  # packed, as the plugin does it at load
            size = GROUP if weight_groups else None
            b = w.once(f"packed for group size {size}", lambda codes: ops.pack_weight(codes, size))
        a_scale, group = (p.group_scale, GROUP) if activation_groups else (p.token_scale, None)
        # None, True: no bias, and weights at rest, as in the plugin's linear
        multiply, quantize = torch.ops.w8a8_bismooth.scaled_mm, torch.ops.w8a8_bismooth.quantize_activations
        if p.linear:
            return lambda i: multiply(*_pair(quantize(p.x, group), b[i], b_scale[i]), torch.bfloat16, None, True)
        return lambda i: multiply(p.codes, b[i], a_scale, b_scale[i], torch.bfloat16, None, True)

    return prepare


def ours_rows(p: Problem) -> timing.Call:
    """Ours with rows of four bits, and some of eight, each with one scale."""
    if not ops.has_kernel("cpu", "scaled_mm_rows"):
        raise RuntimeError("there is no compiled kernel")
    weights = [(r.eight, r.four, r.steps, p.weights.channel_scale, r.order) for r in p.weights.rows()]
    if p.linear:
        return lambda i: torch.ops.w8a8_bismooth.linear_rows(p.x, *weights[i])
    return lambda i: torch.ops.w8a8_bismooth.scaled_mm_rows(p.codes, p.token_scale, *weights[i], torch.bfloat16)


def triton(weight_groups: bool, activation_groups: bool) -> Callable[[Problem], timing.Call]:
    """Ours in Triton, whoever serves."""

    def prepare(p: Problem) -> timing.Call:
        w, operations = p.weights, interpreter.operations(p.weights.device)
        b_scale = w.group_scales if weight_groups else [w.channel_scale] * w.copies
        a_scale, group = (p.group_scale, GROUP) if activation_groups else (p.token_scale, None)
        multiply, quantize = operations["scaled_mm"], operations["quantize_activations"]
        if p.linear:
            return lambda i: multiply(*_pair(quantize(p.x, group), w.codes[i], b_scale[i]), torch.bfloat16)
        return lambda i: multiply(p.codes, w.codes[i], a_scale, b_scale[i], torch.bfloat16)

    return prepare


def _pair(quantized, b, b_scale):
    codes, scale = quantized
    return codes, b, scale, b_scale


def load_vllm(device: str) -> None:
    """vLLM's ops for a device. For a GPU vLLM is not imported: its library is the one that VLLM_LIBRARY names, or an
    installed vLLM's.

    Raises:
        ImportError, RuntimeError: there are none.
    """
    if device == "cpu":
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            raise RuntimeError("the installed vLLM is not for CPUs")
        current_platform.import_kernels()
    elif not hasattr(torch.ops._C, "cutlass_scaled_mm"):
        spec = importlib.util.find_spec("vllm")
        installed = Path(spec.origin).parent / "_C_stable_libtorch.abi3.so" if spec else None
        library = os.environ.get("VLLM_LIBRARY", installed)
        if library is None:
            raise RuntimeError("no vLLM is installed, and VLLM_LIBRARY does not name its _C_stable_libtorch.abi3.so")
        torch.ops.load_library(str(library))


def vllm_cpu(p: Problem) -> timing.Call:
    """oneDNN through vLLM's ops, as its kernel for compressed-tensors INT8 on CPUs calls them."""
    load_vllm("cpu")
    from vllm import _custom_ops as vllm_ops

    w = p.weights
    scale = w.channel_scale.contiguous()
    handlers = w.once("onednn", lambda b: vllm_ops.create_onednn_scaled_mm(b.t(), scale, torch.bfloat16, True, False))
    out = torch.empty(p.m, w.n, dtype=torch.bfloat16)

    def call(i: int) -> torch.Tensor:
        codes, a_scale = p.codes, p.token_scale
        if p.linear:
            codes, a_scale, _ = vllm_ops.onednn_scaled_int8_quant(p.x, None, None, True)
        return vllm_ops.onednn_scaled_mm(handlers[i], codes, out, a_scale, None, None, None)

    return call


def vllm_cuda(p: Problem) -> timing.Call:
    """CUTLASS through vLLM's op."""
    load_vllm("cuda")
    w = p.weights
    scale = w.channel_scale.contiguous()
    out = torch.empty(p.m, w.n, dtype=torch.bfloat16, device="cuda")
    codes, a_scale = torch.empty_like(p.codes), torch.empty_like(p.token_scale)

    def call(i: int) -> torch.Tensor:
        if p.linear:
            torch.ops._C.dynamic_scaled_int8_quant(codes, p.x, a_scale, None)
        a = (codes, a_scale) if p.linear else (p.codes, p.token_scale)
        torch.ops._C.cutlass_scaled_mm(out, a[0], w.codes[i].t(), a[1], scale, None)
        return out

    return call


def cutlass(p: Problem) -> timing.Call:
    """CUTLASS's own collective builder, the best of a few tiles; per-channel, sm_90a only."""
    if p.linear:
        raise RuntimeError("has no quantization of its own")
    w = p.weights
    return cutlass_baseline.prepare(p.codes, w.codes, p.token_scale, w.channel_scale.contiguous())


def torch_float(dtype: torch.dtype) -> Callable[[Problem], timing.Call]:
    def prepare(p: Problem) -> timing.Call:
        x, weights = p.x.to(dtype), p.weights.floats(dtype)
        return lambda i: torch.nn.functional.linear(x, weights[i])

    return prepare


def torch_int_mm(p: Problem) -> timing.Call:
    """int32, without scales."""
    if p.linear:
        raise RuntimeError("has no quantization of its own")
    return lambda i: torch._int_mm(p.codes, p.weights.codes[i].t())


def read_weights(p: Problem) -> timing.Call:
    """Only reads the weights: the memory's ceiling, in turns with the rest, for it varies on shared machines."""
    words = [codes.view(torch.int64) for codes in p.weights.codes]
    return lambda i: words[i - len(words) // 2].amax()  # not those that another implementation has just read


IMPLEMENTATIONS: dict[str, dict[str, Callable[[Problem], timing.Call]]] = {
    "cpu": {
        "ours-channel": ours(False, False),
        "ours-group128": ours(True, True),
        ROWS: ours_rows,
        "triton-channel": triton(False, False),
        "triton-group128": triton(True, True),
        "vllm": vllm_cpu,
        "torch-bf16": torch_float(torch.bfloat16),
        FP32: torch_float(torch.float32),
        "torch-int_mm": torch_int_mm,
        "read-weights": read_weights,
    },
    "cuda": {
        "ours-channel": ours(False, False),
        "ours-group128": ours(True, True),
        "ours-group128-token": ours(True, False),
        "triton-channel": triton(False, False),
        "triton-group128": triton(True, True),
        "vllm": vllm_cuda,
        "cutlass": cutlass,
        "torch-bf16": torch_float(torch.bfloat16),
    },
}


def dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.double() * scale.double().repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def check(name: str, p: Problem, out: torch.Tensor) -> None:
    """Compare some columns of an INT8 implementation's result with float64.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    # Others have other operands or roundings, or saturate.
    if name.startswith(("torch", "read")) or (name == STOCK and (p.linear or processor.saturates())):
        return
    w, grouped = p.weights, "group" in name
    columns = torch.linspace(0, w.n - 1, 16).long()
    a, a_scale, b_scale = p.codes, p.token_scale, w.group_scales[0] if grouped else w.channel_scale
    if grouped and not name.endswith("token"):
        a_scale = p.group_scale
        a = ops.quantize_activations(p.x, GROUP)[0] if p.linear else a
    codes = w.codes[0]
    if name == ROWS:
        codes, order = ops.unpack_rows(w.rows()[0]), w.rows()[0].order.long()
        b_scale = torch.empty_like(b_scale).index_copy_(0, order, b_scale)
    a, b = dequantized(a, a_scale), dequantized(codes[columns], b_scale[columns])
    exact, magnitude = a @ b.t(), a.abs() @ b.abs().t()
    wrong = (out[:, columns].double() - exact).abs() > exact.abs() * 2.0**-7 + magnitude * 2.0**-20
    assert not wrong.any(), (
        f"{name} is wrong in {int(wrong.sum())} of {wrong.numel()} results at M={p.m} N={w.n} K={w.k}"
    )


def prepare_all(
    p: Problem, wanted: str, missing: dict[str, str], clock: Callable[[], float] = time.perf_counter
) -> dict[str, timing.Run]:
    """Runs by implementation; those that cannot run are noted in ``missing``, and why."""
    runs = {}
    for name, prepare in IMPLEMENTATIONS[p.weights.device].items():
        if name in missing or not re.search(wanted, name):
            continue
        try:
            call = prepare(p)
            check(name, p, call(0))
            runs[name] = timing.prepare(call, p.weights.copies, p.weights.device, clock)
        except Exception as error:  # whatever a library that is not ours raises
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"! {name} left out: {missing[name]}", file=sys.stderr)
    return runs


def rows_of(p: Problem, layer: str, times: dict[str, list[float]]) -> list[dict]:
    w, rows, us = p.weights, [], {name: statistics.median(each) for name, each in times.items()}
    for name, each in us.items():
        row = {"impl": name, "layer": layer, "M": p.m, "N": w.n, "K": w.k, "us": round(each, 2)}
        row["least us"] = round(min(times[name]), 2)
        row["TOPS"] = round(2 * p.m * w.n * w.k / each / 1e6, 3)
        row["GB/s"] = round(p.bytes(*BYTES.get(name, (1, 1))) / each / 1e3, 1)
        for column, yardstick in {"x stock": STOCK, "x fp32": FP32}.items():
            if yardstick in us:
                pairs = zip(times[yardstick], times[name], strict=True)
                row[column] = round(statistics.median(theirs / own for theirs, own in pairs), 3)
        rows.append(row)
    return rows


def table_line(rows: list[dict], names: list[str]) -> str:
    cells = [f"{rows[0]['layer']:24}{rows[0]['M']:6}"]
    found = {row["impl"]: row for row in rows}
    for name in names:
        row = found.get(name)
        cells.append(f"{row['us']:10.1f}{row.get('x stock', float('nan')):6.2f}x" if row else " " * 17)
    first = rows[0]
    return "".join(cells) + f"{first['TOPS']:10.3f}{first['GB/s']:9.0f}"


def summary(rows: list[dict], rates: dict[str, float]) -> list[str]:
    """Geometric means over tokens, best rates."""
    lines = []
    for name in dict.fromkeys(row["impl"] for row in rows):
        mine = [row for row in rows if row["impl"] == name]
        rate, read = max(row["TOPS"] for row in mine), max(row["GB/s"] for row in mine)
        line = f"{name:22} best {rate:9.3f} TOPS {read:6.0f} GB/s ({read / rates['GB/s']:4.0%})"
        for label, low, high in (("M<=64", 0, 64), ("M>64", 65, 1 << 30), ("all", 0, 1 << 30)):
            ratios = [r["x stock"] for r in mine if low <= r["M"] <= high and "x stock" in r]
            if ratios and name != STOCK:
                line += f"   {label} {statistics.geometric_mean(ratios):.2f}x (least {min(ratios):.2f}x)"
        lines.append(line)
    return lines


def hold_to(level: str) -> None:
    """One thread, ours at a level, and oneDNN and MKL, which read their variables at their first call, held to it.

    Raises:
        RuntimeError: this CPU has no such level.
    """
    torch.ops.w8a8_bismooth._cpu_level(level)
    torch.set_num_threads(1)
    os.environ["ONEDNN_MAX_CPU_ISA"], os.environ["MKL_ENABLE_INSTRUCTIONS"] = LEVELS[level]


def of_levels(asked: argparse.Namespace) -> list[dict]:
    """Rows of every level that this CPU runs, each level in a process of its own."""
    found, best = [], ops.cpu_level()
    with tempfile.TemporaryDirectory() as scratch:
        for level in LEVELS:
            try:
                torch.ops.w8a8_bismooth._cpu_level(level)
            except RuntimeError:
                continue
            file = Path(scratch) / f"{level}.json"
            command = [sys.executable, "-m", "benchmarks.gemm", "--device", "cpu", "--level", level, *OF_LEVELS]
            command += ["--shapes", asked.shapes, "--json", str(file)]
            command += [f"--{asked.extent}"] * (asked.extent != "full")
            print(level, flush=True)
            subprocess.run(command, check=True)
            found += [{"level": level, **row} for row in json.loads(file.read_text())["rows"]]
    torch.ops.w8a8_bismooth._cpu_level(best)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=IMPLEMENTATIONS, required=True)
    extent = parser.add_mutually_exclusive_group()
    for name, what in (("quick", "fewer shapes, under a minute"), ("dry", "small shapes, to see that it works")):
        extent.add_argument(f"--{name}", dest="extent", action="store_const", const=name, default="full", help=what)
    parser.add_argument("--linear", action="store_true", help="quantization and product")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--m", help="numbers of tokens, such as 1,64")
    parser.add_argument("--shapes", default="", help="regular expression for layers, such as '70B tp1'")
    parser.add_argument("--impl", default="", help="regular expression for implementations")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--level", choices=LEVELS, help="of instructions that all are held to, on a CPU")
    levels.add_argument("--levels", action="store_true", help="every level, beside fp32, on a CPU")
    asked = parser.parse_args()
    if asked.levels:
        rows = of_levels(asked)
        if asked.json:
            record.write(asked.json, rows, measured="product, one thread's CPU time", extent=asked.extent)
        return
    if asked.level:
        hold_to(asked.level)
    device, extent = asked.device, EXTENTS[asked.device][asked.extent]
    tokens = [int(m) for m in asked.m.split(",")] if asked.m else extent.tokens
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: there is no CUDA device")
    if not ops.has_kernel(device):
        print(f"! no compiled kernel for this device: 'ours' is {ops.server(device)}'s", file=sys.stderr)
    torch.manual_seed(0)
    rates = ceilings.measure(device, extent.seconds and 0.5)
    print("ceilings measured: " + ", ".join(f"{rate} {what}" for what, rate in rates.items()), flush=True)
    names = [name for name in IMPLEMENTATIONS[device] if re.search(asked.impl, name)]
    print(f"{'us, x stock':24}{'M':>6}" + "".join(f"{name:>17}" for name in names) + f"{'1st: TOPS':>10}{'GB/s':>9}")
    rows, missing = [], {}
    for layer, (n, k) in extent.layers().items():
        if not re.search(asked.shapes, layer):
            continue
        weights = Weights(n, k, device, extent.copies)
        for m in tokens:
            problem = Problem(m, weights, asked.linear)
            runs = prepare_all(problem, asked.impl, missing, time.process_time if asked.level else time.perf_counter)
            if not runs:
                sys.exit("no implementation can run")
            found = rows_of(problem, layer, timing.times(runs, extent.seconds))
            print(table_line(found, names), flush=True)
            rows += found
        if asked.json:  # after every layer: a run that is cut short leaves what it has
            measured = "quantization and product" if asked.linear else "product"
            more = {"measured": measured, "extent": asked.extent, "ceilings": rates, "left_out": missing}
            record.write(asked.json, rows, **more)
    print(*summary(rows, rates), sep="\n")


if __name__ == "__main__":
    main()
