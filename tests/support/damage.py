"""Ways to damage a checkpoint, and what a refusal of each must say."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


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


def incomplete(damage):
    """The same damage to a checkpoint that lacks a shard; to a whole one it would do nothing."""

    def change(folder: Path) -> None:
        shard_of(folder).unlink()
        damage(folder)

    return change


CASES = {
    "missing tensor": (remove_tensor, [Q, "is missing", "download"]),
    "missing tensor, index agrees": (remove_tensor_everywhere, [Q, "[96, 64]", "is missing"]),
    "duplicate tensor": (duplicate_tensor, [Q, "places in model-0000", "duplicate"]),
    "absent shard": (lambda f: shard_of(f).unlink(), ["model-0000", "absent", "download the shard again"]),
    "index names a strange file": (index_to("../source/model.safetensors"), [Q, "'../source/", "not a shard"]),
    "index names a number": (index_to(7), [Q, "7", "not a shard"]),
    "no index, no weights": (drop("*.safetensors", INDEX), ["only safetensors"]),
    "index is no JSON": (incomplete(lambda f: (f / INDEX).write_text("{")), [INDEX, "not valid JSON"]),
    "index without map": (incomplete(lambda f: (f / INDEX).write_text("{}")), [INDEX, "no weight_map"]),
    "truncated": (truncate, ["model-0000", "truncated or corrupt", "download"]),
    "huge header": (oversized_header, ["model-0000", "truncated or corrupt", "download"]),
    "empty shard": (lambda f: shard_of(f).write_bytes(b""), ["model-0000", "truncated or corrupt"]),
    "NaN": (poison(float("nan")), [Q, "nan at [3, 5]", "repair"]),
    "infinity in the embedding": (
        poison(float("inf"), "model.embed_tokens.weight"),
        ["model.embed_tokens.weight", "inf at [3, 5]"],
    ),
    "values that no model has": (poison(3e38), [Q, "values beyond 1e19", "repair"]),
    "quantized, by config alone": (
        config(quantization_config={"quant_method": "gptq"}),
        ["'gptq'", "all weights are float", "remove quantization_config from config.json"],
    ),
    "quantized, by dtype": (
        lambda f: edit_shard(f, lambda t: t.update({Q: t[Q].to(torch.int8)})),
        [Q, "dtype I8", "already quantized"],
    ),
    "fp8": (
        lambda f: edit_shard(f, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})),
        [Q, "dtype F8_E4M3", "BF16"],
    ),
    "another architecture": (
        config(model_type="gpt2"),
        ["'gpt2'", "none of the tensors of such a model's blocks is in the files"],
    ),
    "architecture is no name": (config(model_type=["llama"]), ["['llama']", "names no type of model"]),
    "more blocks than tensors": (
        config(num_hidden_layers=10**12),
        ["config.json", "num_hidden_layers = 1000000000000 is beyond"],
    ),
    "one block more than there is": (
        config(num_hidden_layers=4),
        ["model.layers.3.*", "1 whole block is missing", "set num_hidden_layers to 3"],
    ),
    "fewer blocks than tensors": (
        config(num_hidden_layers=2),
        ["model.layers.2.*", "belong to no block", "set num_hidden_layers to 3"],
    ),
    "size is no number": (config(hidden_size="64"), ["hidden_size = '64'", "positive integer"]),
    "heads do not divide": (config(num_key_value_heads=3), ["num_attention_heads = 4", "num_key_value_heads = 3"]),
    "wrong shape": (config(intermediate_size=128), ["has shape [96, 64]", "config.json implies [128, 64]"]),
    "foreign tensor": (rename_tensor, ["model.layers.1.router.weight", "is not part of a llama model"]),
    "rotary table of no block": (
        add_tensor("model.layers.99.self_attn.rotary_emb.inv_freq", (12,)),
        ["layers.99", "belong to no block", "remove the tensors"],
    ),
    "rotary table of a strange block": (
        add_tensor("model.layers.00.self_attn.rotary_emb.inv_freq", (12,)),
        ["layers.00", "is not part of"],
    ),
    "bias that the config denies": (
        add_tensor("model.layers.0.self_attn.q_proj.bias", (96,)),
        ["self_attn.q_proj.bias", "is not part of", "mend config.json", "remove the tensor only if"],
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
    "index is a folder": (incomplete(instead(INDEX, Path.mkdir)), [INDEX, "not a regular file"]),
    "index is a pipe": (incomplete(instead(INDEX, os.mkfifo)), [INDEX, "not a regular file"]),
    "index is a link to nowhere": (incomplete(instead(INDEX, to_nowhere)), [INDEX, "not found"]),
    "shard is a folder": (lambda f: instead(shard_of(f).name, Path.mkdir)(f), ["model-0000", "absent"]),
    "shard is a pipe": (lambda f: instead(shard_of(f).name, os.mkfifo)(f), ["model-0000", "absent"]),
    "side file is a link to nowhere": (instead("tokenizer.json", to_nowhere), ["tokenizer.json", "leads nowhere"]),
    "side file is a link in a circle": (instead("vocab.txt", to_itself), ["vocab.txt", "leads nowhere"]),
    "index names a NUL": (index_to("a\0.safetensors"), [Q, r"'a\x00.safetensors'", "not a shard"]),
    "index names two lines": (index_to("a\n.safetensors"), [Q, r"'a\n.safetensors'", "not a shard"]),
    "index names a surrogate": (index_to("\ud800.safetensors"), [Q, r"'\ud800.safetensors'", "not a shard"]),
    "tensor twice in a header": (
        edit_header(lambda text: f'{{"{Q}": {json.dumps(json.loads(text)[Q])}, {text[1:]}'),
        ["model-0000", f"key '{Q}' occurs twice"],
    ),
    "key twice in the index": (
        incomplete(say_twice(INDEX, "weight_map")),
        [INDEX, "'weight_map' occurs twice", "mend it"],
    ),
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
    "huge width": (config(hidden_size=10**12), ["hidden_size = 1000000000000 is beyond"]),
    "huge vocabulary": (config(vocab_size=10**12), ["implies [1000000000000, 64]"]),
    "monstrous width": (
        config(num_attention_heads=10**4000, head_dim=10**4000),
        ["num_attention_heads = a larger number is beyond"],
    ),
}
