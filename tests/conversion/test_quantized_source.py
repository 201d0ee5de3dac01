"""Sources in FP8: their conversion is that of the same numbers in float, byte for byte."""

import pytest
import torch

from tests.support.contents import digests
from tests.support.conversion import convert
from tests.support.quantized import FORMATS, store
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.recipe import Recipe


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["rtn", "data-free", "calibrated"])
@pytest.mark.parametrize("name", FORMATS)
def test_same_bytes_as_from_float(make_checkpoint, tmp_path, calibration_text, name, method, dtype):
    plain = store(make_checkpoint(dtype=dtype), tmp_path / "fp8", name, dtype)
    text = read_text(calibration_text) if method == "calibrated" else None
    recipe = Recipe.of("rtn" if method == "rtn" else "bismooth")
    for source in (tmp_path / "fp8", plain):
        convert(source, tmp_path / f"{source.name}-int8", recipe, text)
    made, expected = (digests(tmp_path / f"{source}-int8") for source in ("fp8", plain.name))
    weights = [file for file in expected if file.endswith(".safetensors")]
    assert weights and {file: made.get(file) for file in weights} == {file: expected[file] for file in weights}
    assert made["config.json"] == expected["config.json"]
