"""Checkpoints whose rows have four bits, or eight where that is worth most."""

import json

import pytest
import torch

from benchmarks.testbed import BEDS
from tests.support.command import run
from tests.support.contents import digests, tensors_of
from tests.support.conversion import convert
from tests.support.models import tiny_model, write_checkpoint
from vllm_w8a8_bismooth import fourbits, grouping
from vllm_w8a8_bismooth.conversion.pipeline import prepare
from vllm_w8a8_bismooth.conversion.preview import preview
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.recipe import Recipe

HEADERS = BEDS["headers"]
TOKENS = 1024


def stored_rows(folder) -> dict[str, tuple[fourbits.Rows, torch.Tensor]]:
    """Linear -> its rows, and their scale."""
    tensors = tensors_of(folder)
    found = {}
    for name in [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]:
        found[name.removesuffix(".weight")] = fourbits.Rows.of(name, tensors), tensors[f"{name}_scale"]
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The bed of headers, calibrated, at 5 bits in groups of 64; and the report."""
    folder = tmp_path_factory.mktemp("rows") / "out"
    recipe = Recipe.of("bismooth", bits=5, group_size=64, calibration_tokens=TOKENS)
    return folder, convert(HEADERS.model, folder, recipe, read_text(HEADERS.calibration))


def test_every_linear_is_packed_within_the_budget(made):
    folder, report = made
    rows, tensors = stored_rows(folder), tensors_of(folder)
    assert rows.keys() == report.linears.keys() and len(rows) == 49
    assert not [name for name in tensors if name.endswith("_proj.weight")]
    size = sum(
        8 * tensors[f"{linear}.weight_{part}"].nbytes
        for linear in rows
        for part in ("packed", "multiplier", "offset", "rows", "low", "scale")
        if f"{linear}.weight_{part}" in tensors
    )
    codes = {linear: each.codes() for linear, (each, _) in rows.items()}
    weights = sum(each.numel() for each in codes.values())
    assert 4.98 < size / weights <= 5
    for linear, (each, _) in rows.items():
        four, eight = grouping.row_bits(codes[linear].shape[1], 64)
        count = len(codes[linear]) * four + len(each.rows) * (eight - four)
        assert report.linears[linear]["bits"] == pytest.approx(count / codes[linear].numel())
    assert len({len(each.rows) for each, _ in rows.values()}) > 5, "one budget is spent on all linears"


def test_what_a_checkpoint_says_of_itself(made):
    folder, _ = made
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("w8a8_bismooth", "int4-int8-rows")
    assert config["bismooth"]["rows"] == {"bits": 5.0, "group_size": 64}
    recipe = json.loads((folder / "recipe.json").read_text())["recipe"]
    assert recipe["bits"] == 5 and recipe["rounding"] == "gptq"
    card = (folder / "README.md").read_text()
    assert "5 bits" in card and "without it refuses" in card
    assert "- w4a8\n" in card and "compressed-tensors\n" not in card


def test_eight_bits_are_as_without_four(made, tmp_path):
    """Rows that keep eight bits are those of an INT8 conversion, and what else is in the checkpoint is its, too."""
    folder, _ = made
    recipe = Recipe.of("bismooth", calibration_tokens=TOKENS)
    convert(HEADERS.model, tmp_path / "int8", recipe, read_text(HEADERS.calibration))
    ours, theirs, rows = tensors_of(folder), tensors_of(tmp_path / "int8"), stored_rows(folder)
    for linear, (each, scale) in rows.items():
        wide = each.rows.long()
        assert torch.equal(each.codes()[wide], theirs[f"{linear}.weight"][wide])
        assert torch.equal(scale[wide], theirs[f"{linear}.weight_scale"][wide])
    others = [name for name in ours if ".weight_" not in name]
    assert others and all(torch.equal(ours[name], theirs[name]) for name in others)


def test_it_is_the_same_every_time_and_found_again(made, tmp_path):
    folder, _ = made
    recipe = Recipe.of("bismooth", bits=5, group_size=64, calibration_tokens=TOKENS)
    text = read_text(HEADERS.calibration)
    convert(HEADERS.model, tmp_path / "out", recipe, text)
    assert digests(tmp_path / "out") == digests(folder)
    assert convert(HEADERS.model, tmp_path / "out", recipe, text).reused


def test_data_free_goes_by_the_weights(tmp_path):
    out = tmp_path / "out"
    code, said = run("convert", HEADERS.model, out, "--bits", "5", "--calibration", "none")
    assert code == 0 and "what four bits change in the weights alone" in said
    assert json.loads((out / "recipe.json").read_text())["recipe"]["group_size"] == 128
    rows = stored_rows(out)
    assert sum(len(each.rows) for each, _ in rows.values()) > 0
    for each, _ in rows.values():
        each.codes()


def test_ignored_linears_stay_in_float_and_do_not_count(tmp_path):
    out = tmp_path / "out"
    options = ("--calibration", "none", "--ignore", "down_proj", "--head", "int8")
    code, said = run("convert", HEADERS.model, out, "--bits", "4.6", *options)
    assert code == 0, said
    tensors, rows = tensors_of(out), stored_rows(out)
    assert not any("down_proj" in linear for linear in rows) and tensors["lm_head.weight"].dtype == torch.int8
    weights = sum(2 * each.packed.numel() for each, _ in rows.values())
    size = sum(8 * t.nbytes for n, t in tensors.items() if ".weight_" in n and not n.startswith("lm_head"))
    assert 4.5 < size / weights <= 4.6


def test_a_preview_knows_the_size(made, tmp_path):
    folder, report = made
    recipe = Recipe.of("bismooth", bits=5, group_size=64, calibration_tokens=TOKENS)
    seen = preview(prepare(HEADERS.model, tmp_path / "out", recipe, read_text(HEADERS.calibration)))
    assert seen.written_bytes == pytest.approx(report.written_bytes, rel=0.01)
    assert not (tmp_path / "out").exists()


BAD = {
    "too few": (("--bits", "4"), ("--bits 4", "outside 4.125 to 8")),
    "too many": (("--bits", "8.5"), ("--bits 8.5", "outside 4.125 to 8")),
    "below the scales": (
        ("--bits", "4.2"),
        (
            "--bits 4.2",
            "rows of four bits take 4.2",
            "with their scales, in groups of 128; give more",
        ),
    ),
    "size": (("--bits", "5", "--group-size", "96"), ("--group-size 96", "32, 64, 128")),
    "layers": (("--bits", "5", "--group-layers", "down_proj"), ("--bits and --group-layers",)),
    "method": (("--bits", "5", "--method", "rtn"), ("--method rtn", "--bits has no effect")),
    "part": (("--bits", "5", "--blocks", "0:3"), ("--bits 5 and --blocks", "one budget")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case):
    options, parts = BAD[case]
    code, message = run("convert", HEADERS.model, tmp_path / "out", *options)
    assert code == 2 and all(part in message for part in parts), message
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_have_four_bits(tmp_path):
    experts = write_checkpoint(tmp_path / "experts", tiny_model("mixtral"), torch.float32)
    code, message = run("convert", experts, tmp_path / "out", "--bits", "5", "--calibration", "none")
    assert code == 2 and "--bits 5" in message and "the model has experts" in message
    odd = write_checkpoint(tmp_path / "odd", tiny_model("llama", intermediate_size=80), torch.float32)
    code, message = run("convert", odd, tmp_path / "out", "--bits", "6", "--calibration", "none")
    assert code == 2 and "model.layers.0.mlp.down_proj" in message and "K = 80" in message and "--ignore" in message
    code, message = run(
        "convert", odd, tmp_path / "out", "--bits", "6", "--calibration", "none", "--ignore", "down_proj"
    )
    assert code == 0 and json.loads((tmp_path / "out/recipe.json").read_text())["recipe"]["group_size"] == 32, message
    turned = write_checkpoint(tmp_path / "turned", tiny_model("gpt2"), torch.float32)
    code, message = run("convert", turned, tmp_path / "gpt2", "--bits", "6", "--calibration", "none")
    assert code == 2 and "is stored transposed" in message and not (tmp_path / "gpt2").exists()
