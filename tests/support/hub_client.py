"""A process that takes the server of :mod:`tests.support.hub` for the Hub."""

import os
import subprocess
import sys
from pathlib import Path


def python(folder: Path, endpoint: str, *words, **environment: str) -> subprocess.CompletedProcess:
    """``python -m ...`` with a Hub cache of its own in an empty folder."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_HUB_DISABLE_XET": "1",
    }
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    (folder / "here").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        env=kept | settings | environment,
        cwd=folder / "here",
        capture_output=True,
        text=True,
    )
