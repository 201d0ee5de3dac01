"""Acceptance of drafters is counted by vLLM, and summed up as it says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import vllm_w8a8_bismooth as package
from benchmarks.real import eagle, texts
from benchmarks.real.drafters import AHEAD, Acceptance, Count, coarsen, measure, summarize
from benchmarks.testbed import PYTHON
from vllm_w8a8_bismooth.checkpoint.layout import Source


def test_figures_are_ratios_of_sums():
    """Three prompts: one with two steps, one with four, and one whose answer ended with its first token."""
    count = Count(drafts=5, drafted=15, accepted=9, positions=[4, 3, 2], answers=[[4, 4], [1, 3, 2, 1], []])
    found = summarize(count)
    assert (found.rate, found.positions, found.covered) == (9 / 15, [4 / 5, 3 / 5, 2 / 5], 5 / 6)
    assert (found.length, found.steps, found.prompts) == (15 / 6, 6, 2)
    assert found.interval == pytest.approx((7 / 4, 8 / 2)), "of two prompts, both draws may be either"
    alike = summarize(Count(drafts=5, drafted=15, accepted=9, positions=[4, 3, 2], answers=[[2, 3]] * 5))
    assert alike.interval == pytest.approx((2.5, 2.5))


def test_a_coarse_draft_is_the_model_in_few_bits(tmp_path):
    coarsen(PYTHON.model, tmp_path / "coarse", bits=3)
    before, after = Source(PYTHON.model).checkpoint, Source(tmp_path / "coarse").checkpoint
    linears = [name for name in before.headers if "_proj" in name]
    assert before.headers.keys() == after.headers.keys() and linears
    for name in before.headers:
        old, new = before.read(name), after.read(name)
        if name in linears:
            assert max(len(row.unique()) for row in new) <= 7 and not old.equal(new)
        else:
            assert old.equal(new), name


def test_a_head_guesses_the_next_state(tmp_path, monkeypatch):
    """On text that it was not fitted to: better than to say again what the model said last."""
    monkeypatch.setattr(texts, "TEXTS", ("python",))
    eagle.fit(PYTHON.model, tmp_path / "head", windows=64)
    model = AutoModelForCausalLM.from_pretrained(PYTHON.model, dtype=torch.bfloat16)
    weight = load_file(tmp_path / "head" / "model.safetensors")["fc.weight"]
    tokens = torch.from_numpy(PYTHON.heldout_windows(8))
    with torch.no_grad():
        states = model.model(input_ids=tokens).last_hidden_state
        inputs = torch.cat([model.get_input_embeddings()(tokens)[:, 1:], states[:, :-1]], dim=-1)
        guessed, again, said = (model.lm_head(s).argmax(-1) for s in (inputs @ weight.T, states[:, :-1], states[:, 1:]))
    assert (guessed == said).float().mean() > 0.15 > 2 * (again == said).float().mean()


@pytest.mark.engine
def test_a_model_keeps_nearly_all_that_it_drafted_itself():
    """Not all: one token and several in a step are rounded otherwise, which decides near-ties."""
    found, count = counted(PYTHON.model, {"method": "draft_model", "model": str(PYTHON.model)})
    assert count.positions == sorted(count.positions, reverse=True)
    assert 0.9 < found.rate <= 1 and 3 < found.length <= AHEAD + 1


@pytest.mark.engine
def test_a_head_reads_the_states_of_an_int8_model(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "TEXTS", ("python",))
    eagle.fit(PYTHON.model, tmp_path / "head", windows=64)
    package.convert(PYTHON.model, tmp_path / "int8", calibration="none")
    found, _ = counted(tmp_path / "int8", {"method": "eagle", "model": str(tmp_path / "head")})
    assert 0.15 < found.positions[0] < 0.9 and found.length > 1.15


def counted(target: Path, drafter: dict) -> tuple[Acceptance, Count]:
    """Sixteen short answers, of which vLLM's counters and the steps say the same."""
    count = measure(target, drafter, PYTHON.heldout_windows(16, 32).tolist(), tokens=12)
    found = summarize(count)
    assert count.drafted == AHEAD * count.drafts and count.accepted == sum(count.positions) and found.covered == 1
    assert [sum(answer) for answer in count.answers] == [11] * 16, "tokens behind the first"
    return found, count
