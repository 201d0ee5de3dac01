"""Windows of text: cut as for calibration, of any model, and what is said about them in this verb's words."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.models import tiny_tokenizer
from vllm_w8a8_bismooth import measure
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.text import read_text, sample
from vllm_w8a8_bismooth.scoring.tokens import _reworded, cut, read, text_of

MEASURE = Path(measure.__file__).parent


def test_they_are_those_of_calibration(make_checkpoint, calibration_text):
    source = make_checkpoint()
    found = cut(read([calibration_text]), source, 640, 64)
    expected = sample(read_text(calibration_text), Checkpoint(source), 640, 64)
    assert np.array_equal(found.tokens, expected.tokens.numpy()) and found.tokens.shape == (10, 64)
    assert (found.tokens[:, 0] == 0).all() or not (expected.tokens[:, 0] == 0).any()
    assert found.sha256 == read_text(calibration_text).sha256 and found.files == ("calibration.txt",)


def test_a_window_leaves_room_for_the_token_that_vllm_generates(make_checkpoint, calibration_text):
    assert cut(read([calibration_text]), make_checkpoint(), 4000, 512).tokens.shape[1] == 127  # of 128 positions


def test_a_model_that_cannot_be_converted(tmp_path, calibration_text):
    """It calls its longest position otherwise."""
    from transformers import GPT2Config

    GPT2Config(vocab_size=160, n_positions=64, bos_token_id=0, eos_token_id=1).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert cut(read([calibration_text]), tmp_path, 2000, 512).tokens.shape[1] == 63


def test_the_text_of_a_token(make_checkpoint, tmp_path):
    source = make_checkpoint()
    (token,) = [t for t in range(160) if text_of(source, t) == "a"]
    assert token and text_of(tmp_path, token) is None


def test_no_message_speaks_of_calibration():
    """Whatever messages the reading of text has, in its source: none says what this verb has no option for."""
    literals = []
    for name in ("text", "corpus", "remedies", "documents", "json_rows"):
        source = (MEASURE / f"{name}.py").read_text()
        source = re.sub(r'"""(.|\n)*?"""', "", source)
        literals += [line for line in source.splitlines() if "calibration" in line and '"' in line]
    said = [line for line in literals if "calibration" in re.sub(r"^.*?\"", "", line)]
    assert said, "they have"
    for line in said:
        assert "calibration" not in _reworded(line), line


def test_a_folder_of_files_is_named_with_our_option(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    with pytest.raises(BismoothError, match="--text ") as caught:
        read([tmp_path / "texts"])
    assert "calibration" not in str(caught.value)
