"""What discovery finds of the model types that the table knows is what the table says."""

from dataclasses import replace

import pytest
from transformers import AutoConfig

from tests.support.contents import digests
from tests.support.conversion import convert
from tests.support.models import MODEL_TYPES, tiny_config
from tests.support.table import tabled
from vllm_w8a8_bismooth.checkpoint.blueprint import Blueprint
from vllm_w8a8_bismooth.discovery import find
from vllm_w8a8_bismooth.discovery.record import Discovery, each, runs
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.model.layers import Site
from vllm_w8a8_bismooth.recipe import Recipe

BIASES = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "qwen3": dict(attention_bias=True),
    "granite": dict(attention_bias=True, mlp_bias=True),
    "qwen2_moe": dict(qkv_bias=False),
}
"""Variants of the types whose config switches biases."""
ALIKE = {"qwen2": dict(num_key_value_heads=4), "llama": dict(tie_word_embeddings=True)}
CASES = [(t, {}) for t in MODEL_TYPES] + [(t, changes) for more in (BIASES, ALIKE) for t, changes in more.items()]


def plain(site: Site) -> Site:
    """A site without what has no meaning: its name, the order of its consumers, how its runs are cut."""
    columns = None if site.columns is None else runs(each(site.columns))
    return replace(site, name="", gate=None, consumers=tuple(sorted(site.consumers)), columns=columns)


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_discovery_finds_what_the_table_says(model_type, changes):
    config = tiny_config(model_type, **changes).to_dict()
    table = tabled(config)
    found = find.find(config)
    blueprint = Blueprint.discovered(config, found)
    assert blueprint.names == table.names and blueprint.tied == table.tied
    assert {**blueprint.outside, **blueprint.optional} == {**table.outside, **table.optional}
    for mine, layer in zip(blueprint.layers, table.layers, strict=True):
        for field in ("tensors", "linears", "posts", "writers", "fused", "row_parallel", "experts"):
            assert getattr(mine, field) == getattr(layer, field), field
        assert mine.routers.keys() == layer.routers.keys()
        assert {plain(site) for site in mine.sites} == {plain(site) for site in layer.sites}
        assert {site.producer: site.gate for site in mine.sites} == {s.producer: s.gate for s in layer.sites}
        is_linear = [site.producer in mine.linears for site in mine.sites]
        assert is_linear == sorted(is_linear, reverse=True)
        assert len({site.name for site in mine.sites}) == len(mine.sites)
        for site, other in ((a, b) for a in mine.sites for b in layer.sites if a.producer == b.producer):
            assert (site.consumers[-1] in layer.routers) == (other.consumers[-1] in layer.routers)
    assert not found.proof.dropped and not found.proof.unseen
    assert found.proof.output < 1e-12 and found.proof.logits < 1e-11
    assert found.proof.resized is not None and found.proof.resized < 1e-12
    assert (found.names.blocks, found.names.embedding, found.names.norm) == (
        "model.layers.",
        "model.embed_tokens.weight",
        "model.norm.weight",
    )
    tied = config["tie_word_embeddings"]
    assert found.names.tied is tied and found.names.head == (None if tied else "lm_head.weight")
    assert Discovery.from_json(found.to_json()) == found


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_conversions_by_either_have_the_same_bytes(make_checkpoint, tmp_path, monkeypatch, model_type):
    source, text = make_checkpoint(model_type), tmp_path / "text.txt"
    text.write_text("".join(map(chr, range(33, 127))) * 20)

    def written(by: str) -> dict[str, str]:
        convert(source, tmp_path / by, Recipe.of("bismooth", calibration_tokens=256), read_text(text))
        kept = digests(tmp_path / by)
        return {name: sha256 for name, sha256 in kept.items() if name.endswith(".safetensors") or name == "config.json"}

    found = written("discovery")
    monkeypatch.setattr(Blueprint, "of", lambda checkpoint, *rest: tabled(checkpoint.config))
    assert written("table") == found and len(found) >= 2


def test_what_has_as_many_rows_as_the_stream_is_wide_does_not_write_into_it_for_that():
    """OLMo 2 has norms behind both halves of a block, and its q as many rows as these have channels."""
    config = AutoConfig.for_model(
        "olmo2", hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=96, num_hidden_layers=2
    )
    (layer, _) = Blueprint.discovered(config.to_dict(), find.find(config.to_dict())).layers
    assert layer.linears["self_attn.q_proj"] == (64, 64)
    norms = {"post_attention_layernorm", "post_feedforward_layernorm"}
    assert layer.writers == {"self_attn.o_proj", "mlp.down_proj", *norms}
