"""What names and shapes alone show of a model: its blocks, what is around them, and what becomes INT8."""

import pytest

from vllm_w8a8_bismooth.checkpoint.reader import Header
from vllm_w8a8_bismooth.checkpoint.stacks import layers_among, names_among
from vllm_w8a8_bismooth.errors import BismoothError


def headers(shapes: dict[str, tuple[int, ...]]) -> dict[str, Header]:
    found = {}
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        found[name] = Header("model.safetensors", shape, "BF16", 0, size)
    return found


AROUND = {"core.wte.weight": (160, 64), "core.final_norm.weight": (64,), "embed_out.weight": (160, 64)}
BLOCK = {
    "mix.q.weight": (64, 64),
    "mix.norm.weight": (64,),
    "ffn.gate.weight": (4, 64),
    "ffn.experts.0.up.weight": (96, 64),
    "ffn.experts.1.up.weight": (96, 64),
    "ffn.odd.weight": (64, 24),
    "conv1d.weight": (64, 1, 4),
}


def model(blocks: int = 2, inside: dict[str, tuple[int, ...]] | None = None) -> dict[str, Header]:
    inner = {f"core.h.{i}.{name}": shape for i in range(blocks) for name, shape in (inside or BLOCK).items()}
    return headers(AROUND | inner)


def test_names():
    names = names_among(model())
    assert (names.blocks, names.embedding) == ("core.h.", "core.wte.weight")
    assert (names.norm, names.head) == ("core.final_norm.weight", "embed_out.weight")


def test_a_tower_is_not_the_decoder_however_large():
    tower = headers({f"vision_tower.layers.{i}.fc.weight": (512, 512) for i in range(8)})
    assert names_among(tower | model()).blocks == "core.h."


def test_what_becomes_int8():
    first, second = layers_among(model(), names_among(model()))
    assert first is second, "blocks that are alike are one object"
    assert first.linears.keys() == {"mix.q", "ffn.experts.0.up", "ffn.experts.1.up"}
    assert first.experts == {"ffn.experts.0.up", "ffn.experts.1.up"} and not first.sites
    assert "router" in first.routers["ffn.gate"] and "multiple of 16" in first.routers["ffn.odd"]


def test_the_mixer_of_mamba_1_stays_in_float_whole():
    """Its outer matrices too, which look like any other."""
    mixer = {f"mixer.{name}.weight": (64, 64) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    made = model(inside=mixer | {"mlp.fc.weight": (96, 64)})
    layer = layers_among(made, names_among(made))[0]
    assert layer.linears.keys() == {"mlp.fc"} and set(layer.routers) == {n.removesuffix(".weight") for n in mixer}


def test_what_is_no_model():
    with pytest.raises(BismoothError, match="no tensor is called like one of a model's block"):
        names_among(headers({"weight": (4, 4)}))
    with pytest.raises(BismoothError, match="looks like an embedding"):
        names_among(headers({"h.0.fc.weight": (4, 4)}))
    made = {name: header for name, header in model(3).items() if ".h.1." not in name}
    with pytest.raises(BismoothError, match=r"core\.h\.1\.\*: is missing"):
        layers_among(made, names_among(made))
