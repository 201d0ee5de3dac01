"""Tasks of lm-evaluation-harness on checkpoints in vLLM, for users with a real model.

    python -m benchmarks.harness CHECKPOINT... [--tasks A,B] [--include-path DIR] [--limit N] [--model-args K=V,...]
                                 [--json FILE]

Needs `pip install lm-eval` (not its extra ``vllm``, which brings packages that a CPU build of torch trips over). Each
checkpoint is loaded in a process of its own. BOS leads every prompt of every arm, as in training; whether it does by
default depends on the tokenizer. Without ``--tasks``: `tasks/continuation.yaml`, which needs no network.

Errors are those of one checkpoint on a draw of questions. All checkpoints answer the same questions, so the difference
between two of them is known more exactly than the errors suggest.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from benchmarks import record
from benchmarks.score import engine_environment

TASKS = Path(__file__).with_name("tasks")
LOCAL = "python_continuation"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
MODEL_ARGS = "add_bos_token=True,enforce_eager=True"

console = Console()


def evaluate(checkpoint: str, arguments: argparse.Namespace) -> dict:
    """The harness' results on one checkpoint.

    Raises:
        RuntimeError: it failed; the message ends with the tail of what it said.
    """
    environment = engine_environment() | (OFFLINE if arguments.tasks == LOCAL else {})
    with tempfile.TemporaryDirectory() as scratch:
        model_args = f"pretrained={checkpoint},{MODEL_ARGS}"
        if arguments.model_args:
            model_args += f",{arguments.model_args}"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "vllm", "--model_args", model_args]
        command += ["--tasks", arguments.tasks, "--include_path", str(arguments.include_path)]
        command += ["--batch_size", "auto", "--output_path", scratch]
        if arguments.limit is not None:
            command += ["--limit", str(arguments.limit)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found = list(Path(scratch).rglob("results*.json"))
        if done.returncode or len(found) != 1:
            raise RuntimeError(f"lm-eval failed on {checkpoint} ({done.returncode}):\n{done.stdout[-3000:]}")
        return json.loads(found[0].read_text())


def parse(checkpoint: str, results: dict) -> list[dict]:
    """One row a task and metric of the harness' results; an error is none where the harness gives none."""
    rows = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    "checkpoint": checkpoint,
                    "task": task,
                    "metric": metric if kind == "none" else f"{metric} ({kind})",
                    "value": value,
                    "stderr": error if isinstance(error, (int, float)) else None,
                    "questions": results.get("n-samples", {}).get(task, {}).get("effective"),
                }
            )
    return rows


def table(rows: list[dict]) -> Table:
    """A section for each task and metric, in it a line for each checkpoint."""
    result = Table(Column("checkpoint", overflow="fold"), Column("± standard error", justify="right"))
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        section = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        questions = section[0]["questions"]
        result.add_row(f"{task}, {metric}" + ("" if questions is None else f", {questions} questions"), style="bold")
        for row in section:
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
            result.add_row(row["checkpoint"], f"{row['value']:.4f}{error}")
        result.add_section()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--tasks", default=LOCAL, help=f"names, separated by commas ({LOCAL})")
    parser.add_argument("--include-path", type=Path, default=TASKS, help="folder with further tasks")
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--model-args", help="further arguments of the engine, e.g. tensor_parallel_size=8")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        parser.exit(1, "lm-evaluation-harness is missing: pip install lm-eval\n")
    rows, versions = [], {}
    for checkpoint in arguments.checkpoints:
        with console.status(checkpoint):
            results = evaluate(checkpoint, arguments)
        rows += parse(checkpoint, results)
        versions |= results.get("versions", {})
        console.print(f"{checkpoint}: done", highlight=False)
    console.print(table(rows))
    if arguments.json:
        record.write(arguments.json, rows, model_args=MODEL_ARGS, tasks=versions, limit=arguments.limit)


if __name__ == "__main__":
    main()
