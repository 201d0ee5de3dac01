"""Sweeps of which every commit sees a part, and CI all."""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest


def sweep(cases: Iterable[Any], fast: int = 1) -> list[Any]:
    """Cases for ``parametrize``, those behind the first ``fast`` marked slow; a tuple is the values of one case."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.slow] * (number >= fast)) for number, case in enumerate(values)]


def rotation(cases: Iterable[str], parts: int = 3) -> list[Any]:
    """Cases for ``parametrize``, one in ``parts`` not marked slow: which ones depends on the commit."""
    turn = _commit() % parts
    return [
        pytest.param(case, marks=[pytest.mark.slow] * (number % parts != turn)) for number, case in enumerate(cases)
    ]


def _commit() -> int:
    """The tree's commit as a number; 0 where there is no repository."""
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return int(done.stdout, 16) if done.returncode == 0 else 0
