"""Bad input of every kind: one message with culprit and remedy, exit code 2, nothing written, source unchanged."""

import os
import shutil
from pathlib import Path

import pytest

from tests.support.command import run
from tests.support.contents import digests
from tests.support.damage import CASES, INDEX, Q, config, drop, edit_json, edit_shard, poison, to_itself
from tests.support.options import OPTIONS


def assert_refused(tmp_path: Path, source: Path, parts: list[str], *options) -> None:
    before = digests(source)
    listing = {p.name for p in tmp_path.iterdir()}
    code, message = run("convert", source, tmp_path / "out", *options)
    assert code == 2 and all(part in message for part in parts), message
    assert digests(source) == before and {p.name for p in tmp_path.iterdir()} == listing


@pytest.mark.parametrize("case", CASES)
def test_source_is_refused(make_checkpoint, tmp_path, case):
    source = make_checkpoint()
    damage, parts = CASES[case]
    damage(source)
    assert_refused(tmp_path, source, parts, "--method", "rtn")


@pytest.mark.parametrize("case", OPTIONS)
def test_options_are_refused(make_checkpoint, tmp_path, case):
    options, parts = OPTIONS[case]
    assert_refused(tmp_path, make_checkpoint(), parts, *options)


@pytest.mark.parametrize("which", [r"experts\.[0-2]\.", "w2", r"layers\.1.*(w1|w3)"])
def test_experts_are_ignored_together(make_checkpoint, tmp_path, which):
    parts = ["--ignore", "block_sparse_moe.experts.", "all experts of a block alike"]
    assert_refused(tmp_path, make_checkpoint("mixtral"), parts, "--method", "rtn", "--ignore", which)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_without_number(make_checkpoint, tmp_path, model_type):
    """transformers would build them all, so the config must not get that far, whichever of the two keys it uses."""
    source = make_checkpoint(model_type)
    config(num_experts=10**12, num_local_experts=10**12)(source)
    assert_refused(tmp_path, source, ["experts = 1000000000000 is beyond what any model has"])
    config(num_experts=10**12, num_local_experts=4)(source)
    assert_refused(tmp_path, source, ["num_experts = 1000000000000 is beyond what any model has"])


@pytest.mark.parametrize("changes", [{"rms_norm_eps": "tiny"}, {"dtype": "bf17"}, {"hidden_act": "none"}])
def test_config_that_only_transformers_refuses(make_checkpoint, tmp_path, calibration_text, changes):
    """It is not the tokenizer's fault, although the tokenizer comes first."""
    source = make_checkpoint()
    config(**changes)(source)
    assert_refused(tmp_path, source, ["config.json", "transformers "], "--calibration", calibration_text)


def test_what_transformers_refuses_is_not_to_be_converted_without_data(make_checkpoint, tmp_path, calibration_text):
    """vLLM reads the config with transformers too, and would refuse the result."""
    source = make_checkpoint("gemma3_text")
    config(layer_types=["full_attention"])(source)
    code, message = run("convert", source, tmp_path / "out", "--calibration", calibration_text)
    assert code == 2 and "config.json: transformers refuses it" in message
    assert "--calibration none" not in message


CALIBRATION = {
    "absent": ("a.txt", None, ["a.txt", "cannot be read"]),
    "empty": ("a.txt", b" \n ", ["a.txt", "is empty", "--calibration none"]),
    "latin 1": ("a.txt", b"caf\xe9", ["a.txt", "not UTF-8 (byte 3)"]),
}


def test_calibration_needs_tokens(make_checkpoint, tmp_path, calibration_text):
    options = ("--calibration", calibration_text, "--calibration-tokens", "0")
    assert_refused(tmp_path, make_checkpoint(), ["--calibration-tokens 0", "positive"], *options)


@pytest.mark.parametrize("case", CALIBRATION)
def test_calibration_is_refused(make_checkpoint, tmp_path, case):
    name, data, parts = CALIBRATION[case]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert_refused(tmp_path, make_checkpoint(), parts, "--calibration", tmp_path / name)


def test_values_that_overflow_in_smoothing(make_checkpoint, tmp_path):
    """The result would hold infinite scales, without a word."""
    source = make_checkpoint()
    edit_shard(source, lambda tensors: tensors[Q].fill_(3e38))
    assert_refused(tmp_path, source, [Q, "beyond 1e19 after smoothing"], "--calibration", "none")


def test_checkpoint_without_tokenizer(make_checkpoint, tmp_path, calibration_text):
    source = make_checkpoint()
    drop("tokenizer*")(source)
    assert_refused(
        tmp_path, source, ["no usable tokenizer for", "--calibration none"], "--calibration", calibration_text
    )


def test_bias_of_a_type_that_always_has_one(make_checkpoint, tmp_path):
    source, bias = make_checkpoint("qwen2"), "model.layers.1.self_attn.q_proj.bias"
    edit_shard(source, lambda tensors: tensors.pop(bias), bias)
    edit_json(source / INDEX, lambda index: index["weight_map"].pop(bias))
    assert_refused(tmp_path, source, [bias, "is missing"], "--method", "rtn")


def test_tokenizer_that_drops_everything(make_checkpoint, tmp_path, calibration_text):
    source = make_checkpoint()
    strip = {"type": "Replace", "pattern": {"Regex": r"[\s\S]"}, "content": ""}
    edit_json(source / "tokenizer.json", lambda t: t.update(normalizer=strip))
    assert_refused(tmp_path, source, ["makes no tokens"], "--calibration", calibration_text)


def test_partial_folder_that_is_not_ours(make_checkpoint, tmp_path):
    source = make_checkpoint()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    assert_refused(tmp_path, source, ["out.partial", "is no unfinished conversion"], "--method", "rtn")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"


def test_source_in_the_place_of_the_partial_folder(make_checkpoint, tmp_path):
    source = make_checkpoint().rename(tmp_path / "model.partial")
    before = digests(source)
    code, message = run("convert", source, tmp_path / "model", "--method", "rtn")
    assert code == 2 and "overlaps the source" in message and digests(source) == before


def test_two_runs_at_once(make_checkpoint, tmp_path):
    from vllm_w8a8_bismooth.checkpoint.journal import Journal

    source = make_checkpoint()
    with Journal(tmp_path / "out", {}):
        (tmp_path / "out.partial" / "half").write_text("half")
        assert_refused(tmp_path, source, ["another conversion is writing it"], "--method", "rtn")
        assert (tmp_path / "out.partial" / "half").exists()
    shutil.rmtree(tmp_path / "out.partial")
    assert run("convert", source, tmp_path / "out", "--method", "rtn")[0] == 0


def test_vocabularies_that_differ(make_checkpoint, tmp_path, calibration_text):
    source = make_checkpoint(vocab_size=40)
    assert_refused(tmp_path, source, ["gives id", "has 40 rows"], "--calibration", calibration_text)


def test_source_is_no_folder(tmp_path):
    to_itself(tmp_path / "circle")
    for source in ("nowhere", "circle"):
        code, message = run("convert", tmp_path / source, tmp_path / "out")
        assert code == 2 and "no such folder" in message


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("verb", ["convert", "inspect", "analyze", "verify", "score"])
def test_source_is_a_file_of_a_checkpoint(make_checkpoint, tmp_path, file, verb):
    source = make_checkpoint(sharded=False)
    more = {"convert": [tmp_path / "out"], "score": ["--text", source / "config.json"]}
    code, message = run(verb, source / file, *more.get(verb, []))
    words = f"{source / file}: a file, not the folder of a checkpoint; give {source}, which holds it"
    assert code == 2 and words in message, message


DESTINATIONS = {
    "under a file": ("file/out", ["file/out", "cannot be written", "check the path"]),
    "deep under a file": ("file/a/out", ["file/a/out", "cannot be written", "check the path"]),
    "a file": ("file", ["file", "no result of bismooth"]),
    "a pipe": ("pipe", ["pipe", "no result of bismooth"]),
    "a link in a circle": ("circle", ["circle", "link in a circle"]),
    "under a link in a circle": ("circle/out", ["circle/out", "cannot be written"]),
    "a name that is too long with .partial": ("a" * 250, ["aaa", "too long"]),
    "a name that is too long": ("a" * 300, ["aaa", "too long"]),
}


@pytest.mark.parametrize("case", DESTINATIONS)
def test_destination_is_refused(make_checkpoint, tmp_path, case):
    source, (place, parts) = make_checkpoint(), DESTINATIONS[case]
    (tmp_path / "file").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    to_itself(tmp_path / "circle")
    before = digests(tmp_path)
    code, message = run("convert", source, tmp_path / place, "--method", "rtn")
    assert code == 2 and all(part in message for part in parts), message
    assert digests(tmp_path) == before and {p.name for p in tmp_path.iterdir()} == {"source", "file", "pipe", "circle"}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_destination_without_permission(make_checkpoint, tmp_path):
    source = make_checkpoint()
    (tmp_path / "locked").mkdir(mode=0o555)
    code, message = run("convert", source, tmp_path / "locked" / "out", "--method", "rtn")
    assert code == 2 and "locked/out: cannot be written" in message and "permissions" in message


def test_failure_while_writing_leaves_nothing(make_checkpoint, tmp_path, monkeypatch):
    source = make_checkpoint()
    monkeypatch.setattr("vllm_w8a8_bismooth.checkpoint.writer.SHARD_SIZE", "40KB")
    poison(float("nan"), "model.layers.2.mlp.down_proj.weight")(source)
    assert_refused(tmp_path, source, ["model.layers.2.mlp.down_proj.weight"], "--method", "rtn")


def test_too_small_a_disk_is_noticed_at_once(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert_refused(tmp_path, make_checkpoint(), ["the result needs 0.16 MB, the disk has 1.00 KB free"])


def test_source_that_changes_meanwhile(make_checkpoint, tmp_path, monkeypatch):
    source = make_checkpoint()
    copy = shutil.copyfile
    monkeypatch.setattr("shutil.copyfile", lambda a, b: (copy(a, b), os.utime(source / "tokenizer.json", (1, 1))))
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "tokenizer.json: changed during the conversion" in message
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_a_result_is_no_source(make_checkpoint, tmp_path):
    """It has a recipe.json of ours; to rename that would spoil the result and lead to the next refusal."""
    assert run("convert", make_checkpoint(), tmp_path / "out", "--method", "rtn")[0] == 0
    code, message = run("convert", tmp_path / "out", tmp_path / "again")
    assert code == 2 and "already quantized" in message and "rename" not in message, message
