"""Experts per-group and per-channel, all of a block alike."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.command import run
from tests.support.contents import digests, tensors_of
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.models import tiny_model, write_checkpoint
from tests.support.sweep import sweep
from vllm_w8a8_bismooth.conversion import merge as merging
from vllm_w8a8_bismooth.conversion import pipeline
from vllm_w8a8_bismooth.conversion.preview import preview
from vllm_w8a8_bismooth.errors import Interrupted
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.method.quantize import quantize_weight
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.verification import verify

INSIDE = {
    "mixtral": ("block_sparse_moe", ("w1", "w2", "w3")),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
BLOCK = "model.layers.1."
CALIBRATED = Recipe.of("bismooth", calibration_tokens=500, group_size=32, group_layers=r"layers\.1\..*experts\.2\..*")
MIXED = Recipe.of("mixed", group_size=32, group_layers=CALIBRATED.group_layers)
WEIGHTS = Recipe.of("mixed", group_size=32)
ARMS = {"by name": (MIXED, False), "calibrated": (CALIBRATED, True), "by the weights": (WEIGHTS, False)}


def experts_of(model_type: str, *blocks: int) -> list[str]:
    """Full names of all experts' linears in some blocks, sorted."""
    inside, linears = INSIDE[model_type]
    return sorted(f"model.layers.{b}.{inside}.experts.{e}.{n}" for b in blocks for e in range(4) for n in linears)


def outlier(model_type: str) -> torch.nn.Module:
    """A model in which INT8 would lose the columns of one linear of one expert in block 1, beside an outlier."""
    model = tiny_model(model_type, **({"moe_intermediate_size": 64} if model_type == "qwen2_moe" else {}))
    stack = model.get_submodule("model.layers.1.mlp.experts")
    with torch.no_grad():
        stack.gate_up_proj[2, 0 : stack.gate_up_proj.shape[1] // 2, 5] *= 1000
    return model


@pytest.mark.parametrize(("model_type", "arm"), sweep([(t, arm) for arm in ARMS for t in INSIDE], fast=2))
def test_all_experts_of_a_block_get_groups(tmp_path, calibration_text, model_type, arm):
    """What names or weights say of one of them holds for all; everything else is as without groups."""
    source, out = write_checkpoint(tmp_path / "source", outlier(model_type)), tmp_path / "out"
    recipe, calibrated = ARMS[arm]
    text, expected = read_text(calibration_text) if calibrated else None, experts_of(model_type, 1)
    planned = preview(pipeline.prepare(source, out, recipe, text))
    report = convert(source, out, recipe, text)
    assert sorted(name for name, entry in report.linears.items() if entry["group_size"] == 32) == expected
    if arm != "by the weights":  # which nobody has read yet
        assert sorted(planned.grouped) == expected and planned.written_bytes == report.written_bytes

    plain = Recipe.of("bismooth", calibration_tokens=500) if calibrated else Recipe.of("rtn")
    without = convert(source, tmp_path / "without", plain, text)
    before, tensors, channels = (tensors_of(folder) for folder in (source, out, without.destination))
    assert tensors.keys() == channels.keys()
    changed = {n for n in tensors if tensors[n].shape != channels[n].shape or not tensors[n].equal(channels[n])}
    assert changed == {f"{name}.{kind}" for name in expected for kind in ("weight", "weight_scale")}
    for name in expected:
        rows, columns = tensors[f"{name}.weight"].shape
        assert tensors[f"{name}.weight_scale"].shape == (rows, columns // 32)
        if not calibrated:
            codes, scale = quantize_weight(before[f"{name}.weight"].float(), 32)
            assert tensors[f"{name}.weight"].equal(codes) and tensors[f"{name}.weight_scale"].equal(scale)

    config = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert config["group_0"]["targets"] == [r"re:.*\.layers\.(1)\.((.*\.|)experts\.\d.*)$"]
    assert config["group_0"]["weights"]["group_size"] == config["group_0"]["input_activations"]["group_size"] == 32
    assert config["group_1"]["targets"] == ["Linear"] and config["group_1"]["weights"]["group_size"] is None
    found = verify(out, source, engine=False)
    assert found.ok and not found.notes, [str(finding) for finding in found.findings]
    assert run("convert", source, out, "--method", "mixed")[0] == 2, "another recipe"


@pytest.mark.slow
def test_vllm_takes_them_as_they_are_stored(tmp_path):
    """vLLM itself, asked for the scheme of each kind of linear; no engine."""
    source = write_checkpoint(tmp_path / "source", tiny_model("mixtral"))
    convert(source, tmp_path / "out", MIXED)
    found = verify(tmp_path / "out", source)
    assert found.ok and not found.findings, [str(finding) for finding in found.findings]


@pytest.mark.parametrize("recipe", [MIXED, WEIGHTS], ids=["by name", "by the weights"])
def test_interrupted_and_in_parts_it_is_the_same(tmp_path, recipe):
    source = write_checkpoint(tmp_path / "source", outlier("mixtral"))
    convert(source, tmp_path / "whole", recipe)

    def dying(stage: str, done: int, total: int, written: int) -> None:
        if (stage, done) == ("convert", 2):
            raise Interrupted.of("disk", "full", "make room")

    with pytest.raises(Interrupted):
        convert(source, tmp_path / "again", recipe, progress=dying)
    assert convert(source, tmp_path / "again", recipe).resumed == 2
    parts = [tmp_path / "first", tmp_path / "second"]
    for part, blocks in zip(parts, (slice(0, 1), slice(1, 3)), strict=True):
        convert(source, part, recipe, blocks=blocks)
    merging.merge(merging.prepare(parts, tmp_path / "merged"))
    assert digests(tmp_path / "whole") == digests(tmp_path / "again") == digests(tmp_path / "merged")


def test_one_expert_with_other_scales_is_a_fault(tmp_path):
    """vLLM would refuse it; the files and the config agree all the same."""
    source, out = write_checkpoint(tmp_path / "source", tiny_model("mixtral")), tmp_path / "out"
    convert(source, out, MIXED)
    name = f"{BLOCK}block_sparse_moe.experts.2.w3"
    weight = tensors_of(source)[f"{name}.weight"].float()
    codes, scale = quantize_weight(weight)
    tensors = tensors_of(out) | {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    save_file(tensors, out / "model.safetensors")

    def name_it(config: dict) -> None:
        groups = config["quantization_config"]["config_groups"]
        config["quantization_config"]["config_groups"] = {"one": groups["group_1"] | {"targets": [name]}, **groups}

    edit_json(out / "config.json", name_it)
    said = [str(finding) for finding in verify(out, engine=False).findings]
    assert any(f"{name}: has group_size None, {BLOCK}" in line and "experts of a block alike" in line for line in said)


def test_what_cannot_have_groups_is_refused(make_checkpoint, tmp_path):
    """K of the other linears of an expert counts, too; and experts that stay in float have no scales."""
    source = make_checkpoint("qwen2_moe", moe_intermediate_size=48)
    options = ["--method", "mixed", "--group-size", "32", "--group-layers"]
    code, text = run("convert", source, tmp_path / "out", *options, r"layers\.2\..*experts\.0\.gate_proj")
    assert code == 2 and "model.layers.2.mlp.experts.0.down_proj: K = 48 is not a multiple of --group-size 32" in text
    code, text = run("convert", source, tmp_path / "out", *options, r"experts\.0", "--ignore", r"\.experts\.")
    assert code == 2 and "both name model.layers.1.mlp.experts.0.down_proj" in text
    assert not (tmp_path / "out").exists()


def test_ranks_need_whole_groups_of_experts(make_checkpoint):
    source = make_checkpoint("qwen2_moe", intermediate_size=512, shared_expert_intermediate_size=512, head_dim=64)
    code, text = run("inspect", source, "--group-size", "32")
    assert code == 0, text
    why = "mlp.experts.{}.down_proj: a rank's share of K = 32 is not a multiple of group_size = 32, if experts have"
    assert text.count(why) == 1, "each expert is not named"


BEFORE = "4eeabe3846cc490ea41a9bbff2ba2b907e56246ace6eefc0a751938fc5246e66"
"""Of what was written before experts could have groups."""


def test_per_channel_bytes_are_what_they_were(tmp_path):
    """Of weights that are the same on every machine, as rounding to nearest is."""
    model = tiny_model("mixtral")
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
            numbers = (torch.arange(parameter.numel()) * 40503 + i * 7919) % 4093 - 2046
            parameter.copy_(numbers.view(parameter.shape) / 16384)
    source = write_checkpoint(tmp_path / "source", model)
    convert(source, tmp_path / "out", Recipe.of("rtn"))
    assert _digest(tmp_path / "out") == BEFORE


def _digest(folder: Path) -> str:
    """Of all tensors, and of what config.json says of them, but for versions."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    digest = hashlib.sha256(json.dumps(config | {"bismooth": None}, sort_keys=True).encode())
    for name, tensor in sorted(tensors_of(folder).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
