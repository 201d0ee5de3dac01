"""Speed and accuracy of whole engines side by side: bf16, stock INT8, ours per-channel, in 4.5 bits and mixed, FP8.

Each of these six, a checkpoint and what serves it, is an arm.

    python -m benchmarks.serve MODEL [--turns N] [--arms REGEX] [--calibration FILE] [--quick] [--json FILE]
                               [-- VLLM OPTION ...]

MODEL is a Hub id, a folder, or random:SIZE: tiny, 1b, llama3-8b or llama3-70b-tp8-shard (what one of eight GPUs holds
of LLaMA3-70B), made on the spot with LLaMA3-70B's outlier columns planted. Each arm goes through `vllm bench
throughput`, `vllm bench latency`, and `vllm bench serve` against a `vllm serve` of its own at several request rates,
multiples of what bf16 sustains in the first throughput run; prompts are real text, answers of fixed length. The arms
take turns, so that what the machine does beside meets all alike. Last comes each arm's KL divergence from bf16, in
vLLM, on text that no conversion saw.

Stock INT8 is plain rounding, what one has without this package, served by vLLM without the plugin; FP8 is vLLM's own,
where the GPU computes in it. Options behind `--` go to every engine: `-- --tensor-parallel-size 4`.

The JSON file is written after each run, and the same command, at the same commit, goes on behind the last one, with
more turns too. Rows are medians over the turns, with ranges. Exit code 1 if an arm failed, 2 if the input is bad.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks import record, tables
from benchmarks.compare import distance
from benchmarks.random_llama import SIZES, checkpoint, planted, tensors
from benchmarks.score import engine_environment, log_probabilities
from benchmarks.server import command_of, serve
from benchmarks.testbed import PYTHON

WORK = Path("build/serve")


@dataclass(frozen=True)
class Arm:
    """A way to serve the model.

    Attributes:
        method: options of `bismooth convert`; none serves the source itself.
        calibrated: whether it takes ``--calibration``.
        environment: of its engines.
        options: of its engines.
    """

    method: tuple[str, ...] | None = None
    calibrated: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()


ARMS = {
    "bf16": Arm(),
    "stock INT8": Arm(("--method", "rtn"), environment={"VLLM_PLUGINS": ""}),
    "ours, per-channel": Arm(("--method", "bismooth"), calibrated=True),
    "ours, 4.5 bits": Arm(("--method", "bismooth", "--bits", "4.5"), calibrated=True),
    "ours, mixed": Arm(("--method", "mixed", "--group-size", "128")),
    "FP8": Arm(options=("--quantization", "fp8")),
}
BASE = "bf16"


@dataclass(frozen=True)
class Workload:
    """What the engines are asked.

    Attributes:
        prompts: of a throughput run.
        input_len, output_len: tokens that each request reads and writes.
        latency: tokens that the one request of a latency run reads and writes.
        iterations: of a latency run, after two to warm up.
        seconds: that a rate of requests lasts, about; at least ``least`` requests.
        loads: rates of requests, as multiples of what bf16 sustains; ``None`` sends all at once.
    """

    prompts: int
    input_len: int
    output_len: int
    latency: int
    iterations: int
    seconds: float
    least: int
    loads: tuple[float | None, ...]


WORKLOADS = {
    "cpu": Workload(16, 256, 32, 32, 6, 10, 6, (0.5, 1.0, None)),
    "cuda": Workload(256, 512, 128, 128, 10, 20, 32, (0.25, 0.5, 1.0, None)),
}
QUICK = Workload(8, 32, 8, 8, 2, 2, 4, (0.5, None))
# vLLM 0.32 cannot load what it compiled ahead of time for a CPU, and would compile anew at each start.
ENGINES = {"cpu": {"VLLM_USE_AOT_COMPILE": "0"}, "cuda": {}}
# Else vLLM leaves one core to a process that an offline run does not have; of two cores that is half.
OFFLINE = {"cpu": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, "cuda": {}}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TURNS = 3
LATENCY_VOCABULARY = 10000  # `vllm bench latency` makes up token ids below it

# Figures of `vllm bench serve`, and what they are called here.
SERVED = {
    "request_throughput": "requests_per_second",
    "output_throughput": "output_tokens_per_second",
    "total_token_throughput": "tokens_per_second",
    "median_ttft_ms": "ttft_ms",
    "median_tpot_ms": "tpot_ms",
    "median_e2el_ms": "e2e_ms",
    "p99_ttft_ms": "p99_ttft_ms",
    "p99_tpot_ms": "p99_tpot_ms",
    "p99_e2el_ms": "p99_e2e_ms",
}
KEY = ("bench", "arm", "load", "rate", "turn")

console = Console(highlight=False)


class Failed(Exception):
    """A bench or a server failed; ends with the tail of its log."""


class Journal:
    """The runs so far, kept in a file of the settings that they were made with."""

    def __init__(self, work: Path, settings: dict[str, Any], results: Path):
        """Go on where the same settings stopped.

        Args:
            work: folder for the journal.
            settings: what is measured; other commits and versions have journals of their own.
            results: file that shall hold the rows, and the runs so far.
        """
        key = [settings, record.COMMIT, record.versions()]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.path, self.results, self.settings = work / f"runs-{digest[:12]}.json", results, settings
        before = json.loads(self.path.read_text()) if self.path.exists() else {"runs": [], "seconds": 0}
        self.runs, self.seconds = before["runs"], before["seconds"]
        self.failed: dict[str, str] = {}
        if self.runs:
            console.print(f"going on behind {len(self.runs)} runs in {self.path}; remove it to start anew")

    def find(self, **key) -> list[dict]:
        return [run for run in self.runs if all(run.get(name) == value for name, value in key.items())]

    def add(self, **run) -> None:
        self.runs.append(run)
        self.write()

    def write(self) -> None:
        more = {"settings": self.settings, "failed": self.failed, "runs": self.runs}
        record.write(self.path, self.rows(), seconds=self.seconds + record.seconds(), **more)
        self.results.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, self.results)

    def rows(self) -> list[dict]:
        """Medians over the turns, and ranges; runs that have no turns as they are."""
        groups: dict[tuple, list[dict]] = {}
        for run in self.runs:
            groups.setdefault(tuple(run.get(name) for name in KEY[:-1]), []).append(run)
        return [row(dict(zip(KEY, key, strict=False)), runs) for key, runs in groups.items()]


def row(key: dict, runs: list[dict]) -> dict:
    """One row of :meth:`Journal.rows`."""
    if "turn" not in runs[0]:
        return runs[0]
    result = {name: value for name, value in key.items() if name in runs[0]} | {"turns": len(runs)}
    for name in runs[0].keys() - set(KEY):
        values = [run[name] for run in runs]
        result[name] = statistics.median(values)
        if len(values) > 1:
            result[f"{name}_range"] = [min(values), max(values)]
    return dict(sorted(result.items(), key=lambda item: (item[0] not in KEY, item[0])))


def refuse(message: str) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(2)


class Case:
    """One model: its source, its arms on disk, and what they are asked."""

    def __init__(self, model: str, arms: list[str], workload: Workload, calibration: Path | None, options: list[str]):
        self.model, self.arms, self.workload = model, arms, workload
        self.calibration, self.options = calibration, options
        self.made: dict[str, Path] = {}
        # Many folders are called alike.
        digest = hashlib.sha256(str(Path(model).resolve()).encode()).hexdigest()[:8] if Path(model).is_dir() else ""
        self.work = WORK / f"{slug(model)}-{digest}".rstrip("-")
        self.work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def source(self) -> Path:
        """Checkpoint folder, unquantized."""
        kind, _, name = self.model.partition(":")
        if kind == "random":
            folder, size = self.work / "source", sum(2 * prod(shape) for _, shape in tensors(SIZES[name]))
            # INT8 arms take a little over half, and embeddings and head stay as they are.
            need = size * (1 + 0.7 * sum(ARMS[arm].method is not None for arm in self.arms))
            if not folder.exists() and (free := shutil.disk_usage(self.work).free) < need:
                refuse(f"{self.model} and its arms need {need / 1e9:.0f} GB in {WORK}, {free / 1e9:.0f} GB are free")
            return checkpoint(folder, SIZES[name], planted())
        if Path(self.model).is_dir():
            return Path(self.model)
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(self.model, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model"]))

    @cached_property
    def vocabulary(self) -> int:
        return json.loads((self.source / "config.json").read_text())["vocab_size"]

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.source)

    def folder(self, arm: str) -> Path:
        """The arm's checkpoint, made when first asked for.

        Raises:
            Failed: it could not be converted.
        """
        if ARMS[arm].method is None:
            return self.source
        if arm not in self.made:  # `bismooth convert` itself finds what another run left
            folder = self.work / slug(arm)
            command = [*command_of("bismooth"), "convert", str(self.source), str(folder), *ARMS[arm].method]
            if ARMS[arm].calibrated:
                command += ["--calibration", str(self.calibration or "none")]
            run(command, dict(os.environ), self.work / f"{slug(arm)}-convert.log")
            self.made[arm] = folder
        return self.made[arm]

    @cached_property
    def requests(self) -> Path:
        """Stretches of text in the ShareGPT format, which `vllm bench` reads.

        Not its random dataset: decoding and encoding again changes the length of random tokens.
        """
        ids = self.tokenizer(PYTHON.calibration.read_text(), add_special_tokens=False)["input_ids"]
        length, count = self.workload.input_len, 512
        starts = [i * (len(ids) - length) // count for i in range(count)]
        prompts = [self.tokenizer.decode(ids[start : start + length]) for start in starts]
        turns = [[{"from": "human", "value": prompt}, {"from": "gpt", "value": prompt}] for prompt in prompts]
        path = self.work / f"requests-of-{length}.json"
        path.write_text(json.dumps([{"conversations": turn} for turn in turns]))
        return path

    @cached_property
    def windows(self) -> np.ndarray:
        """int64 ``[n, 128]`` held-out tokens, BOS first; as many as the vocabulary's size leaves memory for."""
        length = 128
        count = min(24, max(2, 2**25 // (length * self.vocabulary)))
        text = AutoTokenizer.from_pretrained(PYTHON.model).decode(np.load(PYTHON.folder / "heldout.npy"))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        starts = np.linspace(0, len(ids) - length, count).astype(int)
        first = self.tokenizer.bos_token_id or 0
        return np.array([[first, *ids[start : start + length - 1]] for start in starts], dtype=np.int64)

    @cached_property
    def reference(self) -> np.ndarray:
        """Log-probabilities of bf16."""
        return self.score(BASE)

    def score(self, arm: str) -> np.ndarray:
        log = self.work / f"{slug(arm)}-accuracy.log"
        return log_probabilities(self.folder(arm), self.windows, log, environment_of(arm))

    def bytes(self, arm: str) -> int:
        """Bytes of the arm's tensors on disk."""
        return sum(path.stat().st_size for path in self.folder(arm).glob("*.safetensors"))

    def engine_options(self, arm: str) -> list[str]:
        longest = max(self.workload.input_len + self.workload.output_len, 2 * self.workload.latency) + 64
        # Without prefix caching: the same prompts come again in every run of a server.
        fixed = ["--dtype", "bfloat16", "--seed", "0", "--max-model-len", str(longest), "--no-enable-prefix-caching"]
        return [*fixed, *ARMS[arm].options, *self.options]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", Path(name).name.lower() if "/" in name else name.lower()).strip("-")


def environment_of(arm: str) -> dict[str, str]:
    """Variables of the arm's engines."""
    return ENGINES[DEVICE] | ARMS[arm].environment


def run(command: list[str], environment: dict[str, str], log: Path) -> None:
    """Raises :class:`Failed`."""
    with open(log, "wb") as sink:
        done = subprocess.run(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise Failed(f"{' '.join(command[:5])} failed ({done.returncode}), see {log}:\n{tail}")


def bench(kind: str, options: list[str], environment: dict[str, str], log: Path) -> dict:
    """Run `vllm bench`; returns the JSON that it writes.

    Raises:
        Failed: it failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "out.json")
        where = ["--output-json", str(output)]
        if kind == "serve":
            where = ["--save-result", "--result-dir", scratch, "--result-filename", output.name]
        run([*command_of("vllm"), "bench", kind, *options, *where], engine_environment() | environment, log)
        return json.loads(output.read_text())


def throughput(case: Case, arm: str, _) -> Iterator[dict]:
    size = case.workload
    options = ["--model", str(case.folder(arm)), "--dataset-name", "sharegpt", "--dataset-path", str(case.requests)]
    options += ["--num-prompts", str(size.prompts), "--output-len", str(size.output_len), *case.engine_options(arm)]
    environment = OFFLINE[DEVICE] | environment_of(arm)
    found = bench("throughput", options, environment, case.work / f"{slug(arm)}-throughput.log")
    yield {name: found[name] for name in ("tokens_per_second", "requests_per_second")}


def latency(case: Case, arm: str, _) -> Iterator[dict]:
    size = case.workload
    options = ["--model", str(case.folder(arm)), "--batch-size", "1", "--num-iters-warmup", "2"]
    options += ["--input-len", str(size.latency), "--output-len", str(size.latency)]
    options += ["--num-iters", str(size.iterations), *case.engine_options(arm)]
    environment = OFFLINE[DEVICE] | environment_of(arm)
    found = bench("latency", options, environment, case.work / f"{slug(arm)}-latency.log")
    yield {"seconds": statistics.median(found["latencies"])}


def serving(case: Case, arm: str, rates: dict[float | None, float | None]) -> Iterator[dict]:
    size, name = case.workload, slug(arm)
    common = ["--model", str(case.folder(arm)), "--dataset-name", "sharegpt", "--dataset-path", str(case.requests)]
    common += ["--sharegpt-output-len", str(size.output_len), "--ignore-eos", "--seed", "0", "--num-warmups", "1"]
    common += ["--percentile-metrics", "ttft,tpot,e2el", "--metric-percentiles", "99", "--disable-tqdm"]
    log = case.work / f"{name}-serve.log"
    with serve(case.folder(arm), log, *case.engine_options(arm), environment=environment_of(arm)) as url:
        for load, rate in rates.items():
            count = size.prompts if rate is None else max(size.least, round(rate * size.seconds))
            options = [*common, "--base-url", url, "--num-prompts", str(count)]
            options += ["--request-rate", "inf" if rate is None else str(rate)]
            found = bench("serve", options, {}, case.work / f"{name}-client.log")
            if found["completed"] != count:
                raise Failed(f"{count - found['completed']} of {count} requests failed at rate {rate}, see {log}")
            yield {"load": load, "rate": rate, **{ours: found[theirs] for theirs, ours in SERVED.items()}}


BENCHES = {"throughput": throughput, "latency": latency, "serve": serving}


def rates(journal: Journal, loads: tuple[float | None, ...]) -> dict[float | None, float | None]:
    """Load -> requests per second: a multiple of the first throughput run, bf16's unless that failed."""
    capacity = journal.find(bench="throughput", turn=0)[0]["requests_per_second"]
    return {load: load and float(f"{load * capacity:.3g}") for load in loads}


def missing(case: Case, journal: Journal, name: str, arm: str, turn: int) -> dict[float | None, float | None]:
    """Loads that this bench has not seen, with their rates; a bench without rates has the one load ``None``."""
    asked = rates(journal, case.workload.loads) if name == "serve" else {None: None}
    done = {found.get("load") for found in journal.find(bench=name, arm=arm, turn=turn)}
    return {load: rate for load, rate in asked.items() if load not in done}


@contextmanager
def attempt(journal: Journal, arm: str) -> Iterator[None]:
    """Notes what went wrong with an arm, and goes on."""
    try:
        yield
    except (Failed, RuntimeError) as error:
        console.print(f"{arm} failed and is left out: {error}", style="red", markup=False)
        journal.failed[arm] = str(error).splitlines()[0]
        journal.write()


def measure(case: Case, journal: Journal, turns: int) -> None:
    """Run what is still to be done."""
    benches = list(BENCHES)
    if case.vocabulary < LATENCY_VOCABULARY:
        console.print(f"no latency: `vllm bench latency` makes up token ids to {LATENCY_VOCABULARY}")
        benches.remove("latency")
    turned = [case.arms[turn % len(case.arms) :] + case.arms[: turn % len(case.arms)] for turn in range(turns)]
    grid = [(turn, name, arm) for turn in range(turns) for name in benches for arm in turned[turn]]
    for number, (turn, name, arm) in enumerate(grid, 1):
        if arm in journal.failed or not (left := missing(case, journal, name, arm, turn)):
            continue
        where = f"{case.model} {number}/{len(grid)}: turn {turn + 1}, {name}, {arm}"
        with attempt(journal, arm), console.status(where):
            for found in BENCHES[name](case, arm, left):
                journal.add(bench=name, arm=arm, turn=turn, **found)
                tell(where, found)
    for arm in case.arms:
        if arm not in journal.failed and not journal.find(bench="accuracy", arm=arm):
            where = f"{case.model}: accuracy, {arm}"
            with attempt(journal, arm), console.status(where):
                found = distance(case.reference, case.score(arm), case.windows).as_dict()
                journal.add(bench="accuracy", arm=arm, bytes=case.bytes(arm), tokens=case.windows[:, 1:].size, **found)
                tell(where, found)


TOLD = {
    "tokens_per_second": "{:.0f} tokens/s",
    "seconds": "{:.3f} s a request",
    "rate": "{:g} requests/s asked",
    "requests_per_second": "{:.3g} requests/s",
    "ttft_ms": "first token {:.0f} ms",
    "tpot_ms": "each further {:.1f} ms",
    "kl": "KL {:.2e}",
    "top1": "same first token {:.1%}",
}


def tell(where: str, found: dict) -> None:
    said = [text.format(found[name]) for name, text in TOLD.items() if found.get(name) is not None]
    console.print(f"{where}: {', '.join(said)}", markup=False, soft_wrap=True)


def available(arm: str) -> bool:
    """Whether the machine can run it: FP8 needs a GPU that computes in it (Ada, Hopper and later)."""
    return arm != "FP8" or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))


def model_name(text: str) -> str:
    kind, _, name = text.partition(":")
    if kind == "random" and name not in SIZES:
        raise argparse.ArgumentTypeError(f"no {text}; there are: {', '.join(f'random:{name}' for name in SIZES)}")
    if kind != "random" and not Path(text).is_dir() and text.count("/") != 1:
        raise argparse.ArgumentTypeError(f"{text} is no folder, no Hub id (org/name) and no random:SIZE")
    return text


def main() -> int:
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = sys.argv[end + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=model_name)
    parser.add_argument("--turns", type=int, help=f"default: {TURNS}; with --quick 1")
    parser.add_argument(
        "--arms", type=re.compile, metavar="REGEX", default="", help=f"those beside {BASE}; default: all"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text for bi-smoothing; default: data-free")
    parser.add_argument("--quick", action="store_true", help="few requests: shows that everything runs")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: benchmarks/results/<machine>/serve-<model>.json"
    )
    arguments = parser.parse_args(sys.argv[1:end])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it runs ends with it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_CACHE_ROOT", str((WORK / "vllm-cache").resolve()))
    turns = arguments.turns or (1 if arguments.quick else TURNS)
    workload = QUICK if arguments.quick else WORKLOADS[DEVICE]
    arms = [arm for arm in ARMS if arm == BASE or (re.search(arguments.arms, arm) and available(arm))]
    case = Case(arguments.model, arms, workload, arguments.calibration, options)
    name = f"serve-{slug(arguments.model)}"
    path = arguments.json or (case.work / f"{name}.json" if arguments.quick else record.here(name))
    settings = {"model": arguments.model, "arms": arms, "workload": asdict(workload)}
    settings |= {"calibration": arguments.calibration and str(arguments.calibration), "engine_options": options}
    journal = Journal(case.work, settings, path)
    measure(case, journal, turns)
    journal.write()
    print(tables.engines(path))
    console.print(f"written to {path}")
    return 1 if journal.failed else 0


if __name__ == "__main__":
    sys.exit(main())
