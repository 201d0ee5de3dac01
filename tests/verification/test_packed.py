"""Checkpoints of packed rows are checked like the INT8 that they stand for."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import packed
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.models import tiny_model, write_checkpoint
from tests.support.packed import change
from vllm_w8a8_bismooth import fourbits
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.serving.guard import check_files
from vllm_w8a8_bismooth.verification import verify

BLOCK = "model.layers.1."
Q, K, V, DOWN = (f"{BLOCK}{name}_proj.weight" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down"))
NORM, HEAD = f"{BLOCK}input_layernorm.weight", "lm_head.weight"
RECIPE = replace(Recipe.of("bismooth", calibration_tokens=200, head="int8"), rounding="nearest")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A source, and its conversion with packed rows."""
    folder = tmp_path_factory.mktemp("packed")
    source = write_checkpoint(folder / "source", tiny_model("llama", tie_word_embeddings=False))
    text = folder / "text.txt"
    text.write_text("".join(chr(97 + (i * i) % 26) for i in range(3000)))
    convert(source, folder / "out", RECIPE, read_text(text))
    packed.store(folder / "out", folder / "packed", folder / "plain")
    return source, folder / "packed"


def test_it_is_clean(pair):
    source, out = pair
    found = verify(out, source, engine=False)
    assert found.ok and not found.notes, found.findings
    assert len(found.linears) == 3 * 7 + 1
    # Four bits leave 20 dB of a uniform matrix, eight 45.
    assert all(15 < entry["sqnr"] < 45 for name, entry in found.linears.items() if name != "lm_head")
    assert verify(out, engine=False).ok


@pytest.mark.engine
def test_vllm_reads_it(pair):
    """With the plugin, the only one that does."""
    found = verify(pair[1])
    assert found.ok and not any("vLLM" in note for note in found.notes), found.findings + found.notes


def put(name: str, place, value: float) -> Callable[[Path], None]:
    return change(lambda tensors: tensors[name].__setitem__(place, value))


def in_codes(name: str, action: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change what the parts of a weight of four bits alone stand for."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        none = torch.tensor([], dtype=torch.int32)
        parts = [tensors[f"{name}_{part}"] for part in ("packed", "multiplier", "offset")]
        rows = fourbits.Rows(*parts, none, torch.empty(0, parts[0].shape[1], dtype=torch.uint8))
        tensors |= packed.parts(name, fourbits.pack(action(rows.codes()).contiguous(), none, packed.GROUP))

    return change(edit)


def as_it_is(name: str) -> Callable[[Path], None]:
    """Store a packed weight as plain INT8."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        parts = {part: tensors.pop(f"{name}_{part}") for part in fourbits.DTYPES}
        tensors[name] = fourbits.Rows(**parts).codes()

    return change(edit)


def packed_head(tensors: dict[str, torch.Tensor]) -> None:
    codes = tensors.pop(HEAD)
    tensors |= packed.parts(HEAD, fourbits.pack(codes, torch.arange(len(codes)), packed.GROUP))


def quantization(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda c: c["quantization_config"].update(changes))


ALONE = {
    "multiplier 0": (put(f"{Q}_multiplier", (3, 1), 0), [f"{Q}_multiplier: holds a multiplier of 0 at [3, 1]"]),
    "codes beyond 127": (put(f"{Q}_offset", 3, 127), [f"{Q}_packed: row 3 has codes beyond -127 to 127"]),
    "rows that are none": (put(f"{Q}_rows", 0, 99), [f"{Q}_rows: holds 99 at [0], which are not ascending"]),
    "all codes zero": (in_codes(K, lambda codes: codes * 0), [f"{K}: has no code but 0"]),
    "a scale of 0": (put(f"{Q}_scale", (2, 0), 0), [f"{Q}_scale: holds scales that are not between", "0.0 at [2, 0]"]),
    "an offset gone": (change(lambda tensors: tensors.pop(f"{Q}_offset")), [f"{Q}_offset: is missing"]),
    "not packed": (as_it_is(Q), [f"{Q}: is stored as INT8, and by config.json in rows of four and eight bits"]),
    "a packed head": (change(packed_head), [f"{HEAD}: is stored in rows of four and eight bits, as no experts, heads"]),
    "the format of plain INT8": (
        quantization(format="int-quantized"),
        ["format is 'int-quantized', and w8a8_bismooth"],
    ),
    "the method of others": (
        quantization(quant_method="gptq", format="x"),
        ["quant_method is 'gptq', not 'compressed"],
    ),
    "no rows": (quantization(bismooth={"version": "1", "method": "rtn"}), ["bismooth.rows is None; its group_size"]),
}
BESIDE_THE_SOURCE = {
    "rows swapped": (in_codes(K, lambda t: t.flip(0)), [f"{K[:-7]}: 48 of 48 rows in four bits", "are no rounding"]),
    "columns swapped": (
        in_codes(K, lambda t: t.flip(1)),
        [f"{K[:-7]}: ", " of 64 columns in four bits", "no rounding"],
    ),
    "one row swapped": (
        in_codes(K, lambda t: torch.cat([t[:5], t[6:7], t[6:]])),
        [f"{K[:-7]}: 1 of 48 rows in four bits (number 5) are no rounding of the source's"],
    ),
    "rows doubled": (change(lambda t: t[f"{K}_scale"].mul_(2)), [f"{K[:-7]}: 44 of 48 rows in four bits"]),
    "norm changed": (put(NORM, 4, 3.0), ["block 1, norm->qkv", "do not cancel", "number 4"]),
    "v doubled": (change(lambda t: t[f"{V}_scale"].mul_(2)), ["block 1, v->o", "do not cancel"]),
}


@pytest.mark.parametrize("fault", [*ALONE, *BESIDE_THE_SOURCE])
def test_faults_are_found_and_named(pair, tmp_path, fault):
    damage, expected = (ALONE | BESIDE_THE_SOURCE)[fault]
    shutil.copytree(pair[1], tmp_path / "out")
    (tmp_path / "out" / "report.json").unlink()
    damage(tmp_path / "out")
    found = verify(tmp_path / "out", pair[0] if fault in BESIDE_THE_SOURCE else None, engine=False)
    said = [str(finding) for finding in found.findings]
    assert any(all(words in line for words in expected) for line in said), said
    if fault in ALONE and fault != "the method of others":  # in which the parts of rows mean nothing
        assert len(said) == 1


@pytest.mark.parametrize("fault", ["multiplier 0", "codes beyond 127", "rows that are none"])
def test_what_stands_for_no_codes_is_not_compared(pair, tmp_path, fault):
    """It is said as without the source, and all else is compared."""
    damage, expected = ALONE[fault]
    shutil.copytree(pair[1], tmp_path / "out")
    (tmp_path / "out" / "report.json").unlink()
    damage(tmp_path / "out")
    put(NORM, 4, 3.0)(tmp_path / "out")
    said = [str(finding) for finding in verify(tmp_path / "out", pair[0], engine=False).findings]
    assert any(all(words in line for words in expected) for line in said), said
    assert any("computes another function" in line for line in said), said


def test_experts_are_not_packed(tmp_path):
    """Beside packed linears they are INT8 as it is."""
    name = f"{BLOCK}block_sparse_moe.experts.2.w1.weight"
    source = write_checkpoint(tmp_path / "source", tiny_model("mixtral"))
    convert(source, tmp_path / "out", Recipe.of("rtn"))
    packed.store(tmp_path / "out", tmp_path / "packed", tmp_path / "plain")
    assert verify(tmp_path / "packed", source, engine=False).ok
    check_files(tmp_path / "packed")

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        codes = tensors.pop(name)
        tensors |= packed.parts(name, fourbits.pack(codes, torch.arange(len(codes)), packed.GROUP))

    (tmp_path / "packed" / "report.json").unlink()
    change(pack)(tmp_path / "packed")
    (finding,) = verify(tmp_path / "packed", engine=False).findings
    assert str(finding).startswith(f"{name}: is stored in rows of four and eight bits, as no experts")
    with pytest.raises(ValueError, match=f"{name}: has rows of four bits, and experts are served in INT8 alone"):
        check_files(tmp_path / "packed")
