"""Sources in FP8: converted as the same numbers in float, byte for byte; and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.command import converted, json_of, refused, run
from tests.support.contents import digests
from tests.support.conversion import convert
from tests.support.damage import INDEX, config, edit_json, edit_shard
from tests.support.quantized import FORMATS, store
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.conversion import merge as merging
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.verification import verify

Q = "model.layers.1.self_attn.q_proj.weight"
BF16, FP32 = torch.bfloat16, torch.float32
METHODS = {
    "rtn": (Recipe.of("rtn"), False),
    "data-free": (Recipe.of("bismooth", ignore=r"2\.mlp\.down"), False),
    "calibrated": (Recipe.of("bismooth", calibration_tokens=500), True),
}
CASES = [
    *((name, "rtn", BF16) for name in FORMATS),
    *(("deepseek", method, dtype) for method in METHODS for dtype in (BF16, FP32) if (method, dtype) != ("rtn", BF16)),
]


@pytest.fixture
def fp8(make_checkpoint, tmp_path):
    """A source in DeepSeek's format; beside it lies the same in float."""
    store(make_checkpoint(), tmp_path / "fp8", "deepseek")
    return tmp_path / "fp8"


def shards(folder: Path) -> dict[str, str]:
    found = {file: digest for file, digest in digests(folder).items() if file.endswith(".safetensors")}
    assert found
    return found


@pytest.mark.parametrize(("name", "method", "dtype"), CASES)
def test_same_bytes_as_from_float(make_checkpoint, tmp_path, calibration_text, name, method, dtype):
    plain = store(make_checkpoint(dtype=dtype), tmp_path / "fp8", name, dtype)
    recipe, calibrated = METHODS[method]
    text = read_text(calibration_text) if calibrated else None
    sources = (tmp_path / "fp8", plain)
    made, expected = (convert(source, tmp_path / f"{source.name}-int8", recipe, text) for source in sources)
    assert shards(made.destination) == shards(expected.destination)
    assert (made.destination / "config.json").read_bytes() == (expected.destination / "config.json").read_bytes()
    assert made.linears == expected.linears and made.sites == expected.sites
    assert made.source_bytes < 0.75 * expected.source_bytes, "as it is stored"
    for source in sources:
        assert not verify(made.destination, source, engine=False).findings


def test_rounded_once_to_the_models_dtype(make_checkpoint, tmp_path):
    """INT8 of BF16 is not that of the exact products; it is what one gets who saves the model in BF16 first."""
    store(make_checkpoint(), tmp_path / "fp8", "deepseek")
    edit_json(tmp_path / "fp8" / "config.json", lambda c: c.update(dtype="float32"))
    convert(tmp_path / "fp8", tmp_path / "exact", METHODS["rtn"][0])
    edit_json(tmp_path / "fp8" / "config.json", lambda c: c.update(dtype="float16"))
    convert(tmp_path / "fp8", tmp_path / "rounded", METHODS["rtn"][0])
    assert shards(tmp_path / "exact") != shards(tmp_path / "rounded")


@pytest.mark.parametrize("method", ["rtn", "calibrated"])
def test_resumed(fp8, tmp_path, calibration_text, method, monkeypatch):
    recipe, calibrated = METHODS[method]
    text = read_text(calibration_text) if calibrated else None
    convert(fp8, tmp_path / "whole", recipe, text)

    def dying(stage: str, done: int, *_) -> None:
        if (stage, done) == ("convert", 2):
            raise Interrupted.of("disk", "full", "make room")

    with pytest.raises(Interrupted):
        convert(fp8, tmp_path / "out", recipe, text, progress=dying)
    assert convert(fp8, tmp_path / "out", recipe, text).resumed == 2
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert convert(fp8, tmp_path / "out", recipe, text).reused


def test_scales_that_change_meanwhile(fp8, tmp_path):
    """They are in a file of their own, in which no tensor lies that others see."""

    def touching(stage: str, done: int, *_) -> None:
        (fp8 / "model-b.safetensors").touch()

    with pytest.raises(BismoothError, match=r"model-b.safetensors: changed during the conversion"):
        convert(fp8, tmp_path / "out", METHODS["rtn"][0], progress=touching)


def test_other_scales_are_another_source(fp8, tmp_path):
    convert(fp8, tmp_path / "out", METHODS["rtn"][0])
    scales = load_file(fp8 / "model-b.safetensors")
    scales[f"{Q}_scale_inv"][0, 0] *= 2
    save_file(scales, fp8 / "model-b.safetensors")
    code, message = run("convert", fp8, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "source" in message, message
    assert not verify(tmp_path / "out", fp8, engine=False).ok


def test_parts(fp8, tmp_path):
    recipe, _ = METHODS["data-free"]
    whole = convert(fp8, tmp_path / "whole", recipe)
    for blocks in (slice(0, 1), slice(1, 3)):
        convert(fp8, tmp_path / f"part-{blocks.start}", recipe, blocks=blocks)
    merged = merging.merge(merging.prepare([tmp_path / "part-0", tmp_path / "part-1"], tmp_path / "merged"))
    assert digests(tmp_path / "merged") == digests(tmp_path / "whole")
    assert merged.quantized == whole.quantized is not None and merged.source_bytes == whole.source_bytes


def test_what_is_said_of_it(fp8, tmp_path):
    how = "FP8 with a scale for each block of 48 x 40"
    code, said = run("inspect", fp8)
    assert code == 0 and "F8_E4M3" in said and f"quantized already ({how})" in said
    found = json_of(run("inspect", fp8, "--json")[1])
    plain = json_of(run("inspect", fp8.with_name("fp8-in-float"), "--json")[1])
    assert found["quantized"] == how and plain["quantized"] is None
    assert found["parameters"] == plain["parameters"] and found["source_bytes"] < plain["source_bytes"]
    assert found["needs"]["data-free"]["written_bytes"] == plain["needs"]["data-free"]["written_bytes"]
    assert found["needs"]["data-free"]["memory_bytes"] == plain["needs"]["data-free"]["memory_bytes"]
    for options in (["--dry-run"], []):
        said = converted(fp8, tmp_path / "out", "--method", "rtn", *options)
        assert f"Warning: the source's weights are quantized already ({how})" in said and "in BF16" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["source_quantized"] == how and how in (tmp_path / "out" / "README.md").read_text()
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["format"] == "int-quantized" and "weight_block_size" not in written
    said = converted(fp8.with_name("fp8-in-float"), tmp_path / "other", "--method", "rtn")
    assert "Warning" not in said and "FP8" not in (tmp_path / "other" / "README.md").read_text()


SCALE = f"{Q}_scale_inv"


def other_scales(change):
    return lambda folder: edit_shard(folder, lambda tensors: tensors.update({SCALE: change(tensors[SCALE])}), SCALE)


def without_scale(folder: Path) -> None:
    edit_shard(folder, lambda tensors: tensors.pop(SCALE), SCALE)
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(SCALE))


def without_weight(folder: Path) -> None:
    edit_shard(folder, lambda tensors: tensors.pop(Q), Q)
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(Q))


def stored_as(change):
    return lambda folder: edit_shard(folder, lambda tensors: tensors.update({Q: change(tensors[Q])}), Q)


def code(byte: int):
    def change(codes: torch.Tensor) -> torch.Tensor:
        codes.view(torch.uint8)[3, 5] = byte
        return codes

    return stored_as(change)


def unquantized(folder: Path) -> None:
    """Its float twin, with the config of FP8."""
    says = json.loads((folder / "config.json").read_text())["quantization_config"]
    for file in folder.glob("*"):
        file.unlink()
    for file in folder.with_name("fp8-in-float").glob("*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config(quantization_config=says)(folder)


def spoiled(value: float):
    def to(scales: torch.Tensor) -> torch.Tensor:
        scales[1, 1] = value
        return scales

    return other_scales(to)


AGAIN = "download the checkpoint again, as its publisher stores it"
REFUSED = {
    "a scale is missing": (without_scale, [Q, "F8_E4M3", "weight_scale_inv", AGAIN]),
    "a weight is missing": (without_weight, [SCALE, "is the scale of a weight that is not there", AGAIN]),
    "scales of another shape": (
        other_scales(lambda scales: scales[:, :1].clone()),
        [SCALE, "has shape [2, 1]", "block of 48 x 40", f"{Q} [96, 64]", AGAIN],
    ),
    "two scales": (
        lambda folder: (
            edit_shard(folder, lambda t: t.update({f"{Q}_scale": torch.ones(1)}), SCALE),
            edit_json(folder / INDEX, lambda i: i["weight_map"].update({f"{Q}_scale": "model-b.safetensors"})),
        ),
        [f"{Q}_scale: is a scale beside another one of the same weight", AGAIN],
    ),
    "scales in integers": (other_scales(lambda scales: scales.int()), [SCALE, "has dtype I32", "F32, BF16, F16"]),
    "a scale is NaN": (spoiled(float("nan")), [SCALE, "holds nan at [1, 1]", "model-b.safetensors"]),
    "a scale is infinite": (spoiled(float("inf")), [SCALE, "holds inf at [1, 1]"]),
    "a code is NaN": (code(0x7F), [Q, "holds nan at [3, 5]", "model-a.safetensors"]),
    "E5M2": (stored_as(lambda w: w.float().to(torch.float8_e5m2)), [Q, "dtype F8_E5M2", "already quantized"]),
    "BF16 among them": (stored_as(lambda w: w.bfloat16()), [Q, "has dtype BF16, and a scale is beside it", AGAIN]),
    "all in float": (unquantized, ["quant_method = 'fp8'", "all weights are float", "remove quantization_config"]),
    "no word of it in the config": (
        lambda folder: edit_json(folder / "config.json", lambda c: c.pop("quantization_config")),
        ["F8_E4M3", "mend config.json, which has no quantization_config"],
    ),
    "blocks of no size": (
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [0, "a"]}),
        ["[0, 'a'] is no size of blocks"],
    ),
    "blocks as large as can be": (
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [10**12, 10**12]}),
        [SCALE.replace("1.self_attn.q", "0.mlp.down"), "block of 1000000000000 x 1000000000000"],
    ),
    "another method": (config(quantization_config={"quant_method": "awq"}), ["F8_E4M3", "already quantized", "BF16"]),
    "a list": (config(quantization_config=["fp8"]), ["F8_E4M3", "already quantized", "BF16"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(fp8, tmp_path, case):
    damage, parts = REFUSED[case]
    damage(fp8)
    before = digests(fp8)
    refused(fp8, tmp_path, *parts)
    assert digests(fp8) == before and not (tmp_path / "out.partial").exists()


INTEGERS = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "INT8": {"quant_method": "compressed-tensors", "format": "int-quantized"},
    "NVFP4": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
}


@pytest.mark.parametrize("case", INTEGERS)
def test_integers_stay_refused(make_checkpoint, tmp_path, case):
    source = make_checkpoint()
    edit_shard(source, lambda t: t.update({Q: (t[Q] * 100).to(torch.int8)}))
    config(quantization_config=INTEGERS[case])(source)
    refused(source, tmp_path, Q, "I8", "already quantized", "BF16")


def test_a_lost_shard_is_one_problem(fp8, tmp_path):
    (fp8 / "model-b.safetensors").unlink()
    refused(fp8, tmp_path, "model-b.safetensors", "absent")


def test_opened_as_a_source(fp8):
    assert Source(fp8).checkpoint.quantized and not Source(fp8).problems
