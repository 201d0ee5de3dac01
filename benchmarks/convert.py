"""What a conversion costs: `bismooth convert` beside llm-compressor, on blocks of LLaMA3-70B's width.

    python -m benchmarks.convert [--quick] [--peer PYTHON] [--repeats N] [--keep] [--json FILE]

An arm is one way to convert, by us or by llm-compressor. The checkpoints are random, with few blocks and the test bed's
tokenizer and vocabulary, so that blocks dominate. Each conversion is a whole process: wall seconds, CPU seconds (user
and system), peak resident bytes of that process (pages of mapped files count), bytes that it left on disk. The arms
take turns; before each the source is read, so that all meet it in the page cache, and after each the output is deleted.
``--peer`` is the Python of an environment with llm-compressor (`pip install llmcompressor` into a fresh one), which is
compared as a whole process and, since its imports are slow, without them; ours always counts whole. Both calibrate on
the same 16 windows of 256 tokens.

Then the arm that holds most, once on twice the blocks: peak memory must not grow with depth. Last, what a user waits
for `bismooth --help`, and for `bismooth inspect` on the headers of a whole LLaMA3-70B (sparse files, 141 GB long).
``--quick`` takes narrow blocks, one turn and one deep arm: it shows that everything runs, and measures mostly imports.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from benchmarks import record
from benchmarks.random_llama import checkpoint, hole, noise
from benchmarks.testbed import PYTHON

# No torch here, nor in what is imported: the peak of a child starts from what its parent holds.

WORK = Path("build/convert")
# As installers leave it behind: where Python may not write it, each start compiles thousands of modules.
BYTECODE = {"PYTHONPYCACHEPREFIX": str((WORK / "bytecode").resolve()), "PYTHONDONTWRITEBYTECODE": ""}
BISMOOTH = str(Path(sys.executable).with_name("bismooth"))
PEER_SCRIPT = str(Path(__file__).with_name("peer_convert.py"))

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
WHOLE_70B = LLAMA_70B | {"vocab_size": 128256, "num_hidden_layers": 80, "max_position_embeddings": 8192}
# The position limit makes `bismooth` cut the text into the windows that the peer gets.
WIDE = LLAMA_70B | {"max_position_embeddings": 256}
NARROW = WIDE | {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 4, "num_key_value_heads": 2}

CALIBRATED = ("--calibration", str(PYTHON.calibration), "--calibration-tokens", "4096")
OURS = {
    "RTN": ("--method", "rtn"),
    "data-free": ("--method", "bismooth", "--calibration", "none"),
    "calibrated": ("--method", "bismooth", *CALIBRATED),
}
PEERS = {
    "llm-compressor RTN": "rtn",
    "llm-compressor RTN, model-free": "model-free",
    "llm-compressor SmoothQuant": "smoothquant",
}
# Which of ours does the work of which of the peer's, and the share of its time that may take.
PAIRS = {
    ("RTN", "llm-compressor RTN"): 0.4,
    ("data-free", "llm-compressor RTN"): 0.4,
    ("RTN", "llm-compressor RTN, model-free"): 0.4,
    ("calibrated", "llm-compressor SmoothQuant"): 0.6,
}
GROWTH, PEAK_BYTES, HELP_SECONDS, INSPECT_SECONDS = 1.05, 4e9, 0.5, 2.0


@dataclass(frozen=True)
class Scale:
    """How much to measure: the shape of blocks, how many of them for turns and for depth, arms in depth, turns."""

    name: str
    sizes: dict
    shallow: int
    deep: int
    deep_arms: tuple[str, ...]
    repeats: int


FULL = Scale("70b-wide", WIDE, 4, 8, ("calibrated",), 3)  # the arm that holds most
QUICK = Scale("narrow", NARROW, 2, 4, ("data-free",), 1)

console = Console()


def run(command: list[str], name: str) -> dict:
    """Run a process alone, with its output in ``WORK``: wall and CPU seconds, peak resident bytes.

    Raises:
        RuntimeError: it failed; the message ends with the tail of its standard error.
    """
    out, log = WORK / f"{name}.out", WORK / f"{name}.log"
    with open(out, "wb") as stdout, open(log, "wb") as stderr:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | BYTECODE
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        # Of this child; what getrusage tells of children is their maximum so far.
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed ({child.returncode}):\n{log.read_text()[-3000:]}")
    cpu_seconds = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_rss_bytes": used.ru_maxrss * 1024}


def conversion(arm: str, source: Path, destination: Path, peer: str | None) -> dict:
    """One conversion from a cached source: figures of :func:`run`, bytes written; of the peer what it says as well."""
    for path in source.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    if arm in OURS:
        command = [BISMOOTH, "convert", str(source), str(destination), *OURS[arm]]
    else:
        command = [peer, PEER_SCRIPT, PEERS[arm], str(source), str(destination), str(PYTHON.calibration)]
    name = arm.replace(",", "").replace(" ", "-")
    result = run(command, name)
    result["output_bytes"] = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    if arm in PEERS:
        said = json.loads((WORK / f"{name}.out").read_text().splitlines()[-1])
        result |= {"inside_seconds": said["seconds"], "versions": said["versions"]}
    shutil.rmtree(destination)
    os.sync()  # or the next arm waits for this one's writes
    return result


def measure(source: Path, blocks: int, arms: list[str], peer: str | None, repeats: int) -> tuple[list[dict], dict]:
    """Conversions in turns: a row for each arm with lists over the turns and their medians; the peer's versions."""
    turns, versions = {arm: [] for arm in arms}, {}
    for turn in range(repeats):
        first = turn % len(arms)
        for arm in arms[first:] + arms[:first]:
            with console.status(f"{blocks} blocks, turn {turn + 1} of {repeats}: {arm}"):
                result = conversion(arm, source, WORK / "output", peer)
            versions |= result.pop("versions", {})
            turns[arm].append(result)
            console.print(f"{blocks} blocks, turn {turn + 1} of {repeats}: {arm}, {result['seconds']:.1f} s")
    rows = []
    for arm, results in turns.items():
        lists = {key: [result[key] for result in results] for key in results[0]}
        medians = {key: statistics.median(values) for key, values in lists.items()}
        rows.append({"arm": arm, "blocks": blocks, **lists, "median": medians})
    return rows, versions


def ratios(rows: list[dict]) -> list[dict]:
    """Ours over the peer's, of medians at equal blocks: seconds with and without the peer's imports, peak bytes."""
    medians = {(row["arm"], row["blocks"]): row["median"] for row in rows}
    return [
        {
            "ours": ours,
            "peer": peer,
            "blocks": blocks,
            "seconds": medians[ours, blocks]["seconds"] / median["seconds"],
            "seconds_without_imports": medians[ours, blocks]["seconds"] / median["inside_seconds"],
            "peak_rss": medians[ours, blocks]["peak_rss_bytes"] / median["peak_rss_bytes"],
        }
        for ours, peer in PAIRS
        for (arm, blocks), median in medians.items()
        if arm == peer
    ]


def wait_for(arguments: list[str], name: str) -> float | None:
    """Median seconds of five runs of `bismooth`; none for a verb that it lacks."""
    try:
        return statistics.median(run([BISMOOTH, *arguments], name)["seconds"] for _ in range(5))
    except RuntimeError as error:
        if "No such command" in str(error):
            return None
        raise


def targets(rows: list[dict], compared: list[dict]) -> list[dict]:
    """What is promised: name, largest allowed value, measured value, whether met.

    Times of conversions are ratios to the peer's without its imports. What is missing has no measured value.
    """
    shallow, deep = sorted({row["blocks"] for row in rows})
    peaks = {(row["arm"], row["blocks"]): row["median"]["peak_rss_bytes"] for row in rows}
    whole = checkpoint(WORK / "llama-70b-headers", WHOLE_70B, hole)
    inspect = wait_for(["inspect", str(whole), "--json"], "inspect")
    shutil.rmtree(whole)  # whoever copies it would write out its holes
    measured = {
        **{
            f"seconds of {row['ours']}, x {row['peer']}": (
                PAIRS[row["ours"], row["peer"]],
                row["seconds_without_imports"],
            )
            for row in compared
        },
        **{
            f"{arm}: peak bytes, {blocks} blocks": (PEAK_BYTES, peak)
            for (arm, blocks), peak in peaks.items()
            if arm in OURS
        },
        **{
            f"{arm}: peak memory, {deep} / {shallow} blocks": (GROWTH, peak / peaks[arm, shallow])
            for (arm, blocks), peak in peaks.items()
            if blocks == deep
        },
        "seconds of --help": (HELP_SECONDS, wait_for(["--help"], "help")),
        "seconds of inspect, LLaMA3-70B": (INSPECT_SECONDS, inspect),
    }
    return [
        {"name": name, "target": target, "measured": value, "met": None if value is None else value <= target}
        for name, (target, value) in measured.items()
    ]


def show(rows: list[dict], compared: list[dict], promised: list[dict]) -> None:
    table = Table(Column("arm", no_wrap=True), "blocks", "wall s", "less imports", "CPU s", "peak GB", "output GB")
    for row in rows:
        median = row["median"]
        seconds = f"{median['seconds']:.1f}"
        if len(row["seconds"]) > 1:
            seconds += f" ({min(row['seconds']):.1f} to {max(row['seconds']):.1f})"
        inside = f"{median['inside_seconds']:.1f}" if "inside_seconds" in median else ""
        sizes = [f"{median[key] / 1e9:.2f}" for key in ("peak_rss_bytes", "output_bytes")]
        table.add_row(row["arm"], str(row["blocks"]), seconds, inside, f"{median['cpu_seconds']:.1f}", *sizes)
    console.print(table)
    if compared:
        table = Table("ours", Column("peer", no_wrap=True), "wall, ours / peer", "less its imports", "peak memory")
        for row in compared:
            cells = [f"{row[key]:.2f}" for key in ("seconds", "seconds_without_imports", "peak_rss")]
            table.add_row(row["ours"], row["peer"], *cells)
        console.print(table)
    table = Table("target", "at most", "measured", "met")
    for row in promised:
        value = "missing" if row["measured"] is None else f"{row['measured']:.3g}"
        table.add_row(row["name"], f"{row['target']:g}", value, {True: "yes", False: "NO", None: ""}[row["met"]])
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="narrow blocks, one turn")
    parser.add_argument("--peer", metavar="PYTHON", help="of an environment that has llm-compressor")
    parser.add_argument("--repeats", type=int, help=f"turns ({FULL.repeats}; with --quick {QUICK.repeats})")
    parser.add_argument("--keep", action="store_true", help="keep the deeper checkpoint, 14 GB")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    WORK.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(WORK / "output", ignore_errors=True)  # of a run that was cut short

    def source(blocks: int) -> Path:
        with console.status(f"writing {blocks} blocks"):
            return checkpoint(WORK / f"{scale.name}-{blocks}", scale.sizes | {"num_hidden_layers": blocks}, noise())

    arms = [*OURS, *(PEERS if arguments.peer else ())]
    if not arguments.quick:
        with console.status("warming up"):  # bytecode, and programs in the page cache
            small = checkpoint(WORK / f"{QUICK.name}-1", QUICK.sizes | {"num_hidden_layers": 1}, noise())
            for arm in arms:
                conversion(arm, small, WORK / "output", arguments.peer)
    rows, versions = measure(
        source(scale.shallow), scale.shallow, arms, arguments.peer, arguments.repeats or scale.repeats
    )
    rows += measure(source(scale.deep), scale.deep, list(scale.deep_arms), None, 1)[0]
    if not arguments.keep:
        shutil.rmtree(source(scale.deep))
    compared = ratios(rows)
    promised = targets(rows, compared)
    show(rows, compared, promised)
    if arguments.json:
        settings = {"hidden_size": scale.sizes["hidden_size"], "intermediate_size": scale.sizes["intermediate_size"]}
        record.write(arguments.json, rows, settings=settings, ratios=compared, targets=promised, peer_versions=versions)


if __name__ == "__main__":
    main()
