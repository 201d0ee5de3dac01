"""In which dtype calibration computes, and what depends on it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.command import run
from tests.support.damage import edit_json
from tests.support.disk import Failing
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.measure import arithmetic
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.method.rows import ALONE

OLD, NEW = {"fpu", "avx512f"}, {"fpu", "avx512f", "avx512_bf16"}
TABLE = [
    ("F32", "cpu", NEW, "float32"),
    ("BF16", "cpu", NEW, "bfloat16"),
    ("BF16", "cpu", {"amx_bf16"}, "bfloat16"),
    ("BF16", "cpu", {"bf16"}, "bfloat16"),
    ("BF16", "cpu", OLD, "float32"),
    ("BF16", "cpu", set(), "float32"),
    ("F16", "cpu", NEW, "float32"),
    ("F16", "cpu", OLD, "float32"),
]


@pytest.fixture
def cpu(monkeypatch):
    """``cpu(flags)``: a CPU that can do just this."""
    return lambda flags: monkeypatch.setattr(arithmetic, "cpu_flags", lambda: flags)


@pytest.mark.parametrize(("stored", "device", "flags", "expected"), TABLE)
def test_on_cpus(cpu, stored, device, flags, expected):
    cpu(flags)
    assert arithmetic.arithmetic(stored, device) == expected


@pytest.mark.parametrize("ampere", [False, True])
def test_on_gpus(monkeypatch, ampere):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: ampere)
    for stored in ("F16", "BF16"):
        assert arithmetic.arithmetic(stored, "cuda") == ("bfloat16" if ampere else "float32")
    assert arithmetic.arithmetic("F32", "cuda") == "float32"


def test_flags_of_this_and_other_machines(tmp_path):
    (tmp_path / "x86").write_text("processor : 0\nflags\t\t: fpu amx_bf16\nvmx flags : x\n\nflags : other\n")
    (tmp_path / "odd").write_bytes(b"model name : caf\xe9\nflags : fpu\n")
    assert arithmetic.cpu_flags(tmp_path / "odd") == {"fpu"}
    (tmp_path / "arm").write_text("processor : 0\nFeatures : fp asimd bf16\n")
    assert arithmetic.cpu_flags(tmp_path / "x86") == {"fpu", "amx_bf16"}
    assert arithmetic.cpu_flags(tmp_path / "arm") == {"fp", "asimd", "bf16"}
    assert arithmetic.cpu_flags(tmp_path / "none") == set()


def enlarged(make_checkpoint, dtype: torch.dtype, factor: float) -> Path:
    """A checkpoint whose first block multiplies what it adds to the residual stream by the square of a factor."""
    source = make_checkpoint(dtype=dtype, sharded=False)
    tensors = load_file(source / "model.safetensors")
    for name in ("up_proj", "down_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= factor
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_activations_beyond_fp16(make_checkpoint, tmp_path, calibration_text):
    """A sound model in bf16, saved as fp16: its weights fit, its residual stream does not."""
    source, out = enlarged(make_checkpoint, torch.float16, 2000.0), tmp_path / "out"
    code, message = run("convert", source, out, "--calibration", calibration_text)
    assert code == 0, message
    found = json.loads((out / "report.json").read_text())
    assert found["calibration"]["arithmetic"] == "float32" and "computed in float32" in (out / "README.md").read_text()
    opened = Source(source)
    read = Calibration(opened, torch.arange(64).view(2, 32), torch.device("cpu"))
    read.advance(0, {name: opened.checkpoint.read(opened.names.block(0) + name) for name in opened.blocks[0]}, ALONE)
    assert read.hidden.abs().max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize(("factor", "place"), [(1e12, "in the residual stream behind it"), (1e20, "at site up->down")])
def test_what_no_arithmetic_holds_is_named(make_checkpoint, tmp_path, calibration_text, factor, place):
    """Norms would make zeros of it, without a word."""
    source = enlarged(make_checkpoint, torch.bfloat16, factor)
    code, message = run("convert", source, tmp_path / "out", "--calibration", calibration_text)
    assert code == 2 and message.startswith("model.layers.0.*: calibration, computed in "), message
    assert place in message and message.endswith("or convert it with --method rtn, which does not run it")
    if factor == 1e12:  # else the weights themselves are too large
        assert run("convert", source, tmp_path / "out", "--method", "rtn")[0] == 0


def test_an_unfinished_run_goes_on_in_its_own_arithmetic(make_checkpoint, tmp_path, calibration_text, cpu, monkeypatch):
    source, out = make_checkpoint(), tmp_path / "out"
    options = ("convert", source, out, "--calibration", calibration_text, "--calibration-tokens", "300")
    cpu(NEW)
    with monkeypatch.context() as patch:
        Failing(patch, 20)
        assert run(*options)[0] == 2 and out.with_name("out.partial").exists()
    cpu(OLD)
    code, message = run(*options)
    assert code == 2 and "arithmetic: 'bfloat16' there, 'float32' now" in message
    cpu(NEW)
    assert run(*options)[0] == 0
    cpu(OLD)
    assert "nothing to do" in run(*options)[1], "the recipe is the same"


def test_parts_of_another_arithmetic_are_no_parts_of_one(make_checkpoint, tmp_path, calibration_text, cpu):
    source = make_checkpoint()
    for blocks, flags in (("0:1", NEW), ("1:3", OLD)):
        cpu(flags)
        options = ("--calibration", calibration_text, "--calibration-tokens", "300", "--blocks", blocks)
        assert run("convert", source, tmp_path / blocks, *options)[0] == 0
    code, message = run("merge", tmp_path / "out", tmp_path / "0:1", tmp_path / "1:3")
    assert code == 2 and "arithmetic: 'float32' there, 'bfloat16' now" in message


NO_NUMBERS = {"rms_norm_eps": -1.0, "rope_parameters": {"rope_theta": 0.0, "rope_type": "default"}}


@pytest.mark.parametrize("key", NO_NUMBERS)
def test_a_model_that_computes_no_numbers(make_checkpoint, tmp_path, calibration_text, key):
    """No method makes a sound result of it, so that none is offered."""
    source = make_checkpoint()
    edit_json(source / "config.json", lambda config: config.update({key: NO_NUMBERS[key]}))
    for verb in (("convert", source, tmp_path / "out"), ("analyze", source)):
        code, message = run(*verb, "--calibration", calibration_text)
        assert code == 2 and " meets NaN " in message and "mend config.json" in message and "rtn" not in message
