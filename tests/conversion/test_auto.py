"""Granularity chosen by measured error: two passes over the blocks, each of which may die."""

import functools
import json
import os
from dataclasses import replace

import pytest

from benchmarks.testbed import BEDS
from tests.support.command import run
from tests.support.contents import digests, tensors_of
from tests.support.conversion import convert
from tests.support.disk import Failing
from tests.support.rename import architecture, bare, renamed
from tests.support.sweep import sweep
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted
from vllm_w8a8_bismooth.measure import sensitivity
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report.outcome import Outcome
from vllm_w8a8_bismooth.verification import verify

HEADERS = BEDS["headers"]
CHOSEN = ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"]
DOWN = CHOSEN[0]


def recipe_of(**options) -> Recipe:
    return Recipe.of("auto", **{"group_size": 32, "calibration_tokens": 1024, **options})


def grouped(report: Outcome) -> list[str]:
    return [name for name, entry in report.linears.items() if entry["group_size"]]


def a_tenth_better(source, text, folder, **options) -> Recipe:
    """A recipe that needs some groups, also where errors are spread evenly."""
    without = convert(source, folder / "without", recipe_of(**options, group_budget=0), text)
    return recipe_of(**options, target_kl=0.9 * without.estimated_kl)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The test bed of headers converted without interruption, and the report, by rule of rounding."""

    @functools.cache
    def made(rounding: str = "gptq"):
        folder = tmp_path_factory.mktemp(rounding) / "out"
        return folder, convert(HEADERS.model, folder, recipe_of(rounding=rounding), read_text(HEADERS.calibration))

    return made


def test_groups_go_where_the_cost_is(whole):
    """More than half of it is in one down_proj, one linear of 49, and a little in the o_proj before it."""
    folder, report = whole()
    assert grouped(report) == CHOSEN
    scales = {name: len(tensor[0]) for name, tensor in tensors_of(folder).items() if name.endswith("_scale")}
    assert {name for name, groups in scales.items() if groups > 1} == {f"{name}.weight_scale" for name in CHOSEN}
    assert scales[f"{DOWN}.weight_scale"] == 512 / 32
    first = report.granularity[0]
    assert first.unit == DOWN and first.chosen and first.share > 0.3 and first.per_group < first.per_channel / 2
    assert not any(entry.share > 0.1 for entry in report.granularity[1:])
    assert len(report.granularity) == 7 * 4, "qkv, o, gate_up and down of each block"
    left = (entry.per_group if entry.chosen else entry.per_channel for entry in report.granularity)
    assert report.estimated_kl == pytest.approx(sum(left)) and 1e-4 < report.estimated_kl < 3e-4
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    targets = config["config_groups"]["group_0"]["targets"]
    assert targets == [r"re:.*\.layers\.(0)\.(mlp\.down_proj)$", r"re:.*\.layers\.(0)\.(self_attn\.o_proj)$"]


def test_elsewhere_it_is_the_smoothed_conversion(whole, tmp_path):
    folder, _ = whole()
    smoothed = Recipe.of("bismooth", calibration_tokens=1024)
    convert(HEADERS.model, tmp_path / "out", smoothed, read_text(HEADERS.calibration))
    ours, theirs = tensors_of(folder), tensors_of(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    changed = {n for n in ours if ours[n].shape != theirs[n].shape or not ours[n].equal(theirs[n])}
    assert changed == {f"{name}.{kind}" for name in CHOSEN for kind in ("weight", "weight_scale")}


KILLED = [("analyze", 3), ("convert", 4), ("calibrate", 5), ("analyze", 7), ("convert", 0)]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize(("stage", "blocks"), sweep(KILLED, fast=2))
def test_killed_in_any_pass_it_is_resumed(whole, tmp_path, monkeypatch, stage, blocks, rounding):
    """To the same bytes, and nothing is measured twice; to make up for errors, the last pass calibrates again."""
    text, out, advance = read_text(HEADERS.calibration), tmp_path / "out", Calibration.advance
    advanced, measured, measure, (folder, unbroken) = [], [], sensitivity.measure, whole(rounding)

    def advancing(self, index, *arguments):
        advanced.append(index)
        return advance(self, index, *arguments)

    def measuring(passing, *arguments):
        measured.append(passing.index)
        return measure(passing, *arguments)

    def interrupted(at, done, total, written):
        if (at, done) == (stage, blocks):
            raise KeyboardInterrupt

    monkeypatch.setattr(Calibration, "advance", advancing)
    monkeypatch.setattr(sensitivity, "measure", measuring)
    with pytest.raises(KeyboardInterrupt):
        convert(HEADERS.model, out, recipe_of(rounding=rounding), text, progress=interrupted)
    done = {"calibrate": (blocks, 0), "analyze": (7, blocks), "convert": (7, 7)}[stage]
    assert not out.exists() and (len(advanced[:7]), len(measured)) == done
    report = convert(HEADERS.model, out, recipe_of(rounding=rounding), text)
    assert measured == list(reversed(range(7))) and advanced[:7] == list(range(7))
    assert not advanced[7:] if rounding == "nearest" else set(advanced[7:]) == set(range(7))
    assert report.granularity == unbroken.granularity and (report.resumed > 0) == (stage == "convert" and blocks == 4)
    assert digests(out) == digests(folder) and not out.with_name("out.partial").exists()


@pytest.mark.slow
def test_a_disk_that_fails_in_either_pass(make_checkpoint, tmp_path, calibration_text, monkeypatch):
    """Small blocks of which some get groups, and a failure at many points between two writes."""
    source, text = make_checkpoint(num_hidden_layers=2), read_text(calibration_text)
    recipe = a_tenth_better(source, text, tmp_path)
    with monkeypatch.context() as patch:
        counter = Failing(patch, 10**9)
        report = convert(source, tmp_path / "whole", recipe, text)
    assert 0 < len(grouped(report)) < 14
    for last in range(2, counter.count, max(1, counter.count // 10)):
        out = tmp_path / f"out-{last}"
        with monkeypatch.context() as patch:
            Failing(patch, last, once=last % 2 == 0)
            with pytest.raises((Interrupted, BismoothError)):
                convert(source, out, recipe, text)
        assert not out.exists()
        convert(source, out, recipe, text)
        assert digests(out) == digests(tmp_path / "whole")


def test_a_state_that_is_gone_starts_anew(make_checkpoint, tmp_path, calibration_text):
    source, text, out = make_checkpoint(), read_text(calibration_text), tmp_path / "out"
    recipe = recipe_of(rounding="nearest")
    for stage, blocks in (("analyze", 2), ("convert", 0)):

        def interrupted(at, done, total, written, where=(stage, blocks)):
            if (at, done) == where:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(source, out, recipe, text, progress=interrupted)
        states = list((tmp_path / "out.partial" / ".bismooth").glob("*.safetensors"))
        assert states
        for state in states:
            os.truncate(state, 10)
        with pytest.raises(BismoothError, match="of an earlier run is gone.*starts anew"):
            convert(source, out, recipe, text)
        assert not (tmp_path / "out.partial").exists()
    assert not convert(source, out, recipe, text).resumed


def test_another_budget_is_another_run(make_checkpoint, tmp_path, calibration_text):
    source, text, out = make_checkpoint(), read_text(calibration_text), tmp_path / "out"
    first = convert(source, out, recipe_of(), text)
    assert first.granularity and convert(source, out, recipe_of(), text) == replace(first, reused=True)
    with pytest.raises(BismoothError, match="group_budget: 0.25 there, 0.5 now"):
        convert(source, out, recipe_of(group_budget=0.5), text)


def test_without_a_budget_everything_stays_per_channel(make_checkpoint, tmp_path, calibration_text):
    report = convert(make_checkpoint(), tmp_path / "out", recipe_of(group_budget=0), read_text(calibration_text))
    assert grouped(report) == [] and not any(entry.chosen for entry in report.granularity)


def test_columns_that_groups_do_not_divide(make_checkpoint, tmp_path, calibration_text):
    """They stay per-channel with a word on it, where --method mixed would refuse a name that was given."""
    source, text = make_checkpoint(hidden_size=128), read_text(calibration_text)
    recipe = a_tenth_better(source, text, tmp_path, group_size=64)
    report = convert(source, tmp_path / "out", recipe, text)
    divided = {name for name in report.linears if not name.endswith(("down_proj", "o_proj"))}  # 96 columns
    assert set(grouped(report)) <= divided and grouped(report)
    left = {entry.unit.rpartition(".")[2] for entry in report.granularity if "not a multiple" in entry.reason}
    assert left == {"down_proj", "o_proj"}


@pytest.mark.parametrize("model_type", sweep(["mixtral", "phi3", "qwen2", "gemma2"]))
def test_of_other_types(make_checkpoint, tmp_path, calibration_text, model_type):
    source, text, out = make_checkpoint(model_type), read_text(calibration_text), tmp_path / "out"
    report = convert(source, out, a_tenth_better(source, text, tmp_path), text)
    assert grouped(report)
    assert json.loads((out / "recipe.json").read_text())["recipe"]["method"] == "auto"
    assert verify(out, tmp_path / "source", engine=False).ok


def test_experts_are_chosen_together(make_checkpoint, tmp_path, calibration_text):
    """A target takes all groups that help, which are also those of experts; half of these work for a token."""
    source, text, out = make_checkpoint("mixtral"), read_text(calibration_text), tmp_path / "out"
    without = convert(source, tmp_path / "without", recipe_of(group_budget=0), text).granularity
    least = sum(min(entry.per_channel, entry.per_group) for entry in without)
    report = convert(source, out, recipe_of(target_kl=1.0001 * least), text)
    experts = [entry for entry in report.granularity if entry.unit.endswith(".experts")]
    assert len(experts) == 3 and any(entry.chosen for entry in experts)
    for entry in experts:
        found = {report.linears[name]["group_size"] for name in entry.linears}
        assert len(entry.linears) == 4 * 3 and found == ({32} if entry.chosen else {None})
        assert entry.work == pytest.approx(2 * 3 * 64 * 96 / (3 * (2 * 3 * 64 * 96 + 2 * 64 * 96 + 2 * 64 * 48)))
    assert report.estimated_kl == pytest.approx(least, rel=1e-3)
    assert verify(out, tmp_path / "source", engine=False).ok


def test_with_ranges_instead_of_errors(make_checkpoint, tmp_path, calibration_text):
    out, options = tmp_path / "out", ("--smoothing", "alpha", "--alpha", "0.7", "--group-size", "32")
    command = ("convert", make_checkpoint(), out, "--method", "auto", "--calibration", calibration_text, *options)
    assert run(*command)[0] == 0
    stored = json.loads((out / "recipe.json").read_text())["recipe"]
    assert (stored["smoothing"], stored["alpha"], stored["group_budget"]) == ("alpha", 0.7, 0.25)


def test_a_target_is_reached_with_as_little_as_will_do(make_checkpoint, tmp_path, calibration_text):
    source, text = make_checkpoint(), read_text(calibration_text)
    without = convert(source, tmp_path / "none", recipe_of(group_budget=0), text).estimated_kl
    report = convert(source, tmp_path / "out", recipe_of(target_kl=0.8 * without), text)
    assert report.recipe.group_budget == 1.0 and 0 < len(grouped(report)) < len(report.linears)
    last = [entry for entry in report.granularity if entry.chosen][-1]
    assert report.estimated_kl <= 0.8 * without < report.estimated_kl + last.per_channel - last.per_group
    again = convert(source, tmp_path / "out", recipe_of(target_kl=0.8 * without), text)
    assert again.reused and again.estimated_kl == report.estimated_kl
    code, output = run("convert", source, tmp_path / "far", "--method", "auto", "--target-kl", "1e-9")
    assert code == 2 and "--target-kl 1e-09: out of reach: " in output and "--group-size" in output
    assert not (tmp_path / "far").exists() and not (tmp_path / "far.partial").exists()


def test_the_size_of_groups_fits_the_model(make_checkpoint, tmp_path, calibration_text):
    """128 does not divide a hidden size of 64, nor 64 the 96 columns of down_proj."""
    recipe = Recipe.of("auto", calibration_tokens=1024)
    assert convert(make_checkpoint(), tmp_path / "out", recipe, read_text(calibration_text)).recipe.group_size == 32


def test_a_target_needs_a_model_that_predicts_tokens(make_checkpoint, tmp_path, calibration_text):
    source = make_checkpoint(sharded=False)
    architecture(source, "LlamaModel")
    renamed(source, bare)
    report = convert(source, tmp_path / "out", recipe_of(), read_text(calibration_text))
    assert report.estimated_kl is None and all(entry.per_channel > 0 for entry in report.granularity)
    with pytest.raises(BismoothError, match="--target-kl: is a divergence of predicted tokens.*LlamaModel"):
        convert(source, tmp_path / "other", recipe_of(target_kl=0.1), read_text(calibration_text))
