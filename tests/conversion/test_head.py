"""A head that is stored although the embedding is to be the head."""

import pytest
from safetensors.torch import load_file, save_file

from tests.support.command import run
from tests.support.conversion import convert
from vllm_w8a8_bismooth import inspect
from vllm_w8a8_bismooth.conversion.merge import merge, prepare
from vllm_w8a8_bismooth.recipe import Recipe

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def tied(make_checkpoint):
    """``tied(factor)``: a tied checkpoint that also stores a head, the embedding times the factor; 0 stores none."""

    def make(factor: float, model_type: str = "llama"):
        source = make_checkpoint(model_type, tie_word_embeddings=True, sharded=False)
        if factor:
            tensors = load_file(source / "model.safetensors")
            save_file(tensors | {HEAD: tensors[EMBEDDING] * factor}, source / "model.safetensors", {"format": "pt"})
        return source

    return make


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("factor", [0, 1, 2])
def test_it_is_mentioned(tied, tmp_path, factor, model_type):
    """Headers show that it is there, values whether it is another one."""
    source, out = tied(factor, model_type), tmp_path / "out"
    stored = f"Note: {HEAD} is stored, though config.json ties the head to the embedding: vLLM ignores it"
    for words in (("inspect", source), ("convert", source, out, "--method", "rtn", "--dry-run")):
        code, text = run(*words)
        assert code == 0 and (stored in text) == bool(factor), text
    assert bool(inspect(source).notes) == bool(factor)
    code, text = run("convert", source, out, "--method", "rtn")
    assert code == 0 and (f"{HEAD} differs from the embedding" in text) == (factor == 2), text
    assert "Note: " in text if factor == 2 else "Note: " not in text


def test_it_belongs_to_the_part_that_has_it(tied, tmp_path):
    source = tied(2)
    first, last = (
        convert(source, tmp_path / name, Recipe.of("rtn"), blocks=blocks)
        for name, blocks in (("a", slice(0, 2)), ("b", slice(2, 3)))
    )
    assert len(first.notes) == 1 and not last.notes
    assert len(merge(prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")).notes) == 1


def test_an_untied_head_is_nothing_to_mention(make_checkpoint, tmp_path):
    assert not convert(make_checkpoint(), tmp_path / "out", Recipe.of("rtn")).notes
