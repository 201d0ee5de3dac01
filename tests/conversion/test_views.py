"""Stacked experts and transposed weights: converted as the same matrices under their own names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3VLMoeConfig

from tests.support.contents import digests
from tests.support.conversion import convert
from tests.support.folding import smoothed_copy
from tests.support.models import tiny_config, tiny_model, write_checkpoint
from tests.support.stored import store_apart
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.conversion import merge as merging
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted
from vllm_w8a8_bismooth.measure import experts
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.method.quantize import quantize_weight
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.verification import verify

STACKED = ["granitemoe", "llama4_text", "qwen3_vl_moe"]
METHODS = {
    "rtn": (Recipe.of("rtn"), False),
    "data-free": (Recipe.of("bismooth"), False),
    "calibrated": (Recipe.of("bismooth", calibration_tokens=500), True),
}


@pytest.fixture(scope="session", autouse=True)
def kept_records(tmp_path_factory):
    """What is found out of a type is found out once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def model_of(model_type: str) -> torch.nn.Module:
    if model_type != "qwen3_vl_moe":
        return tiny_model(model_type)
    text = tiny_config("qwen3_moe", mlp_only_layers=[], num_hidden_layers=2, moe_intermediate_size=48).to_dict()
    del text["model_type"]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]}
    vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=4)
    config = Qwen3VLMoeConfig(
        text_config=text,
        vision_config={**vision, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        image_token_id=150, video_token_id=151, vision_start_token_id=152, vision_end_token_id=153,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3 if parameter.dim() == 1 else 0.08)
    return model.eval()


def write(folder: Path, model_type: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    return write_checkpoint(folder, model_of(model_type), dtype, sharded=False)


def logits(folder: Path) -> torch.Tensor:
    auto = AutoModelForImageTextToText if "vl" in folder.parent.name else AutoModelForCausalLM
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    model = auto.from_pretrained(folder, dtype=torch.float64, **eager).eval()
    ids = torch.randint(2, 140, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def edit(shard: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})


def codes(folder: Path) -> dict[str, str]:
    return {file: digest for file, digest in digests(folder).items() if file.endswith(".safetensors")}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", STACKED)
def test_same_bytes_as_from_experts_of_their_own(tmp_path, calibration_text, model_type, method):
    source = write(tmp_path / "stacked", model_type)
    apart = store_apart(source, tmp_path / "apart")
    assert Source(source).checkpoint.views and not Source(apart).checkpoint.views
    recipe, calibrated = METHODS[method]
    text = read_text(calibration_text) if calibrated else None
    made, expected = (convert(each, tmp_path / f"{each.name}-int8", recipe, text) for each in (source, apart))
    assert codes(made.destination) == codes(expected.destination)
    assert made.linears == expected.linears and made.sites == expected.sites
    blocks = 3 if model_type == "granitemoe" else 2
    assert sum(".experts." in name for name in made.linears) == 4 * 3 * blocks
    assert made.source_bytes == expected.source_bytes
    for each in (source, apart):
        assert not verify(made.destination, each, engine=False).findings


def test_same_bytes_as_from_stacks_the_other_way_round(tmp_path):
    source = write(tmp_path / "source", "qwen3_vl_moe")
    made = convert(source, tmp_path / "out", METHODS["data-free"][0])

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        stacks = {name: tensor.mT.contiguous() for name, tensor in tensors.items() if ".experts." in name}
        assert len(stacks) == 2 * 2
        tensors.update(stacks)

    edit(source / "model.safetensors", turn)
    assert codes(convert(source, tmp_path / "turned", METHODS["data-free"][0]).destination) == codes(made.destination)
    assert not verify(tmp_path / "out", source, engine=False).findings


@pytest.mark.parametrize("model_type", ["gpt2", *STACKED])
def test_folds_keep_the_function(tmp_path, model_type):
    source = write(tmp_path / model_type / "source", model_type, torch.float32)
    smoothed_copy(source, tmp_path / model_type / "folded")
    before, after = logits(source), logits(tmp_path / model_type / "folded")
    assert (before - after).norm() < 1e-5 * before.norm()


def test_gpt2_is_written_transposed_as_it_is_read(tmp_path):
    """vLLM turns weights of such names, and nothing else, whatever their dtype."""
    source = write(tmp_path / "source", "gpt2")
    convert(source, tmp_path / "out", METHODS["rtn"][0])
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == {name for name in after if not name.endswith("_scale")}
    quantized = [name for name in after if after[name].dtype == torch.int8]
    assert len(quantized) == 4 * 3
    for name in quantized:
        expected, scale = quantize_weight(before[name].float().T.contiguous())
        assert torch.equal(after[name], expected.T) and torch.equal(after[f"{name}_scale"], scale)


@pytest.mark.parametrize("method", METHODS)
def test_gpt2_is_verified(tmp_path, calibration_text, method):
    source = write(tmp_path / "source", "gpt2")
    recipe, calibrated = METHODS[method]
    convert(source, tmp_path / "out", recipe, read_text(calibration_text) if calibrated else None)
    found = verify(tmp_path / "out", source, engine=False)
    assert not found.findings and len(found.linears) == 4 * 3
    name = "transformer.h.1.mlp.c_fc.weight"

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][5] *= -1  # an input channel: nothing that a factor makes of a row

    edit(tmp_path / "out" / "model.safetensors", flip)
    (tmp_path / "out" / "report.json").unlink()
    found = verify(tmp_path / "out", source, engine=False)
    assert any(name.removesuffix(".weight") in problem.where for problem in found.findings)


@pytest.mark.parametrize(("model_type", "method"), [("gpt2", "calibrated"), ("llama4_text", "calibrated")])
def test_resumed(tmp_path, calibration_text, model_type, method):
    source, (recipe, _) = write(tmp_path / "source", model_type), METHODS[method]
    text = read_text(calibration_text)
    convert(source, tmp_path / "whole", recipe, text)

    def dying(stage: str, done: int, *_) -> None:
        if (stage, done) == ("convert", 2):
            raise Interrupted.of("disk", "full", "make room")

    with pytest.raises(Interrupted):
        convert(source, tmp_path / "out", recipe, text, progress=dying)
    assert convert(source, tmp_path / "out", recipe, text).resumed == 2
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert convert(source, tmp_path / "out", recipe, text).reused


@pytest.mark.parametrize("model_type", ["gpt2", "granitemoe"])
def test_parts(tmp_path, model_type):
    source, (recipe, _) = write(tmp_path / "source", model_type), METHODS["data-free"]
    convert(source, tmp_path / "whole", recipe)
    for blocks in (slice(0, 1), slice(1, 3)):
        convert(source, tmp_path / f"part-{blocks.start}", recipe, blocks=blocks)
    merging.merge(merging.prepare([tmp_path / "part-0", tmp_path / "part-1"], tmp_path / "merged"))
    assert digests(tmp_path / "merged") == digests(tmp_path / "whole")


def test_experts_that_no_token_reached(tmp_path, calibration_text):
    """They are smoothed by what others were given, and are named."""
    source = write(tmp_path / "source", "llama4_text", torch.float32)

    def never(tensors: dict[str, torch.Tensor]) -> None:
        router = tensors["model.layers.1.feed_forward.router.weight"]
        router[2] = router[[0, 1, 3]].mean(0)  # the largest of them is larger

    edit(source / "model.safetensors", never)
    text = read_text(calibration_text)
    made = convert(source, tmp_path / "out", METHODS["calibrated"][0], text)
    assert [site["site"] for site in made.sites[1] if site.get("unread")] == ["experts.up->down.2"]
    assert any("experts.up->down.2 in block 1" in note for note in made.notes)
    (factors,) = (site for site in made.sites[1] if site["site"] == "experts.up->down.2")
    assert factors["factor_max"] > 1.01 * factors["factor_min"]
    assert not verify(tmp_path / "out", source, engine=False).findings


def test_unusual_experts_run_as_they_are(tmp_path, calibration_text, monkeypatch):
    """Nothing inside them is measured; all else is, and the same."""
    source, text = write(tmp_path / "source", "llama4_text"), read_text(calibration_text)
    usual = convert(source, tmp_path / "usual", METHODS["calibrated"][0], text)
    monkeypatch.setattr(experts, "_KINDS", {})
    made = convert(source, tmp_path / "out", METHODS["calibrated"][0], text)
    for i, sites in usual.sites.items():
        found = {site["site"]: site for site in made.sites[i]}
        for site in sites:
            if site["site"].startswith("experts.up->down"):
                assert site["site"] not in found
            else:
                assert found[site["site"]]["factor_max"] == pytest.approx(site["factor_max"], rel=0.05)
    assert any("8 sites, like experts.up->down.0 in block 1, are left as they are" in note for note in made.notes)
    assert not any("left as they are" in note for note in usual.notes)
    assert not verify(tmp_path / "out", source, engine=False).findings


def test_auto_passes_unusual_experts_over(tmp_path, calibration_text, monkeypatch):
    source, text = write(tmp_path / "source", "llama4_text"), read_text(calibration_text)
    recipe = Recipe.of("auto", calibration_tokens=500, group_size=32)
    usual = convert(source, tmp_path / "usual", recipe, text)
    monkeypatch.setattr(experts, "_KINDS", {})
    made = convert(source, tmp_path / "out", recipe, text)
    units, left = ({entry.unit for entry in report.granularity} for report in (usual, made))
    assert units - left == {"model.layers.1.experts", "model.layers.3.experts"} and left < units
    assert not any(".experts." in name and entry["group_size"] for name, entry in made.linears.items())


def test_experts_that_vllm_serves_in_float_only(tmp_path):
    source = write(tmp_path / "source", "gpt_oss")
    made = convert(source, tmp_path / "out", METHODS["data-free"][0])
    assert len(made.linears) == 4 * 3 and not any("experts" in name for name in made.linears)
    assert made.sites, "attention is smoothed all the same"
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    stacks = [name for name in before if ".experts." in name]
    assert len(stacks) == 4 * 3 and all(torch.equal(before[name], after[name]) for name in stacks)
    ignore = Source(source)
    assert "with biases" in ignore.layers[0].routers["mlp.experts.gate_up_proj"]
    assert not verify(tmp_path / "out", source, engine=False).findings


def test_a_stack_of_another_shape(tmp_path):
    source = write(tmp_path / "source", "granitemoe")
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    edit(source / "model.safetensors", lambda tensors: tensors.update({name: tensors[name][:, :-2].clone()}))
    with pytest.raises(BismoothError, match=r"input_linear.weight: has shape \[4, 190, 64\], config.json implies") as e:
        Source(source)
    assert len(e.value.problems) == 1


def test_a_stack_that_is_not_there(tmp_path):
    source = write(tmp_path / "source", "granitemoe")
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    edit(source / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(BismoothError, match=name):
        Source(source)
