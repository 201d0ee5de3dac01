"""Sweeps of which every commit sees the beginning, and CI all."""

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], fast: int = 1) -> list[Any]:
    """Cases for ``parametrize``, those behind the first ``fast`` marked slow; a tuple is the values of one case."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.slow] * (number >= fast)) for number, case in enumerate(values)]
