"""Matrices that are parts of other tensors, or transposed: read as if they were stored themselves."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_w8a8_bismooth.checkpoint import elements
from vllm_w8a8_bismooth.checkpoint.files import Checksum
from vllm_w8a8_bismooth.checkpoint.readahead import ReadAhead
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.checkpoint.writer import ShardWriter
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.model.layers import View

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def opened(folder: Path, tensors: dict[str, torch.Tensor], views: dict[str, View]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({"model_type": "views"}))
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    assert not checkpoint.show(views)
    return checkpoint


def numbered(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """Different values, as far as the dtype has so many."""
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


def experts(whole: tuple[int, int, int], parts: int, transposed: bool) -> dict[str, View]:
    """The matrices of a stack, each expert's rows in so many of them."""
    rows, columns = whole[:0:-1] if transposed else whole[1:]
    size = rows // parts
    return {
        f"experts.{e}.{part}.weight": View("stack", whole, (size, columns), e, part * size, transposed)
        for e in range(whole[0])
        for part in range(parts)
    }


def of(stack: torch.Tensor, view: View) -> torch.Tensor:
    slab = stack if view.expert is None else stack[view.expert]
    return (slab.T if view.transposed else slab)[view.start : view.start + view.shape[0]].contiguous()


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 24), st.integers(1, 24)),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_every_way_of_reading_gives_what_the_loaded_tensor_has(tmp_path_factory, whole, parts, transposed, dtype, data):
    size = (whole[0], whole[1], whole[2] * parts) if transposed else (whole[0], whole[1] * parts, whole[2])
    stack, views = numbered(*size, dtype=dtype), experts(size, parts, transposed)
    checkpoint = opened(tmp_path_factory.mktemp("views"), {"stack": stack, "other": numbered(3)}, views)
    assert list(checkpoint.headers) == ["other", *views] or list(checkpoint.headers) == [*views, "other"]
    assert sum(header.nbytes for header in checkpoint.headers.values()) == checkpoint.nbytes()
    name = data.draw(st.sampled_from(sorted(views)))
    expected = of(stack, views[name])
    assert checkpoint.headers[name].shape == expected.shape and checkpoint.stored_nbytes(name) == expected.nbytes
    digest = Checksum()
    assert torch.equal(checkpoint.read(name, digest), expected)
    assert digest.hexdigest() == checkpoint.digest(name)
    start = data.draw(st.integers(0, len(expected)))
    count = data.draw(st.integers(0, len(expected) - start))
    assert torch.equal(checkpoint.rows(name, start, count), expected[start : start + count])
    first = data.draw(st.integers(0, expected.numel()))
    more = data.draw(st.integers(0, expected.numel() - first))
    assert torch.equal(checkpoint._read(name, first, (more,)), expected.view(-1)[first : first + more])
    assert torch.equal(torch.cat(list(checkpoint.pieces(name))), expected.view(-1))
    with ReadAhead(checkpoint, list(views), 2**20) as ahead:
        for each in views:
            assert torch.equal(ahead.take(each), of(stack, views[each]))
            ahead.release(each)


def test_no_more_is_read_than_the_matrix(tmp_path, monkeypatch):
    stack = numbered(8, 64, 96)
    checkpoint = opened(tmp_path, {"stack": stack}, experts((8, 64, 96), 2, True))
    read = 0

    def counting(descriptor: int, buffers: list, offset: int, real=os.preadv) -> int:
        nonlocal read
        read += (got := real(descriptor, buffers, offset))
        return got

    monkeypatch.setattr(elements.os, "preadv", counting)
    checkpoint.read("experts.5.1.weight")
    assert read == 48 * 64 * 4
    checkpoint.rows("experts.5.1.weight", 7, 2)
    assert read == 50 * 64 * 4


def test_a_value_that_is_none_is_named_by_its_place_in_the_matrix(tmp_path):
    stack = numbered(2, 4, 6)
    stack[1, 2, 4] = torch.nan
    checkpoint = opened(tmp_path, {"stack": stack}, experts((2, 4, 6), 2, True))
    checkpoint.read("experts.1.0.weight")
    with pytest.raises(BismoothError, match=r"experts.1.1.weight: holds nan at \[1, 2\] \(1 such values\)"):
        checkpoint.read("experts.1.1.weight")


def test_a_stack_the_other_way_round(tmp_path):
    """As Qwen3-VL's publisher stores it, while transformers saves it as it has it in memory."""
    stack = numbered(2, 6, 4)
    views = experts((2, 6, 4), 2, False)
    checkpoint = opened(tmp_path, {"stack": stack.mT.contiguous()}, views)
    for name, view in views.items():
        assert torch.equal(checkpoint.read(name), of(stack, view))


def test_matrices_of_their_own_are_taken_as_they_are(tmp_path):
    views = experts((2, 6, 4), 1, True)
    apart = {name: numbered(*view.shape) for name, view in views.items()}
    checkpoint = opened(tmp_path, apart, views)
    assert not checkpoint.views
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in apart.items())


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"stack": numbered(2, 4, 7)}, r"stack: has shape \[2, 4, 7\], config.json implies \[2, 4, 6\]"),
        ({"stack": numbered(8, 6)}, r"stack: has shape \[8, 6\], config.json implies \[2, 4, 6\]"),
        (
            {"stack": numbered(2, 4, 6), "experts.1.0.weight": numbered(3, 4)},
            r"stack: holds experts.1.0.weight, which is stored beside it",
        ),
    ],
)
def test_what_does_not_fit(tmp_path, tensors, what):
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    (problem,) = checkpoint.show(experts((2, 4, 6), 2, True))
    assert re.fullmatch(what, f"{problem.where}: {problem.what}")
    assert checkpoint.lost | checkpoint.headers.keys() == experts((2, 4, 6), 2, True).keys()


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_written_transposed(tmp_path_factory, rows, columns, data):
    """Rows in any order make the same file as the transposed whole."""
    folder = tmp_path_factory.mktemp("out")
    matrix = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    tensors = {n: torch.empty(columns, rows, dtype=torch.int8, device="meta") for n in ("whole", "pieces")}
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows)))})
    pieces = data.draw(st.permutations(list(zip(cuts, cuts[1:], strict=False))))
    with ShardWriter(folder, folder, tensors, turned={"whole", "pieces"}) as writer:
        writer.add("whole", matrix)
        for start, stop in pieces:
            writer.add_rows("pieces", start, matrix[start:stop])
        writer.finish()
    (folder / "config.json").write_text("{}")
    written = Checkpoint(folder, dtypes=("I8",))
    assert torch.equal(written.read("whole"), matrix.T) and torch.equal(written.read("pieces"), matrix.T)
