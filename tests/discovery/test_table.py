"""What discovery finds of the model types that the table knows is what the table says."""

from dataclasses import replace

import pytest
import torch

from tests.support.models import MODEL_TYPES, tiny_config
from vllm_w8a8_bismooth.checkpoint.architectures import ARCHITECTURES, Layer
from vllm_w8a8_bismooth.checkpoint.architectures import Site as Row
from vllm_w8a8_bismooth.checkpoint.audit import layer_tensors, layers_of, sizes_of
from vllm_w8a8_bismooth.discovery import find
from vllm_w8a8_bismooth.discovery.record import Discovery, Site, runs
from vllm_w8a8_bismooth.method.smooth import rows_of, spread

BIASES = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "qwen3": dict(attention_bias=True),
    "granite": dict(attention_bias=True, mlp_bias=True),
    "qwen2_moe": dict(qkv_bias=False),
}
"""Variants of the types whose config switches biases."""
ALIKE = {"qwen2": dict(num_key_value_heads=4), "llama": dict(tie_word_embeddings=True)}
CASES = [(t, {}) for t in MODEL_TYPES] + [(t, changes) for more in (BIASES, ALIKE) for t, changes in more.items()]


def expected(row: Row, layer: Layer, sizes: dict[str, int], offset: float) -> Site:
    """A site of the table with its rows and columns written out, and no title."""
    start, width = rows_of(row, layer, sizes)
    consumer = row.consumers[0]
    columns = sizes[layer.linears[consumer][1]]
    channels = torch.arange(width)
    if columns > width:
        channels = spread(channels, columns // width, sizes["head"])
    is_linear = row.producer in layer.linears
    total = sum(sizes[part] for part in layer.linears[row.producer][0]) if is_linear else width
    return Site(
        name="",
        producer=row.producer,
        consumers=tuple(sorted(row.consumers)),
        rows=None if width == total else ((start, width),),
        columns=runs(channels.tolist()) if columns > width else None,
        offset=0.0 if is_linear else offset,
    )


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_discovery_finds_what_the_table_says(model_type, changes):
    config = tiny_config(model_type, **changes).to_dict()
    architecture = ARCHITECTURES[model_type]
    sizes = sizes_of(config, architecture)
    table = layers_of(config, architecture, sizes, sizes["blocks"])
    found = find.find(config)
    assert len(found.blocks) == len(table)
    for kind, layer in zip(found.blocks, table, strict=True):
        mine = found.layers[kind]
        assert dict(mine.tensors) == layer_tensors(layer, sizes, config)
        assert dict(mine.linears) == {
            name: (sum(sizes[part] for part in rows), sizes[columns]) for name, (rows, columns) in layer.linears.items()
        }
        assert set(mine.floats) == set(layer.routers)
        assert dict(mine.vectors) == {name: sizes[size] for name, size in layer.vectors.items()}
        assert mine.experts == layer.experts
        behind = (
            layer.writers - layer.linears.keys()
        )  # Gemma's linears are not added themselves, but what their norms make
        assert mine.writers == (behind or layer.writers)
        sites = {replace(site, name="", consumers=tuple(sorted(site.consumers))) for site in mine.sites}
        assert sites == {expected(row, layer, sizes, architecture.offset) for row in layer.sites}
        is_linear = [site.producer in mine.linears for site in mine.sites]
        assert is_linear == sorted(is_linear, reverse=True)
        assert len({site.name for site in mine.sites}) == len(mine.sites)
        for site in mine.sites:  # routers see every token, and stand last
            kinds = [consumer in mine.linears for consumer in site.consumers]
            assert kinds == sorted(kinds, reverse=True)
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
