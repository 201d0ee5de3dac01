import json
import os
import threading
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.disk import Failing
from vllm_w8a8_bismooth.checkpoint.files import INDEX, sha256
from vllm_w8a8_bismooth.checkpoint.journal import Journal
from vllm_w8a8_bismooth.checkpoint.writer import ShardWriter
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted

DTYPES = (torch.int8, torch.float32, torch.bfloat16, torch.float16)
TENSORS = st.dictionaries(
    st.text('abc.\u00e9"', min_size=1, max_size=6),
    st.tuples(st.lists(st.integers(0, 20), min_size=1, max_size=2).map(tuple), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=12,
).map(lambda shapes: {name: torch.randint(-128, 128, shape).to(dtype) for name, (shape, dtype) in shapes.items()})


@given(tensors=TENSORS, shard_size=st.integers(50, 2000), data=st.data())
def test_shards_partition_the_tensors(tmp_path_factory, tensors, shard_size, data):
    """Whatever the sizes, the limit and the order: every tensor lies in exactly the shard that the index names, and
    the bytes are those that safetensors would have written."""
    out = tmp_path_factory.mktemp("writer")
    meta = {n: t.to("meta") for n, t in tensors.items()}
    with patch("vllm_w8a8_bismooth.checkpoint.writer.SHARD_SIZE", shard_size), ShardWriter(out, out, meta) as writer:
        for name in data.draw(st.permutations(sorted(tensors))):
            tensor = tensors[name]
            if tensor.dim() == 2 and len(tensor) and data.draw(st.booleans()):
                cut = data.draw(st.integers(0, len(tensor)))
                writer.add_rows(name, cut, tensor[cut:])
                writer.add_rows(name, 0, tensor[:cut])
            else:
                writer.add(name, tensor)
        digests = writer.finish()
    assert writer.nbytes == sum(t.nbytes for t in tensors.values())
    assert digests == {path.name: sha256(path) for path in out.glob("*.safetensors")}
    found = {}
    for file, names in writer.files.items():
        content = load_file(out / file)
        assert content.keys() == set(names) and not content.keys() & found.keys()
        found |= content
        save_file(content, out / "expected", metadata={"format": "pt"})
        assert (out / file).read_bytes() == (out / "expected").read_bytes()
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    if len(digests) > 1:
        expected = {name: file for file, names in writer.files.items() for name in names}
        assert json.loads((out / INDEX).read_text())["weight_map"] == expected


def test_an_error_of_the_disk_is_reported_by_the_next_call(tmp_path):
    writer = ShardWriter(tmp_path / "gone", tmp_path / "out", {"a": torch.ones(2, device="meta")})
    with pytest.raises(Interrupted, match="out: cannot be written .*No such file.*goes on where it stopped"), writer:
        writer.add("a", torch.ones(2))
        writer.finish()


def test_nothing_is_done_behind_a_flush_that_failed(tmp_path, monkeypatch):
    """A block that is not safe on disk must not be followed by one that is marked as done, or a state that is gone."""
    done, begun = [], threading.Event()
    fdatasync, calls = os.fdatasync, []

    def failing(descriptor):
        begun.wait()
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", failing)
    writer = ShardWriter(tmp_path, tmp_path / "out", {"a": torch.ones(2, device="meta")})
    with pytest.raises(Interrupted, match="Input/output error"), writer:
        writer.add("a", torch.ones(2))
        for action in (1, 2):
            writer.then(partial(done.append, action))
        begun.set()
        writer.finish()
    assert done == []


@pytest.mark.parametrize(
    ("failure", "kept"), [(BismoothError, False), (Interrupted, True), (ValueError, True), (KeyboardInterrupt, True)]
)
def test_what_is_left_of_a_failed_run(tmp_path, failure, kept):
    with pytest.raises(failure), Journal(tmp_path / "out", {"a": 1}) as journal:
        journal.finish("unit", {"value": 0.1})
        raise failure
    assert (tmp_path / "out.partial").exists() == kept and not (tmp_path / "out").exists()
    with Journal(tmp_path / "out", {"a": 1}) as journal:
        assert journal.record("unit") == ({"value": 0.1} if kept else None)
        assert journal.record("other") is None


def test_states_are_kept_bit_for_bit(tmp_path):
    tensors = {"hidden": torch.randn(3, 4).bfloat16(), "site": torch.randn(5)}
    with pytest.raises(Interrupted), Journal(tmp_path / "out", {}) as journal:
        journal.keep("unit", tensors)
        raise Interrupted
    with Journal(tmp_path / "out", {}) as journal:
        found = journal.state("unit")
        assert all(torch.equal(found[name], tensors[name]) for name in tensors) and journal.state("none") is None
        journal.forget("unit")
        journal.forget("unit")
        assert journal.state("unit") is None
        journal.commit()
    assert list((tmp_path / "out").iterdir()) == [] and not (tmp_path / "out.partial").exists()


def test_a_record_that_a_power_cut_spoilt_counts_as_missing(tmp_path):
    with pytest.raises(Interrupted), Journal(tmp_path / "out", {}) as journal:
        journal.finish("unit", 1)
        raise Interrupted
    (tmp_path / "out.partial" / ".bismooth" / "unit.json").write_bytes(b"\0\0")
    with Journal(tmp_path / "out", {}) as journal:
        assert journal.record("unit") is None


def test_another_run_is_refused_with_the_differences(tmp_path):
    with pytest.raises(Interrupted), Journal(tmp_path / "out", {"recipe": {"alpha": 0.5, "x": 1}}):
        raise Interrupted
    with pytest.raises(BismoothError, match=r"recipe.alpha: 0.5 there, 0.7 now\); finish that one"):
        Journal(tmp_path / "out", {"recipe": {"alpha": 0.7, "x": 1}}).__enter__()
    assert (tmp_path / "out.partial").exists()


def test_a_shard_whose_header_was_refused_is_laid_out_again(tmp_path, monkeypatch):
    """By whichever thread comes next: it must not take the shard for one that is there."""
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    with ShardWriter(tmp_path, tmp_path, {n: t.to("meta") for n, t in tensors.items()}) as writer:
        with monkeypatch.context() as disk:
            Failing(disk, 1, once=True)
            with pytest.raises(Interrupted):
                writer.add("a", tensors["a"])
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        (file,) = writer.finish()
    found = load_file(tmp_path / file)
    assert found.keys() == tensors.keys() and all(found[n].equal(t) for n, t in tensors.items())
