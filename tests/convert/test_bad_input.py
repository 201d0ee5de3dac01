"""Bad input of every kind: one message with culprit and remedy, exit code 2, nothing written, source unchanged."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.conftest import edit_json, patience
from tests.convert.test_convert import digests
from vllm_w8a8_bismooth.cli import main
from vllm_w8a8_bismooth.errors import BismoothError

INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"


def shard_of(folder: Path, name: str = Q) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_shard(folder: Path, change, name: str = Q) -> None:
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


def poison(value: float, name: str = Q):
    def change(tensors):
        tensors[name][3, 5] = value

    return lambda folder: edit_shard(folder, change, name)


def remove_tensor(folder: Path) -> None:
    edit_shard(folder, lambda tensors: tensors.pop(Q))


def remove_tensor_everywhere(folder: Path) -> None:
    remove_tensor(folder)
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(Q))


def rename_tensor(folder: Path) -> None:
    new, file = "model.layers.1.router.weight", shard_of(folder).name
    edit_shard(folder, lambda tensors: tensors.update({new: tensors.pop(Q)}))
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({new: file}) or index["weight_map"].pop(Q))


def add_tensor(name: str, shape: tuple[int, ...]):
    def change(folder: Path) -> None:
        edit_shard(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))
        edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: shard_of(folder).name}))

    return change


def duplicate_tensor(folder: Path) -> None:
    other = next(p for p in sorted(folder.glob("*.safetensors")) if p != shard_of(folder))
    save_file(load_file(other) | {Q: torch.ones(1)}, other)


def truncate(folder: Path) -> None:
    os.truncate(shard_of(folder), shard_of(folder).stat().st_size - 7)


def oversized_header(folder: Path) -> None:
    shard = shard_of(folder)
    shard.write_bytes(struct.pack("<Q", 2**62) + shard.read_bytes()[8:])


def edit_header(change):
    """``change`` takes a shard's header as text and returns it changed."""

    def damage(folder: Path) -> None:
        content = shard_of(folder).read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = change(content[8:end].decode()).encode()
        shard_of(folder).write_bytes(struct.pack("<Q", len(header)) + header + content[end:])

    return damage


def header_to_the_end(folder: Path) -> None:
    content = shard_of(folder).read_bytes()
    shard_of(folder).write_bytes(struct.pack("<Q", len(content)) + content[8:])


def monstrous_tensor(folder: Path) -> None:
    entry = f'"x":{{"dtype":"F32","shape":[0,{2**63}],"data_offsets":[0,0]}}'
    edit_header(lambda text: f"{{{entry},{text[1:]}")(folder)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(x=shard_of(folder).name))


def say_twice(file: str, key: str):
    """Put a key in front that the file has already."""
    return lambda folder: (folder / file).write_text(f'{{"{key}": 1, ' + (folder / file).read_text()[1:])


def instead(file: str, make):
    """Put something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return damage


def to_itself(path: Path) -> None:
    path.symlink_to(path)


def to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(changes))


def drop(*names: str):
    def change(folder: Path) -> None:
        for name in names:
            for path in folder.glob(name):
                path.unlink()

    return change


def index_to(file):
    return lambda folder: edit_json(folder / INDEX, lambda index: index["weight_map"].update({Q: file}))


CASES = {
    "missing tensor": (remove_tensor, [Q, "is missing", "download"]),
    "missing tensor, index agrees": (remove_tensor_everywhere, [Q, "[96, 64]", "is missing"]),
    "duplicate tensor": (duplicate_tensor, [Q, "places in model-0000", "duplicate"]),
    "absent shard": (lambda f: shard_of(f).unlink(), ["model-0000", "absent", "download the shard again"]),
    "index names a strange file": (index_to("../source/model.safetensors"), [Q, "'../source/", "not a shard"]),
    "index names a number": (index_to(7), [Q, "7", "not a shard"]),
    "no index, no weights": (drop("*.safetensors", INDEX), ["only safetensors"]),
    "index is no JSON": (lambda f: (f / INDEX).write_text("{"), [INDEX, "not valid JSON"]),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), [INDEX, "no weight_map"]),
    "truncated": (truncate, ["model-0000", "truncated or corrupt", "download"]),
    "huge header": (oversized_header, ["model-0000", "truncated or corrupt", "download"]),
    "empty shard": (lambda f: shard_of(f).write_bytes(b""), ["model-0000", "truncated or corrupt"]),
    "NaN": (poison(float("nan")), [Q, "nan at [3, 5]", "repair"]),
    "infinity in the embedding": (
        poison(float("inf"), "model.embed_tokens.weight"),
        ["model.embed_tokens.weight", "inf at [3, 5]"],
    ),
    "values that no model has": (poison(3e38), [Q, "values beyond 1e19", "repair"]),
    "quantized, by config": (config(quantization_config={"quant_method": "gptq"}), ["already quantized", "'gptq'"]),
    "quantized, by dtype": (
        lambda f: edit_shard(f, lambda t: t.update({Q: t[Q].to(torch.int8)})),
        [Q, "dtype I8", "already quantized"],
    ),
    "fp8": (
        lambda f: edit_shard(f, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})),
        [Q, "dtype F8_E4M3", "BF16"],
    ),
    "unknown architecture": (
        config(model_type="gpt2"),
        ["'gpt2'", "known are gemma2, gemma3_text, granite, llama, mistral"],
    ),
    "architecture is no name": (config(model_type=["llama"]), ["['llama']", "not supported"]),
    "more blocks than tensors": (config(num_hidden_layers=10**12), ["model.layers.3.", "is missing"]),
    "fewer blocks than tensors": (config(num_hidden_layers=2), ["model.layers.2.", "is not part of"]),
    "size is no number": (config(hidden_size="64"), ["hidden_size = '64'", "positive integer"]),
    "heads do not divide": (config(num_key_value_heads=3), ["num_attention_heads = 4", "num_key_value_heads = 3"]),
    "wrong shape": (config(intermediate_size=128), ["has shape [96, 64]", "config.json implies [128, 64]"]),
    "foreign tensor": (rename_tensor, ["model.layers.1.router.weight", "is not part of a llama model"]),
    "rotary table of no block": (
        add_tensor("model.layers.99.self_attn.rotary_emb.inv_freq", (12,)),
        ["layers.99", "is not part of"],
    ),
    "rotary table of a strange block": (
        add_tensor("model.layers.00.self_attn.rotary_emb.inv_freq", (12,)),
        ["layers.00", "is not part of"],
    ),
    "bias that the config denies": (
        add_tensor("model.layers.0.self_attn.q_proj.bias", (96,)),
        ["self_attn.q_proj.bias", "is not part of", "mend config.json"],
    ),
    "bias that the config promises": (config(attention_bias=True), ["q_proj.bias: tensor of shape [96] is missing"]),
    "another recipe.json": (lambda f: (f / "recipe.json").write_text("{}"), ["recipe.json", "rename it"]),
    "shard with a long name": (index_to("a" * 300 + ".safetensors"), ["aaa", "too long"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "not an object"]),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), ["config.json", "not valid JSON"]),
    "config nests too deep": (
        lambda f: (f / "config.json").write_text("[" * 200_000),
        ["config.json", "not valid JSON"],
    ),
    "no config": (drop("config.json"), ["config.json", "not found"]),
    "config is a folder": (instead("config.json", Path.mkdir), ["config.json", "not a regular file"]),
    "config is a pipe": (instead("config.json", os.mkfifo), ["config.json", "not a regular file"]),
    "config is a link in a circle": (instead("config.json", to_itself), ["config.json", "cannot be read"]),
    "index is a folder": (instead(INDEX, Path.mkdir), [INDEX, "not a regular file"]),
    "index is a pipe": (instead(INDEX, os.mkfifo), [INDEX, "not a regular file"]),
    "index is a link to nowhere": (instead(INDEX, to_nowhere), [INDEX, "not found"]),
    "shard is a folder": (lambda f: instead(shard_of(f).name, Path.mkdir)(f), ["model-0000", "absent"]),
    "shard is a pipe": (lambda f: instead(shard_of(f).name, os.mkfifo)(f), ["model-0000", "absent"]),
    "side file is a link to nowhere": (instead("tokenizer.json", to_nowhere), ["tokenizer.json", "leads nowhere"]),
    "side file is a link in a circle": (instead("notes.txt", to_itself), ["notes.txt", "leads nowhere"]),
    "index names a NUL": (index_to("a\0.safetensors"), [Q, r"'a\x00.safetensors'", "not a shard"]),
    "index names two lines": (index_to("a\n.safetensors"), [Q, r"'a\n.safetensors'", "not a shard"]),
    "index names a surrogate": (index_to("\ud800.safetensors"), [Q, r"'\ud800.safetensors'", "not a shard"]),
    "tensor twice in a header": (
        edit_header(lambda text: f'{{"{Q}": {json.dumps(json.loads(text)[Q])}, {text[1:]}'),
        ["model-0000", f"key '{Q}' occurs twice"],
    ),
    "key twice in the index": (say_twice(INDEX, "weight_map"), [INDEX, "'weight_map' occurs twice", "mend it"]),
    "key twice in the config": (say_twice("config.json", "hidden_size"), ["config.json", "'hidden_size' occurs twice"]),
    "offsets that do not fit the shape": (
        edit_header(lambda text: text.replace("[96,64]", "[96,63]", 1)),
        ["model-0000", "truncated or corrupt"],
    ),
    "header longer than the file": (header_to_the_end, ["model-0000", "truncated or corrupt"]),
    "empty tensor of a monstrous shape": (monstrous_tensor, ["x", f"[0, {2**63}]", "no tensor is that large"]),
    "tensor that the index does not name": (
        lambda f: edit_shard(f, lambda t: t.update(x=torch.ones(1))),
        ["model-0000", "holds tensor x", f"{INDEX} does not name"],
    ),
    "empty tensor in a block": (
        lambda f: edit_shard(f, lambda t: t.update({Q: torch.ones(0, 64)})),
        [Q, "[0, 64]", "config.json implies [96, 64]"],
    ),
    "huge width": (config(hidden_size=10**12), ["implies [1000000000000, 96]"]),
    "huge vocabulary": (config(vocab_size=10**12), ["implies [1000000000000, 64]"]),
    "monstrous width": (
        config(num_attention_heads=10**4000, head_dim=10**4000),
        ["num_attention_heads", "below 2**48"],
    ),
}


def run(*arguments) -> tuple[int, str]:
    """Exit code and message of the command, in this process."""
    try:
        with patience(60):
            result = CliRunner().invoke(main.app, [str(a) for a in arguments], catch_exceptions=False)
    except TimeoutError:  # an OSError, but not one of the user's
        raise AssertionError(f"hangs: {arguments}") from None
    except (BismoothError, OSError) as error:  # as main catches them
        return 2, str(error)
    return result.exit_code, result.output


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


OPTIONS = {
    "K and group size": (["--method", "mixed", "--group-size", "64", "--group-layers", "down_proj"], ["K = 96", "32"]),
    "group size of 48": (["--method", "mixed", "--group-size", "48"], ["--group-size 48", "multiple of 32"]),
    "names no linear": (["--method", "mixed", "--group-layers", "lm_head"], ["'lm_head': names no linear", "q_proj"]),
    "no expression": (["--method", "mixed", "--group-layers", "("], ["no regular expression"]),
    "ignores no linear": (["--ignore", "lm_head"], ["--ignore 'lm_head': names no linear", "q_proj"]),
    "ignores everything": (["--method", "rtn", "--ignore", "proj"], ["--ignore 'proj': names every linear"]),
    "ignore is no expression": (["--ignore", "["], ["--ignore '[': no regular expression"]),
    "ignored and per-group": (
        ["--group-size", "32", "--group-layers", "q_proj", "--ignore", r"layers\.2\.self_attn\.k"],
        ["--group-layers 'q_proj' and --ignore", "both name model.layers.2.self_attn.k_proj", "sibling"],
    ),
    "unknown method": (["--method", "gptq"], ["'gptq'", "rtn, bismooth, mixed, auto"]),
    "alpha": (["--smoothing", "alpha", "--alpha", "1.5"], ["--alpha 1.5", "0 to 1"]),
    "alpha of balanced": (["--alpha", "0.5"], ["--alpha has no effect", "--smoothing alpha"]),
    "alpha of balanced, named": (["--smoothing", "balanced", "--alpha", "0.5"], ["--alpha has no effect", "leave it"]),
    "unknown smoothing": (["--smoothing", "awq"], ["--smoothing 'awq'", "balanced, alpha"]),
    "unknown smoothing of auto": (["--method", "auto", "--smoothing", "awq"], ["--smoothing 'awq'", "balanced, alpha"]),
    "useless smoothing": (
        ["--method", "rtn", "--smoothing", "balanced"],
        ["--smoothing has no effect", "leave it out"],
    ),
    "auto without text": (["--method", "auto"], ["--method auto", "activations", "--calibration FILE"]),
    "auto with no text": (["--method", "auto", "--calibration", "none"], ["--method auto", "--calibration FILE"]),
    "group budget": (["--method", "auto", "--group-budget", "1.5"], ["--group-budget 1.5", "0 to 1"]),
    "budget in per cent": (["--method", "auto", "--group-budget", "300%"], ["--group-budget 3.0", "0 to 1"]),
    "budget in words": (["--method", "auto", "--group-budget", "few"], ["'few' is no share", "3% or 0.03"]),
    "negative budget": (["--method", "auto", "--group-budget", "-0.1"], ["--group-budget -0.1", "0 to 1"]),
    "no budget": (["--method", "auto", "--group-budget", "nan"], ["--group-budget nan", "0 to 1"]),
    "useless budget": (["--group-budget", "0.1"], ["--group-budget has no effect", "leave it out"]),
    "names for auto": (["--method", "auto", "--group-layers", "down_proj"], ["--group-layers has no effect"]),
    "useless option": (["--method", "rtn", "--alpha", "0.5"], ["--alpha has no effect", "leave it out"]),
    "useless calibration": (["--method", "mixed", "--calibration", "x.txt"], ["--calibration has no effect"]),
    "half of a group": (["--group-layers", "down"], ["needs both --group-layers and --group-size"]),
    "no such device": (["--device", "tpu"], ["--device tpu", "leave it out"]),
    "no CUDA": (["--device", "cuda:77"], ["--device cuda:77", "leave it out"]),
    "tokens of no text": (["--calibration-tokens", "9"], ["--calibration-tokens has no effect without"]),
}


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
    assert_refused(tmp_path, source, ["implies many more tensors than the"])
    config(num_experts=10**12, num_local_experts=4)(source)
    assert_refused(tmp_path, source, ["'num_experts': 1000000000000", "'num_local_experts': 4", "contradict"])


@pytest.mark.parametrize("changes", [{"rms_norm_eps": "tiny"}, {"dtype": "bf17"}, {"hidden_act": "none"}])
def test_config_that_only_transformers_refuses(make_checkpoint, tmp_path, calibration_text, changes):
    """It is not the tokenizer's fault, although the tokenizer comes first."""
    source = make_checkpoint()
    config(**changes)(source)
    assert_refused(tmp_path, source, ["transformers refuses config.json"], "--calibration", calibration_text)


CALIBRATION = {
    "absent": ("a.txt", None, ["a.txt", "cannot be read"]),
    "empty": ("a.txt", b" \n ", ["a.txt", "is empty", "--calibration none"]),
    "latin 1": ("a.txt", b"caf\xe9", ["a.txt", "not UTF-8 (byte 3)"]),
    "parquet": ("a.parquet", b"PAR1", ["a.parquet", ".txt or .jsonl"]),
    "no JSON": ("a.jsonl", b'{"text": "a"}\nhello\n', ["a.jsonl", "line 2"]),
    "no text": ("a.jsonl", b'{"content": "a"}\n', ["a.jsonl", "line 1", '"text"']),
    "only empty texts": ("a.jsonl", b'{"text": ""}\n', ["a.jsonl", "is empty"]),
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
    assert_refused(tmp_path, source, [Q, "beyond 1e19 after smoothing"])


def test_checkpoint_without_tokenizer(make_checkpoint, tmp_path, calibration_text):
    source = make_checkpoint()
    drop("tokenizer*")(source)
    assert_refused(tmp_path, source, ["no usable tokenizer", "--calibration none"], "--calibration", calibration_text)


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
    assert_refused(tmp_path, source, ["out.partial", "is not ours"], "--method", "rtn")
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
    assert_refused(tmp_path, make_checkpoint(), ["the result needs 0.00 GB, the disk has 0.00 GB free"])


def test_source_that_changes_meanwhile(make_checkpoint, tmp_path, monkeypatch):
    source = make_checkpoint()
    copy = shutil.copyfile
    monkeypatch.setattr("shutil.copyfile", lambda a, b: (copy(a, b), os.utime(source / "tokenizer.json", (1, 1))))
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "tokenizer.json: changed during the conversion" in message
    assert {p.name for p in tmp_path.iterdir()} == {"source"}
