import json
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from vllm_w8a8_bismooth.checkpoint import INDEX
from vllm_w8a8_bismooth.writer import CheckpointWriter

SHAPES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    st.lists(st.integers(0, 20), min_size=1, max_size=2).map(tuple),
    min_size=1,
    max_size=12,
)


@given(shapes=SHAPES, shard_size=st.integers(50, 2000), data=st.data())
def test_shards_partition_the_tensors(tmp_path_factory, shapes, shard_size, data):
    """Whatever the sizes, the limit and the order: every tensor lies in exactly the shard that the index names."""
    tensors = {name: torch.randint(-128, 128, shape, dtype=torch.int8) for name, shape in shapes.items()}
    out = tmp_path_factory.mktemp("writer") / "out"
    with (
        patch("vllm_w8a8_bismooth.writer.SHARD_SIZE", shard_size),
        CheckpointWriter(out, {n: t.to("meta") for n, t in tensors.items()}) as writer,
    ):
        for name in data.draw(st.permutations(sorted(tensors))):
            writer.add(name, tensors[name])
        assert writer.commit() == sum(t.nbytes for t in tensors.values())
    files = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    found = [(file, name) for file, content in files.items() for name in content]
    assert sorted(name for _, name in found) == sorted(tensors)
    assert all(torch.equal(files[file][name], tensors[name]) for file, name in found)
    if len(files) > 1:
        assert json.loads((out / INDEX).read_text())["weight_map"] == {name: file for file, name in found}
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_without_commit(tmp_path, failure):
    with pytest.raises(failure), CheckpointWriter(tmp_path / "out", {"a": torch.ones(2, device="meta")}) as writer:
        writer.add("a", torch.ones(2))
        raise failure
    assert list(tmp_path.iterdir()) == []
