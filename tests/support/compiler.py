"""g++ for kernels that run on the host; what it made is kept in ``build/host`` for the next run of the same sources."""

import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build/host"


@functools.cache
def machine() -> bytes:
    """The compiler and what ``-march=native`` may depend on."""
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return version + b"".join(sorted({line for line in lines if line.startswith((b"flags", b"model name"))}))


def digest(flags: Sequence[str], sources: Sequence[Path], includes: Sequence[Path]) -> str:
    """A digest of all that decides on the result; where files lie does not."""
    found = hashlib.sha256(machine() + "\0".join(flags).encode())
    for folder in includes:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cpp"):
                found.update(f"\0{path.relative_to(folder)}\0".encode() + path.read_bytes())
    for path in sources:
        found.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return found.hexdigest()


def build(flags: Sequence[str], sources: Sequence[Path], includes: Sequence[Path]) -> Path:
    """``g++ FLAGS -I INCLUDES SOURCES``, whose warnings are errors.

    Args:
        flags: none of which names a file.
        sources: C++ files, or objects.
        includes: folders.
    """
    made = KEPT / digest(flags, sources, includes)
    if not made.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as scratch:
            command = ["g++", *flags, *(f"-I{folder}" for folder in includes), *map(str, sources)]
            target = Path(scratch, "made")
            done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
            assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
            os.replace(target, made)
    return made
