"""Which tokens are taken of calibration text, and what is said of them."""

import json

import pytest

from tests.support.command import patience
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.measure.text import read_text, sample


def lines(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return read_text(path)


def test_documents_are_those_of_the_windows(make_checkpoint, tmp_path):
    """More are looked at than the budget has room for."""
    text = lines(tmp_path / "rows.jsonl", (f"{i:05d}" * 20 for i in range(5000)))
    found = sample(text, Checkpoint(make_checkpoint()), 1000)
    assert found.tokens.shape == (7, 128) and 7 <= found.used.documents <= 7 * 3


@pytest.mark.parametrize("budget", [1000, 2000, 3900, 8000, 16384, 31250])
def test_rows_of_alternating_length_fill_the_budget(make_checkpoint, tmp_path, budget):
    """Whatever the distance between those that are taken: the text has many times as much."""
    text = lines(tmp_path / "rows.jsonl", ("s" * 2 if i % 2 else "L" * 4000 for i in range(2000)))
    found = sample(text, Checkpoint(make_checkpoint()), budget)
    assert found.tokens.shape == (budget // 128, 128)


def test_templates_that_say_much_take_no_longer(make_checkpoint, tmp_path):
    """As those with a long system prompt: with chats of few words, 100 times what is said."""
    source = make_checkpoint()
    prompt = "You are a model. " * 200
    (source / "chat_template.jinja").write_text(prompt + "{% for m in messages %}{{ m.content }}{% endfor %}")
    chats = [{"messages": [{"role": "user", "content": f"{i:05d}"}]} for i in range(20000)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    with patience(20):
        found = sample(read_text(tmp_path / "chats.jsonl"), Checkpoint(source), 3000)
    assert found.tokens.shape == (23, 128) and 1 < found.used.documents <= 2 * 23


def test_no_budget_is_passed(make_checkpoint, tmp_path):
    """Not by the token that begins a window."""
    source = make_checkpoint()
    settings = json.loads((source / "tokenizer.json").read_text())
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (source / "tokenizer.json").write_text(json.dumps(settings))
    text = lines(tmp_path / "rows.jsonl", ["abc" * 99])
    shapes = [tuple(sample(text, Checkpoint(source), budget).tokens.shape) for budget in (1, 2, 130)]
    assert shapes == [(1, 1), (1, 2), (1, 128)]
    assert sample(text, Checkpoint(source), 2).tokens[0, 0] == 0 != sample(text, Checkpoint(source), 1).tokens[0, 0]
