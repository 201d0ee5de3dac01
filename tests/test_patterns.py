"""Patterns that name linears: how a text is cut, and which names each means."""

import re

import pytest

from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.patterns import found_by, split
from vllm_w8a8_bismooth.recipe import Recipe

BLOCKS = 22
NAMES = [
    *(f"model.layers.{i}.self_attn.{letter}_proj" for i in range(BLOCKS) for letter in "qkvo"),
    *(f"model.layers.{i}.mlp.{name}" for i in range(BLOCKS) for name in ("gate", "gate_proj", "down_proj")),
    "lm_head",
]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("down_proj", ["down_proj"]),
        ("a, b ,c", ["a", "b", "c"]),
        (["a,b", "c"], ["a", "b", "c"]),
        (r"layers\.\d{1,2}\.,lm_head", [r"layers\.\d{1,2}\.", "lm_head"]),
        ("[,x],(a,b)", ["[,x]", "(a,b)"]),
        ("[(],b", ["[(]", "b"]),
        (r"a\,b,\[,c", [r"a\,b", r"\[", "c"]),
        (r"a\\,b", [r"a\\", "b"]),
        ("a,,b", ["a", "", "b"]),
        ("", [""]),
        ([], []),
    ],
)
def test_texts_are_cut_at_commas_outside_brackets(given, expected):
    assert list(split(given)) == expected
    assert split(split(given)) == split(given)


def blocks_of(pattern: str) -> list[int]:
    return sorted({int(match[1]) for name in found_by(pattern, NAMES) if (match := re.search(r"layers\.(\d+)", name))})


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [
        ("layers.1", [1]),
        (r"layers\.1\.", [1]),
        ("layers.(1|10)", [1, 10]),
        ("layers.(10|1)", [1, 10]),
        (r"layers\.[12]", [1, 2]),
        (r"layers\.1\d", list(range(10, 20))),
        ("1.mlp", [1]),
        ("re:.*layers.2", [2]),
        ("re:model.layers.21.*", [21]),
        ("re:layers.1", []),
        ("(?i)LAYERS.2.MLP", [2]),
        ("(?x) layers.2  # the third", [2]),
        ("model.layers.3.mlp.down_proj", [3]),
    ],
)
def test_no_pattern_takes_a_number_apart(pattern, blocks):
    assert blocks_of(pattern) == blocks


def test_a_full_name_means_one_module():
    assert found_by("model.layers.3.mlp.gate", NAMES) == {"model.layers.3.mlp.gate"}
    assert found_by("layers.3.mlp.gate", NAMES) == {"model.layers.3.mlp.gate", "model.layers.3.mlp.gate_proj"}
    assert found_by("re:.*mlp.gate$", NAMES) == {f"model.layers.{i}.mlp.gate" for i in range(BLOCKS)}
    assert found_by("re:.*lm_head", NAMES) == {"lm_head"}


def test_recipes_hold_single_patterns():
    recipe = Recipe.of("bismooth", ignore=["a,b", "c"], group_size=32, group_layers="x{1,2}")
    assert recipe.ignore == ("a", "b", "c") and recipe.group_layers == ("x{1,2}",)
    assert Recipe("rtn", ignore="a,b") == Recipe("rtn", ignore=["a", "b"]) == Recipe.of("rtn", ignore=("a", "b"))
    assert Recipe.of("rtn", ignore=[]) == Recipe.of("rtn")


def test_stored_recipes_are_compared_pattern_by_pattern():
    """As lists, and as 0.1.0 stored them: as one text."""
    recipe = Recipe.of("rtn", ignore=["a", "b{1,2}"])
    stored = {"method": "rtn", **dict.fromkeys(("smoothing", "alpha", "calibration_tokens", "group_size"))}
    assert not recipe.differences({**stored, "ignore": ["a", "b{1,2}"]})
    assert not recipe.differences({**stored, "ignore": "a,b{1,2}"})
    assert recipe.differences({**stored, "ignore": ["a", 7]}) == ["ignore: a,7 there, a,b{1,2} now"]
    assert recipe.differences({**stored, "ignore": None}) == ["ignore: None there, a,b{1,2} now"]


@pytest.mark.parametrize("pattern", ["(", "*", "re:[", "a{3,1}", "re:", "(?P<a>x)(?P<a>y)", r"\1"])
def test_what_is_no_expression_is_refused(pattern):
    with pytest.raises(BismoothError, match="--ignore"):
        Recipe.of("rtn", ignore=pattern)
