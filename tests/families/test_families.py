"""Each family from its config to a checked checkpoint: nothing in it is special to a type."""

from pathlib import Path

import pytest

from tests.support.coverage import prove
from tests.support.families import FAMILIES
from tests.support.sweep import rotation


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    """Nothing was found out before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", rotation(FAMILIES))
def test_a_family_is_found_out_converted_and_keeps_its_function(tmp_path, calibration_text, name):
    proof = prove(FAMILIES[name], tmp_path, calibration_text)
    assert proof.discovery < 60
    assert proof.function < 1e-5
    assert (proof.stream is None) is FAMILIES[name].uncalibrated and (proof.stream or 0) < 1e-4
    assert not proof.faults
    assert set(proof.floats) == FAMILIES[name].floats and all(proof.floats.values())
    # All that JetMoE's norms feed is stacks of experts, which vLLM takes in float alone.
    assert (proof.sites or proof.family == "jetmoe") and set(proof.converted.values()) == {proof.linears}
