"""The calibration text that comes with this package, and the words that choose it or none."""

from importlib import resources
from pathlib import Path

WORD, NONE = "bundled", "none"
"""What ``--calibration`` takes instead of a file. A file that is called so is ``./bundled``, ``./none``."""
NAME = "bundled calibration text"
"""Of the text, for people."""


def path() -> Path:
    """Of its gzipped JSON lines; benchmarks/calibration/build.py made them, and LICENSES beside them says of what."""
    return Path(str(resources.files("vllm_w8a8_bismooth") / "data" / "calibration.jsonl.gz"))
