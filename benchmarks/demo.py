"""`make demo`: an INT8 collapse, its two repairs, and a vLLM server that answers from the repaired checkpoint.

    python -m benchmarks.demo [--json FILE]

Everything is real: the model is SmolLM2-135M-Instruct out of a package of the index (:mod:`benchmarks.real`), or,
where that cannot be had, a small one that was trained here; `bismooth convert` is run as a user would run it; every
checkpoint is loaded in vLLM, whose log-probabilities give the table, and answers the same prompts; the last step talks
to `vllm serve` over HTTP.

An arm is a checkpoint that is compared: the model itself, or what one method made of it. The planted model is the
healthy one with outlier columns put in (:mod:`benchmarks.testbed.plant`), which computes the same.
"""

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import record, speak
from benchmarks.real import SMOLLM2, texts
from benchmarks.real.packages import Unavailable
from benchmarks.real.weights import folder_of
from benchmarks.server import command_of, serve
from benchmarks.testbed import PYTHON
from benchmarks.testbed.plant import plant
from vllm_w8a8_bismooth.scoring.divergence import Divergence, compare, summarize

WORK = Path("build/demo")
CACHE = Path("build/vllm-cache")
"""What vLLM finds out about its models; it stays, for the next run."""
PLANT = {"kind": "norm", "k": 1000.0, "blocks": (0, 1, 3), "channels": 3, "seed": 0}
WINDOWS = 12
PLANTED = WORK / "planted"

# How an arm is made: whether from the planted model, and with which options; without any the source itself is served.
ARMS: dict[str, tuple[bool, tuple[str, ...] | None]] = {
    "healthy bf16": (False, None),
    "healthy RTN": (False, ("--method", "rtn")),
    "bf16": (True, None),
    "RTN": (True, ("--method", "rtn")),
    "bi-smooth, data-free": (True, ("--calibration", "none")),
    "bi-smooth": (True, ()),
}
SERVED = "bi-smooth"


@dataclass(frozen=True)
class Subject:
    """The model that the demo is about.

    Attributes:
        name: for people.
        folder: its checkpoint.
        windows: int64 ``[n, 256]``, of text that no calibration saw.
        prompts: what it is asked.
        about: of its weights, where a figure of them has to say it.
    """

    name: str
    folder: Path
    windows: np.ndarray
    prompts: tuple[str, ...]
    about: str = ""


def smollm2() -> Subject:
    """SmolLM2-135M-Instruct, asked through its own template.

    Raises:
        Unavailable: the package cannot be had.
    """
    from transformers import AutoTokenizer

    folder = folder_of(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = ("What is photosynthesis?", "Why is the sky blue?", "Write a short poem about the sea.")
    chats = [[{"role": "user", "content": question}] for question in asked]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    name, about = "SmolLM2-135M-Instruct", f"weights were {SMOLLM2.weights} once"
    return Subject(name, folder, texts.heldout_windows(tokenizer, WINDOWS), tuple(prompts), about)


def bed() -> Subject:
    """The test bed of Python source."""
    prompts = (
        'def read(path):\n    """Return the contents of the file."""\n    with open(',
        "class Stack:\n    def __init__(self):\n",
        "import os\n\nfor name in ",
    )
    return Subject("a LLaMA of 6.7M parameters", PYTHON.model, PYTHON.heldout_windows(WINDOWS), prompts)


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


def place_of(arm: str) -> Path:
    return WORK / arm.replace(",", "").replace(" ", "-")


def convert_arms(subject: Subject) -> dict[str, Path]:
    """Plant the pathology, convert every arm; arm -> checkpoint to load."""
    plant(subject.folder, PLANTED, **PLANT)
    checkpoints = {}
    for arm, (planted, options) in ARMS.items():
        source = PLANTED if planted else subject.folder
        checkpoints[arm] = source if options is None else place_of(arm)
        if options is not None:
            asked = ["convert", str(source), str(place_of(arm)), *options]
            console.print(f"$ bismooth {' '.join(asked)}", style="cyan", highlight=False, soft_wrap=True)
            subprocess.run([*command_of("bismooth"), *asked], check=True)
    return checkpoints


@dataclass(frozen=True)
class Measured:
    """How far an arm is from its source, and what it answers."""

    divergence: Divergence
    answers: list[str]


def measure(subject: Subject, checkpoints: dict[str, Path], dtype: str) -> dict[str, Measured]:
    """Load every arm in real vLLM and compare it with the arm before it that nothing quantized."""
    found, reference = {}, []
    spoken = speak.each(list(checkpoints.values()), subject.windows, subject.prompts, WORK / "vllm.log", dtype)
    for number, (arm, (_, options)) in enumerate(ARMS.items(), 1):
        started = time.monotonic()
        with console.status(f"vLLM {number}/{len(ARMS)}: {arm}"):
            said = next(spoken)
        reference = said.predictions if options is None else reference
        pairs = zip(reference, said.predictions, subject.windows, strict=True)
        found[arm] = Measured(summarize([compare(*pair) for pair in pairs]), said.answers)
        d = found[arm].divergence
        console.print(
            f"vLLM {number}/{len(ARMS)}: {arm:<21} perplexity {d.perplexity:10.3f}   KL {d.kl:.3g}"
            f"   [dim]{time.monotonic() - started:.0f} s[/dim]",
            highlight=False,
        )
    return found


def answers(subject: Subject, found: dict[str, Measured]) -> Table:
    """What each checkpoint answers to the same prompts."""
    result = Table("checkpoint", *(_asked(prompt) for prompt in subject.prompts), title="The same prompts, greedily")
    for arm, measured in found.items():
        result.add_row(arm, *(escape(answer.strip()) for answer in measured.answers), end_section=arm == "healthy RTN")
    return result


def _asked(prompt: str) -> str:
    """A prompt without its template."""
    return escape(prompt.rpartition("user\n")[2].partition("<|im_end|>")[0].strip())


def table(subject: Subject, found: dict[str, Measured], dtype: str) -> Table:
    about = f" ({subject.about})" if subject.about else ""
    tokens = WINDOWS * (subject.windows.shape[1] - 1)
    title = f"{subject.name}{about}: {tokens} held-out tokens in vLLM, computed in {dtype}"
    result = Table("checkpoint", title=title)
    for heading in ("perplexity", "KL to its source (nats/token), 95 %", "worst token", "same first token"):
        result.add_column(heading, justify="right")
    for arm, measured in found.items():
        d = measured.divergence
        low, high = d.kl_interval
        cells = (f"{d.kl:.2e} ({low:.2e} to {high:.2e})", f"{d.kl_worst:.2g}", f"{d.top1:.1%}")
        to_source = ("", "", "") if ARMS[arm][1] is None else cells
        result.add_row(arm, f"{d.perplexity:.3f}", *to_source, end_section=arm == "healthy RTN")
    return result


def ask(model: Path, prompt: str, options: tuple[str, ...]) -> str:
    """Start a server, get one completion through the openai client, stop the server."""
    from openai import OpenAI

    with serve(model, WORK / "serve.log", *options) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused")
        name = client.models.list().data[0].id
        completion = client.completions.create(model=name, prompt=prompt, max_tokens=48, temperature=0)
    return completion.choices[0].text


def subject_here() -> Subject:
    """The real model, or the small one where that cannot be had."""
    try:
        return smollm2()
    except Unavailable as reason:
        console.print(f"{reason}\nA small model that was trained for this takes its place.", markup=False)
        return bed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table's figures")
    arguments = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    os.environ.setdefault("VLLM_CACHE_ROOT", str(CACHE.resolve()))

    dtype, subject = dtype_here(), subject_here()
    with step("Convert", f"{subject.name} with LLaMA3-70B's outlier columns: 3 channels x 1000 in blocks 0, 1, 3."):
        checkpoints = convert_arms(subject)
    served, options = place_of(SERVED), ("--enforce-eager",)  # to compile would take longer than to answer
    with (
        ThreadPoolExecutor(1) as pool,
        step("Measure", f"All {len(ARMS)} checkpoints in vLLM, one after the other, in one process."),
    ):
        if dtype == "float32":
            console.print("This CPU has no bf16 instructions: all engines compute in fp32, the unquantized ones too.")
        # A server starts on one core, meanwhile; a GPU's memory has no room for a second engine.
        first = subject.prompts[0]
        meanwhile = pool.submit(ask, served, first, options) if not record.machine()["gpu"] else None
        found = measure(subject, checkpoints, dtype)
    console.print(answers(subject, found))
    console.print(table(subject, found, dtype))
    with step("Serve", "An answer over HTTP from the repaired checkpoint."):
        console.print(f"$ vllm serve {served} {' '.join(options)}", style="cyan", highlight=False)
        completion = meanwhile.result() if meanwhile else ask(served, first, options)
        console.print(_asked(first), style="dim", highlight=False, markup=False)
        console.print(completion.strip(), style="green", highlight=False, markup=False)
    spent = ", ".join(f"{name.lower()} {seconds} s" for name, seconds in steps.items())
    console.print(f"The server is stopped. {record.seconds()} s in all ({spent}); checkpoints and logs are in {WORK}.")
    if arguments.json:
        rows = [
            {"arm": arm, "source": ARMS[arm][1] is None, **asdict(measured.divergence), "answers": measured.answers}
            for arm, measured in found.items()
        ]
        more = {"plant": PLANT, "tokens": WINDOWS * 255, "dtype": dtype, "steps": steps, "completion": completion}
        model = {"model": subject.name, "weights": subject.about, "prompts": subject.prompts}
        record.write(arguments.json, rows, **model, **more)


if __name__ == "__main__":
    main()
