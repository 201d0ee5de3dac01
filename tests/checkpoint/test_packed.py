"""Packed INT8 rows are read as the INT8 that they stand for, and what does not fit is named."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import packed
from tests.support.contents import tensors_of
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.models import tiny_model, write_checkpoint
from tests.support.packed import change
from vllm_w8a8_bismooth.checkpoint.files import Folder
from vllm_w8a8_bismooth.checkpoint.layout import Layout, Source
from vllm_w8a8_bismooth.checkpoint.reader import FLOAT_DTYPES, Checkpoint, Headers
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.recipe import Recipe

Q = "model.layers.1.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"
INT8 = (*FLOAT_DTYPES, "I8")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A conversion, packed and as plain INT8."""
    folder = tmp_path_factory.mktemp("packed")
    convert(write_checkpoint(folder / "source", tiny_model("llama")), folder / "out", Recipe.of("rtn", head="int8"))
    packed.store(folder / "out", folder / "packed", folder / "plain")
    return folder / "packed", folder / "plain"


def test_it_is_shown_as_int8(pair):
    small, plain = (Checkpoint(folder, dtypes=INT8) for folder in pair)
    assert small.headers.keys() == plain.headers.keys()
    for name, header in plain.headers.items():
        shown = small.headers[name]
        assert (shown.shape, shown.dtype, shown.nbytes) == (header.shape, header.dtype, header.nbytes)
        whole = plain.read(name)
        assert torch.equal(small.read(name), whole)
        assert torch.equal(torch.cat([*small.pieces(name)]), whole.view(-1))
        for start in range(0, len(whole), 7):
            count = min(7, len(whole) - start)
            assert torch.equal(small.rows(name, start, count), whole[start : start + count])
    assert 0 < small.nbytes() < plain.nbytes() and small.quantized is None
    files = tensors_of(pair[0])
    assert sum(map(small.stored_nbytes, small.headers)) == sum(tensor.nbytes for tensor in files.values())
    assert f"{K}_packed" in files and f"{K}_rows" not in files and f"{Q}_rows" in files


def test_it_is_no_source(pair):
    """As plain INT8 is none."""
    for folder, method in zip(pair, ("w8a8_bismooth", "compressed-tensors"), strict=True):
        with pytest.raises(BismoothError, match=r"weight: has dtype I8 in .* \(and 21 more\): already quantized"):
            Source(folder)
        with pytest.raises(BismoothError, match=f"already quantized .*quant_method = '{method}'"):
            Layout(Headers(Folder.of(folder), dtypes=INT8))


def put(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return change(lambda tensors: tensors.update({Q + part: make(tensors[Q + part]).contiguous()}))


def drop(part: str) -> Callable[[Path], None]:
    return change(lambda tensors: tensors.pop(Q + part))


def rows_of(value: object) -> Callable[[Path], None]:
    def say(config: dict) -> None:
        config["quantization_config"]["bismooth"]["rows"] = value

    return lambda folder: edit_json(folder / "config.json", say)


IN_HEADERS = {
    "no packed": (drop("_packed"), f"{Q}_packed: is missing"),
    "no multiplier": (drop("_multiplier"), f"{Q}_multiplier: is missing"),
    "no offset": (drop("_offset"), f"{Q}_offset: is missing"),
    "no rows": (drop("_rows"), f"{Q}_rows: is missing"),
    "no low": (drop("_low"), f"{Q}_low: is missing"),
    "packed of another dtype": (put("_packed", torch.Tensor.char), f"{Q}_packed: is I8 [96, 32]; packed rows are U8"),
    "packed of one dimension": (put("_packed", torch.Tensor.flatten), f"{Q}_packed: is U8 [3072]; packed rows are U8"),
    "multiplier of another dtype": (
        put("_multiplier", torch.Tensor.char),
        f"{Q}_multiplier: is I8 [96, 2], and the parts beside it imply U8 [96, 2]",
    ),
    "multiplier of another shape": (
        put("_multiplier", lambda t: t[:, :1]),
        f"{Q}_multiplier: is U8 [96, 1], and the parts beside it imply U8 [96, 2]",
    ),
    "offset of another dtype": (
        put("_offset", torch.Tensor.byte),
        f"{Q}_offset: is U8 [96, 2], and the parts beside it imply I8 [96, 2]",
    ),
    "rows of another dtype": (
        put("_rows", torch.Tensor.long),
        f"{Q}_rows: is I64 [20]; it numbers some of 96 rows in I32",
    ),
    "more rows than there are": (
        put("_rows", lambda t: torch.arange(97, dtype=torch.int32)),
        f"{Q}_rows: is I32 [97]; it numbers some of 96 rows in I32",
    ),
    "fewer low than rows": (
        put("_low", lambda t: t[:-1]),
        f"{Q}_low: is U8 [19, 32], and the parts beside it imply U8 [20, 32]",
    ),
    "stored as it is, too": (
        change(lambda tensors: tensors.update({Q: torch.ones(96, 64, dtype=torch.int8)})),
        f"{Q}: is stored as it is, and packed in {Q}_packed",
    ),
    "another group size": (
        rows_of({"bits": 4.5, "group_size": 64}),
        f"{'model.layers.0.mlp.down_proj.weight'}_packed: has K = 96, which is not a multiple of group_size = 64",
    ),
    "no rows in the config": (rows_of(None), "config.json: quantization_config: bismooth.rows is None; its group_size"),
    "no such group size": (rows_of({"bits": 4.5, "group_size": 48}), "its group_size must be one of 32, 64, 128"),
    "no group size": (rows_of({"bits": 4.5, "group_size": True}), "its group_size must be one of 32, 64, 128"),
    "no such bits": (rows_of({"bits": 3, "group_size": 32}), "its bits must be a number from 4 to 8"),
    "bits that are none": (rows_of({"bits": math.nan, "group_size": 32}), "its bits must be a number from 4 to 8"),
}
IN_VALUES = {
    "multiplier 0": (
        put("_multiplier", lambda t: t.index_put((torch.tensor(70), torch.tensor(1)), t.new_zeros(()))),
        f"{Q}_multiplier: holds a multiplier of 0 at [70, 1]",
    ),
    "rows not ascending": (put("_rows", lambda t: t.flip(0)), f"{Q}_rows: holds 90 at [1], which are not ascending"),
    "rows twice": (put("_rows", lambda t: t * 0 + 5), f"{Q}_rows: holds 5 at [1], which are not ascending numbers"),
    "rows beyond the last": (put("_rows", lambda t: t + 1), f"{Q}_rows: holds 96 at [19], which are not ascending"),
    "rows before the first": (put("_rows", lambda t: t - 1), f"{Q}_rows: holds -1 at [0], which are not ascending"),
    "codes beyond 127": (
        put("_offset", lambda t: t.index_fill(0, torch.tensor(71), 127)),
        f"{Q}_packed: row 71 has codes beyond -127 to 127",
    ),
}


@pytest.mark.parametrize("fault", [*IN_HEADERS, *IN_VALUES])
def test_what_does_not_fit_is_one_problem(pair, tmp_path, fault):
    damage, expected = (IN_HEADERS | IN_VALUES)[fault]
    folder = tmp_path / "damaged"
    shutil.copytree(pair[0], folder)
    damage(folder)
    with pytest.raises(BismoothError) as refusal:
        checkpoint = Checkpoint(folder, dtypes=INT8)
        assert fault not in IN_HEADERS
        checkpoint.rows(Q, 64, 20)
    (problem,) = refusal.value.problems
    assert expected in str(problem)
