"""Which files hold the weights: the index where it is right, what is whole where it is not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.command import run
from tests.support.contents import tensors_of
from tests.support.damage import INDEX
from tests.support.rename import in_files

SINGLE = "model.safetensors"
NUMBERED = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def source(make_checkpoint):
    return make_checkpoint(sharded=False)


def same(source, tmp_path, expected: dict[str, torch.Tensor], *parts: str) -> None:
    """Converts, says ``parts``, and writes the weights of the one file that there was before."""
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 0 and all(part in message for part in parts), message
    out = tensors_of(tmp_path / "out")
    assert out.keys() == expected.keys() and all(torch.equal(out[name], expected[name]) for name in out)


@pytest.fixture
def expected(source, tmp_path):
    code, message = run("convert", source, tmp_path / "first", "--method", "rtn")
    assert code == 0, message
    return tensors_of(tmp_path / "first")


FILES = {
    "one of one": ["model-00001-of-00001.safetensors"],
    "numbered": NUMBERED,
    "six digits": ["model-000001-of-000002.safetensors", "model-000002-of-000002.safetensors"],
    "another stem": ["pytorch_model-00001-of-00001.safetensors"],
    "another name": ["weights.safetensors"],
}


@pytest.mark.parametrize("case", FILES)
def test_without_an_index(source, tmp_path, expected, case):
    in_files(source, FILES[case])
    same(source, tmp_path, expected, f"there is no {INDEX}", FILES[case][0])


def test_a_shard_less_without_an_index(source, tmp_path):
    in_files(source, NUMBERED)
    (source / NUMBERED[1]).unlink()
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and f"{NUMBERED[1]}: absent; download the shard again" in message


def test_two_models_in_one_folder(source, tmp_path, expected):
    in_files(source, NUMBERED)
    (source / "other.safetensors").write_bytes((source / NUMBERED[0]).read_bytes())
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "several models' weights" in message and "leave only the files of one" in message
    (source / "other.safetensors").unlink()
    same(source, tmp_path, expected)


def test_a_shard_of_another_set(source, tmp_path, expected):
    """No file is the whole model, so that none is to be called so."""
    in_files(source, NUMBERED)
    stray = source / "model-00001-of-00009.safetensors"
    stray.write_bytes((source / NUMBERED[0]).read_bytes())
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "leave only the files of one" in message and "the name model.safetensors" not in message
    stray.unlink()
    same(source, tmp_path, expected)


BROWSERS = ["{} (1).safetensors", "{}(1).safetensors", "{} - Copy.safetensors", "{}_1.safetensors"]
BROWSERS += ["Copy of {}.safetensors"]


@pytest.mark.parametrize("name", BROWSERS)
@pytest.mark.parametrize("index", [False, True], ids=["no index", "index"])
def test_a_shard_under_the_name_that_a_browser_gave_it(source, tmp_path, expected, name, index):
    """No pattern is shown as if it were a file, and nothing is to be removed."""
    in_files(source, NUMBERED, index)
    stray = name.format(NUMBERED[1].removesuffix(".safetensors"))
    (source / NUMBERED[1]).rename(source / stray)
    for verb in (("convert", source, tmp_path / "out", "--method", "rtn"), ("inspect", source, "--json")):
        code, message = run(*verb)
        assert code == 2 and f"rename {stray} to {NUMBERED[1]}" in message and "model-of-" not in message, message
        assert "shard 2 of 3 is absent" in message and "leave only" not in message and "again" not in message
    (source / stray).rename(source / NUMBERED[1])
    same(source, tmp_path, expected)


def test_a_shard_twice(source, tmp_path, expected):
    in_files(source, NUMBERED)
    stray = "model-00002-of-00003 (1).safetensors"
    (source / stray).write_bytes((source / NUMBERED[1]).read_bytes())
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and f"{stray} looks like a second copy" in message and f"move {stray} out" in message
    (source / stray).unlink()
    same(source, tmp_path, expected)


def test_files_are_called_by_their_names(source, tmp_path):
    in_files(source, NUMBERED)
    (source / "model-fp32.safetensors").write_bytes((source / NUMBERED[0]).read_bytes())
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and f"({NUMBERED[0]} to {NUMBERED[2]}, model-fp32.safetensors)" in message


HEADS = {"lm_head.weight": "lm_head.safetensors", "model.norm.weight": "norm.safetensors"}


@pytest.mark.parametrize("tensor", [*HEADS, "model.layers.2."])
@pytest.mark.parametrize("index", [False, True], ids=["no index", "index"])
def test_what_is_missing_lies_in_another_file(source, tmp_path, tensor, index):
    file = HEADS.get(tensor, "more.safetensors")
    tensors = load_file(source / SINGLE)
    apart = {name: tensors.pop(name) for name in [*tensors] if name.startswith(tensor)}
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    save_file(apart, source / file, metadata={"format": "pt"})
    if index:
        (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, SINGLE)}))
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and f"in what is read, and {file} holds it; " in message and "also:" not in message, message
    code, message = run("inspect", source)
    assert code == 2 and f"{file} holds it" in " ".join(message.split())
    assert file not in message.partition("Left out")[2].partition("\n")[0]


def test_another_copy_of_the_model_is_no_part_of_it(source, tmp_path):
    (source / "model.fp16.safetensors").write_bytes((source / SINGLE).read_bytes())
    tensors = load_file(source / SINGLE)
    del tensors["lm_head.weight"]
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "download the checkpoint again" in message and "fp16" not in message


def test_one_tensor_in_two_files(source, tmp_path):
    in_files(source, NUMBERED[:1] + NUMBERED[2:])
    (source / NUMBERED[1]).write_bytes((source / NUMBERED[0]).read_bytes())
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and f"which {NUMBERED[0]} holds too" in message


@pytest.mark.parametrize("beside", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_files_that_are_not_the_model(source, tmp_path, expected, beside):
    in_files(source, ["weights.safetensors"])
    (source / beside).write_bytes(b"something else")
    same(source, tmp_path, expected, beside)


STALE = {
    "shards that are gone": json.dumps({"weight_map": {"model.norm.weight": NUMBERED[0]}}),
    "no JSON": "{",
    "no map": "{}",
    "a strange file": json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}),
}


@pytest.mark.parametrize("case", STALE)
@pytest.mark.parametrize("files", [[SINGLE], NUMBERED], ids=["one file", "shards"])
def test_a_stale_index_beside_what_is_whole(source, tmp_path, expected, case, files):
    if case == "shards that are gone" and files == NUMBERED:
        pytest.skip("then they are not whole")
    in_files(source, files)
    (source / INDEX).write_text(STALE[case])
    same(source, tmp_path, expected, f"{INDEX} ", "it is stale", files[0])


def test_an_index_that_is_right_goes_before_one_file(source, tmp_path, expected):
    """As in vLLM, which reads what the index names."""
    whole = (source / SINGLE).read_bytes()
    in_files(source, NUMBERED, index=True)
    (source / SINGLE).write_bytes(whole[: len(whole) // 2])
    same(source, tmp_path, expected, f"({SINGLE}")


@pytest.mark.parametrize("place", ["inner", "snapshots/0123456789abcdef", "checkpoint-500"])
def test_the_folder_around_the_model(source, tmp_path, place):
    """A Hub cache's folder, a trainer's output: the remedy names the folder that is meant."""
    (tmp_path / "around" / place).parent.mkdir(parents=True)
    inner = source.rename(tmp_path / "around" / place)
    code, message = run("convert", tmp_path / "around", tmp_path / "out", "--method", "rtn")
    assert code == 2 and f"around/config.json: not found; give {inner}, which holds one" in message


def test_pickles_alone(source, tmp_path):
    (source / SINGLE).unlink()
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "pytorch_model.bin is a pickle" in message and "model.save_pretrained(FOLDER)" in message


def test_an_index_that_writes_its_paths_otherwise(source, tmp_path, expected):
    in_files(source, NUMBERED, index=True)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] = {name: f"./{file}" for name, file in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps(index))
    same(source, tmp_path, expected)
    assert "stale" not in run("inspect", source)[1]


def test_an_index_that_names_tables_which_no_file_holds(source, tmp_path, expected):
    """Older versions of transformers stored rotary tables; every reader computes them."""
    in_files(source, NUMBERED, index=True)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = NUMBERED[0]
    (source / INDEX).write_text(json.dumps(index))
    same(source, tmp_path, expected, "which no file holds")
