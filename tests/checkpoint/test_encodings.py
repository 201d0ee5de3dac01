"""What FP8 and MXFP4 stand for, beside plain loops and the libraries' own dequantization."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.support.damage import edit_json
from tests.support.quantized import FORMATS, Format, quantize, store
from vllm_w8a8_bismooth.checkpoint import encodings, reader
from vllm_w8a8_bismooth.checkpoint.encodings import Fp8, Mxfp4, decode_into
from vllm_w8a8_bismooth.checkpoint.readahead import ReadAhead
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError

BLOCKS = [(128, 128), (1, 128), (128, 1), (3, 7), (10**12, 10**12), (1, 10**12)]


def e4m3(byte: int) -> float:
    """By its definition: sign, 4 bits of exponent, 3 bits of fraction; no infinities."""
    sign, exponent, fraction = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    return sign * (fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def stored(**tensors: torch.Tensor) -> encodings.Fetch:
    """Reads elements of tensors in memory."""

    def fetch(name: str, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        flat = tensors[name].view(-1)
        assert first >= 0 and first + math.prod(shape) <= len(flat)
        return flat[first : first + math.prod(shape)].view(shape)

    return fetch


def decoded(encoding: encodings.Encoding, fetch: encodings.Fetch, first: int, count: int) -> torch.Tensor:
    values = torch.full((count,), math.nan)
    decode_into(values, encoding, fetch, first)
    return values


def test_every_code_of_fp8():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    encoding = Fp8("codes", "scales", (1, 256), (1, 256))
    found = decoded(encoding, stored(codes=codes, scales=torch.ones(1)), 0, 256)
    expected = torch.tensor([e4m3(byte) for byte in range(256)])
    assert torch.equal(found.nan_to_num(7e7).view(torch.int32), expected.nan_to_num(7e7).view(torch.int32))


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(BLOCKS), st.integers(0, 2**32), st.data())
def test_any_part_of_a_matrix(rows, columns, block, seed, data):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 0x7F, (rows, columns), dtype=torch.uint8, generator=random).view(torch.float8_e4m3fn)
    grid = math.ceil(rows / block[0]), math.ceil(columns / block[1])
    scales = torch.rand(grid, generator=random)
    expected = codes.float()
    for i, j in np.ndindex(*grid):
        (high, wide), (top, left) = block, (i * block[0], j * block[1])
        expected[top : top + high, left : left + wide] *= scales[i, j]
    first = data.draw(st.integers(0, rows * columns - 1))
    count = data.draw(st.integers(1, rows * columns - first))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "_TOGETHER", data.draw(st.sampled_from([1, 1000, 2**19])))
        found = decoded(
            Fp8("codes", "scales", (rows, columns), block), stored(codes=codes, scales=scales), first, count
        )
    assert torch.equal(found, expected.view(-1)[first : first + count])


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32), st.data())
def test_any_part_of_experts(experts, rows, groups, seed, data):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(0, 250, (experts, rows, groups), dtype=torch.uint8, generator=random)
    expected = convert_moe_packed_tensors(codes, scales)
    shape = (experts, 32 * groups, rows)
    assert expected.shape == shape
    first = data.draw(st.integers(0, expected.numel() - 1))
    count = data.draw(st.integers(1, expected.numel() - first))
    found = decoded(Mxfp4("codes", "scales", shape), stored(codes=codes, scales=scales), first, count)
    assert torch.equal(found.bfloat16(), expected.view(-1)[first : first + count]), "both are exact in BF16"
    assert torch.equal(found.bfloat16().float(), found)


def test_fp4_by_its_definition():
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    scales = torch.arange(120, 136, dtype=torch.uint8).view(1, 1, 16)
    found = decoded(Mxfp4("codes", "scales", (1, 512, 1)), stored(codes=codes, scales=scales), 0, 512)
    for place in range(512):
        byte = place // 2
        half = byte >> 4 if place % 2 else byte & 15
        sign = -1.0 if half & 8 else 1.0
        assert found[place] == sign * values[half & 7] * 2.0 ** (120 + place // 32 - 127)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_as_compressed_tensors_has_it(strategy, scales):
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    block = {"tensor": (256, 384), "channel": (1, 384), "block": (128, 128)}[strategy]
    shape = {"tensor": (1,)}.get(strategy)
    format = Format({}, lambda _: block, shape=lambda grid: shape or grid, scales=scales)
    codes, scale, _ = quantize(torch.randn(256, 384, generator=torch.Generator().manual_seed(1)), format)
    found = decoded(Fp8("codes", "scales", (256, 384), block), stored(codes=codes, scales=scale), 0, codes.numel())
    expected = dequantize(codes, scale)
    assert torch.equal(found.view(256, 384).to(expected.dtype), expected)


def test_as_transformers_has_it():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    format = Format({}, lambda _: (128, 128))
    codes, scale, _ = quantize(torch.randn(256, 384, generator=torch.Generator().manual_seed(2)), format)
    found = decoded(Fp8("codes", "scales", (256, 384), (128, 128)), stored(codes=codes, scales=scale), 0, codes.numel())
    for dtype in (torch.float32, torch.bfloat16):
        expected = Fp8Dequantize(None)._dequantize_one(codes, scale, dtype)
        assert torch.equal(found.view(256, 384).to(dtype), expected)


def gpt_oss(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A folder with the experts of one block of gpt-oss, two projections; codes and exponents of the first."""
    folder.mkdir()
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for name, rows, groups in (("gate_up_proj", 96, 2), ("down_proj", 64, 3)):
        name = f"model.layers.0.mlp.experts.{name}"
        shape = (5, rows, groups)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
        tensors[f"{name}_scales"] = torch.randint(110, 130, shape, dtype=torch.uint8, generator=random)
        tensors[f"{name}_bias"] = torch.randn(5, rows, generator=random).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}')
    first = "model.layers.0.mlp.experts.gate_up_proj"
    return tensors[f"{first}_blocks"], tensors[f"{first}_scales"]


def test_gpt_oss(tmp_path, monkeypatch):
    """Its experts are under the names, and in the shapes, that transformers gives them; however they are read."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    expected = convert_moe_packed_tensors(*gpt_oss(tmp_path / "source"))
    checkpoint = Checkpoint(tmp_path / "source")
    inside = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    assert {*checkpoint.headers} == {f"model.layers.0.mlp.experts.{name}" for name in inside}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    header = checkpoint.headers[name]
    assert (header.dtype, header.shape, header.nbytes) == ("BF16", (5, 64, 96), 2 * expected.numel())
    assert checkpoint.quantized == "MXFP4" and "quantization_config" not in checkpoint.config
    assert torch.equal(checkpoint.read(name), expected)
    assert torch.equal(checkpoint.rows(name, 1, 3), expected[1:4])
    monkeypatch.setattr(reader, "_PIECE", 2**14)
    assert torch.equal(torch.cat([*checkpoint.pieces(name)]), expected.view(-1))
    with ReadAhead(checkpoint, [*checkpoint.headers], 2**20) as ahead:
        taken = {each: ahead.take(each).clone() for each in checkpoint.headers}
    assert torch.equal(taken[name], expected) and ahead.digests[name] == checkpoint.digest(name)


@pytest.mark.parametrize("value", [0xFF, 0xFE])
def test_exponents_beyond_all_numbers(tmp_path, value):
    codes, scales = gpt_oss(tmp_path / "source")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    codes[4, 7, 1] = 0x77  # 6 and 6
    scales[4, 7, 1] = value
    save_file({f"{name}_blocks": codes, f"{name}_scales": scales}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(BismoothError, match=rf"{name}: holds (nan|inf) at \[4, 32, 7\] \(32 such values\)"):
        Checkpoint(tmp_path / "source").read(name)


MXFP4 = {
    "no exponents": (lambda t: t.pop("x_scales"), ["x_blocks: is MXFP4, and x_scales is not there"]),
    "exponents of another shape": (
        lambda t: t.update(x_scales=torch.zeros(2, 3, 5, dtype=torch.uint8)),
        ["x_scales: is U8 [2, 3, 5], and x_blocks implies U8 [2, 3, 4]"],
    ),
    "exponents in float": (lambda t: t.update(x_scales=torch.zeros(2, 3, 4)), ["x_scales: is F32 [2, 3, 4]"]),
    "another size of groups": (
        lambda t: t.update(x_blocks=torch.zeros(2, 3, 4, 8, dtype=torch.uint8)),
        ["x_blocks: has shape [2, 3, 4, 8]; MXFP4 has [experts, rows, groups, 16]"],
    ),
    "float beside it": (lambda t: t.update(x=torch.zeros(2, 128, 3)), ["x: is stored as float, and as MXFP4"]),
}


@pytest.mark.parametrize("case", MXFP4)
def test_mxfp4_that_does_not_fit(tmp_path, case):
    (change, words), bytes_ = MXFP4[case], dict(dtype=torch.uint8)
    tensors = {"x_blocks": torch.zeros(2, 3, 4, 16, **bytes_), "x_scales": torch.zeros(2, 3, 4, **bytes_)}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    with pytest.raises(BismoothError) as raised:
        Checkpoint(tmp_path)
    assert len(raised.value.problems) == 1 and all(word in str(raised.value) for word in words), raised.value


def test_names_and_dtypes_that_others_see(make_checkpoint, tmp_path):
    plain = store(make_checkpoint(), tmp_path / "fp8", "vllm")
    here, there = (Checkpoint(folder) for folder in (tmp_path / "fp8", plain))
    assert {name: (h.dtype, h.shape, h.nbytes) for name, h in here.headers.items()} == {
        name: (h.dtype, h.shape, h.nbytes) for name, h in there.headers.items()
    }
    assert all(torch.equal(here.read(name), there.read(name)) for name in there.headers)
    assert here.config == there.config and here.quantized == "FP8 with a scale for each matrix"
    assert there.quantized is None and there.stored == there.headers
    edit_json(tmp_path / "fp8" / "config.json", lambda config: config.update(dtype="float32"))
    exact = Checkpoint(tmp_path / "fp8")
    name = "model.layers.0.mlp.up_proj.weight"
    assert exact.headers[name].dtype == "F32" and torch.equal(exact.read(name).bfloat16(), here.read(name))


def test_a_block_as_wide_as_the_matrix_is_no_row():
    kinds = {(128, 64): "block of 128 x 64", (1, 64): "row", (300, 64): "matrix", (1, 32): "block of 1 x 32"}
    for block, kind in kinds.items():
        assert Fp8("codes", "scales", (300, 64), block).words() == f"FP8 with a scale for each {kind}"


@pytest.mark.parametrize("name", FORMATS)
def test_how_it_is_said(make_checkpoint, tmp_path, name):
    store(make_checkpoint(), tmp_path / "fp8", name)
    kind = {"deepseek": "block of 48 x 40", "fbgemm": "row", "compressed-tensors, channel": "row"}.get(name, "matrix")
    kind = "block of 48 x 40" if name.endswith("block") else kind
    assert Checkpoint(tmp_path / "fp8").quantized == f"FP8 with a scale for each {kind}"
