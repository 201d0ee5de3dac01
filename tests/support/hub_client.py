"""Processes that take the server of :mod:`tests.support.hub` for the Hub: others, and this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from vllm_w8a8_bismooth.cli import main
from vllm_w8a8_bismooth.errors import BismoothError


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


def command(patch: pytest.MonkeyPatch, folder: Path, endpoint: str, token: str | None, *words):
    """``bismooth ...`` in this process, as a finished one; what the user of this machine has of the Hub is not seen.

    For uploads: the addresses of downloads were made when the library was imported.

    Args:
        patch: holds as long as it does.
        folder: an empty one for cache and tokens.
        endpoint: the server's.
        token: of the user, if there is one.
        words: of the command.
    """
    for name, value in {
        "ENDPOINT": endpoint,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_TOKEN_PATH": str(folder / "token"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        patch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
    arguments = [str(word) for word in words]
    try:
        done = CliRunner().invoke(main.app, arguments, catch_exceptions=False)
    except (BismoothError, OSError) as error:  # as main catches them
        return subprocess.CompletedProcess(arguments, 2, "", f"Error: {error}")
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)
