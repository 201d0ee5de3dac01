"""Checkpoints that are unusual and yet fit for conversion."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import emulate
from tests.support.command import run
from tests.support.contents import digests, tensors_of
from tests.support.damage import INDEX, config, edit_json, edit_shard
from tests.support.effort import calls
from tests.support.sweep import sweep
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.checkpoint.writer import ShardWriter
from vllm_w8a8_bismooth.model.names import Names
from vllm_w8a8_bismooth.verification import verify


def converted(source: Path, out: Path, *options) -> Path:
    code, message = run("convert", source, out, *(options or ("--method", "rtn")))
    assert code == 0, message
    return out


def test_hub_cache(make_checkpoint, tmp_path):
    """A snapshot whose files are links into a folder of blobs gives the same bytes as the files themselves."""
    source, snapshot, blobs = make_checkpoint(), tmp_path / "snapshots" / "main", tmp_path / "blobs"
    blobs.mkdir()
    for i, path in enumerate(p for p in sorted(source.rglob("*")) if p.is_file()):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / str(i))
        link.symlink_to(os.path.relpath(blobs / str(i), link.parent))
    out = converted(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    expected, found = digests(converted(source, tmp_path / "expected")), digests(out)
    differing = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
    assert differing == {"recipe.json", "README.md"}  # which say what the source was called


def test_links_of_other_kinds(make_checkpoint, tmp_path):
    """To a file elsewhere: copied. To a folder: not entered, even if it leads in a circle. Pipes are not read."""
    source = make_checkpoint()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "licence.txt").write_text("yours")
    (source / "licence.txt").symlink_to(tmp_path / "elsewhere" / "licence.txt")
    (source / "folder").symlink_to(tmp_path / "elsewhere")
    (source / "circle").symlink_to(source)
    (source / "device").symlink_to("/dev/zero")
    os.mkfifo(source / "pipe")
    out = converted(source, tmp_path / "out")
    assert (out / "licence.txt").read_text() == "yours" and not (out / "licence.txt").is_symlink()
    assert not {"folder", "circle", "device", "pipe"} & {path.name for path in out.iterdir()}


FLOATS = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = {
    "norms in fp32": lambda i, tensor: torch.float32 if tensor.dim() == 1 else torch.bfloat16,
    "head and embedding in fp32": lambda i, tensor: torch.float32 if len(tensor) == 160 else torch.float16,
    "embedding in fp16, blocks in bf16": lambda i, tensor: torch.float16 if len(tensor) == 160 else torch.bfloat16,
    "all mixed": lambda i, tensor: FLOATS[i % 3],
}


@pytest.mark.parametrize("model_type", sweep(["llama", "gemma2", "qwen2_moe"]))
@pytest.mark.parametrize("case", DTYPES)
def test_mixed_dtypes(make_checkpoint, tmp_path, calibration_text, case, model_type):
    """What is not quantized keeps its own dtype; accuracy does not depend on it."""
    source = make_checkpoint(model_type, torch.float32, sharded=False)
    shard = source / "model.safetensors"
    tensors = {name: t.to(DTYPES[case](i, t)) for i, (name, t) in enumerate(sorted(load_file(shard).items()))}
    save_file(tensors, shard, metadata={"format": "pt"})
    tokens = torch.randint(2, 160, (4, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = emulate.load(source)(tokens).logits
        # Compensation would fit the calibration's few letters; these tokens are any.
        smoothed = ("--calibration", calibration_text, "--rounding", "nearest")
        for name, options in (("rtn", ("--method", "rtn")), ("bismooth", smoothed)):
            out = converted(source, tmp_path / name, *options)
            written = tensors_of(out)
            kept = {n: t.dtype for n, t in written.items() if t.dtype != torch.int8 and not n.endswith("_scale")}
            assert kept == {n: tensors[n].dtype for n in kept} and len(written) == 2 * len(tensors) - len(kept)
            error = (emulate.load(out)(tokens).logits - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert error.median() < 0.03, name  # the median, for experts that are chosen by a hair


def test_tensors_of_odd_shapes_and_names(make_checkpoint, tmp_path):
    source = make_checkpoint(sharded=False)
    shard = source / "model.safetensors"
    odd = {
        "empty": torch.ones(0),
        "empty matrix": torch.ones(3, 0),
        "scalar": torch.tensor(2.0),
        "deep": torch.ones([1] * 40),
        "é\u202e\U0001f600 \n\0": torch.arange(3.0),
        "": torch.arange(5.0).half(),
        "a" * 5000: torch.ones(2),
        "other.weight_scale": torch.ones(2, 1),
    }
    save_file(load_file(shard) | odd, shard, metadata={"format": "pt"})
    written = tensors_of(converted(source, tmp_path / "out"))
    assert all(
        torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype for name, tensor in odd.items()
    )


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], values: dict[int, bytes]) -> None:
    """A safetensors file of bf16 zeros that takes no space, but for ``values``, at their places in the data."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        start = file.tell()
        for place, value in values.items():
            file.seek(start + place)
            file.write(value)
        file.truncate(start + end)


def test_offsets_beyond_32_bits(tmp_path):
    """Read and written behind 2 and 4 GiB of holes."""
    shapes = {Names().embedding: (2**21, 1024), "model.norm.weight": (1024,)}
    one = torch.ones(1, dtype=torch.bfloat16)
    marked = {2**31 - 2, 2**31, 2**32 - 2, 2**32 + 2046}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    write_sparse(
        source / "model.safetensors", shapes, dict.fromkeys(sorted(marked), one.view(torch.uint8).numpy().tobytes())
    )
    checkpoint = Checkpoint(source)
    found = {
        2048 * row + 2 * int(column)
        for row in (2**20 - 1, 2**20, 2**21 - 1)
        for column in checkpoint.rows(Names().embedding, row, 1)[0].nonzero()
    }
    norm = checkpoint.read("model.norm.weight")
    assert found | {2**32 + 2 * int(column) for column in norm.nonzero()} == marked and norm.sum() == 1

    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with ShardWriter(out, out, tensors) as writer:
        assert len(writer.files) == 1
        writer.add("model.norm.weight", norm)
        writer.add_rows(Names().embedding, 2**20, one.expand(1, 1024))
    written = Checkpoint(out)
    assert torch.equal(written.read("model.norm.weight"), norm)
    assert written.rows(Names().embedding, 2**20 - 1, 3).sum(dim=1).tolist() == [0, 1024, 0]


def write_blocks(folder: Path, blocks: int, shards: int) -> int:
    """A checkpoint of so many tiny blocks in at most so many shards; how many tensors it has."""
    folder.mkdir()
    sizes = dict(hidden_size=4, intermediate_size=6, num_attention_heads=2, num_key_value_heads=1, vocab_size=5)
    inside = {
        "input_layernorm": (4,), "post_attention_layernorm": (4,),
        "self_attn.q_proj": (4, 4), "self_attn.k_proj": (2, 4), "self_attn.v_proj": (2, 4), "self_attn.o_proj": (4, 4),
        "mlp.gate_proj": (6, 4), "mlp.up_proj": (6, 4), "mlp.down_proj": (4, 6),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(blocks) for name, shape in inside.items()}
    shapes |= {Names().embedding: (5, 4), "model.norm.weight": (4,), "lm_head.weight": (5, 4)}
    place = {name: f"model-{i % shards:05d}.safetensors" for i, name in enumerate(shapes)}
    files: dict[str, dict] = {}
    for name, file in place.items():
        files.setdefault(file, {})[name] = shapes[name]
    for file, names in files.items():
        write_sparse(folder / file, names, {})
    (folder / INDEX).write_text(json.dumps({"weight_map": place}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": blocks, **sizes}))
    return len(shapes)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 10_000])
def test_ten_thousand_tensors_are_as_much_work_each_as_a_thousand(tmp_path, shards):
    def effort(blocks: int) -> float:
        count = write_blocks(tmp_path / str(blocks), blocks, shards)
        assert len(Source(tmp_path / str(blocks)).checkpoint.headers) == count
        return calls(lambda: Source(tmp_path / str(blocks))) / count

    few, many = effort(100), effort(1000)
    assert 1 < many < 1.5 * few


def test_labels_without_number(make_checkpoint, tmp_path, calibration_text):
    """transformers would make up a name for each label of a classifier that there is not."""
    source = make_checkpoint()
    config(num_labels=10**12)(source)
    converted(source, tmp_path / "out", "--calibration", calibration_text)


def test_config_keys_of_later_transformers(make_checkpoint, tmp_path, calibration_text):
    """Keys that nobody knows are kept."""
    source = make_checkpoint()
    edit_json(source / "config.json", lambda c: c.update(invented={"deep": [1, None, {}]}))
    out = converted(source, tmp_path / "out", "--calibration", calibration_text)
    assert json.loads((out / "config.json").read_text())["invented"] == {"deep": [1, None, {}]}


_SCALED = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", **_SCALED},
    "yarn with its own attention factor": {"rope_type": "yarn", "attention_factor": 1.1, "beta_fast": 16.0, **_SCALED},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0] * 12, **_SCALED},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_SCALED},
}


@pytest.mark.parametrize("case", ROPES)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rotary_embeddings_of_every_kind(make_checkpoint, tmp_path, calibration_text, case, key):
    """Also as configs from before transformers 5 have it, which keep the base beside the rest."""
    source, stored = make_checkpoint(), dict(ROPES[case])

    def change(config: dict) -> None:
        config.pop("rope_parameters", None)
        if key == "rope_scaling":
            config["rope_theta"] = stored.pop("rope_theta")
            stored["type"] = stored.pop("rope_type")
        config[key] = stored

    edit_json(source / "config.json", change)
    out = converted(source, tmp_path / "out", "--calibration", calibration_text)
    assert json.loads((out / "config.json").read_text())[key] == stored
    assert verify(out, source, engine=False).ok


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_that_no_token_is_sent_to(make_checkpoint, tmp_path, calibration_text, model_type):
    """One token meets two of four experts in each block."""
    source = make_checkpoint(model_type)
    out = converted(source, tmp_path / "out", "--calibration", calibration_text, "--calibration-tokens", "1")
    assert verify(out, source, engine=False).ok


@pytest.mark.parametrize("value", [1e-37, 1e-40])
def test_rows_whose_scales_are_subnormal(make_checkpoint, tmp_path, value):
    """Dead neurons, after years of weight decay: sound, and verify says so."""
    source = make_checkpoint(dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    edit_shard(source, lambda tensors: tensors[name][5].fill_(value), name)
    assert verify(converted(source, tmp_path / "out"), source, engine=False).ok
