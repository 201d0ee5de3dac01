"""Which vocabularies count as the same."""

import pytest

from vllm_w8a8_bismooth.scoring.vocabulary import _numbers, size


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"vocab_size": 7}, 7),
        ({"text_config": {"vocab_size": 8}}, 8),
        ({"text_config": 3}, None),
        ({"vocab_size": "many"}, None),
        ({}, None),
    ],
)
def test_size(config, tokens):
    assert size(config) == tokens


@pytest.mark.parametrize(
    ("tokenizer", "numbers"),
    [
        ({"model": {"vocab": {"a": 0, "b": 1}}}, {"a": 0, "b": 1}),
        ({"model": {"vocab": [["a", -1.5], ["b", -2.0]]}}, {"a": 0, "b": 1}),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 5, "content": "<s>"}, 3]}, {"a": 0, "<s>": 5}),
        ({"model": {"vocab": [[], 3]}}, {"[]": 0, "3": 1}),
        ({"model": 3, "added_tokens": 4}, {}),
        ({}, {}),
    ],
)
def test_numbers(tokenizer, numbers):
    """Of any kind, and of what is none."""
    assert _numbers(tokenizer) == numbers
