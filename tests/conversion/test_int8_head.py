"""``--head int8``: the language model's head per-channel, whether it is a tensor of its own or the embedding."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.command import run
from tests.support.contents import digests, tensors_of
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.rename import renamed
from vllm_w8a8_bismooth import inspect
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, RECIPE, REPORT, read_json
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.conversion.merge import merge, prepare
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.method.quantize import quantize_weight
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.verification import verify

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
RTN, SCALE, TARGET = Recipe.of("rtn", head="int8"), "lm_head.weight_scale", r"re:(.*\.)?lm_head$"
METHODS = {
    "rtn": {},
    "bismooth": {"calibration_tokens": 300},
    "data-free": {},
    "mixed": {"group_size": 32, "group_layers": "proj"},
    "auto": {"calibration_tokens": 300, "group_size": 32},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_head_is_rounded_and_nothing_else_changes(make_checkpoint, tmp_path, calibration_text, method, tied):
    source = make_checkpoint(tie_word_embeddings=tied)
    text = read_text(calibration_text) if "calibration_tokens" in METHODS[method] else None
    for name, head in (("float", None), ("int8", "int8")):
        name_of_method = "bismooth" if method == "data-free" else method
        recipe = Recipe.of(name_of_method, head=head, **METHODS[method])
        outcome = convert(source, tmp_path / name, recipe, text)
    before, without, found = (tensors_of(folder) for folder in (source, tmp_path / "float", tmp_path / "int8"))
    codes, scale = quantize_weight(before[EMBEDDING if tied else HEAD].float())
    assert torch.equal(found.pop(HEAD), codes) and torch.equal(found.pop(SCALE), scale)
    assert without.pop(HEAD, None) is None if tied else without.pop(HEAD) is not None
    assert found.keys() == without.keys() and all(torch.equal(found[name], without[name]) for name in found)
    config, plain = (read_json(tmp_path / name / CONFIG) for name in ("int8", "float"))
    assert config["tie_word_embeddings"] is False and plain["tie_word_embeddings"] is tied
    quantization = config["quantization_config"]
    assert "lm_head" not in quantization["ignore"] and "lm_head" in plain["quantization_config"]["ignore"]
    per_channel = list(quantization["config_groups"].values())[-1]
    assert per_channel["targets"] == ([] if method == "mixed" else ["Linear"]) + [TARGET]
    assert per_channel["weights"]["strategy"] == "channel"
    stored = sum(tensor.nbytes for tensor in before.values())
    assert outcome.source_bytes == stored, "an embedding that is the head is there once"
    assert outcome.linears["lm_head"]["group_size"] is None and outcome.linears["lm_head"]["sqnr"] > 30
    found = verify(tmp_path / "int8", source, engine=False)
    assert found.ok and not found.notes, (found.findings, found.notes)
    assert HEAD in found.unscaled and found.linears["lm_head"]["sqnr"] > 30


def test_rows_are_read_in_slabs(make_checkpoint, tmp_path, monkeypatch):
    source = make_checkpoint(tie_word_embeddings=True)
    convert(source, tmp_path / "whole", RTN)
    sizes, rows = [], Checkpoint.rows
    monkeypatch.setattr("vllm_w8a8_bismooth.conversion.stages._SLAB", 1000)
    monkeypatch.setattr(Checkpoint, "rows", lambda self, *a: sizes.append(a[2]) or rows(self, *a))
    convert(source, tmp_path / "slabs", RTN)
    assert len(sizes) > 3 and max(sizes) * 64 <= 1024
    whole, slabs = (digests(tmp_path / name) for name in ("whole", "slabs"))
    sums = {REPORT, "README.md"}  # whose last digits depend on the order of sums
    assert {name for name in whole if whole[name] != slabs[name]} <= sums and whole.keys() == slabs.keys()


@pytest.mark.parametrize("tied", [False, True])
def test_parts_give_the_same(make_checkpoint, tmp_path, tied):
    source = make_checkpoint(tie_word_embeddings=tied)
    whole = convert(source, tmp_path / "whole", RTN)
    parts = {"a": slice(0, 2), "b": slice(2, 3)}
    made = {name: convert(source, tmp_path / name, RTN, blocks=blocks) for name, blocks in parts.items()}
    assert "lm_head" in made["a"].linears and "lm_head" not in made["b"].linears
    merged = merge(prepare([tmp_path / "b", tmp_path / "a"], tmp_path / "merged"))
    assert digests(tmp_path / "merged") == digests(tmp_path / "whole") and merged.linears == whole.linears
    with pytest.raises(BismoothError, match=r"of another conversion than .*recipe.head: "):
        convert(source, tmp_path / "c", Recipe.of("rtn"), blocks=parts["b"])
        prepare([tmp_path / "a", tmp_path / "c"], tmp_path / "refused")


@pytest.mark.parametrize("tied", [False, True])
def test_another_head_is_another_conversion(make_checkpoint, tmp_path, tied):
    source, out = make_checkpoint(tie_word_embeddings=tied), tmp_path / "out"
    command = ["convert", source, out, "--method", "rtn"]
    code, text = run(*command, "--head", "int8")
    assert code == 0 and "22 linears per-channel" in text
    code, text = run(*command, "--head", "int8")
    assert code == 0 and "nothing to do" in text
    for other in ([], ["--head", "float"]):
        code, text = run(*command, *other)
        assert code == 2 and "holds another conversion (head: 'int8' there, None now" in text
    partial = out.with_name("out.partial")
    assert not partial.exists()


def test_float_is_the_default(make_checkpoint, tmp_path):
    source = make_checkpoint()
    convert(source, tmp_path / "a", Recipe.of("rtn"))
    convert(source, tmp_path / "b", Recipe.of("rtn", head="float"))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def bare(folder):
    renamed(folder, lambda name: None if name.startswith("lm_head") else name.removeprefix("model."))
    edit_json(folder / CONFIG, lambda config: config.update(architectures=["LlamaModel"]))


def classifier(folder):
    renamed(folder, lambda name: name.replace("lm_head", "score"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"score.weight": tensors["score.weight"][:2].clone()}, folder / "model.safetensors")
    edit_json(folder / CONFIG, lambda config: config.update(architectures=["LlamaForSequenceClassification"]))


def beside(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING] * 2}, folder / "model.safetensors")


REFUSED = {
    "a bare decoder": ("llama", bare, {}, "the model is a LlamaModel, without a language model's head"),
    "a classifier": ("llama", classifier, {}, "LlamaForSequenceClassification, without a language model's head"),
    "a head that nobody uses": ("llama", beside, {"tie_word_embeddings": True}, "lm_head.weight: is stored, though"),
    "a class that ties": ("gemma2", None, {}, "always takes the embedding for its head (model_type gemma2)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_heads_that_cannot(make_checkpoint, tmp_path, case):
    model_type, change, options, says = REFUSED[case]
    source = make_checkpoint(model_type, sharded=False, **options)
    if change is not None:
        change(source)
    code, text = run("convert", source, tmp_path / "out", "--method", "rtn", "--head", "int8")
    assert code == 2 and says in " ".join(text.split()), text
    assert not (tmp_path / "out").exists()
    assert (head := inspect(source).head) is None or head.obstacle
    assert run("convert", source, tmp_path / "out", "--method", "rtn")[0] == 0


def test_an_estimate_that_knows_nothing_of_it_is_no_target(make_checkpoint, tmp_path, calibration_text):
    source, out = make_checkpoint(), tmp_path / "out"
    options = ("--method", "auto", "--calibration", calibration_text, "--head", "int8")
    code, text = run("convert", source, out, *options, "--target-kl", "0.003")
    assert code == 2 and "knows nothing of an INT8 head; leave out one of the two" in " ".join(text.split())
    assert not out.exists()
    code, text = run("convert", source, out, *options, "--calibration-tokens", "256")
    assert code == 0 and "without groups), without what its INT8 head costs; bismooth score" in " ".join(text.split())


def test_preview_and_inspection_say_it(make_checkpoint, tmp_path):
    source = make_checkpoint(tie_word_embeddings=True)
    code, text = run("convert", source, tmp_path / "out", "--method", "rtn", "--head", "int8", "--dry-run")
    written = convert(source, tmp_path / "out", RTN).written_bytes
    assert "data-free, the head in INT8" in text
    assert code == 0 and f"{written / 1e6:.1f}"[:3] in text.replace(" kB", "e3"), text
    head = inspect(source).head
    vocabulary, hidden = tensors_of(source)[EMBEDDING].shape
    assert (head.name, head.nbytes, head.int8_nbytes) == (HEAD, 0, vocabulary * (hidden + 4)) and not head.obstacle
    code, text = run("inspect", source)
    assert code == 0 and "nothing beside the embedding of the result; " in text and "with --head int8" in text
    assert "model's head was rounded as it was" in (tmp_path / "out" / "README.md").read_text()


DAMAGE = {
    "a code": (lambda t: t[HEAD][3].add_(2).clamp_(-127, 127), "columns"),
    "a scale": (lambda t: t[SCALE][5].mul_(1.02), "columns"),
    "a row of another token": (lambda t: t[HEAD].copy_(t[HEAD].roll(1, 0)), "columns"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_a_head_that_is_another(make_checkpoint, tmp_path, damage):
    source, out = make_checkpoint(tie_word_embeddings=True, sharded=False), tmp_path / "out"
    convert(source, out, RTN)
    tensors, (change, says) = load_file(out / "model.safetensors"), DAMAGE[damage]
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / REPORT).unlink()
    (fault,) = verify(out, source, engine=False).findings
    assert fault.where == HEAD and says in fault.what and "not the source's, rounded" in fault.what


def test_verify_wants_what_the_recipe_says(make_checkpoint, tmp_path):
    """A tied config beside an INT8 head, and an INT8 head that nobody asked for."""
    for tied in (True, False):
        source, out = make_checkpoint(tie_word_embeddings=tied), tmp_path / f"out-{tied}"
        convert(source, out, RTN)
        if tied:
            edit_json(out / CONFIG, lambda config: config.update(tie_word_embeddings=True))
        else:
            edit_json(out / RECIPE, lambda content: content["recipe"].update(head=None))
        says = "tie_word_embeddings is true, in the source false" if tied else f"{HEAD} is I8"
        found = [f"{fault.where} {fault.what}" for fault in verify(out, source, engine=False).findings]
        assert any(says in fault for fault in found), found
        shutil.rmtree(source)
