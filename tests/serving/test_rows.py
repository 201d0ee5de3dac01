"""Packed rows in the real engine: served as the INT8 that they stand for, and by nobody else."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import packed
from tests.support.adapters import write_adapter
from tests.support.quantization import ROWS, TOKEN, W8A8, config_class
from tests.support.workers.engine import ask_each
from vllm_w8a8_bismooth import fourbits, grouping, ops


@pytest.fixture(scope="module")
def pair(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """The bi-smoothed checkpoint with rounded codes, in packed rows and as plain INT8."""
    folder = tmp_path_factory.mktemp("rows")
    names = {name: folder / name for name in ("packed", "plain")}
    packed.store(checkpoints["bismooth"], **names)
    return names


def test_what_the_config_must_say():
    groups = {"g": {"targets": ["Linear"], "weights": W8A8, "input_activations": TOKEN}}
    assert config_class().from_config(ROWS | {"config_groups": groups}).rows == 128
    for changes, message in (
        (
            {"format": "int-quantized"},
            "format of quantization_config is 'int-quantized', and w8a8_bismooth has 'int4-i",
        ),
        ({"bismooth": {}}, "quantization_config: bismooth.rows is None; its group_size must be one of 32, 64, 128"),
        ({"bismooth": {"rows": {"group_size": 128}}}, "its bits must be a number from 4 to 8; convert the model again"),
        ({"config_groups": {}}, "no linear is quantized"),
    ):
        with pytest.raises(ValueError, match=message):
            config_class().from_config(ROWS | changes)


def test_memory_is_what_the_bits_say():
    """But for a hundredth, which is where rows stand in the output."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (1024, 2048), generator=draw).to(torch.int8)
    rows = torch.arange(0, 1024, 8)
    stored = fourbits.pack(packed.rounded(codes, rows, 128), rows, 128)
    laid_out = ops.pack_rows(stored)
    four, eight = grouping.row_bits(2048, 128)
    scales = 4 * len(codes)
    expected = ((len(codes) - len(rows)) * four + len(rows) * eight) / 8
    assert sum(getattr(laid_out, field.name).nbytes for field in fields(laid_out)) + scales < 1.01 * expected


def test_transformers_does_not_know_it(pair, caplog):
    """It says so, and that it fills what it lacks with random numbers, where it might refuse."""
    caplog.set_level("WARNING", "transformers")
    AutoModelForCausalLM.from_pretrained(pair["packed"])
    assert "Unknown quantization type, got w8a8_bismooth" in caplog.text and "MISSING" in caplog.text


@pytest.mark.engine
def test_stock_vllm_refuses_it(pair, tmp_path):
    (answer,) = ask_each(tmp_path, {"stock": {"model": pair["packed"]}}, plugins="").values()
    assert "Unknown quantization method: w8a8_bismooth. Must be one of" in answer["error"]


@pytest.mark.engine
def test_it_is_served_as_the_int8_that_it_stands_for(pair, tmp_path):
    """Compiled, with merged linears, an INT8 head and an adapter, and loaded again: the same tokens and
    log-probabilities, to the last bit."""
    small, large = (sum(f.stat().st_size for f in pair[name].glob("*.safetensors")) for name in ("packed", "plain"))
    assert small < large
    write_adapter(tmp_path / "adapter", pair["plain"])
    options = {"lora": tmp_path / "adapter", "enable_lora": True, "max_loras": 2}
    answers = ask_each(tmp_path, {name: {"model": model, **options} for name, model in pair.items()})
    ours, plain = answers["packed"], answers["plain"]
    assert ours["quantization"] == plain["quantization"] == "w8a8_bismooth"
    assert ours["linears"] == plain["linears"] and ours["adapted"]["tokens"] != ours["tokens"]
    for key in ("tokens", "logprobs", "adapted", "reloaded"):
        assert ours[key] == plain[key], key
    assert ours["reloaded"] == {key: ours[key] for key in ours["reloaded"]}
