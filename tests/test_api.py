"""The functions that users import: what they take, what they refuse, and that importing them costs nothing."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vllm_w8a8_bismooth as b
from tests.support.command import run
from tests.support.contents import digests
from vllm_w8a8_bismooth import api, conversion
from vllm_w8a8_bismooth.cli.main import app
from vllm_w8a8_bismooth.conversion import preparation
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.recipe import Recipe

FUNCTIONS = ["convert", "inspect", "merge", "preview", "score", "sites", "verify"]


def modules_after(line: str) -> set[str]:
    script = f"import json, sys\n{line}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_costs_nothing():
    """vLLM imports the package in every process, for its entry point."""
    heavy = {"torch", "transformers", "safetensors", "huggingface_hub", "typer", "rich", "vllm", "numpy"}
    assert not modules_after("import vllm_w8a8_bismooth") & heavy
    assert not modules_after("from vllm_w8a8_bismooth import " + ", ".join(FUNCTIONS)) & heavy


def test_they_are_there_and_documented():
    assert set(FUNCTIONS) | {"register"} == set(b.__all__) <= set(dir(b))
    for name in FUNCTIONS:
        function = getattr(b, name)
        assert function is getattr(api, name)
        for parameter in inspect.signature(function).parameters:
            assert f"{parameter}" in function.__doc__, (name, parameter)
        assert "Raises:" in function.__doc__
    with pytest.raises(AttributeError, match="no attribute 'converts'"):
        b.converts  # noqa: B018


def test_the_options_are_those_of_the_command():
    import typer

    parameters = {p.name for p in typer.main.get_command(app).commands["convert"].params}
    of_the_command = {"dry_run", "as_json", "push_to_hub", "public"}
    assert parameters - of_the_command == inspect.signature(b.convert).parameters.keys() - {"progress"}


@pytest.mark.parametrize("kind", [str, Path])
def test_the_same_bytes_as_the_command(make_checkpoint, tmp_path, calibration_text, kind):
    source, stages = make_checkpoint(), []
    options = ["--calibration", calibration_text, "--calibration-tokens", "300", "--ignore", "lm_head,layers.1.mlp"]
    assert run("convert", source, tmp_path / "command", *options)[0] == 0
    given = {"calibration": kind(calibration_text), "calibration_tokens": 300, "ignore": ["lm_head", "layers.1.mlp"]}
    plan = b.preview(kind(source), kind(tmp_path / "function"), **given)
    assert not (tmp_path / "function").exists()
    outcome = b.convert(
        kind(source), kind(tmp_path / "function"), **given, progress=lambda *step: stages.append(step[:3])
    )
    assert digests(tmp_path / "command") == digests(tmp_path / "function")
    assert ("convert", 3, 3) in stages and plan.written_bytes == outcome.written_bytes
    assert outcome.recipe.ignore == ("lm_head", "layers.1.mlp") and outcome.recipe.source and outcome.recipe.calibration
    assert outcome.already_float == ["lm_head"] and len(outcome.ignored) == 3
    assert b.convert(kind(source), kind(tmp_path / "function"), **given).reused
    found = b.verify(kind(tmp_path / "function"), against=kind(source), engine=False)
    assert found.ok and b.inspect(kind(source)).problems == []


@pytest.mark.parametrize("kind", [str, Path])
def test_parts(make_checkpoint, tmp_path, kind):
    source, parts = make_checkpoint(), [kind(tmp_path / "a"), kind(tmp_path / "b")]
    b.convert(source, parts[0], method="rtn", blocks="0:2")
    b.convert(source, parts[1], method="rtn", blocks=range(2, 3))
    b.convert(source, tmp_path / "whole", method="rtn")
    b.merge(kind(tmp_path / "merged"), parts)
    assert digests(tmp_path / "merged") == digests(tmp_path / "whole")


WRONG = {
    "source": {"source": 7},
    "destination": {"destination": None},
    "bytes": {"destination": b"out"},
    "method": {"method": ["rtn"]},
    "calibration": {"calibration": 7},
    "calibrations": {"calibration": [None]},
    "calibration_tokens": {"calibration": "text.txt", "calibration_tokens": "many"},
    "tokens of half": {"calibration": "text.txt", "calibration_tokens": 16.5},
    "alpha": {"smoothing": "alpha", "alpha": "0.5"},
    "smoothing": {"smoothing": 7},
    "group_size": {"method": "mixed", "group_size": "32"},
    "yes": {"method": "mixed", "group_size": True},
    "group_layers": {"method": "mixed", "group_size": 32, "group_layers": 7},
    "group_budget": {"method": "auto", "group_budget": [3]},
    "share": {"method": "auto", "group_budget": "some"},
    "ignore": {"ignore": [7]},
    "path to ignore": {"ignore": Path("down_proj")},
    "blocks": {"blocks": 7},
    "text of blocks": {"blocks": "7"},
    "steps of blocks": {"blocks": range(0, 3, 2)},
    "device": {"device": 7},
    "progress": {"progress": "yes"},
    "option": {"groupsize": 32},
    "license": {"license": 3},
    "base_model": {"base_model": Path("org/name")},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_kinds_are_named(make_checkpoint, tmp_path, monkeypatch, calibration_text, case):
    """Either error says which argument it is; nothing is written."""
    monkeypatch.chdir(tmp_path)
    calibration_text.rename(tmp_path / "text.txt")
    given = {"source": make_checkpoint(), "destination": tmp_path / "out", **WRONG[case]}
    (name,) = list(WRONG[case])[-1:]
    with pytest.raises((TypeError, BismoothError)) as caught:
        b.convert(given.pop("source"), given.pop("destination"), **given)
    assert name in str(caught.value).replace("-", "_"), caught.value
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_wrong_kinds_elsewhere(make_checkpoint, tmp_path):
    source = make_checkpoint()
    for call, says in (
        (lambda: b.verify(7), "folder must be a path"),
        (lambda: b.verify(source, against=7), "source must be a path"),
        (lambda: b.verify(source, progress=7), "progress must be a function"),
        (lambda: b.inspect(None), "source must be a path"),
        (lambda: b.inspect(source, group_size="32"), "group_size must be an integer"),
        (lambda: b.merge(tmp_path / "out", "part"), "parts must be a list"),
        (lambda: b.merge(tmp_path / "out", [7]), "parts must be a path"),
        (lambda: b.merge(tmp_path / "out", None), "parts must be a list"),
        (lambda: b.verify(source, engine="no"), "engine must be True or False"),
        (lambda: b.preview(source, tmp_path / "out", groupsize=32), "groupsize is no option"),
        (lambda: preparation.prepare(source, tmp_path / "out", Recipe.of("bismooth"), "text.txt"), "read_text returns"),
    ):
        with pytest.raises(TypeError, match=says):
            call()
    with pytest.raises(BismoothError, match="--group-size 0: not positive"):
        b.inspect(source, group_size=0)
    with pytest.raises(BismoothError, match="--group-size 40: not a positive multiple of 32"):
        b.inspect(source, group_size=40)
    with pytest.raises(BismoothError, match="--calibration-tokens has no effect with --calibration none"):
        b.convert(source, tmp_path / "out", calibration="none", calibration_tokens=9)
    with pytest.raises(BismoothError, match="names no file; give it one, or leave it out"):
        b.convert(source, tmp_path / "out", calibration=[])
    with pytest.raises(BismoothError, match="no parts were named"):
        b.merge(tmp_path / "out", [])


def test_an_empty_path_is_not_the_current_folder(make_checkpoint, tmp_path, monkeypatch):
    """``b.convert(os.environ.get("SRC", ""), ...)`` in a folder that holds a checkpoint."""
    source = make_checkpoint()
    monkeypatch.chdir(source)
    for call in (
        lambda: b.convert("", tmp_path / "out"),
        lambda: b.convert(source, tmp_path / "out", calibration=""),
        lambda: b.inspect(""),
        lambda: b.verify(""),
        lambda: b.verify(source, against=""),
        lambda: b.merge(tmp_path / "out", [""]),
    ):
        with pytest.raises(BismoothError, match="is empty"):
            call()
    assert not (tmp_path / "out").exists()


def test_numbers_of_numpy_are_numbers(make_checkpoint, tmp_path):
    source = make_checkpoint()
    assert b.preview(source, tmp_path / "out", smoothing="alpha", alpha=np.float32(0.5)).shards
    assert b.preview(source, tmp_path / "out", method="mixed", group_size=np.int64(32)).shards
    assert b.inspect(source, group_size=np.int64(32)).group_size == 32


@pytest.mark.parametrize("none", ["none", ["none"], ("none",), ["none", "none"]], ids=str)
def test_none_is_a_calibration_as_it_is_for_the_command(make_checkpoint, tmp_path, none):
    assert b.convert(make_checkpoint(), tmp_path / "out", calibration=none).recipe.calibration is None


BESIDE = {
    "none": (["text.txt", "none"], "--calibration none: stands beside files; leave out one of the two"),
    "bundled": (("none", "bundled"), "--calibration none: stands beside files; leave out one of the two"),
    "twice": (["-", "-"], "--calibration -: given twice, and can be read once; leave out one of the two"),
    "empty": (["text.txt", ""], "--calibration: is empty; give a file, bundled or none"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_lists_of_calibration_are_refused_in_the_words_of_the_command(make_checkpoint, tmp_path, case):
    source, (given, words) = make_checkpoint(), BESIDE[case]
    with pytest.raises(BismoothError) as caught:
        b.convert(source, tmp_path / "out", calibration=given)
    command = [part for file in given for part in ("--calibration", file)]
    assert str(caught.value) == words and run("convert", source, tmp_path / "out", *command) == (2, words)


def test_strings_where_paths_are_usual(make_checkpoint, tmp_path, calibration_text):
    """Also behind these functions."""
    from vllm_w8a8_bismooth.conversion import pipeline
    from vllm_w8a8_bismooth.verification import verify

    text = read_text(str(calibration_text))
    ready = conversion.preparation.prepare(
        str(make_checkpoint()), str(tmp_path / "out"), Recipe.of("bismooth", calibration_tokens=200), text
    )
    assert pipeline.convert(ready).files and verify(str(tmp_path / "out"), engine=False).ok


def test_a_download_does_not_begin_for_a_destination_that_is_refused(tmp_path, monkeypatch):
    from vllm_w8a8_bismooth.checkpoint import hub

    monkeypatch.setattr(hub, "fetch", lambda source: pytest.fail("downloads"))
    monkeypatch.chdir(tmp_path)
    for destination in (".", "", "~/out"):
        with pytest.raises(BismoothError, match="tiny-int8|home"):
            b.convert("org/tiny@main", destination)
