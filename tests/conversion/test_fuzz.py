"""Mutated checkpoints: converted or refused, but never a crash, and never half a result."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.command import run
from tests.support.damage import INDEX
from tests.support.models import tiny_model, write_checkpoint
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.reader import FLOAT_DTYPES, Checkpoint

EXAMPLES = int(os.environ.get("BISMOOTH_FUZZ", settings.default.max_examples * 2 // 5))
"""How many for each test: 40, in the profile ``quick`` 10; thousands take an hour."""


class Pairs(list):
    """A JSON object as its pairs, so that a key may occur twice."""


def parse(text: bytes) -> Any:
    return json.loads(text, object_pairs_hook=Pairs)


def dump(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in value) + "}"
    return "[" + ",".join(map(dump, value)) + "]" if isinstance(value, list) else json.dumps(value)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([-(2**63), 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**4200])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["BF16", "F16", "F32", "F8_E4M3", "I8", "F4", "\0", "a\nb", "../x", "x.safetensors"])
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.lists(st.tuples(st.text(max_size=5), inner), max_size=4).map(Pairs),
    max_leaves=6,
)


def places(value: Any) -> Iterator[tuple[list, int]]:
    """Every container inside a JSON value with every position in it."""
    if isinstance(value, list):
        for i in range(len(value)):
            yield value, i
            yield from places(value[i][1] if isinstance(value, Pairs) else value[i])


def mutate(value: Any, data: st.DataObject) -> None:
    """Change one thing somewhere in a JSON value."""
    container, i = data.draw(st.sampled_from(list(places(value))), label="place")
    key, old = container[i] if isinstance(container, Pairs) else (None, container[i])

    def put(at: int, new: Any) -> None:
        container.insert(at, (key, new) if isinstance(container, Pairs) else new)

    action = data.draw(st.sampled_from(["replace", "delete", "repeat", "nudge", "swap", "rename"]), label="action")
    if action == "rename" and key is not None:
        container[i] = (data.draw(st.text(max_size=8) | st.sampled_from([k for k, _ in container])), old)
    elif action == "swap":
        j = data.draw(st.integers(0, len(container) - 1))
        other = container[j][1] if isinstance(container, Pairs) else container[j]
        container[i] = (key, other) if isinstance(container, Pairs) else other
    elif action == "nudge" and type(old) is int:
        container.pop(i)
        put(i, data.draw(st.sampled_from([-old, old - 1, old + 1, old - 2, old + 2, 2 * old, old // 2, old + 2**32])))
    elif action == "repeat":
        put(data.draw(st.integers(0, len(container))), data.draw(st.just(old) | JUNK))
    elif action == "delete":
        container.pop(i)
    else:
        container.pop(i)
        put(i, data.draw(JUNK))


def with_header(shard: bytes, change) -> bytes:
    length = int.from_bytes(shard[:8], "little")
    header = change(shard[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + shard[8 + length :]


def mutated(content: bytes, is_shard: bool, data: st.DataObject) -> bytes:
    def change(text: bytes) -> bytes:
        value = parse(text)
        for _ in range(data.draw(st.integers(1, 3), label="changes")):
            if value:
                mutate(value, data)
        return dump(value).encode(errors="surrogatepass")

    return with_header(content, change) if is_shard else change(content)


def flipped(content: bytes, data: st.DataObject) -> bytes:
    """Random bytes among the first 3000."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, min(len(changed), 3000) - 1))] = data.draw(st.integers(0, 255))
    return bytes(changed)


class Sample(NamedTuple):
    folder: Path
    originals: dict[str, bytes]

    def __repr__(self) -> str:  # a failure need not show all the weights
        return f"Sample({self.folder})"


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def source(request, tmp_path_factory):
    """A checkpoint, and what its config, index and shards hold."""
    folder = tmp_path_factory.mktemp("fuzz") / "source"
    write_checkpoint(folder, tiny_model(request.param, num_hidden_layers=2))
    files = [p for p in folder.iterdir() if p.name in ("config.json", INDEX) or p.suffix == ".safetensors"]
    return Sample(folder, {p.name: p.read_bytes() for p in files})


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("the quick brown fox " * 20)
    return path


METHODS = [
    ["--method", "rtn"],
    ["--method", "bismooth"],
    ["--method", "mixed", "--group-size", "32"],
]


def assert_whole_or_absent(folder: Path, out: Path, options: list) -> None:
    code, message = run("convert", folder, out, *options)
    assert code in (0, 2), message
    assert out.exists() == (code == 0) and not out.with_name("out.partial").exists()
    if code == 0:
        json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"
        written, original = Checkpoint(out, dtypes=(*FLOAT_DTYPES, "I8")), Source(folder)
        linears = {f"model.layers.{i}.{n}.weight" for i, layer in enumerate(original.layers) for n in layer.linears}
        assert linears == {name for name, header in written.headers.items() if header.dtype == "I8"}
        assert written.headers.keys() == original.checkpoint.headers.keys() | {f"{name}_scale" for name in linears}
        for name, header in written.headers.items():
            if math.prod(header.shape):
                written.read(name)
    else:
        assert message.strip()


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_mutated_json(source, calibration, tmp_path_factory, data):
    folder, originals = source
    out = tmp_path_factory.mktemp("out") / "out"
    names = data.draw(st.lists(st.sampled_from(sorted(originals)), min_size=1, max_size=2, unique=True))
    options = data.draw(st.sampled_from([*METHODS, ["--calibration", calibration]]))
    try:
        for name in names:
            (folder / name).write_bytes(mutated(originals[name], name.endswith(".safetensors"), data))
        assert_whole_or_absent(folder, out, options)
    finally:
        for name in names:
            (folder / name).write_bytes(originals[name])


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_flipped_bytes(source, tmp_path_factory, data):
    folder, originals = source
    out = tmp_path_factory.mktemp("out") / "out"
    name = data.draw(st.sampled_from(sorted(originals)))
    try:
        (folder / name).write_bytes(flipped(originals[name], data))
        assert_whole_or_absent(folder, out, data.draw(st.sampled_from(METHODS)))
    finally:
        (folder / name).write_bytes(originals[name])


ITEM = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "F8_E4M3": 1}
DTYPES = st.sampled_from(["BF16", "F16", "F32"] * 3 + ["F64", "I8", "F8_E4M3"])
NAMES = st.text(max_size=6) | st.sampled_from(["model.layers.0.x", "model.layers.7.mlp.up_proj.weight", "é\n\0", "."])
FILLS = [bytes(8), b"\x01" * 8, b"\x7f" * 8, b"\x7b" * 8, b"\x00\x80" * 4]
"""Zeros, subnormals, the largest numbers of fp32 and bf16 (NaN in fp16), large ones, negative zeros."""


def read_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    checkpoint = Checkpoint(folder)
    return {
        name: (header.dtype, header.shape, checkpoint.read(name).view(-1).view(torch.uint8).numpy().tobytes())
        for name, header in checkpoint.headers.items()
    }


def write_tensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    entries, end = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        begin, end = end, end + len(content)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    contents = b"".join(content for _, _, content in tensors.values())
    path.write_bytes(len(header).to_bytes(8, "little") + header + contents)


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_mutated_tensors(source, calibration, tmp_path_factory, data):
    """Sound files with other tensors in them: other names, dtypes, shapes and extreme values."""
    folder, _ = source
    scratch = tmp_path_factory.mktemp("tensors")
    changed = scratch / "source"
    shutil.copytree(folder, changed, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = read_tensors(folder)
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        name = data.draw(st.sampled_from(sorted(tensors)))
        dtype, shape, content = tensors[name]
        match data.draw(st.sampled_from(["fill", "fill", "dtype", "shape", "name", "drop", "add"])):
            case "fill":
                pass
            case "dtype":
                dtype = data.draw(DTYPES)
            case "shape":
                shape = data.draw(st.permutations(shape) | st.lists(st.integers(0, 100), max_size=2))
            case "name":
                del tensors[name]
                name = data.draw(NAMES)
            case "drop":
                if len(tensors) > 1:
                    del tensors[name]
                continue
            case "add":
                name = data.draw(NAMES)
        fill = data.draw(st.sampled_from(FILLS))
        tensors[name] = (dtype, shape, (fill * math.prod(shape))[: ITEM[dtype] * math.prod(shape)])
    write_tensors(changed / "model.safetensors", tensors)
    options = data.draw(st.sampled_from([*METHODS, ["--calibration", calibration]]))
    assert_whole_or_absent(changed, scratch / "out", options)


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_mutated_config(source, calibration, tmp_path_factory, data):
    """In calibration, where transformers reads the whole of it."""
    folder, originals = source
    out = tmp_path_factory.mktemp("out") / "out"
    try:
        (folder / "config.json").write_bytes(mutated(originals["config.json"], False, data))
        assert_whole_or_absent(folder, out, ["--calibration", calibration, "--calibration-tokens", "64"])
    finally:
        (folder / "config.json").write_bytes(originals["config.json"])
