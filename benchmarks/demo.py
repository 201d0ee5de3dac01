"""`make demo`: an INT8 collapse, its two repairs, and a vLLM server that answers from the repaired checkpoint.

    python -m benchmarks.demo [--json FILE]

Everything is real: the test bed is a trained model, `bismooth convert` is run as a user would run it, vLLM loads every
checkpoint and its prompt log-probabilities give the table, and the last step talks to `vllm serve` over HTTP.

An arm is a checkpoint that is compared: the model itself, or what one method made of it. The planted model is the
trained one with outlier columns put in (:mod:`benchmarks.testbed.plant`), which computes the same.
"""

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.compare import Distance, distance
from benchmarks.score import each
from benchmarks.server import command_of, serve
from benchmarks.testbed import PYTHON
from benchmarks.testbed.plant import plant

WORK = Path("build/demo")
CACHE = Path("build/vllm-cache")
"""What vLLM finds out about its models; it stays, for the next run."""
PLANT = {"kind": "norm", "k": 1000.0, "blocks": (0, 1, 3), "channels": 3, "seed": 0}
WINDOWS = 24
PROMPT = 'def read(path):\n    """Return the contents of the file."""\n    with open('

# Checkpoint, the source it is converted from, and how. Without a method the source itself is served.
ARMS = (
    ("healthy bf16", PYTHON.model, None),
    ("healthy RTN", PYTHON.model, ("--method", "rtn")),
    ("bf16", WORK / "planted", None),
    ("RTN", WORK / "planted", ("--method", "rtn")),
    ("mixed, g = 32", WORK / "planted", ("--method", "mixed", "--group-size", "32")),
    ("bi-smooth", WORK / "planted", ("--method", "bismooth", "--calibration", str(PYTHON.calibration))),
    ("bi-smooth, data-free", WORK / "planted", ("--method", "bismooth", "--calibration", "none")),
)
SERVED = "bi-smooth"

console = Console()
steps: dict[str, int] = {}
"""Seconds that each step took."""


@contextmanager
def step(name: str, what: str) -> Iterator[None]:
    """Say what begins, and in the end how long it took."""
    console.rule(name, align="left")
    console.print(what, highlight=False)
    started = time.monotonic()
    yield
    steps[name] = round(time.monotonic() - started)
    console.print(f"{name}: {steps[name]} s", style="bold", highlight=False)


def dtype_here() -> str:
    """In which the engines compute: bf16 where the machine has instructions for it, else fp32, faster there."""
    machine = record.machine()
    return "bfloat16" if machine["gpu"] or {"avx512_bf16", "amx_bf16"}.intersection(machine["flags"]) else "float32"


def folder_of(arm: str) -> Path:
    return WORK / arm.replace(",", "").replace(" = ", "").replace(" ", "-")


def convert_arms() -> dict[str, Path]:
    """Plant the pathology, convert every arm; arm -> checkpoint to load."""
    plant(PYTHON.model, WORK / "planted", **PLANT)
    checkpoints = {}
    for arm, source, options in ARMS:
        checkpoints[arm] = folder_of(arm) if options else source
        if options:
            asked = ["convert", str(source), str(folder_of(arm)), *options]
            console.print(f"$ bismooth {' '.join(asked)}", style="cyan", highlight=False, soft_wrap=True)
            subprocess.run([*command_of("bismooth"), *asked], check=True)
    return checkpoints


def measure(checkpoints: dict[str, Path], dtype: str) -> dict[str, Distance]:
    """Load every arm in real vLLM and compare it with the arm before it that nothing quantized."""
    windows = PYTHON.heldout_windows(WINDOWS)
    distances, reference = {}, None
    scored = each(list(checkpoints.values()), windows, WORK / "vllm.log", dtype=dtype)
    for number, (arm, _, options) in enumerate(ARMS, 1):
        started = time.monotonic()
        with console.status(f"vLLM {number}/{len(ARMS)}: {arm}"):
            scores = next(scored)
        if options is None:
            reference = scores
        distances[arm] = distance(reference, scores, windows)
        console.print(
            f"vLLM {number}/{len(ARMS)}: {arm:<21} perplexity {distances[arm].ppl:10.3f}   KL {distances[arm].kl:.3g}"
            f"   [dim]{time.monotonic() - started:.0f} s[/dim]",
            highlight=False,
        )
    return distances


def table(distances: dict[str, Distance], dtype: str) -> Table:
    title = f"{WINDOWS} x 255 held-out tokens, prompt log-probabilities from vLLM, computed in {dtype}"
    result = Table("checkpoint", title=title)
    for heading in ("perplexity", "KL to its source (nats/token)", "same first token"):
        result.add_column(heading, justify="right")
    for arm, d in distances.items():
        to_source = ("", "") if arm.endswith("bf16") else (f"{d.kl:.2e} ± {d.kl_error:.0e}", f"{d.top1:.1%}")
        result.add_row(arm, f"{d.ppl:.3f}", *to_source, end_section=arm == "healthy RTN")
    return result


def ask(model: Path, options: tuple[str, ...]) -> str:
    """Start a server, get one completion through the openai client, stop the server."""
    from openai import OpenAI

    with serve(model, WORK / "serve.log", *options) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused")
        name = client.models.list().data[0].id
        completion = client.completions.create(model=name, prompt=PROMPT, max_tokens=48, temperature=0)
    return completion.choices[0].text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table's figures")
    arguments = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    os.environ.setdefault("VLLM_CACHE_ROOT", str(CACHE.resolve()))

    dtype = dtype_here()
    with step(
        "Convert", "a small LLaMA with LLaMA3-70B's outlier columns (planted: 3 channels x 1000 in blocks 0, 1, 3)."
    ):
        checkpoints = convert_arms()
    served, options = folder_of(SERVED), ("--enforce-eager",)  # to compile would take longer than to answer
    with (
        ThreadPoolExecutor(1) as pool,
        step("Measure", f"All {len(ARMS)} checkpoints in vLLM, one after the other, in one process."),
    ):
        if dtype == "float32":
            console.print("This CPU has no bf16 instructions: all engines compute in fp32, the unquantized ones too.")
        # A server starts on one core, meanwhile; a GPU's memory has no room for a second engine.
        meanwhile = pool.submit(ask, served, options) if not record.machine()["gpu"] else None
        distances = measure(checkpoints, dtype)
    console.print(table(distances, dtype))
    with step("Serve", "An answer over HTTP from the repaired checkpoint."):
        console.print(f"$ vllm serve {served} {' '.join(options)}", style="cyan", highlight=False)
        completion = meanwhile.result() if meanwhile else ask(served, options)
        console.print(PROMPT, style="dim", end="", highlight=False, markup=False)
        console.print(completion, style="green", highlight=False, markup=False)
    spent = ", ".join(f"{name.lower()} {seconds} s" for name, seconds in steps.items())
    console.print(f"The server is stopped. {record.seconds()} s in all ({spent}); checkpoints and logs are in {WORK}.")
    if arguments.json:
        rows = [{"arm": arm, **d.as_dict()} for arm, d in distances.items()]
        more = {"plant": PLANT, "tokens": WINDOWS * 255, "dtype": dtype, "steps": steps, "completion": completion}
        record.write(arguments.json, rows, **more)


if __name__ == "__main__":
    main()
