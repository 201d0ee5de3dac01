"""The demo on the small model that takes the real one's place: one collapse, seen in real vLLM."""

import pytest

from benchmarks import demo
from benchmarks.real.packages import Unavailable
from benchmarks.testbed import PYTHON


def test_a_small_model_takes_the_place_of_one_that_cannot_be_had(monkeypatch, capsys):
    def unavailable():
        raise Unavailable("the index cannot be reached")

    monkeypatch.setattr(demo, "smollm2", unavailable)
    subject = demo.subject_here()
    assert subject.folder == PYTHON.model and subject.windows.shape == (demo.WINDOWS, 256)
    assert len(subject.prompts) == 3
    said = capsys.readouterr().out
    assert "the index cannot be reached" in said and "takes its place" in said


@pytest.mark.engine
def test_arms_are_converted_and_speak(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WORK", tmp_path)
    monkeypatch.setattr(demo, "PLANTED", tmp_path / "planted")
    monkeypatch.setattr(demo, "ARMS", {"bf16": (True, None), "RTN": (True, ("--method", "rtn"))})
    subject = demo.bed()
    checkpoints = demo.convert_arms(subject)
    assert checkpoints == {"bf16": tmp_path / "planted", "RTN": tmp_path / "RTN"}
    found = demo.measure(subject, checkpoints, "float32")
    assert found["bf16"].divergence.kl < 1e-9 and found["RTN"].divergence.kl > 1
    for prompt, answer in zip(subject.prompts, found["bf16"].answers, strict=True):
        assert answer and answer != prompt
    assert found["RTN"].answers != found["bf16"].answers
    assert demo.table(subject, found, "float32").row_count == demo.answers(subject, found).row_count == 2
