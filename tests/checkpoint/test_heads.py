"""Heads: those that `architectures` implies, those that are there, and bare decoders."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from tests.support.command import converted, refused, run
from tests.support.contents import tensors_of
from tests.support.damage import config, edit_json
from tests.support.models import MODEL_TYPES
from tests.support.rename import architecture, bare, edit_tensors, renamed
from tests.support.sweep import sweep
from vllm_w8a8_bismooth.checkpoint import heads
from vllm_w8a8_bismooth.model import classes
from vllm_w8a8_bismooth.model.names import Names
from vllm_w8a8_bismooth.verification import verify

HEADS = {
    "Model": {},
    "ForSequenceClassification": {"score.weight": (2, 64)},
    "ForTokenClassification": {"score.weight": (5, 64), "score.bias": (5,)},
    "ForQuestionAnswering": {"qa_outputs.weight": (2, 64), "qa_outputs.bias": (2,)},
    "ForRewardModel": {
        "score.0.weight": (64, 64),
        "score.0.bias": (64,),
        "score.2.weight": (1, 64),
        "score.2.bias": (1,),
    },
    "ForProcessRewardModel": {"score.0.weight": (64, 64), "score.2.weight": (2, 64)},
    "RewardModel": {"v_head.weight": (1, 64)},
}


@pytest.mark.parametrize("ending", HEADS)
@pytest.mark.parametrize("shift", ["causal", "bare"])
def test_every_head_is_carried_and_left_in_float(make, tmp_path, ending, shift):
    """A head that config.json did not name as float would be quantized by vLLM, with random scales."""
    source, head = make(), {name: torch.randn(shape) for name, shape in HEADS[ending].items()}
    renamed(source, bare if shift == "bare" else lambda name: None if name.startswith("lm_head") else name)
    edit_tensors(source, lambda tensors: tensors | head)
    architecture(source, f"Llama{ending}")
    out = tmp_path / "out"
    converted(source, out)
    before, after = tensors_of(source), tensors_of(out)
    led = shift == "bare" and "For" in ending  # the names that readers look for beside a head
    own = "transformer." if ending == "ForQuestionAnswering" else "model."
    expected = {own + name if led and name not in head else name for name in before}
    assert {name.removesuffix("_scale") for name in after} == expected
    assert all(torch.equal(after[name], tensor) for name, tensor in head.items())
    assert verify(out, source, engine=False).ok


@pytest.mark.parametrize("ending", sorted(HEADS.keys() - {"Model"}))
def test_a_head_that_is_not_there(make, tmp_path, ending):
    source = make()
    renamed(source, bare)
    architecture(source, f"Llama{ending}")
    edit_tensors(source, lambda tensors: tensors | {"position_ids": torch.arange(8)})  # which is no head
    refused(source, tmp_path, f"architectures is ['Llama{ending}']", "no tensor of such a head", '"LlamaModel"')


@pytest.mark.parametrize("ending", ["ForSequenceClassification", "ForProcessRewardModel", "RewardModel"])
@pytest.mark.parametrize("beside", ["lm_head.weight", "other.weight"])
def test_what_lies_beside_it_is_no_head_of_another_kind(make, tmp_path, ending, beside):
    """vLLM would serve a score of uninitialized memory."""
    source = make()
    renamed(source, lambda name: name.replace("lm_head.weight", beside))
    architecture(source, f"Llama{ending}")
    what = "no tensor of such a head" if beside == "lm_head.weight" else f"the decoder, {beside}, is no head that vLLM"
    refused(source, tmp_path, f"architectures is ['Llama{ending}']", what)
    edit_tensors(source, lambda tensors: tensors | {"score.weight": torch.randn(2, 64)})
    converted(source, tmp_path / "out")


@pytest.mark.parametrize("said", [{"classifier_from_token": ["no", "yes"]}, {"method": "no_post_processing"}])
def test_a_classifier_that_vllm_makes_of_the_language_head(make, tmp_path, said):
    source = make()
    architecture(source, "LlamaForSequenceClassification")
    config(**dict.fromkeys(said))(source)
    refused(source, tmp_path, "no tensor of such a head")
    config(**said)(source)
    converted(source, tmp_path / "out")


def test_a_causal_lm_without_head_says_what_it_is_and_the_remedy_works(make, tmp_path):
    source = make()
    renamed(source, bare)
    refused(source, tmp_path, "lm_head.weight: is missing", "a bare decoder", 'set architectures to ["LlamaModel"]')
    architecture(source, "LlamaModel")
    converted(source, tmp_path / "out")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("given", [None, [], [None], ["GritLM"], ["AnyForConditionalGeneration"], ["AnyLMHeadModel"]])
def test_the_class_that_a_remedy_names_is_one(model_type, given):
    """Whatever ``architectures`` says: the decoder's own class, as transformers and vLLM call it."""
    sizes = dict(vocab_size=8, hidden_size=4, num_hidden_layers=1, tie_word_embeddings=False)
    headers = SimpleNamespace(
        config={"model_type": model_type, "architectures": given, **sizes},
        names=Names.behind(""),
        lost=set(),
        place=SimpleNamespace(files=dict),
    )
    (problem,) = heads.head_problems(headers, False, {})
    assert f'set architectures to ["{MODEL_MAPPING_NAMES[model_type]}"]' in problem.remedy


def test_a_head_of_another_name_makes_no_bare_decoder(make, tmp_path):
    source = make()
    renamed(source, lambda name: name.replace("lm_head", "output"))
    refused(
        source,
        tmp_path,
        "lm_head.weight: is missing",
        "output.weight has its shape",
        "rename output.weight to lm_head.weight in the files",
    )


def test_of_two_heads_of_other_names_none_is_chosen(make, tmp_path):
    source = make()
    renamed(source, lambda name: name.replace("lm_head", "output"))
    edit_tensors(source, lambda tensors: tensors | {"early_output.weight": tensors["output.weight"] + 1})
    refused(source, tmp_path, "rename the one that is the head to lm_head.weight in the files")


def test_a_head_that_is_the_embedding_without_a_word_of_it(make, tmp_path):
    """As fine-tunes of tied models that lost the key: the remedy does not make an embedding model of it."""
    source = make()
    edit_json(source / "config.json", lambda c: c.pop("tie_word_embeddings"))
    renamed(source, lambda name: None if name.startswith("lm_head") else name)
    refused(source, tmp_path, 'tie_word_embeddings "not given"', "tie_word_embeddings to true if the embedding is")
    config(tie_word_embeddings=True)(source)
    converted(source, tmp_path / "out")


@pytest.mark.parametrize("model_type", sweep(MODEL_TYPES))
@pytest.mark.parametrize("options", [("--method", "rtn"), ()], ids=["rtn", "data-free"])
def test_bare_decoders_of_every_type(make, tmp_path, model_type, options):
    """The bytes are those of the causal LM's blocks, under the names of the source."""
    source = make(model_type)
    converted(source, tmp_path / "causal", *options)
    renamed(source, bare)
    architecture(source, "AnyModel")
    converted(source, tmp_path / "bare", *options)
    causal, found = tensors_of(tmp_path / "causal"), tensors_of(tmp_path / "bare")
    expected = {name.removeprefix("model."): t for name, t in causal.items() if not name.startswith("lm_head")}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())
    assert verify(tmp_path / "bare", source, engine=False).ok


def test_tied_bare_decoder_that_is_called_a_causal_lm(make, tmp_path):
    """As Qwen3-Embedding is stored."""
    source = make("qwen3", tie_word_embeddings=True)
    renamed(source, bare)
    converted(source, tmp_path / "out")
    assert "layers.0.mlp.up_proj.weight_scale" in tensors_of(tmp_path / "out")


def test_calibrated_parts_of_a_bare_decoder_merge(make, tmp_path, calibration_text):
    source = make()
    renamed(source, bare)
    architecture(source, "LlamaModel")
    options = ("--calibration", calibration_text, "--ignore", r"layers\.1\.mlp\.down_proj")
    converted(source, tmp_path / "whole", *options)
    for part in ("0:1", "1:"):
        converted(source, tmp_path / part.replace(":", "-"), *options, "--blocks", part)
    code, message = run("merge", tmp_path / "merged", tmp_path / "0-1", tmp_path / "1-")
    assert code == 0, message
    for file in ("model.safetensors", "config.json", "report.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("head", "ending"), [("score", "ForSequenceClassification"), ("qa_outputs", "ForQuestionAnswering")]
)
def test_a_head_whose_class_is_not_named(make, tmp_path, head, ending):
    """The remedy keeps the head: neither an embedding model nor a language model is made of a classifier."""
    source = make()
    renamed(source, lambda name: None if name.startswith("lm_head") else name)
    edit_tensors(source, lambda tensors: tensors | {f"{head}.weight": torch.randn(2, 64)})
    what = f'and {head}.weight is another head; set architectures to ["Llama{ending}"]'
    refused(source, tmp_path, "lm_head.weight: is missing", what)
    architecture(source, f"Llama{ending}")
    converted(source, tmp_path / "out")
    assert f"{head}.weight" in tensors_of(tmp_path / "out")


def test_a_head_whose_class_nobody_knows(make, tmp_path):
    source = make()
    renamed(source, lambda name: None if name.startswith("lm_head") else name)
    edit_tensors(source, lambda tensors: tensors | {"v_head.weight": torch.randn(1, 64)})
    refused(source, tmp_path, "v_head.weight is another head; set architectures in config.json to the class that has")


def test_a_classifier_in_a_file_of_its_own(make, tmp_path):
    source = make()
    renamed(source, lambda name: None if name.startswith("lm_head") else name)
    save_file({"score.weight": torch.randn(2, 64)}, source / "score.safetensors")
    architecture(source, "LlamaForSequenceClassification")
    refused(source, tmp_path, "score.weight: is missing in what is read, and score.safetensors holds it")


UNKNOWN = {
    "LlamaForRewardModelWithGating": ["gating.layers.0.weight", "regression_layer.weight"],
    "LlamaForScore": ["classification_head.dense.weight"],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_heads_that_no_reader_knows(make, tmp_path, name):
    source = make()
    renamed(source, lambda tensor: None if tensor.startswith("lm_head") else tensor)
    edit_tensors(source, lambda tensors: tensors | {head: torch.randn(3, 64) for head in UNKNOWN[name]})
    architecture(source, name)
    refused(source, tmp_path, f"architectures is ['{name}']", UNKNOWN[name][0], "is no head that vLLM or transformers")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_class_of_a_head_is_one_of_transformers(model_type):
    """Where transformers has such a class for the type."""
    family = classes.family_of({"model_type": model_type})
    for head, names in (
        ("score.weight", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        ("qa_outputs.weight", MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    ):
        assert names.get(model_type, family + classes.implied_by(head)) == family + classes.implied_by(head)
