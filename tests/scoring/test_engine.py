"""A score in real vLLM, of the trained test bed."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import vllm_w8a8_bismooth as b
from benchmarks import emulate
from benchmarks.compare import distance
from benchmarks.score import log_probabilities
from benchmarks.testbed import PYTHON
from tests.support.command import run
from tests.support.conversion import convert
from tests.support.rename import architecture
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report import section

pytestmark = [pytest.mark.slow, pytest.mark.engine]
ASKED = {"against": PYTHON.model, "tokens": 1024, "window": 128}


class Killed(Exception):
    """In the middle of a score."""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Held-out tokens as text, which calibration never saw."""
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    stream = np.load(PYTHON.folder / "heldout.npy")[:3000]
    path.write_text(AutoTokenizer.from_pretrained(PYTHON.model).decode(stream))
    return path


def test_rounding_is_scored_as_it_is_served(text, tmp_path, monkeypatch):
    """Interrupted, resumed, against emulation and against vLLM's own answer; the source is itself; the card says it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    out = tmp_path / "int8"
    convert(PYTHON.model, out, Recipe.of("rtn"))

    def kill(stage: str, done: int, total: int, written: int = 0) -> None:
        if stage == "checkpoint" and done == 3:
            raise Killed

    with pytest.raises(Killed):
        b.score(out, text=text, **ASKED, progress=kill)
    steps: list[tuple[str, int]] = []
    found = b.score(out, text=text, **ASKED, write_card=True, progress=lambda *step: steps.append(step[:2]))
    assert found.windows == found.reused == 8 and found.length == 128 and found.quantization == "w8a8_bismooth"
    assert "source" not in dict(steps) and ("checkpoint", 3) not in steps and ("checkpoint", 4) in steps

    windows = np.load(found.store / "tokens.npy")
    kept = np.stack([np.load(found.store / "source" / f"{i:06d}.npy") for i in range(8)])
    answered = log_probabilities(PYTHON.model, windows[:1], tmp_path / "log", dict(os.environ))
    assert np.abs(kept[:1] - answered).max() < 1e-4, "prompt_logprobs=-1"

    emulated = [emulate.log_probabilities(emulate.load(folder), windows) for folder in (PYTHON.model, out)]
    expected, own = distance(*emulated, windows), found.divergence
    assert expected.kl / 1.5 < own.kl < 1.5 * expected.kl, (expected, own)
    assert abs(own.top1 - expected.top1) < 0.02 and own.perplexity == pytest.approx(expected.ppl, rel=0.01)
    assert own.kl_interval[0] < own.kl < own.kl_interval[1] and own.kl_median < own.kl < own.kl_p999 <= own.kl_worst

    card = (out / "README.md").read_bytes()
    assert f"| KL divergence, nats a token: mean | {own.kl:.2e} (".encode() in section.held(card)

    itself = b.score(PYTHON.model, text=text, **ASKED)
    assert itself.reused == 8 and itself.divergence.kl < 1e-6 and itself.divergence.top1 == 1
    assert abs(itself.divergence.log_ratio) < 1e-6 and itself.quantization is None


def test_an_engine_that_fails_says_why(text, tmp_path, monkeypatch):
    """What vLLM refuses is its own matter."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(PYTHON.model, tmp_path / "broken")
    architecture(tmp_path / "broken", "UnheardOfForCausalLM")
    code, said = run("score", tmp_path / "broken", "--against", PYTHON.model, "--text", text, "--tokens", 64)
    assert code == 2 and "vLLM failed on it (exit code 1), and said at last:" in said
    assert "UnheardOfForCausalLM" in said and "the whole log is " in said
