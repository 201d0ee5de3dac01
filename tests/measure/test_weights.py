import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.testbed import PYTHON
from benchmarks.testbed.plant import plant
from tests.support.command import json_of, run
from tests.support.damage import edit_shard
from tests.support.models import layer_of
from vllm_w8a8_bismooth.measure import weights
from vllm_w8a8_bismooth.method.quantize import quantize_folded
from vllm_w8a8_bismooth.method.rows import Fold

LLAMA = layer_of("llama")


def error_of(weight: torch.Tensor, group_size: int | None = None) -> float:
    return quantize_folded(weight, Fold(), group_size).column_error()


@given(st.integers(0, 2**31), st.sampled_from([100.0, 1000.0]), st.integers(1, 3))
def test_outlier_columns_are_told_from_healthy_ones(seed, k, count):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 512, generator=generator)
    assert error_of(weight) < weights.VULNERABLE / 2
    weight[:, torch.randperm(512, generator=generator)[:count]] *= k
    assert error_of(weight) > 2 * weights.VULNERABLE
    assert error_of(weight, 32) < error_of(weight) * (count + 1) / 16 + 0.02, "only the outliers' groups are spoilt"


def test_zero_columns_do_not_count():
    weight = torch.zeros(4, 64)
    assert error_of(weight) == 0
    weight[:, 0] = 1
    assert error_of(weight) < 1e-6


def test_choice_is_closed_under_fusion():
    errors = {name: 0.01 for name in LLAMA.linears} | {"self_attn.k_proj": 0.3, "mlp.down_proj": 0.06}
    assert weights.vulnerable(errors, LLAMA) == {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.down_proj",
    }


def test_measure_tells_what_stands_out():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator)
    healthy = weights.measure(weight)
    assert healthy.shape == (64, 512) and not healthy.vulnerable() and healthy.reason() == ""
    assert healthy.columns.outliers == healthy.rows.outliers == 0 and healthy.groups == {}
    assert healthy.columns.maximum == healthy.rows.maximum == pytest.approx(float(weight.abs().max()))
    assert healthy.columns.median == float(weight.abs().amax(0).median())

    columns = weight.clone()
    columns[:, [3, 77]] *= 500
    found = weights.measure(columns)
    assert found.vulnerable() and found.columns.outliers == 2 and 300 < found.columns.ratio < 900
    assert found.reason().startswith("2 of 512 input columns up to ") and "rounds the rest to zero" in found.reason()

    rows = weight.clone()
    rows[5] *= 500
    found = weights.measure(rows)
    assert not found.vulnerable() and found.rows.outliers == 1 and "harmless" in found.reason()

    spike = torch.randn(4096, 64, generator=generator)
    spike[5, 7] = 500
    assert "in so few rows" in weights.measure(spike).reason()

    small = weight.clone()
    small[:, :200] /= 1000
    found = weights.measure(small)
    assert found.vulnerable() and found.columns.outliers == 0
    assert re.match(r"input columns 0\.000\d+x to [\d.]+x the median: ", found.reason())


def test_zeros_do_not_stand_out():
    weight = torch.ones(4, 64)
    weight[1] = weight[:, :60] = 0
    found = weights.measure(weight)
    assert found.columns == found.rows == weights.Extent(1, 1, 1, 1, 0)
    nothing = weights.measure(torch.zeros(4, 64))
    assert nothing.columns.maximum == 0 and not nothing.vulnerable() and nothing.reason() == ""


def test_group_sizes_are_measured():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    weight[:, 3] *= 1000
    assert weights.measure(weight, 64).groups == {64: error_of(weight, 64)}
    assert weights.measure(weight, 96).groups == {}, "96 does not divide 512"
    tried = weights.measure(weight, search=True).groups
    assert list(tried) == [256, 128, 64, 32] and tried[32] > weights.VULNERABLE
    wide = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0))
    wide[:, 3] *= 1000
    assert list(weights.measure(wide, search=True).groups) == [256, 128], "the first that repairs is the last"
    assert weights.measure(torch.ones(4, 512), search=True).groups == {}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("testbed") / "planted"
    plant(PYTHON.model, folder, k=1000.0, blocks=(0, 1, 3), channels=3)
    return folder


def test_planted_linears_are_named_with_the_reason(planted, tmp_path):
    code, output = run("analyze", planted, "--json", "--figures", tmp_path / "figures")
    found = json_of(output)
    expected = {
        f"model.layers.{block}.{linear}"
        for block in (0, 1, 3)
        for linear in (*(f"self_attn.{letter}_proj" for letter in "qkv"), "mlp.gate_proj", "mlp.up_proj")
    }
    assert code == 0 and set(found["vulnerable"]) == set(found["grouped"]) == expected
    assert len(found["linears"]) == 42 and found["source"] == str(planted)
    for name, linear in found["linears"].items():
        assert bool(linear["reason"]) == (name in expected), name
        if name in expected:
            assert re.fullmatch(r"3 of 384 input columns up to \d+x the median: .*", linear["reason"])
            assert linear["columns"]["outliers"] == 3 and linear["columns"]["ratio"] > 500
            assert linear["groups"]["32"] < linear["groups"]["64"] < linear["column_error"]
    errors = [found["linears"][name]["column_error"] for name in found["vulnerable"]]
    assert errors == sorted(errors, reverse=True)
    shapes = {name: linear["shape"] for name, linear in found["linears"].items()}
    parameters = {name: rows * columns for name, (rows, columns) in shapes.items()}
    assert found["vulnerable_share"] == sum(parameters[n] for n in expected) / sum(parameters.values())
    for name in ("weights.svg", "errors.svg"):
        assert (tmp_path / "figures" / name).read_text().startswith("<?xml")


@pytest.mark.slow
def test_perturbation_tells_weights_from_activations(planted):
    options = ("--calibration", PYTHON.calibration, "--calibration-tokens", 2048)
    code, output = run("analyze", planted, "--json", *options)
    found = json_of(output)["perturbation"]
    assert code == 0 and len(found) == 24, "four fused linears in each of six blocks"
    for block in (0, 1, 3):
        for unit in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
            errors = found[f"model.layers.{block}.{unit}"]
            assert errors["before_weights"] > 100 * errors["after_weights"], "the outlier columns are in the weights"
            assert errors["before_both"] > 100 * errors["after_both"]
    for unit, errors in found.items():
        assert set(errors) == {f"{w}_{x}" for w in ("before", "after") for x in ("weights", "activations", "both")}
        sides = errors["after_weights"] + errors["after_activations"]
        assert errors["after_both"] == pytest.approx(sides, rel=0.15), f"{unit}: two independent sources of error"
    assert max(found, key=lambda unit: found[unit]["after_both"]).endswith("down_proj")
    code, output = run("analyze", planted, "--calibration-tokens", 2048)
    assert code == 2 and "--calibration-tokens has no effect without --calibration FILE" in output
    code, output = run("analyze", PYTHON.model, "--top", 3, *options)
    assert code == 0 and "sum of 24" in output and output.count("down_proj") >= 3


def test_table_says_why_and_what_to_do(planted):
    code, output = run("analyze", planted, "--group-size", 32, "--top", 4)
    assert code == 0
    assert output.count("3 of 384 input columns") == 4 and "11 more that are vulnerable; --top 15 shows them" in output
    assert "15 of 42 linears are vulnerable, 32.5% of the linears' parameters" in output
    assert f"bismooth convert {planted} DST --calibration" in output
    assert "Per-group scales of 32 on 15 linears" in output and "are not enough" in output
    assert "0 of 42 linears" in run("analyze", PYTHON.model)[1]


def test_repair_by_groups_is_named_with_its_siblings(make_checkpoint):
    source = make_checkpoint(hidden_size=1024, num_hidden_layers=1)
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_shard(source, lambda tensors: tensors[name][:, 5].mul_(500), name)
    code, output = run("analyze", source)
    assert code == 0 and "Or by per-group scales on 3 linears, 2 of them because vLLM serves them alike" in output
    assert f"bismooth convert {source} DST --method mixed --group-size 32" in output


def test_experts_are_repaired_together(make_checkpoint):
    source = make_checkpoint("qwen3_moe", hidden_size=512, head_dim=16, moe_intermediate_size=64)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit_shard(source, lambda tensors: tensors[name][:, 5].mul_(300), name)
    code, output = run("analyze", source, "--figures", source.parent / "figures")
    assert code == 0 and "1 of " in output
    assert "Or by per-group scales on 12 linears, 11 of them because vLLM serves them alike" in output
    assert f"bismooth convert {source} DST --method mixed --group-size 32" in output
    drawn = (source.parent / "figures" / "errors.svg").read_text()  # text is drawn as paths, beside a comment
    assert re.findall(r"<!-- (\S+_proj) -->", drawn) == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("experts.*.gate_proj", "experts.*.up_proj", "experts.*.down_proj"),
    ]


def test_groups_must_fit_the_other_experts(make_checkpoint):
    """Those of 32 would repair this linear, but not divide the other's 48 columns."""
    source = make_checkpoint("qwen3_moe", hidden_size=512, head_dim=16, moe_intermediate_size=48)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit_shard(source, lambda tensors: tensors[name][:, 5].mul_(300), name)
    code, output = run("analyze", source)
    assert code == 0 and "K of a vulnerable linear, or of one served like it, is not a multiple of 32" in output
    assert "--method mixed" not in output


def test_bad_options(make_checkpoint, tmp_path, monkeypatch):
    source = make_checkpoint()
    for options, message in (
        (["--group-size", 33], "--group-size 33: not a positive multiple of 32"),
        (["--figures", source / "config.json"], "config.json"),
    ):
        code, output = run("analyze", source, *options)
        assert code == 2 and message in output
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, output = run("analyze", source, "--figures", tmp_path / "figures")
    assert code == 2 and "pip install vllm-w8a8-bismooth[plot]" in output
    assert not (tmp_path / "figures").exists()
