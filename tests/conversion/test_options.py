"""``--ignore`` and ``--group-layers``: as people write them, and what is said of what they name."""

import json

import pytest

from tests.support.command import json_of, run
from tests.support.conversion import convert
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.conversion.options import ignored_by_name
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.verification import verify

RTN = ("--method", "rtn")
DOWN = [f"model.layers.{i}.mlp.down_proj" for i in range(12)]
HABITS = {
    "twice": (["down_proj", "layers.1.self_attn.o_proj"], [*DOWN, "model.layers.1.self_attn.o_proj"], []),
    "a list": (["down_proj, layers.1.self_attn.o_proj"], [*DOWN, "model.layers.1.self_attn.o_proj"], []),
    "a block": (["layers.1"], None, []),
    "a block and what is float": (["lm_head", r"re:.*layers\.1\..*"], None, ["lm_head"]),
    "llm-compressor's": (["lm_head,re:.*mlp.down_proj$"], DOWN, ["lm_head"]),
    "llm-compressor's head": (["re:.*lm_head", DOWN[3]], [DOWN[3]], ["lm_head"]),
    "only the head": (["lm_head"], [], ["lm_head"]),
    "full names": (DOWN[1:3], DOWN[1:3], []),
    "a sibling": (["model.layers.4.self_attn.k_proj"], [f"model.layers.4.self_attn.{x}_proj" for x in "kqv"], []),
    "the embedding": (["re:model.embed_tokens", DOWN[0]], [DOWN[0]], ["model.embed_tokens"]),
    "commas in brackets": ([r"layers\.\d{1,2}\.mlp\.down"], DOWN, []),
}


@pytest.mark.parametrize("case", HABITS)
def test_patterns_as_people_write_them(make_checkpoint, tmp_path, case):
    given, expected, in_float = HABITS[case]
    source, out = make_checkpoint(num_hidden_layers=12), tmp_path / "out"
    options = [word for pattern in given for word in ("--ignore", pattern)]
    code, text = run("convert", source, out, *RTN, "--dry-run", "--json", *options)
    plan = json_of(text)
    if expected is None:
        expected = [f"model.layers.1.{name}" for name in Source(source).layers[1].linears]
    assert code == 0 and sorted(plan["ignored"]) == sorted(expected) and plan["already_float"] == in_float
    code, text = run("convert", source, out, *RTN, *options)
    assert code == 0 and ("In float anyway, also without --ignore: " in text) == bool(in_float), text
    assert json.loads((out / "report.json").read_text())["ignored"] == plan["ignored"]
    assert run("convert", source, out, *RTN, *options)[1].count("nothing to do") == 1
    found = verify(out, source, engine=False)
    assert found.ok and sorted(found.ignored) == sorted(expected)


def test_what_is_named_is_said_in_few_words(make_checkpoint, tmp_path):
    source = make_checkpoint(num_hidden_layers=12)
    options = ["--ignore", r"layers\.([0357]|4|1[01])\.mlp\.down", "--ignore", "lm_head,layers.9.self_attn.o"]
    options += ["--group-size", "32", "--group-layers", "layers.2.mlp.down,layers.1.self_attn.v"]
    for way in (["--dry-run"], []):
        code, text = run("convert", source, tmp_path / "out", *options, *way)
        lines = text.splitlines()
        (ignored,) = [line for line in lines if "eft in float: " in line]
        assert ignored.endswith("eft in float: down_proj in blocks 0, 3-5, 7, 10-11; o_proj in block 9"), text
        (grouped,) = [line for line in lines if "er-group" in line and "g = 32" in line]
        assert grouped.endswith(": k_proj, q_proj, v_proj in block 1; down_proj in block 2"), text
        assert "In float anyway, also without --ignore: lm_head" in lines


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("lm_head,re:.*mlp.gate$", "lm_head; gate in blocks 1-2"),
        ("re:.*mlp.shared_expert_gate$", "shared_expert_gate in blocks 1-2"),
    ],
)
def test_routers_are_float_anyway(make_checkpoint, tmp_path, pattern, names):
    """They are among what recipes for mixtures ignore."""
    source = make_checkpoint("qwen2_moe")
    code, text = run("convert", source, tmp_path / "out", *RTN, "--ignore", pattern)
    assert code == 0 and text.count("In float anyway") == 1
    (line,) = [line for line in text.splitlines() if "In float anyway" in line]
    assert set(line.partition(": ")[2].split("; ")) == set(names.split("; "))


def test_the_same_choice_in_other_words_is_another_recipe(make_checkpoint, tmp_path):
    source, out = make_checkpoint(), tmp_path / "out"
    convert(source, out, Recipe.of("rtn", ignore=["down_proj", "o_proj"]))
    assert convert(source, out, Recipe.of("rtn", ignore="down_proj,o_proj")).reused
    code, text = run("convert", source, out, *RTN, "--ignore", "o_proj")
    assert code == 2 and "ignore: down_proj,o_proj there, o_proj now" in text


def test_siblings_come_along(make_checkpoint):
    source = Source(make_checkpoint())
    (first, *others) = ignored_by_name(source, Recipe.of("rtn", ignore="layers.0.mlp.up"))
    assert first == {"mlp.up_proj", "mlp.gate_proj"} and not any(others)


def test_files_have_names_in_differences(make_checkpoint, tmp_path, calibration_text):
    """A hash says nothing to people."""
    source, other = make_checkpoint(), tmp_path / "other text.txt"
    other.write_text(calibration_text.read_text()[::-1])
    options = ("--calibration-tokens", "200")
    assert run("convert", source, tmp_path / "out", "--calibration", calibration_text, *options)[0] == 0
    code, text = run("convert", source, tmp_path / "out", "--calibration", other, *options)
    assert code == 2 and "calibration: calibration.txt (" in text and ") there, other text.txt (" in text, text
    code, text = run("convert", source, tmp_path / "out", "--calibration", "none")
    assert code == 2 and "calibration: calibration.txt (" in text and "there, None now" in text
    code, text = run("convert", source, tmp_path / "out")
    assert code == 2 and ") there, bundled calibration text (" in text
    copy = source.with_name("another")
    source.rename(copy)
    (copy / "model.safetensors.index.json").exists()
    assert run("convert", copy, tmp_path / "part", "--blocks", "0:2", *options, "--calibration", other)[0] == 0
    code, text = run("convert", copy, tmp_path / "part", "--blocks", "0:2", *options, "--calibration", calibration_text)
    assert code == 2 and "recipe.calibration: other text.txt (" in text and ") there, calibration.txt (" in text, text


@pytest.mark.parametrize("given", ['["lm_head","re:.*q_proj"]', "['lm_head']", '"down_proj"'])
def test_a_list_of_python_is_no_pattern(make_checkpoint, tmp_path, given):
    """As an expression it means any one of its letters, and so nearly every linear."""
    code, message = run("convert", make_checkpoint(), tmp_path / "out", *RTN, "--ignore", given)
    assert code == 2 and "has quotation marks, which no name has; write patterns without" in message, message


@pytest.mark.parametrize("device", ["CPU", "gpu", "cpu:1", "meta", "cuda:", "mps"])
def test_devices_are_those_that_the_help_names(make_checkpoint, tmp_path, device):
    code, message = run("convert", make_checkpoint(), tmp_path / "out", *RTN, "--device", device)
    assert code == 2 and f"--device {device}: not one of cpu, cuda, cuda:1; leave it out" in message, message


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_data_free_factors_are_said_to_be_guesses(make_checkpoint, tmp_path, dry):
    source = make_checkpoint()
    for name, options in {"free": ["--calibration", "none"], "rtn": ["--method", "rtn"], "default": []}.items():
        code, said = run("convert", source, tmp_path / name, *options, *dry)
        assert code == 0 and ("data-free factors are guesses" in " ".join(said.split())) == (name == "free"), said
