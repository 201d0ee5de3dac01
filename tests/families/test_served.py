"""vLLM serves each family that it has kernels for on a CPU, with the source's predictions."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.coverage import make, serve
from tests.support.families import FAMILIES, Family

_ENGINES = 12
"""In one process."""
SERVED = [family for family in FAMILIES.values() if not family.unserved]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.soak  # ninety engines: too long for every run of CI
@pytest.mark.parametrize("first", range(0, len(SERVED), _ENGINES))
def test_vllm_serves_families(tmp_path, calibration_text, first):
    families: Sequence[Family] = SERVED[first : first + _ENGINES]
    for family in families:
        make(family, tmp_path / family.name, calibration_text)
    served = list(serve(families, tmp_path))
    assert {one.family: one.error for one in served if one.error} == {}
    assert {one.family: one.linears for one in served} == {one.family: one.expected for one in served}
    for one in served:  # a router that hesitates sends a token elsewhere
        assert one.cost < (0.1 if one.experts else 0.05) * one.yardstick, one
