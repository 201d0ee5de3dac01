"""Records that are given by hand: proven, or refused with what was measured; read without trust."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.models import tiny_config
from vllm_w8a8_bismooth.discovery.find import find
from vllm_w8a8_bismooth.discovery.reading import read
from vllm_w8a8_bismooth.discovery.record import Discovery
from vllm_w8a8_bismooth.errors import BismoothError

TYPES = {
    "llama": {},
    "qwen2_moe": {},
    "phi3": {},
    "gemma3_text": {},
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, n_inner=96),
    "nemotron": dict(intermediate_size=96),
    "granitemoe": dict(num_local_experts=4, num_experts_per_tok=2),
}


def config_of(model_type: str) -> dict:
    return tiny_config(model_type, **TYPES[model_type]).to_dict()


@pytest.fixture(scope="module")
def llama() -> tuple[dict, dict]:
    """A config, and what was found out of it, as JSON."""
    config = config_of("llama")
    return config, find(config).to_json()


def site_of(record: dict, producer: str) -> dict:
    return next(site for site in record["templates"][0]["sites"] if site["producer"] == producer)


@pytest.mark.parametrize("model_type", TYPES)
def test_what_was_found_is_given_back_unchanged(model_type):
    config = config_of(model_type)
    found = find(config)
    again = find(config, given=read(json.loads(json.dumps(found.to_json()))))
    assert replace(again, proof=found.proof) == found and any(layer.sites for layer in found.templates)
    assert again.proof.output < 1e-12 and again.proof.logits < 1e-11


def test_sites_may_be_taken_out_and_renamed(llama):
    config, record = llama
    record = copy.deepcopy(record)
    (layer,) = record["templates"]
    layer["sites"] = [dict(site, name="mine") for site in layer["sites"] if site["producer"] != "self_attn.v_proj"]
    found = find(config, given=read(record))
    assert [site.producer for site in found.templates[0].sites] == [site["producer"] for site in layer["sites"]]
    assert found.proof.output < 1e-12 and len(layer["sites"]) == 3


def moved(record: dict, producer: str, **changes: Any) -> None:
    site_of(record, producer).update(changes)


def added(record: dict, **site: Any) -> None:
    record["templates"][0]["sites"].append({"name": "mine", "offset": 0.0, "power": 1.0, **site})


WRONG = {
    "an offset that is none": (
        lambda r: moved(r, "input_layernorm", offset=1.0),
        ["does not keep what block 0 computes", "of its size"],
    ),
    "another power": (lambda r: moved(r, "mlp.up_proj", power=2.0), ["does not keep what block 0 computes"]),
    "NaN": (lambda r: moved(r, "mlp.up_proj", power=float("nan")), ["offset and power must be numbers"]),
    "behind an activation function": (
        lambda r: added(r, producer="mlp.gate_proj", consumers=["mlp.down_proj"]),
        ["does not keep what block 0 computes", "of its size"],
    ),
    "a consumer left out": (
        lambda r: moved(r, "input_layernorm", consumers=["self_attn.q_proj", "self_attn.k_proj"]),
        ["does not keep what block 0 computes"],
    ),
    "channels in another order": (
        lambda r: moved(r, "mlp.up_proj", columns=[[48, 48], [0, 48]]),
        ["does not keep what block 0 computes"],
    ),
    "columns without a channel": (
        lambda r: moved(r, "self_attn.v_proj", columns=[[0, 48]]),
        ["do not fill the columns of self_attn.o_proj"],
    ),
    "rows beyond": (lambda r: moved(r, "mlp.up_proj", rows=[[0, 97]]), ["not among the 96 of mlp.up_proj"]),
    "half a channel": (
        lambda r: moved(r, "mlp.up_proj", columns=[[1, 95], [0, 1]]),
        ["no site of the model", "whole multiples"],
    ),
    "a writer": (
        lambda r: added(r, producer="self_attn.o_proj", consumers=["mlp.gate_proj", "mlp.up_proj"]),
        ["does not keep what block 0 computes"],
    ),
    "a stranger": (
        lambda r: added(r, producer="self_attn.w_proj", consumers=["mlp.down_proj"]),
        ["self_attn.w_proj is neither a linear nor a vector"],
    ),
    "the same site twice": (
        lambda r: added(r, producer="mlp.up_proj", consumers=["mlp.down_proj"]),
        ["does not hold", "its consumers take another site's factor"],
    ),
    "another type": (lambda r: r.update(model_type="qwen2"), ["not of this model", "model_type is qwen2"]),
    "another width": (
        lambda r: r["templates"][0]["tensors"].update({"mlp.up_proj.weight": [97, 64]}),
        ["not of this model", "mlp.up_proj.weight is (97, 64), and must be (96, 64)"],
    ),
    "more blocks": (lambda r: r.update(blocks=[0] * 4), ["not of this model", "blocks has 4, and the model 3"]),
    "fewer blocks": (lambda r: r.update(blocks=[0] * 2), ["not of this model", "blocks has 2"]),
    "a linear in float": (
        lambda r: r["templates"][0].update(
            linears={k: v for k, v in r["templates"][0]["linears"].items() if k != "self_attn.q_proj"},
            floats={"self_attn.q_proj": "I say so"},
        ),
        ["not of this model", "self_attn.q_proj"],
    ),
    "other names": (lambda r: r["names"].update(blocks="layers."), ["not of this model", "names"]),
    "no record": (lambda r: r.clear(), ["not of its form"]),
    "experts without end": (lambda r: r.update(experts=[10**12]), ["experts must be numbers up to"]),
    "blocks without end": (lambda r: r.update(blocks=[0] * 10**5), ["blocks must be up to"]),
    "no such template": (lambda r: r.update(blocks=[0, 1, 7]), ["blocks must be"]),
    "runs without end": (
        lambda r: moved(r, "self_attn.v_proj", columns=[[0, 48]] * 10**5),
        ["do not fill the columns"],
    ),
    "braces": (lambda r: moved(r, "self_attn.v_proj", name="{}{:>99999999}"), ["holds braces"]),
    "a list for a name": (lambda r: moved(r, "self_attn.v_proj", consumers=[["x"]]), ["must have a name"]),
    "negative sizes": (lambda r: r["templates"][0]["tensors"].update(x=[-1]), ["must have sizes"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_record_of_the_model_is_refused(llama, case):
    config, record = llama
    change, parts = WRONG[case]
    record = copy.deepcopy(record)
    change(record)
    with pytest.raises((BismoothError, ValueError)) as caught:
        find(config, given=read(json.loads(json.dumps(record))))
    assert all(part in str(caught.value) for part in parts), caught.value


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where something stands in JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in [(*path, key), *places(inner, (*path, key))]]


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_stands_anywhere_is_read_or_refused(llama, data):
    record = copy.deepcopy(llama[1])
    *way, last = data.draw(st.sampled_from(places(record)))
    inside: Any = record
    for key in way:
        inside = inside[key]
    inside[last] = data.draw(json_values)
    try:
        found = read(record)
    except ValueError:
        return
    assert isinstance(found, Discovery)
    assert sum(len(layer.sites) for layer in found.layers) <= 2**20
