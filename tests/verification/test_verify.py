import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.command import json_of, run
from tests.support.conversion import convert
from tests.support.damage import INDEX, edit_json, edit_shard, shard_of
from tests.support.models import MODEL_TYPES, tiny_model, write_checkpoint
from tests.support.others import DATA
from tests.support.sweep import sweep
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.method.quantize import quantize_weight
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.verification import Verification, verify

BLOCK = "model.layers.1."
Q, V, OUT, UP, DOWN = (
    f"{BLOCK}{name}_proj.weight" for name in ("self_attn.q", "self_attn.v", "self_attn.o", "mlp.up", "mlp.down")
)
NORM, EMBEDDING = f"{BLOCK}input_layernorm.weight", "model.embed_tokens.weight"
MIXED = Recipe.of("mixed", group_size=32, group_layers=r"layers\.1\.(self_attn\.v_proj|mlp\.down_proj)")
BISMOOTH = Recipe.of("bismooth", calibration_tokens=200)
NEAREST = replace(BISMOOTH, rounding="nearest")
IGNORED = replace(NEAREST, ignore=r"layers\.1\.(self_attn\.v_proj|mlp\.down_proj)")


def lines(found: Verification) -> list[str]:
    return [str(finding) for finding in found.findings]


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("model_type", sweep(MODEL_TYPES, 3))
def test_calibrated_conversions_are_clean(make_checkpoint, tmp_path, calibration_text, model_type):
    source, out = make_checkpoint(model_type), tmp_path / "out"
    convert(source, out, BISMOOTH, read_text(calibration_text))
    stages = []
    found = verify(out, source, lambda *step: stages.append(step), engine=False)
    assert found.ok and not found.notes, lines(found)
    assert ("compare", 3, 3, 0) in stages and stages[0][0] == "read"
    layout = Source(source)
    writers = [
        f"{layout.names.block(i)}{name}"
        for i, layer in enumerate(layout.layers)
        for name in layout.blocks[i]
        if name.removesuffix(".weight").removesuffix(".bias") in layer.writers
    ]
    assert found.unscaled == [*layout.outside, *writers] and len(writers) >= 6
    written = report_of(out)["linears"]
    assert found.linears.keys() == written.keys()
    for name, entry in found.linears.items():  # the factors were found again from narrow matrices
        assert abs(entry["sqnr"] - written[name]["sqnr"]) < 0.5 and entry["group_size"] is None


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("gemma2", torch.float16), ("llama", torch.bfloat16), ("phi3", torch.float32), ("qwen2_moe", torch.bfloat16)],
)
def test_odd_weights_are_no_faults(tmp_path, calibration_text, model_type, dtype):
    """Dead and huge channels, rows and columns of zeros, tiny and vanished biases: all leave something unknown."""
    biases = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    model = tiny_model(model_type, **biases)
    with torch.no_grad():
        for name, parameter in model.model.layers.named_parameters():
            if "norm" in name:
                parameter[5] = -1.0 if model_type == "gemma2" else 0.0
                parameter[11] *= 30
            elif parameter.dim() == 1:
                parameter[3], parameter[7], parameter[9] = 0.0, -0.0, 1e-6
            elif parameter.dim() == 2 and len(parameter) > 16:
                parameter[4], parameter[:, 6] = 0, 0
                parameter[8] *= 1e-3
                parameter[:, 9] *= 100
    source = write_checkpoint(tmp_path / "source", model, dtype)
    grouped = {"group_size": 32, "group_layers": r"layers\.1\.(self_attn|mlp\.down)"}
    recipes = {"rtn": Recipe.of("rtn"), "data-free": Recipe.of("bismooth"), "mixed": Recipe.of("mixed", **grouped)}
    recipes["calibrated"] = Recipe.of("bismooth", calibration_tokens=200, **grouped)
    recipes["ignored"] = replace(
        BISMOOTH, ignore=r"layers\.1\.(self_attn|mlp\.(down|experts))|layers\.2\..*(n\.k|p\.up)_proj"
    )
    for name, recipe in recipes.items():
        calibrated = recipe.calibration_tokens and name != "data-free"
        convert(source, tmp_path / name, recipe, read_text(calibration_text) if calibrated else None)
        found = verify(tmp_path / name, source, engine=False)
        assert found.ok, (name, lines(found))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """A source of one name and its conversion, sharded, made once and copied; the card and side files are there too."""
    made: dict[str, Path] = {}

    def pair(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            folder = made[kind] = tmp_path_factory.mktemp(kind)
            changes = {"attention_bias": True, "mlp_bias": True} if kind == "biased" else {}
            model_type = kind if kind in MODEL_TYPES else "llama"
            source = write_checkpoint(folder / "source", tiny_model(model_type, **changes))
            (source / "README.md").write_text("# original")
            text = folder / "text.txt"
            text.write_text("".join(chr(97 + (i * i) % 26) for i in range(3000)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("vllm_w8a8_bismooth.checkpoint.writer.SHARD_SIZE", "40KB")
                convert(
                    source,
                    folder / "out",
                    {"mixed": MIXED, "ignored": IGNORED, "compensated": BISMOOTH}.get(kind, NEAREST),
                    None if kind == "mixed" else read_text(text),
                )
        copy = tmp_path_factory.mktemp("copy")
        shutil.copytree(made[kind] / "out", copy / "out")
        return made[kind] / "source", copy / "out"

    return pair


def test_mixed_is_clean_and_told_apart(pairs):
    source, out = pairs("mixed")
    found = verify(out, source, engine=False)
    assert found.ok and not found.notes, lines(found)
    grouped = {name for name, entry in found.linears.items() if entry["group_size"] == 32}
    assert grouped == {f"{BLOCK}self_attn.{p}_proj" for p in "qkv"} | {DOWN.removesuffix(".weight")}


def test_ignored_is_clean_and_told_apart(pairs):
    source, out = pairs("ignored")
    found = verify(out, source, engine=False)
    assert found.ok and not found.notes, lines(found)
    assert set(found.ignored) == set(report_of(out)["ignored"]) and len(found.ignored) == 4
    assert found.linears.keys() == report_of(out)["linears"].keys()


def change(name: str, action: Callable[[torch.Tensor], torch.Tensor | None]):
    """Edit one tensor, in place or by another."""

    def damage(out: Path) -> None:
        def edit(tensors):
            new = action(tensors[name])
            tensors[name] = tensors[name] if new is None else new.contiguous()

        edit_shard(out, edit, name)

    return damage


def put(name: str, place, value: float):
    return change(name, lambda tensor: tensor.__setitem__(place, value))


def drop(name: str, index_too: bool = True):
    def damage(out: Path) -> None:
        edit_shard(out, lambda tensors: tensors.pop(name), name)
        if index_too:
            edit_json(out / INDEX, lambda index: index["weight_map"].pop(name))

    return damage


def add(name: str):
    def damage(out: Path) -> None:
        edit_shard(out, lambda tensors: tensors.update({name: torch.ones(3)}), Q)
        edit_json(out / INDEX, lambda index: index["weight_map"].update({name: shard_of(out, Q).name}))

    return damage


def flip_code(steps: int) -> Callable[[Path], None]:
    def action(codes: torch.Tensor) -> None:
        codes[3, 5] = codes[3, 5] - steps if codes[3, 5] > 0 else codes[3, 5] + steps

    return change(Q, action)


def scaled(tensor: torch.Tensor, place, factor: float) -> None:
    tensor[place] *= factor


def flip_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.int16)[7, 7] ^= 1


def in_int8(name: str):
    """Store a linear that is float as INT8, with scales."""

    def damage(out: Path) -> None:
        def edit(tensors):
            tensors[name], tensors[f"{name}_scale"] = quantize_weight(tensors[name].float())

        edit_shard(out, edit, name)
        file = shard_of(out, name).name
        edit_json(out / INDEX, lambda index: index["weight_map"].update({f"{name}_scale": file}))

    return damage


def float_expert(out: Path) -> None:
    name = f"{BLOCK}block_sparse_moe.experts.2.w3"
    change(f"{name}.weight", lambda t: t.bfloat16())(out)
    drop(f"{name}.weight_scale")(out)
    quantization(lambda c: c["ignore"].append(name))(out)


def ignoring(old: str, new: str):
    """Replace a part of each expression under ``ignore``."""
    return quantization(lambda c: c.update(ignore=[pattern.replace(old, new) for pattern in c["ignore"]]))


def quantization(action: Callable[[dict], None]):
    return lambda out: edit_json(out / "config.json", lambda config: action(config["quantization_config"]))


def strategy(value: str):
    return quantization(lambda c: c["config_groups"]["group_0"]["weights"].update(strategy=value))


def stray_shard(out: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, out / "model.safetensors")


def index_without_size(out: Path) -> None:
    edit_json(out / INDEX, lambda index: index["metadata"].pop("total_size"))


# What is done to which conversion -> what one finding must say. report.json is removed, so that hashes tell nothing.
ALONE = {
    "scale 0": (
        "llama",
        put(f"{Q}_scale", (2, 0), 0.0),
        [f"{Q}_scale", "0.0 at [2, 0]", "scales that are not between 0 and", "1 such values"],
    ),
    "scale NaN": ("llama", put(f"{Q}_scale", (2, 0), float("nan")), [f"{Q}_scale", "nan at [2, 0]"]),
    "scale negative": ("llama", put(f"{Q}_scale", (2, 0), -0.5), [f"{Q}_scale", "-0.5 at [2, 0]"]),
    "scale in bf16": ("llama", change(f"{Q}_scale", lambda t: t.bfloat16()), [f"{Q}_scale", "BF16", "not F32"]),
    "code -128": ("llama", put(Q, (4, 9), -128), [Q, "codes outside", "-128 at [4, 9]"]),
    "all codes zero": ("llama", change(Q, lambda t: t.zero_()), [Q, "no code but 0"]),
    "norm infinite": ("llama", put(NORM, 4, float("inf")), [NORM, "inf at [4]"]),
    "tensor gone": ("llama", drop(V), [V, "[48, 64]", "is missing"]),
    "tensor gone, index not": ("llama", drop(V, index_too=False), [V, "is missing", INDEX]),
    "scale gone": ("llama", drop(f"{V}_scale"), [f"{V}_scale", "is missing"]),
    "norm gone": ("llama", drop(NORM), [NORM, "is missing"]),
    "foreign tensor": ("llama", add(f"{BLOCK}mlp.router.weight"), [f"{BLOCK}mlp.router.weight", "not part of a llama"]),
    "foreign scale": ("llama", add("lm_head.weight_scale"), ["lm_head.weight_scale", "no INT8 weight"]),
    "linear in float": ("llama", change(Q, lambda t: t.bfloat16()), [Q, "stored as BF16, not INT8"]),
    "norm in INT8": ("llama", change(NORM, lambda t: t.to(torch.int8)), [NORM, "INT8", "only matrices"]),
    "embedding in INT8": ("llama", change(EMBEDDING, lambda t: t.to(torch.int8)), [f"{EMBEDDING}_scale", "is missing"]),
    "scale of another shape": (
        "llama",
        change(f"{Q}_scale", lambda t: t.expand(-1, 2)),
        [f"{Q}_scale", "[96, 2]", "per-channel", "[96, 1]"],
    ),
    "scale of another group": (
        "mixed",
        change(f"{Q}_scale", lambda t: t[:, :1]),
        [f"{Q}_scale", "[96, 1]", "per group of 32", "[96, 2]"],
    ),
    "weight of another shape": ("llama", change(Q, lambda t: t[:48]), [Q, "[48, 64]", "implies [96, 64]"]),
    "index total": (
        "llama",
        lambda out: edit_json(out / INDEX, lambda index: index["metadata"].update(total_size=7)),
        [INDEX, "total_size is 7"],
    ),
    "index without total": ("llama", index_without_size, [INDEX, "total_size is None"]),
    "stray shard": ("llama", stray_shard, ["model.safetensors", "lies in its folder"]),
    "target gone": (
        "mixed",
        quantization(lambda c: c["config_groups"]["group_0"]["targets"].pop()),
        [f"{BLOCK}self_attn.q_proj.weight_scale", "[96, 2]", "per-channel"],
    ),
    "fused name gone": (
        "mixed",
        quantization(
            lambda c: c["config_groups"]["group_0"].update(
                targets=[t.replace(r"|self_attn\.qkv_proj", "") for t in c["config_groups"]["group_0"]["targets"]]
            )
        ),
        [f"{BLOCK}self_attn.qkv_proj", "another granularity"],
    ),
    "half a fused linear per-group": (
        "mixed",
        quantization(lambda c: c["config_groups"]["group_0"].update(targets=[r"re:.*\.1\.self_attn\.(q|qkv)_proj$"])),
        [f"{BLOCK}self_attn.v_proj.weight_scale", "per-channel"],
    ),
    "target is no expression": (
        "mixed",
        quantization(lambda c: c["config_groups"]["group_0"]["targets"].append("re:(")),
        ["config.json", "not read by compressed-tensors"],
    ),
    "nothing ignored": (
        "llama",
        quantization(lambda c: c.update(ignore=[])),
        ["lm_head", "BF16", "config.json says INT8", "ignore"],
    ),
    "router not ignored": (
        "mixtral",
        quantization(lambda c: c.update(ignore=["lm_head"])),
        [f"{BLOCK}block_sparse_moe.gate", "config.json says INT8"],
    ),
    "linear ignored": (
        "llama",
        quantization(lambda c: c["ignore"].append(Q.removesuffix(".weight"))),
        [Q.removesuffix(".weight"), "stored as INT8", "leaves it in float"],
    ),
    "ignored with a scale": ("ignored", add(f"{V}_scale"), [f"{V}_scale", "no INT8 weight"]),
    "ignored in INT8": (
        "ignored",
        in_int8(DOWN),
        [DOWN.removesuffix(".weight"), "stored as INT8", "leaves it in float"],
    ),
    "ignored, and not by the config": ("ignored", ignoring("mlp", "x"), [DOWN, "stored as BF16, not INT8"]),
    "fused name not ignored": (
        "ignored",
        ignoring(r"|self_attn\.qkv_proj", ""),
        [f"{BLOCK}self_attn.qkv_proj", "another granularity"],
    ),
    "half a fused linear ignored": (
        "ignored",
        lambda out: (in_int8(V)(out), ignoring(r"|self_attn\.v_proj", "")(out)),
        [f"{BLOCK}self_attn.qkv_proj", "its parts differ"],
    ),
    "one expert in float": (
        "mixtral",
        float_expert,
        [f"{BLOCK}block_sparse_moe.experts.2.w3", "1 of its block's 12 experts' linears", "alike"],
    ),
    "no quantization_config": (
        "llama",
        lambda out: edit_json(out / "config.json", lambda c: c.pop("quantization_config")),
        ["config.json", "is None", "not a quantized checkpoint"],
    ),
    "other format": ("llama", quantization(lambda c: c.update(format="pack-quantized")), ["config.json", "'pack-quan"]),
    "no such strategy": ("llama", strategy("chanel"), ["config.json", "not read by compressed-tensors", "chanel"]),
    "per-tensor": ("llama", strategy("tensor"), ["target 'Linear'", "expected channel and token"]),
    "four bits": (
        "llama",
        quantization(lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=4)),
        ["target 'Linear'", "weights", "(4, 'int'"],
    ),
    "weight-only": (
        "llama",
        quantization(lambda c: c["config_groups"]["group_0"].update(input_activations=None)),
        ["target 'Linear'", "input_activations in float"],
    ),
    "heads that do not divide": (
        "llama",
        lambda out: edit_json(out / "config.json", lambda c: c.update(num_key_value_heads=3)),
        ["recipe.json: layout", "num_attention_heads = 4 is not a multiple"],
    ),
    "another type": (
        "llama",
        lambda out: edit_json(out / "config.json", lambda c: c.update(model_type="gpt2")),
        ["recipe.json: layout", "is not that of a model with this config.json"],
    ),
    "endless model": (
        "llama",
        lambda out: edit_json(out / "config.json", lambda c: c.update(num_hidden_layers=10**12)),
        ["recipe.json: layout", "num_hidden_layers = 1000000000000 is beyond"],
    ),
    "truncated": (
        "llama",
        lambda out: os.truncate(shard_of(out, Q), shard_of(out, Q).stat().st_size - 7),
        ["model-0", "truncated or corrupt"],
    ),
}
BESIDE_THE_SOURCE = {
    "norm changed": ("llama", put(NORM, 4, 3.0), ["block 1, norm->qkv", "do not cancel", "number 4", "divided by"]),
    "gain lost": ("llama", put(NORM, 4, 0.0), [NORM, "lost the gain", "number 4"]),
    "other norm changed": ("llama", put("model.norm.weight", 4, 3.0), ["model.norm.weight", "1 of 64 values"]),
    "v rows doubled": (
        "llama",
        change(f"{V}_scale", lambda t: t.mul_(2)),
        ["block 1, v->o", "the two sides of v->o in block 1 do not cancel", "48 of 48"],
    ),
    "one up row off by a hundredth": (
        "llama",
        change(f"{UP}_scale", lambda t: scaled(t, 7, 1.01)),
        ["block 1, up->down", "do not cancel", "number 7", "mlp.up_proj", "mlp.down_proj"],
    ),
    "q doubled": ("llama", change(f"{Q}_scale", lambda t: t.mul_(2)), ["block 1, norm->qkv", "q_proj"]),
    "columns swapped in o": (
        "llama",
        change(OUT, lambda t: t.flip(1)),
        [OUT.removesuffix(".weight"), "columns", "rounding"],
    ),
    "rows swapped in v": ("llama", change(V, lambda t: t.flip(0)), [V.removesuffix(".weight"), "rows", "rounding"]),
    "a code two steps off": ("llama", flip_code(2), [Q.removesuffix(".weight"), "1 of 64 columns", "number 5"]),
    # Compensated codes show less of what a weight was.
    "compensated, a code four steps off": ("compensated", flip_code(4), [Q.removesuffix(".weight"), "number 5"]),
    "compensated, one up row off by a twentieth": (
        "compensated",
        change(f"{UP}_scale", lambda t: scaled(t, 7, 1.05)),
        ["block 1, up->down", "do not cancel", "number 7", "mlp.up_proj", "mlp.down_proj"],
    ),
    "compensated, norm changed": (
        "compensated",
        put(NORM, 4, 3.0),
        ["block 1, norm->qkv", "do not cancel", "number 4"],
    ),
    "compensated, rows swapped": (
        "compensated",
        change(V, lambda t: t.flip(0)),
        [V.removesuffix(".weight"), "rows", "rounding"],
    ),
    "bias of v": ("biased", put(f"{BLOCK}self_attn.v_proj.bias", 4, 3.0), ["block 1, v->o", "number 4", "in its bias"]),
    "bias of q": ("biased", put(f"{BLOCK}self_attn.q_proj.bias", 4, 3.0), ["q_proj.bias", "1 of 96 values"]),
    "expert": (
        "mixtral",
        change(f"{BLOCK}block_sparse_moe.experts.2.w3.weight_scale", lambda t: t.mul_(2)),
        ["block 1, w3->w2.2", "do not cancel"],
    ),
    "router": (
        "mixtral",
        put(f"{BLOCK}block_sparse_moe.gate.weight", (1, 9), 1.0),
        [f"{BLOCK}block_sparse_moe.gate.weight", "1 of 64 columns", "number 9"],
    ),
    "per-group scale": (
        "mixed",
        change(f"{DOWN}_scale", lambda t: scaled(t, (3, 1), 1.5)),
        [DOWN.removesuffix(".weight"), "columns"],
    ),
    "ignored v": ("ignored", put(V, (3, 5), 1.0), [V.removesuffix(".weight"), "1 of 48 rows", "number 3"]),
    "ignored down": ("ignored", put(DOWN, (3, 5), 1.0), [DOWN.removesuffix(".weight"), "1 of 96 columns", "number 5"]),
    "ignored row doubled": (
        "ignored",
        change(V, lambda t: scaled(t, 7, 2)),
        ["block 1, v->o", "do not cancel", "self_attn.v_proj"],
    ),
    "ignored column halved": (
        "ignored",
        change(DOWN, lambda t: scaled(t, (slice(None), 7), 0.5)),
        ["block 1, up->down", "do not cancel", "number 7"],
    ),
    "ignored q doubled": ("ignored", change(Q, lambda t: t.mul_(2)), ["block 1, norm->qkv", "q_proj"]),
    "ignored in fp16": ("ignored", change(DOWN, lambda t: t.half()), [DOWN, "F16", "BF16"]),
    "embedding": ("llama", change(EMBEDDING, flip_bit), [EMBEDDING, "1 of 10240 values"]),
    "embedding in fp32": ("llama", change(EMBEDDING, lambda t: t.float()), [EMBEDDING, "F32 [160, 64]", "BF16"]),
    "extra tensor": ("llama", add("model.extra.weight"), ["model.extra.weight", "is not in the source"]),
    "side file": (
        "llama",
        lambda out: (out / "chat_template.jinja").write_text("x"),
        ["chat_template.jinja", "differs"],
    ),
    "side file gone": ("llama", lambda out: (out / "tokenizer.json").unlink(), ["tokenizer.json", "absent"]),
    "card of the source": (
        "llama",
        lambda out: (out / "ORIGINAL_README.md").unlink(),
        ["ORIGINAL_README.md", "absent"],
    ),
    "config": (
        "llama",
        lambda out: edit_json(out / "config.json", lambda c: c.update(rms_norm_eps=0.5)),
        ["config.json", "rms_norm_eps is 0.5, in the source 1e-06"],
    ),
}


@pytest.mark.parametrize("case", [*ALONE, *BESIDE_THE_SOURCE])
def test_faults_are_found_and_named(pairs, case):
    alone = case in ALONE
    kind, damage, parts = ALONE[case] if alone else BESIDE_THE_SOURCE[case]
    source, out = pairs(kind)
    (out / "report.json").unlink()
    damage(out)
    found = verify(out, None if alone else source, engine=False)
    assert any(all(part in line for part in parts) for line in lines(found)), lines(found)
    assert all(finding.where and finding.what and finding.remedy for finding in found.findings)
    assert any("report.json is absent" in note for note in found.notes)
    if not alone:
        others = [finding for finding in verify(out, engine=False).findings if finding.where != INDEX]
        assert not others, "only the source can tell"


# What writes into the residual stream, or reads it last, by kind of conversion: how it is stored, and what is in bf16.
STREAM = {
    "llama": ("self_attn.o_proj.weight_scale", "mlp.down_proj.weight_scale"),
    "compensated": ("self_attn.o_proj.weight_scale", "mlp.down_proj.weight_scale"),
    "mixed": ("self_attn.o_proj.weight_scale", "mlp.down_proj.weight_scale"),
    "ignored": ("self_attn.o_proj.weight_scale", "mlp.down_proj.weight"),
    "biased": ("self_attn.o_proj.bias", "mlp.down_proj.bias"),
    "mixtral": ("self_attn.o_proj.weight_scale", "block_sparse_moe.experts.2.w2.weight_scale"),
    "gemma2": ("self_attn.o_proj.weight_scale", "post_attention_layernorm.weight", "post_feedforward_layernorm.weight"),
    "phi3": ("self_attn.o_proj.weight_scale", "mlp.down_proj.weight_scale"),
    "qwen2_moe": ("mlp.shared_expert.down_proj.weight_scale", "mlp.experts.2.down_proj.weight_scale"),
}
WRITTEN = [(kind, f"{BLOCK}{name}") for kind, names in STREAM.items() for name in names]
WRITTEN += [("llama", name) for name in (EMBEDDING, "model.norm.weight", "lm_head.weight")]


@pytest.mark.parametrize(("place", "factor"), [(3, 1.5), (3, 1.05), (slice(None), 1.5), (slice(None), 1.02)])
@pytest.mark.parametrize(("kind", "name"), WRITTEN)
def test_what_writes_into_the_residual_stream_is_unscaled(pairs, kind, name, place, factor):
    source, out = pairs(kind)
    written = name.removesuffix("_scale")
    assert written in verify(out, source, engine=False).unscaled
    (out / "report.json").unlink()
    change(name, lambda tensor: scaled(tensor, place, factor))(out)
    found = verify(out, source, engine=False)
    assert not found.ok and written not in found.unscaled
    if name.endswith("_scale") and (place, factor) == (3, 1.5):
        where = written.removesuffix(".weight")
        (line,) = (line for line in lines(found) if line.startswith(where))
        assert re.search(r"1 of \d+ rows \(number 3\) write 1\.5 times as much into the residual stream", line), line


def test_every_fault_is_listed(pairs):
    source, out = pairs("llama")
    for damage in (put(f"{Q}_scale", (2, 0), -1.0), put(NORM, 4, float("nan")), put(V, (0, 0), -128), drop(UP)):
        damage(out)
    text = "\n".join(lines(verify(out, source, engine=False)))
    for part in (f"{Q}_scale", NORM, V, UP, "SHA-256", INDEX):
        assert part in text


def test_a_flipped_byte_shows_in_the_hash(pairs):
    _, out = pairs("llama")
    shard = shard_of(out, Q)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (finding,) = verify(out, engine=False).findings
    assert finding.where == shard.name and "SHA-256" in finding.what
    os.truncate(shard, len(content) - 1)  # cannot be opened any more, but hashed
    assert [shard.name in line for line in lines(verify(out, engine=False))] == [True, True]


def test_checkpoints_of_others_are_verified_as_far_as_possible(pairs):
    """Without our marker: bf16 scales and code -128 are usual there, and rounding is their own affair."""
    source, out = pairs("llama")
    (out / "report.json").unlink()
    for damage in (
        quantization(lambda c: c.pop("bismooth")),
        change(f"{Q}_scale", lambda t: t.bfloat16()),
        put(V, (0, 0), -128),
        flip_code,
    ):
        damage(out)
    found = verify(out, source, engine=False)
    assert [line for line in lines(found) if "total_size" not in line] == []
    assert "not made by bismooth" in found.notes[0] and found.linears[Q.removesuffix(".weight")]["sqnr"] > 20


def silent_model(folder: Path, model_type: str = "llama") -> Path:
    """A checkpoint with linears that do nothing, as pruning or an initialization with zeros leaves them."""
    model = tiny_model(model_type)
    with torch.no_grad():
        for name, parameter in model.model.layers.named_parameters():
            if re.search(r"0\.self_attn\.o_proj|[12]\.mlp\.down_proj|2\.self_attn\.v_proj|1\.mlp\.experts\.down", name):
                parameter.zero_()
    return write_checkpoint(folder, model)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("method", ["rtn", "bismooth", "calibrated"])
def test_linears_that_are_zero_in_the_source_are_a_note(tmp_path, calibration_text, model_type, method):
    source, out = silent_model(tmp_path / "source", model_type), tmp_path / "out"
    text = read_text(calibration_text) if method == "calibrated" else None
    recipe = (
        Recipe.of("rtn") if method == "rtn" else Recipe.of("bismooth", **({"calibration_tokens": 200} if text else {}))
    )
    convert(source, out, recipe, text)
    silent = {"llama": "down_proj in blocks 1-2", "mixtral": "experts.*.w2 in block 1"}[model_type]
    for against, how in ((source, "as in the source"), (None, "as in the source, by what report.json says")):
        found = verify(out, against, engine=False)
        (note,) = found.notes
        assert found.ok and note.startswith(f"all weights are 0, {how}: ") and silent in note, (lines(found), note)
        assert "o_proj in block 0" in note and "v_proj in block 2" in note
    (out / "report.json").unlink()
    assert verify(out, source, engine=False).ok
    (fault, *_) = verify(out, engine=False).findings
    assert "has no code but 0" in fault.what and "name the source with --against" in fault.remedy


def test_linears_that_became_zero_are_faults(pairs):
    source, out = pairs("llama")
    change(Q, lambda t: t.zero_())(out)
    (hash_, fault) = verify(out, engine=False).findings
    assert "SHA-256" in hash_.what and "no code but 0" in fault.what
    fault = next(f for f in verify(out, source, engine=False).findings if f.where == Q)
    assert "the source's does something" in fault.what and fault.remedy.startswith("copy the file again")
    edit_json(
        out / "report.json", lambda r: r["linears"][Q.removesuffix(".weight")].update(column_error=0.0, sqnr=None)
    )
    assert any("no code but 0" in line for line in lines(verify(out, engine=False))), "the file is not as it was noted"


def of_others(out: Path, *names: str) -> None:
    """As llm-compressor leaves it when nothing but these is to be INT8 besides: without our marker and report."""
    (out / "report.json").unlink()
    for name in names:
        in_int8(f"{name}.weight")(out)
    ignore = lambda c: [p for p in c["ignore"] if not any(is_named(p, name) for name in names)]  # noqa: E731
    quantization(lambda c: (c.pop("bismooth"), c.update(ignore=ignore(c))))(out)
    shards = {path: load_file(path) for path in out.glob("*.safetensors")}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    edit_json(out / INDEX, lambda index: index["metadata"].update(total_size=total))


def is_named(pattern: str, name: str) -> bool:
    return bool(re.match(pattern.removeprefix("re:"), name)) if pattern.startswith("re:") else pattern == name


def test_a_head_in_int8_is_looked_at(pairs, monkeypatch):
    source, out = pairs("llama")
    of_others(out, "lm_head")
    asked = []
    monkeypatch.setattr(
        "vllm_w8a8_bismooth.verification.served.ask", lambda module, request: asked.append(request) or []
    )
    found = verify(out, source)
    assert found.ok and found.linears["lm_head"]["sqnr"] > 30, lines(found)
    assert asked[0]["linears"]["lm_head"] is None and "lm_head" not in asked[0]["float"]
    put("lm_head.weight_scale", (2, 0), 0.0)(out)
    assert any("lm_head.weight_scale" in line for line in lines(verify(out, engine=False)))


def test_routers_in_int8_are_a_note(pairs, monkeypatch):
    source, out = pairs("mixtral")
    of_others(out, *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(3)))
    asked = []
    monkeypatch.setattr(
        "vllm_w8a8_bismooth.verification.served.ask", lambda module, request: asked.append(request) or []
    )
    found = verify(out, source)
    assert found.ok, lines(found)
    assert "routers in INT8 (gate in blocks 0-2): whether vLLM serves them so was not checked" in found.notes
    assert not [name for name in asked[0]["float"] if "gate" in name]


@pytest.mark.engine
def test_vllm_takes_a_head_in_int8_by_its_name(pairs):
    """Its heads are no linears by the name of their class."""
    _, out = pairs("llama")
    of_others(out, "lm_head")
    faults = verify(out).findings
    assert {fault.where for fault in faults} == {"lm_head"}
    assert all("takes it for float, but it is stored as INT8" in fault.what for fault in faults)
    quantization(lambda c: c["config_groups"]["group_0"]["targets"].append("lm_head"))(out)
    found = verify(out)
    assert found.ok and not [note for note in found.notes if "vLLM" in note], (lines(found), found.notes)


ADDED = {
    "chat_template.json": True,
    "additional_chat_templates/rag.jinja": True,
    "added_tokens.json": True,
    "adapter_config.json": True,
    "hf_quant_config.json": True,
    "modules.json": True,
    "LICENSE": False,
    "notes.txt": False,
    "runs/chat_template.jinja": False,
    "pytorch_model.bin.index.json": False,
}


@pytest.mark.parametrize("name", ADDED)
def test_files_that_were_added(pairs, tmp_path, name):
    """They change what is served, where something reads them because of their names."""
    source, out = pairs("llama")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("[]")
    says = (
        f"{name}: is not in the source, and what reads such files would load it; "
        "remove it; what a model needs belongs into its source, before the conversion"
    )
    assert lines(verify(out, source, engine=False)) == ([says] if ADDED[name] else [])
    edit_json(out / "report.json", lambda report: report["beside"].append(name))
    assert verify(out, source, engine=False).ok
    (out / "report.json").unlink()
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / name).parent.mkdir(exist_ok=True)
    shutil.copy(out / name, tmp_path / "source" / name)
    assert verify(out, tmp_path / "source", engine=False).ok


@pytest.mark.parametrize(
    "arguments",
    [["nowhere"], ["out", "--against", "nowhere"], ["out", "--against", "out"], ["empty"]],
)
def test_nothing_to_check_is_bad_input(pairs, arguments):
    _, out = pairs("llama")
    (out.parent / "empty").mkdir()
    code, message = run("verify", *(a if a.startswith("--") else out.parent / a for a in arguments))
    assert code == 2 and message


def test_command(pairs, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    source, out = pairs("llama")
    code, text = run("verify", out, "--against", source)
    assert code == 0 and "21 INT8 linears, nothing wrong" in text and "vLLM is not installed" in text
    assert "Worst linears" in text and text.count("per-channel") == 5
    stream = "model.embed_tokens, lm_head, model.norm; o_proj, down_proj in blocks 0-2"
    assert f"The residual stream is the source's, unscaled: {stream}." in " ".join(text.split())
    ignoring_source, ignoring_out = pairs("ignored")
    code, text = run("verify", ignoring_out, "--against", ignoring_source)
    assert code == 0 and "17 INT8 linears, 4 left in float, nothing wrong" in text
    put(Q, (4, 9), -128)(out)
    code, text = run("verify", out)
    assert code == 1 and "codes outside" in text and "SHA-256" in text and "2 faults found" in text
    code, text = run("verify", out, "--json")
    answer = json_of(text)
    assert code == 1 and not answer["ok"] and answer["notes"] and len(answer["linears"]) == 21
    assert answer["findings"][0].keys() == {"where", "what", "remedy"} and answer["unscaled"] == []


@pytest.mark.engine
@pytest.mark.parametrize("kind", sweep(["mixed", "mixtral", "ignored"]))
def test_vllm_reads_it_as_meant(pairs, kind):
    _, out = pairs(kind)
    found = verify(out)
    assert found.ok and not found.notes, (lines(found), found.notes)


@pytest.mark.engine
def test_what_vllm_refuses_is_a_fault(pairs):
    _, out = pairs("mixed")
    quantization(lambda c: c["config_groups"]["group_0"]["weights"].update(actorder="group"))(out)
    (line,) = lines(verify(out))
    assert line.startswith("config.json: vLLM's w8a8_bismooth refuses") and "actorder" in line


def test_errors_of_reading_stay_errors(pairs, monkeypatch):
    """A file that shrinks while it is read is no fault of the checkpoint."""
    _, out = pairs("llama")
    from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint

    pieces = Checkpoint.stored_pieces

    def shrinking(self, name, digest=None):
        os.truncate(self.folder / self.headers[name].file, 100)
        return pieces(self, name, digest)

    monkeypatch.setattr(Checkpoint, "stored_pieces", shrinking)
    with pytest.raises(BismoothError, match="can no longer be read"):
        verify(out, engine=False)


def test_files_are_only_read(pairs):
    source, out = pairs("llama")
    before = {path: path.stat().st_mtime_ns for folder in (source, out) for path in folder.rglob("*")}
    verify(out, source, engine=False)
    assert {path: path.stat().st_mtime_ns for folder in (source, out) for path in folder.rglob("*")} == before
    assert load_file(shard_of(out, Q))[Q].dtype == torch.int8


UNLIKE = {
    "static": "has input_activations of num_bits, type, symmetric, dynamic = (8, 'int', True, False)",
    "tensor-dynamic": "has strategies ('tensor', 'token')",
    "asymmetric-dynamic": "symmetric, dynamic = (8, 'int', False, True)",
    "w4a16": "quantization_config.format is 'pack-quantized'",
    "fp8": "quantization_config.format is 'float-quantized'",
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_what_others_quantized_in_another_way_is_not_called_faulty(pairs, kind):
    """The plugin serves some of them; to remove their input scales, as was said, would spoil them."""
    _, out = pairs("llama")
    configs = json.loads((DATA / "configs.json").read_text())
    edit_json(out / "config.json", lambda config: config.update(quantization_config=configs[kind]))
    code, message = run("verify", out)
    assert code == 2 and UNLIKE[kind] in message and "it may be in order" in message, message
    assert "remove" not in message.lower() and "onvert" not in message


def test_a_checkpoint_of_llm_compressor_with_input_scales_is_not_called_faulty():
    code, message = run("verify", DATA / "mixed")
    assert code == 2 and "not made by bismooth, and target" in message and "it may be in order" in message, message


def test_a_conversion_that_has_not_ended(tmp_path):
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(BismoothError, match="has not ended, out.partial holds what is done; run the same"):
        verify(tmp_path / "out")


def test_what_is_absent_is_no_text(pairs):
    source, out = pairs("llama")
    edit_json(out / "config.json", lambda config: config.update(rope_theta=5.0))
    (line,) = lines(verify(out, source, engine=False))
    assert "rope_theta is 5.0, in the source absent" in line


def test_what_else_is_asked_of_vllm_is_a_note(pairs):
    _, out = pairs("llama")
    quantization(lambda c: c.update(kv_cache_scheme={"num_bits": 8, "type": "float"}))(out)
    found = verify(out, engine=False)
    assert found.ok and "kv_cache_scheme in config.json asks vLLM for more" in found.notes[0], found.notes


def test_a_link_that_leads_nowhere_is_called_so(pairs):
    _, out = pairs("llama")
    shard = shard_of(out, Q)
    shard.unlink()
    shard.symlink_to("nowhere")
    assert any("a link that leads nowhere" in line for line in lines(verify(out, engine=False)))


STALE = {
    "names an absent file": lambda names: {"weight_map": {"a": "b.safetensors"}},
    "has no map": lambda names: {},
    "calls the file otherwise": lambda names: {"weight_map": dict.fromkeys(names, "./model.safetensors")},
}


@pytest.mark.parametrize("case", STALE)
def test_an_index_that_vllm_does_not_pass_over(make_checkpoint, tmp_path, case):
    """Stale beside a whole file; vLLM's own function is asked. A source may have one, its result none."""
    weights = pytest.importorskip("vllm.model_executor.model_loader.weight_utils")
    source, out = make_checkpoint(sharded=False), tmp_path / "out"
    (source / INDEX).write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    convert(source, out, Recipe.of("rtn"))
    assert not (out / INDEX).exists() and verify(out, source, engine=False).ok
    (out / INDEX).write_text(json.dumps(STALE[case](load_file(out / "model.safetensors"))))
    (finding,) = (f for f in verify(out, engine=False).findings if f.where == INDEX)
    assert "vLLM refuses" in finding.what and finding.remedy.startswith("remove the index")
    with pytest.raises((FileNotFoundError, KeyError)):
        weights.filter_duplicate_safetensors_files([str(out / "model.safetensors")], str(out), INDEX)
    (out / INDEX).unlink()
    assert verify(out, engine=False).ok


def test_a_head_beside_a_tied_embedding_is_noted(make_checkpoint, tmp_path):
    """As convert and inspect say it of the source."""
    source, out = make_checkpoint(), tmp_path / "out"
    edit_json(source / "config.json", lambda config: config.update(tie_word_embeddings=True))
    said = convert(source, out, Recipe.of("rtn")).notes
    found = verify(out, source, engine=False)
    assert found.ok and any("lm_head.weight differs from the embedding" in note for note in found.notes)
    assert set(said) <= set(found.notes)


def test_a_result_of_ours_is_not_to_be_downloaded(make_checkpoint, tmp_path):
    source, out = make_checkpoint(sharded=False), tmp_path / "out"
    convert(source, out, Recipe.of("rtn"))
    tensors = load_file(out / "model.safetensors")
    del tensors[NORM]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    found = verify(out, engine=False).findings
    assert any(NORM in finding.where for finding in found)
    assert not any(finding.remedy.startswith("download") for finding in found)
