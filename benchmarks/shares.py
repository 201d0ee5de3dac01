"""Where an engine's time goes: shares of linears, attention, head, norms and the rest, in real vLLM on a CPU.

    python -m benchmarks.shares MODEL... [--levels avx512_vnni,avx2] [--arms ours,apart,stock] [--threads N] [--turns N]
                                [--quick] [--json FILE]

MODEL is a folder, a model of benchmarks/real, or random:SIZE; it is converted by plain rounding. ``ours`` serves it
with this package, ``apart`` too, but quantizes and multiplies in two operations, and ``stock`` with vLLM's own INT8. At
a level below the machine's, our kernels are switched to it, oneDNN and torch are kept to it by their variables, and
vLLM takes the library that it has for it. One request reads and writes 32 tokens; 16 at once read 64 tokens each and
write 16. Shares are of the engine's main thread under torch's profiler; seconds are without it. What no operation
accounts for is Python's, with what the profiler adds to it.
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

import vllm_w8a8_bismooth as bismooth
from benchmarks import real, record, tables
from benchmarks.random_llama import SIZES, checkpoint, planted
from benchmarks.real.weights import folder_of
from benchmarks.score import engine_environment
from vllm_w8a8_bismooth.ops import kernels

WORK = Path("build/shares")
LEVELS = {"avx512_vnni": {}, "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}}
"""Our level -> variables that keep others to it."""
ARMS = {"ours": {}, "apart": {}, "stock": {"VLLM_PLUGINS": ""}}
"""Name -> variables of its engines."""
LOADS = {"1 request": (1, 32, 32), "16 requests": (16, 64, 16)}
"""Requests, tokens that each reads, and writes."""
QUICK = (1, 8, 2)
PARTS = {
    "linears": r"::(linear|scaled_mm|onednn_scaled_mm|onednn_mm|weight_packed_linear|mm|addmm)$",
    "quantization": r"::(quantize_activations|silu_mul_quantize|rms_norm_quantize|\w*scaled_int8_quant)$",
    "attention": r"attention|attn|reshape_and_cache",
    "norms": r"cpp_fused\w*rsqrt",
    "other compiled": r"cpp_fused",
}
"""Part -> what its operations are called; the first that fits. The head's and the sampler's are found by who calls."""
RANGES = ("head", "sampling")
REST = "Python and other"


def part_of(event: torch.autograd.profiler_util.FunctionEvent) -> str:
    """The part that an event's own time belongs to: its range's, or else that of the innermost operation with one."""
    found = ""
    while event is not None:
        if event.name in RANGES:
            return event.name
        found = found or next((part for part, names in PARTS.items() if re.search(names, event.name)), "")
        event = event.cpu_parent
    return found or REST


def child(folder: Path, level: str, arm: str, loads: dict[str, tuple[int, int, int]], turns: int) -> dict:
    """For each load the seconds of each part, and of the whole without the profiler, in this process' engine."""
    torch.ops.w8a8_bismooth._cpu_level(level)
    if arm == "apart":
        kernels.relieve("cpu", "linear")
    if level == "avx2":  # what vLLM asks before it loads its library, and before it takes kernels for bf16
        for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            setattr(torch.cpu, name, lambda: False)
    from vllm import LLM, SamplingParams
    from vllm.v1.sample.sampler import Sampler

    llm = LLM(
        str(folder),
        dtype="bfloat16",
        seed=0,
        max_model_len=256,
        enable_prefix_caching=False,
        compilation_config={"inductor_compile_config": {"cpp.enable_kernel_profile": True}},
    )

    def answer(requests: int, reads: int, writes: int) -> float:
        prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 + 5 for j in range(reads)]} for i in range(requests)]
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=writes, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - start

    alone = {}
    for name, load in loads.items():
        answer(*load)
        alone[name] = statistics.median(answer(*load) for _ in range(turns))
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    for owner, name, label in ((type(model), "compute_logits", "head"), (Sampler, "forward", "sampling")):
        setattr(owner, name, torch.profiler.record_function(label)(getattr(owner, name)))
    return {name: {"seconds": alone[name], **profiled(lambda load=load: answer(*load))} for name, load in loads.items()}


def profiled(answer: Callable[[], float]) -> dict:
    """The seconds that ``answer`` returns, and those of each part."""
    answer()
    spent: dict[str, float] = defaultdict(float)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        seconds = answer()
    events = profile.events()
    main = next(event.thread for event in events if event.name == "head")
    for event in events:
        if event.thread == main:
            spent[part_of(event)] += event.self_cpu_time_total / 1e6
    spent[REST] += seconds - sum(spent.values())
    return {"profiled": seconds, "parts": dict(spent)}


def source(model: str) -> Path:
    kind, _, size = model.partition(":")
    if kind == "random" and size in SIZES:
        WORK.mkdir(parents=True, exist_ok=True)
        return checkpoint(WORK / f"random-{size}", SIZES[size], planted())
    return folder_of(real.MODELS[model]) if model in real.MODELS else Path(model)


def measure(folder: Path, level: str, arm: str, threads: int, *extent: object) -> dict:
    """What :func:`child` finds, in a process of its own.

    Raises:
        RuntimeError: it failed; the message ends with what it said last.
    """
    given = json.dumps([level, arm, *extent])
    command = [sys.executable, "-m", "benchmarks.shares", "--child", str(folder), given]
    # One process: the profiler sees the engine. vLLM 0.32 cannot load what it compiled ahead of time for a CPU.
    fixed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_AOT_COMPILE": "0"}
    fixed |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    environment = engine_environment() | fixed | LEVELS[level] | ARMS[arm]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{level}, {arm}, {folder} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(Path(sys.argv[2]), *json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--levels", default=",".join(LEVELS), help="some of %(default)s")
    parser.add_argument("--arms", default="ours", help=f"some of {','.join(ARMS)}; default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the engine; default: all")
    parser.add_argument(
        "--turns", type=int, default=3, help="without the profiler, for the seconds; default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="a few tokens: shows that everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/<machine>/shares.json")
    arguments = parser.parse_args()
    loads, rows = {"1 request": QUICK} if arguments.quick else LOADS, []
    path = arguments.json or (WORK / "shares.json" if arguments.quick else record.here("shares"))
    levels, arms = arguments.levels.split(","), arguments.arms.split(",")
    for level, model, arm in itertools.product(levels, arguments.models, arms):
        origin = source(model)
        folder = WORK / f"{origin.name}-rtn"
        bismooth.convert(origin, folder, method="rtn")
        for load, found in measure(folder, level, arm, arguments.threads, loads, arguments.turns).items():
            rows.append({"model": origin.name, "level": level, "arm": arm, "load": load, **found})
            print(json.dumps(rows[-1]), flush=True)
        record.write(path, rows, loads=loads, threads=arguments.threads)
    print(tables.shares(path))


if __name__ == "__main__":
    main()
