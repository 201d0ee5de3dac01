"""In which dtype calibration computes, and what depends on it."""

import json
import os
import subprocess
import sys
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

OLD, NEW = 0.14, 2.1
"""How many times faster than fp32 bf16 is without instructions for it (oneDNN's AVX2) and with them (Zen 4)."""
TABLE = [
    ("F32", NEW, "float32"),
    ("F32", OLD, "float32"),
    ("BF16", NEW, "bfloat16"),
    ("BF16", 1.0, "bfloat16"),
    ("BF16", OLD, "float32"),
    ("F16", NEW, "float32"),
    ("F16", OLD, "float32"),
]


@pytest.fixture
def cpu(monkeypatch):
    """``cpu(faster)``: a CPU on which products of bf16 have so many times the speed of those of fp32."""
    return lambda faster: monkeypatch.setattr(arithmetic, "faster", lambda: faster)


@pytest.mark.parametrize(("stored", "faster", "expected"), TABLE)
def test_on_cpus(cpu, stored, faster, expected):
    cpu(faster)
    assert arithmetic.arithmetic(stored) == expected


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16", "avx512f", "fpu"])
def test_without_torch(monkeypatch, flag):
    monkeypatch.setattr(arithmetic, "cpu_flags", lambda: {"fpu", flag})
    expected = "bfloat16" if "bf16" in flag else "float32"
    assert arithmetic.arithmetic("BF16", fast=arithmetic.has_instructions) == expected


SLOW = """
import torch
from vllm_w8a8_bismooth.measure import arithmetic
torch.set_num_threads(3)
print(arithmetic.faster(), arithmetic.arithmetic("BF16"), torch.get_num_threads())
"""


def test_a_cpu_without_bf16_computes_in_fp32():
    """oneDNN, kept from the instructions, does what it does on a CPU that lacks them."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", SLOW], env=environment, capture_output=True, text=True, check=True)
    faster, chosen, threads = done.stdout.split()
    assert float(faster) < 1 and chosen == "float32", "bf16 takes about seven times as long"
    assert threads == "3", "as before"


@pytest.mark.skipif(not arithmetic.has_instructions(), reason="a CPU without instructions for bf16")
def test_a_cpu_with_bf16_uses_it():
    assert arithmetic.faster() > 1 and arithmetic.bf16_pays()
    assert arithmetic.faster() is arithmetic.faster(), "measured once"


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
    assert (
        found["calibration"]["compute_dtype"] == "float32" and "computed in float32" in (out / "README.md").read_text()
    )
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
    code, message = run(*options, "--compute-dtype", "float32")
    assert code == 2 and "recipe.compute_dtype: 'bfloat16' there, 'float32' now" in message
    assert run(*options)[0] == 0
    recipe = json.loads((out / "recipe.json").read_text())["recipe"]
    assert recipe["compute_dtype"] == "bfloat16", "written down when it was chosen, which was elsewhere"
    assert "nothing to do" in run(*options)[1]
    code, message = run(*options, "--compute-dtype", "float32")
    assert code == 2 and "compute_dtype: 'bfloat16' there, 'float32' now" in message


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_what_is_asked_for_is_done_on_any_machine(make_checkpoint, tmp_path, calibration_text, cpu, chosen):
    """Byte for byte what a machine that would choose it itself makes, and no other machine is asked to measure."""
    source, options = make_checkpoint(), ("--calibration", calibration_text, "--calibration-tokens", "300")
    cpu(NEW if chosen == "bfloat16" else OLD)
    assert run("convert", source, tmp_path / "auto", *options)[0] == 0
    cpu(OLD if chosen == "bfloat16" else NEW)
    assert run("convert", source, tmp_path / "asked", *options, "--compute-dtype", chosen)[0] == 0
    auto, asked = (
        {p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.*") if p.is_file()} for n in ("auto", "asked")
    )
    assert auto == asked and f"computed in {chosen}" in asked["README.md"].decode()


def test_both_dtypes_make_about_the_same(make_checkpoint, tmp_path, calibration_text):
    """But not the same, or the option would do nothing."""
    source, found = make_checkpoint(), []
    for chosen in ("float32", "bfloat16"):
        out = tmp_path / chosen
        options = ("--calibration", calibration_text, "--calibration-tokens", "300", "--rounding", "nearest")
        assert run("convert", source, out, *options, "--compute-dtype", chosen)[0] == 0
        found.append(load_file(out / "model.safetensors"))
    wide, narrow = found
    codes = [name for name, tensor in wide.items() if tensor.dtype == torch.int8]
    apart = torch.cat([(wide[n].int() - narrow[n].int()).abs().flatten() for n in codes])
    assert 0 < apart.float().mean() < 0.5 and apart.max() <= 4


def test_a_dtype_that_does_nothing_is_refused(make_checkpoint, tmp_path):
    source = make_checkpoint()
    for options, said in {
        (
            "--calibration",
            "none",
            "--compute-dtype",
            "float32",
        ): "--compute-dtype has no effect with --calibration none",
        ("--method", "rtn", "--compute-dtype", "float32"): "--compute-dtype has no effect",
        ("--compute-dtype", "float16"): "choose one of auto, float32, bfloat16",
    }.items():
        code, message = run("convert", source, tmp_path / "out", *options)
        assert code == 2 and said in message


def test_parts_of_another_arithmetic_are_no_parts_of_one(make_checkpoint, tmp_path, calibration_text, cpu):
    source = make_checkpoint()
    for blocks, faster in (("0:1", NEW), ("1:3", OLD)):
        cpu(faster)
        options = ("--calibration", calibration_text, "--calibration-tokens", "300", "--blocks", blocks)
        assert run("convert", source, tmp_path / blocks, *options)[0] == 0
    code, message = run("merge", tmp_path / "out", tmp_path / "0:1", tmp_path / "1:3")
    assert code == 2 and "recipe.compute_dtype: 'float32' there, 'bfloat16' now" in message


NO_NUMBERS = {"rms_norm_eps": -1.0, "rope_parameters": {"rope_theta": 0.0, "rope_type": "default"}}


@pytest.mark.parametrize("key", NO_NUMBERS)
def test_a_model_that_computes_no_numbers(make_checkpoint, tmp_path, calibration_text, key):
    """No method makes a sound result of it, so that none is offered."""
    source = make_checkpoint()
    edit_json(source / "config.json", lambda config: config.update({key: NO_NUMBERS[key]}))
    for verb in (("convert", source, tmp_path / "out"), ("analyze", source)):
        code, message = run(*verb, "--calibration", calibration_text)
        assert code == 2 and " meets NaN " in message and "mend config.json" in message and "rtn" not in message
