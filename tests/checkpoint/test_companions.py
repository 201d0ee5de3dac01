"""Files beside the weights: what serving needs travels, whatever names it; the rest is left out, and said."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.command import run
from tests.support.contents import digests
from tests.support.damage import edit_json
from tests.support.embedders import dense, projector, put
from tests.support.hub import serving
from vllm_w8a8_bismooth.checkpoint.companions import MODULES, companions
from vllm_w8a8_bismooth.checkpoint.files import Folder
from vllm_w8a8_bismooth.verification import verify

_LEFTOVERS = """
onnx/model.onnx onnx/model.onnx_data onnx/config.json openvino/openvino_model.xml openvino/openvino_model.bin
pytorch_model.bin pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json model.bak tf_model.h5 flax_model.msgpack
rust_model.ot model.gguf model-Q4_K_M.llamafile model.mlpackage/weights.bin consolidated.00.pth consolidated.safetensors
original/consolidated.00.pth original/tokenizer.model original/params.json model.fp16.safetensors
adapter_model.safetensors adapter_config.json quantize_config.json hf_quant_config.json .gitattributes .git/config
checkpoint-500/model.safetensors checkpoint-500/trainer_state.json global_step10/mp_rank_00_model_states.pt latest
pytorch_model_fsdp_0/__0_0.distcp optimizer.pt scheduler.pt scaler.pt rng_state.pth training_args.bin trainer_state.json
all_results.json eval_results.json train_results.json wandb/run-1/run.wandb wandb/run-1/files/config.yaml
runs/events.out.tfevents.1 train.jsonl data.parquet eval.csv nohup.out train.log core.123 backup.tar.gz old.zip model.7z
zero_to_fp32.py train.py __pycache__/train.cpython-311.pyc notes.ipynb figure.png sample.wav requirements.txt Makefile
"""
_USEFUL = """
generation_config.json tokenizer.json tokenizer_config.json tokenizer.model tokenizer.model.v3 vocab.json vocab.txt
merges.txt special_tokens_map.json added_tokens.json sentencepiece.bpe.model spiece.model qwen.tiktoken tekken.json
chat_template.jinja chat_template.json additional_chat_templates/tool.jinja preprocessor_config.json
processor_config.json video_preprocessor_config.json config_sentence_transformers.json sentence_bert_config.json
llama_toolcall_parser.py super_reasoning_Parser_v2.py
params.json LICENSE LICENSE.txt licence.md NOTICE USE_POLICY.md README.md
"""
LEFTOVERS, USEFUL = _LEFTOVERS.split(), _USEFUL.split()


def converted(source: Path, out: Path) -> Path:
    code, message = run("convert", source, out, "--method", "rtn")
    assert code == 0, message
    return out


def test_leftovers_stay_and_are_counted(make_checkpoint, tmp_path):
    source = make_checkpoint(sharded=False)
    for file in LEFTOVERS:
        put(source, file, bytes(1000))
    out = tmp_path / "out"
    code, message = run("convert", source, out, "--method", "rtn")
    assert code == 0, message
    assert not set(LEFTOVERS) & digests(out).keys()
    hidden = sum(file.startswith(".") for file in LEFTOVERS)
    count = len(LEFTOVERS) - hidden + 1  # and a note of the fixture's
    assert f"Left out, as serving does not need it: {count} files, " in message and "onnx/" in message
    code, report = run("inspect", source, "--json")
    assert set(json.loads(report)["left_out"]) >= {file for file in LEFTOVERS if not file.startswith(".")}


def test_what_serving_needs_travels(make_checkpoint, tmp_path):
    source = make_checkpoint()
    for file in set(USEFUL) - digests(source).keys():
        put(source, file)
    before, after = digests(source), digests(converted(source, tmp_path / "out"))
    for file in set(USEFUL) - {"README.md"}:
        assert after.get(file) == before[file], file
    assert after["ORIGINAL_README.md"] == before["README.md"]


KINDS = (
    "sentence_transformers.models.Dense",
    "sentence_transformers.base.modules.dense.Dense",
    "pylate.models.Dense.Dense",
)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_travel_with_their_weights(make_checkpoint, tmp_path, kind):
    source = make_checkpoint()
    projector(source, kind=kind)
    before, out = digests(source), converted(source, tmp_path / "out")
    after = digests(out)
    for file in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert after[file] == before[file]
    assert verify(out, source, engine=False).ok


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_module_without_weights_is_refused_and_found(make_checkpoint, tmp_path, file):
    source = make_checkpoint()
    projector(source)
    out = converted(source, tmp_path / "out")
    (out / "2_Dense" / "model.safetensors").unlink()
    (finding,) = verify(out, engine=False).findings
    assert "2_Dense" in finding.where and "modules.json says that it is a Dense" in finding.what
    (source / "2_Dense" / "model.safetensors").unlink()
    code, message = run("convert", source, tmp_path / "again", "--method", "rtn")
    assert code == 2 and "2_Dense" in message and "download the folder again" in message
    dense(source)
    (source / "2_Dense" / "model.safetensors").rename(source / "2_Dense" / file)
    before = (source / "2_Dense" / file).read_bytes()
    assert (converted(source, tmp_path / "again") / "2_Dense" / file).read_bytes() == before


BROKEN = {
    "cut off": (lambda folder: os.truncate(folder / "2_Dense" / "model.safetensors", 300), "truncated or corrupt"),
    "another shape": (
        lambda folder: dense(folder, **{"linear.weight": torch.ones(32, 63)}),
        "linear.weight has shape [32, 63], 2_Dense/config.json says [32, 64]",
    ),
    "another name": (
        lambda folder: dense(folder, **{"projection.weight": torch.ones(32, 64)}),
        "holds none of weight, linear.weight, dense.weight, by which a linear's matrix is found (projection.weight)",
    ),
    "no tensors": (lambda folder: save_file({}, folder / "2_Dense" / "model.safetensors"), "found (nothing)"),
    "a bias that is not there": (
        lambda folder: edit_json(folder / "2_Dense/config.json", lambda config: config.pop("bias")),
        "holds no linear.bias, but 2_Dense/config.json says that the linear has a bias",
    ),
    "a config without sizes": (
        lambda folder: edit_json(folder / "2_Dense/config.json", lambda config: config.pop("in_features")),
        "2_Dense/config.json: says in_features = None, which is no size of a linear",
    ),
    "a config that is no JSON": (lambda folder: put(folder, "2_Dense/config.json", b"{"), "not valid JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_module_whose_weights_do_not_load_is_refused_and_found(make_checkpoint, tmp_path, case):
    """vLLM logs it, leaves the linear out, and answers with 64 numbers for 32."""
    source, (damage, words) = make_checkpoint(), BROKEN[case]
    projector(source)
    out = converted(source, tmp_path / "out")
    for place in (source, out):
        damage(place)
    for arguments in (("convert", source, tmp_path / "again", "--method", "rtn"), ("inspect", source, "--json")):
        code, message = run(*arguments)
        assert code == 2 and words in message, message
    found = [str(finding) for finding in verify(out, engine=False).findings]
    assert any(words in line and "2_Dense/" in line for line in found), found


@pytest.mark.parametrize("name", ["weight", "linear.weight", "dense.weight"])
def test_a_linear_may_have_any_name_that_vllm_knows(make_checkpoint, tmp_path, name):
    source = make_checkpoint()
    projector(source)
    dense(source, **{name: torch.ones(32, 64), name.replace("weight", "bias"): torch.ones(32)})
    edit_json(source / "2_Dense/config.json", lambda config: config.update(bias=True))
    converted(source, tmp_path / "out")


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b"])
def test_modules_elsewhere_are_refused(make_checkpoint, tmp_path, path):
    source = make_checkpoint()
    put(source, "modules.json", json.dumps([{"type": KINDS[0], "path": path}]).encode())
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "modules.json: entry 0 has the path" in message


def test_routed_modules_travel(make_checkpoint, tmp_path):
    source = make_checkpoint()
    put(source, "modules.json", b'[{"idx": 0, "type": "sentence_transformers.models.Router", "path": ""}]')
    put(source, "router_config.json", b'{"types": {"query_0_Dense": "sentence_transformers.models.Dense"}}')
    dense(source, "query_0_Dense")
    assert (converted(source, tmp_path / "out") / "query_0_Dense" / "model.safetensors").is_file()


ROUTERS = {
    "": "router_config.json",
    "1_Router": "1_Router/router_config.json",
    "1_Asym": "1_Asym/config.json",
}


@pytest.mark.parametrize("folder", ROUTERS)
def test_a_routed_module_without_weights_is_refused_and_found(make_checkpoint, tmp_path, folder):
    source, route = make_checkpoint(), f"{folder}/document_0_Dense".removeprefix("/")
    kind = f"sentence_transformers.models.{folder[2:] or 'Router'}"
    put(source, "modules.json", json.dumps([{"type": kind, "path": folder}]).encode())
    put(source, ROUTERS[folder], json.dumps({"types": {"document_0_Dense": KINDS[0]}}).encode())
    dense(source, route)
    out = converted(source, tmp_path / "out")
    for place in (out, source):
        (place / route / "model.safetensors").unlink()
    (finding,) = verify(out, engine=False).findings
    assert finding.where == route and f"{ROUTERS[folder]} says that it is a Dense" in finding.what
    code, message = run("convert", source, tmp_path / "again", "--method", "rtn")
    assert code == 2 and message.count("has no model.safetensors") == 1


@pytest.mark.parametrize("folder", ["1_Pooling", "2_Dense"])
def test_a_module_without_its_config_is_refused(make_checkpoint, tmp_path, folder):
    """vLLM would leave the projector out, or pool in another way, without a word."""
    source = make_checkpoint()
    projector(source)
    (source / folder / "config.json").unlink()
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and f"{folder}: has no config.json" in message


def test_a_module_that_is_a_link(make_checkpoint, tmp_path):
    source = make_checkpoint()
    projector(source)
    (source / "1_Pooling").rename(tmp_path / "elsewhere")
    (source / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "1_Pooling: a link to a folder, which is not followed; put the files" in message


def test_a_module_whose_folder_is_spelled_otherwise(make_checkpoint, tmp_path):
    source = make_checkpoint()
    projector(source)
    put(source, "modules.json", json.dumps([{"type": KINDS[0], "path": "./2_dense"}]).encode())
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "2_dense: no such folder; 2_Dense is there; write it so in modules.json" in message
    put(source, "modules.json", json.dumps([{"type": KINDS[0], "path": "2_Dense"}]).encode())
    converted(source, tmp_path / "out")


LINKED = {
    "additional_chat_templates": "tool.jinja",
    "lib": "util.py",
    "lib/sub": "deep/util.py",
    "2_Dense": "model.safetensors",
}


@pytest.mark.parametrize("folder", LINKED)
def test_what_lies_behind_a_link_is_not_lost_without_a_word(make_checkpoint, tmp_path, folder):
    """What would have to travel is refused, by inspect too; put there itself, it travels."""
    source = make_checkpoint()
    projector(source)
    edit_json(source / "config.json", lambda c: c.update(auto_map={"AutoModel": "modeling_own.OwnModel"}))
    if not (source / folder / LINKED[folder]).exists():
        put(source, f"{folder}/{LINKED[folder]}", b"content")
    (source / folder).rename(tmp_path / "elsewhere")
    (source / folder).symlink_to(tmp_path / "elsewhere")
    for verb in (("convert", source, tmp_path / "out", "--method", "rtn"), ("inspect", source)):
        message = " ".join(run(*verb)[1].split())
        assert f"{folder}: a link to a folder, which is not followed" in message
    (source / folder).unlink()
    (tmp_path / "elsewhere").rename(source / folder)
    assert f"{folder}/{LINKED[folder]}" in digests(converted(source, tmp_path / "out"))


def test_other_links_to_folders_are_said(make_checkpoint, tmp_path):
    source = make_checkpoint()
    (source / "data").symlink_to(source / "extra")
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 0 and "links to folders are not followed, and nothing in them travels: data" in " ".join(
        message.split()
    )


@pytest.mark.parametrize("path", ["./2_Dense", "2_Dense/", "2_Dense//"])
def test_the_paths_of_modules_may_be_written_otherwise(make_checkpoint, tmp_path, path):
    source = make_checkpoint()
    projector(source)
    put(source, "modules.json", json.dumps([{"type": KINDS[0], "path": path}]).encode())
    assert (converted(source, tmp_path / "out") / "2_Dense" / "model.safetensors").is_file()


@pytest.mark.parametrize("file", ["modules.json", "tokenizer.json", "2_Dense/config.json", "chat_template.jinja"])
@pytest.mark.parametrize("compared", [True, False], ids=["with the source", "alone"])
def test_a_copied_file_that_is_gone_is_found(make_checkpoint, tmp_path, file, compared):
    """Without modules.json an embedding model gives other vectors, and no engine says so."""
    source = make_checkpoint()
    projector(source)
    out = converted(source, tmp_path / "out")
    (out / file).unlink()
    found = verify(out, source if compared else None, engine=False).findings
    assert any(problem.where in (file, str(Path(file).parent)) for problem in found) and len(found) <= 1 + compared


def test_leftovers_in_the_folder_of_a_module_stay(make_checkpoint, tmp_path):
    source = make_checkpoint()
    projector(source)
    leftovers = ["optimizer.pt", "onnx/model.onnx", "checkpoint-5/model.safetensors", "training_args.bin"]
    for file in leftovers:
        put(source, f"2_Dense/{file}")
    after = digests(converted(source, tmp_path / "out"))
    assert not after.keys() & {f"2_Dense/{file}" for file in leftovers} and "2_Dense/model.safetensors" in after


def test_a_transformer_in_a_folder_of_its_own(make_checkpoint, tmp_path):
    """vLLM wants it at the top. Converted alone it would lose the others, and that is said; the remedy keeps them."""
    around = tmp_path / "around"
    inner = make_checkpoint().rename(around.mkdir() or around / "0_Transformer")
    projector(around)
    entries = json.loads((around / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    put(around, "modules.json", json.dumps(entries).encode())
    code, message = run("convert", around, tmp_path / "out", "--method", "rtn")
    assert code == 2 and f"move what is in {inner} up into {around}, and set the path" in message
    code, message = run("convert", inner, tmp_path / "alone", "--method", "rtn")
    assert code == 0 and "one module of 3, and the others do not travel" in " ".join(message.split())
    for path in [*inner.iterdir()]:
        path.rename(around / path.name)
    entries[0]["path"] = ""
    put(around, "modules.json", json.dumps(entries).encode())
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors"} <= digests(converted(around, tmp_path / "out")).keys()


POINTERS = ("tokenizer.json", "2_Dense/model.safetensors", "config.json", "model.safetensors")


@pytest.mark.parametrize("file", POINTERS)
def test_pointers_of_git_lfs_are_no_files(make_checkpoint, tmp_path, file):
    source = make_checkpoint(sharded=False)
    projector(source)
    digest = "0" * 64
    put(source, file, f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 12345\n".encode())
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and f"{file}: a pointer of Git LFS, not the file; run git lfs pull in its clone" in message


@pytest.mark.parametrize("tokenizer", ["tekken.json", "tokenizer.model.v3"])
def test_what_makes_vllm_take_another_tokenizer_is_said(make_checkpoint, tmp_path, tokenizer):
    source = make_checkpoint("mistral")
    put(source, tokenizer)
    assert "mistral" not in run("convert", source, tmp_path / "first", "--method", "rtn")[1]
    put(source, "consolidated.safetensors", b"weights")
    code, message = run("convert", source, tmp_path / "second", "--method", "rtn")
    assert code == 0 and "give --tokenizer-mode mistral" in " ".join(message.split())


NAMED = {
    "tokenizer_config.json": ({"vocab_file": "words.dat"}, "words.dat"),
    "preprocessor_config.json": ({"mel_filters": "assets/mel.npz"}, "assets/mel.npz"),
    "processor_config.json": ({"voices": {"a": ["voices/a.bin"]}}, "voices/a.bin"),
    "generation_config.json": ({"grammar": "./grammar.ebnf"}, "grammar.ebnf"),
    "config_sentence_transformers.json": ({"prompts_file": "prompts.yaml"}, "prompts.yaml"),
}


@pytest.mark.parametrize("file", NAMED)
def test_files_that_a_json_names_travel(make_checkpoint, tmp_path, file):
    source, (value, named) = make_checkpoint(), NAMED[file]
    if not (source / file).exists():
        put(source, file)
    edit_json(source / file, lambda stored: stored.update(value))
    put(source, named, b"content")
    assert (converted(source, tmp_path / "out") / named).read_bytes() == b"content"


def test_a_named_copy_of_the_weights_does_not_travel(make_checkpoint, tmp_path):
    """vLLM would load every safetensors file at the top as a part of the model."""
    source = make_checkpoint(sharded=False)
    put(source, "model.fp16.safetensors", b"another")
    edit_json(source / "generation_config.json", lambda c: c.update(variant="model.fp16.safetensors"))
    assert not (converted(source, tmp_path / "out") / "model.fp16.safetensors").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_travels_where_a_config_says_that_there_is_some(make_checkpoint, tmp_path, file):
    source = make_checkpoint()
    for name in ("modeling_own.py", "parts/attention.py"):
        put(source, name, b"# code")
    assert "modeling_own.py" not in digests(converted(source, tmp_path / "without"))
    if not (source / file).exists():
        put(source, file)
    edit_json(source / file, lambda c: c.update(auto_map={"AutoModel": "modeling_own.OwnModel"}, more="x" * 2**21))
    after = digests(converted(source, tmp_path / "with"))
    assert {"modeling_own.py", "parts/attention.py"} <= after.keys()


@pytest.mark.parametrize("file", ["modules.json", "router_config.json"])
def test_code_of_modules_travels(make_checkpoint, tmp_path, file):
    source = make_checkpoint()
    put(source, "own.py", b"# code")
    value = {"modules": [{"type": "own.Module", "path": ""}]} if file == MODULES else {"types": {"a": "own.Module"}}
    put(source, file, json.dumps(value).encode())
    assert (converted(source, tmp_path / "out") / "own.py").is_file()


def test_folder_and_hub_agree(make_checkpoint, tmp_path, monkeypatch):
    source = make_checkpoint()
    projector(source)
    for file in [*LEFTOVERS, *USEFUL]:
        if not (source / file).exists():
            put(source, file)
    with serving({"org/name": source}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        from vllm_w8a8_bismooth.checkpoint.hub import Repository

        assert companions(Repository("org/name")) == companions(Folder(source))


def test_room_for_the_companions_is_counted(make_checkpoint, tmp_path, monkeypatch):
    source = make_checkpoint()
    put(source, "tokenizer.model", bytes(2**21))
    code, report = run("inspect", source, "--json")
    assert json.loads(report)["needs"]["data-free"]["disk_bytes"] > 2**21
