import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.command import run
from vllm_w8a8_bismooth import doctor, engine, ops

BISMOOTH = str(Path(sys.executable).with_name("bismooth"))


@pytest.mark.engine
def test_this_installation_is_whole():
    """The real thing: vLLM's processes, as many as it takes."""
    done = subprocess.run([BISMOOTH, "doctor", "--json"], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["problems"] == [], done.stderr
    assert found["versions"]["torch"] and found["versions"]["vllm-w8a8-bismooth"]
    assert found["kernels"]["cpu"].split(";")[0] == ops.cpu_level()
    assert found["serving"]["platform"] == "cpu" and found["serving"]["registered"]
    assert {kernel for kernel, *_ in found["serving"]["layers"].values()} == {"our kernel"}


@pytest.mark.engine
def test_the_self_test_on_demand(tmp_path):
    """Of this CPU's kernels, too; a verdict is printed and kept."""
    if not ops.has_kernel("cpu"):
        pytest.skip("the CPU kernels are not built (see setup.py)")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([BISMOOTH, "doctor", "--self-test"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"self-test\n  this CPU  (\d+) of \1 kernels passed the self-test\n", done.stdout)
    assert len(list(tmp_path.glob("bismooth/selftest/*.json"))) == 1


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "status", "line"),
    [
        (
            '{"shapes": [{"rows": 32, "columns": 64, "kernel": "stock"}]}',
            0,
            r"plan\n  given: 32 x 64, activations per token  stock \(given\)\n",
        ),
        (
            "{}",
            1,
            "Problem: environment: .*plan.json is no plan of kernels: it is no object with a list of shapes; mend",
        ),
    ],
)
def test_a_plan_that_is_given(tmp_path, text, status, line):
    (tmp_path / "plan.json").write_text(text)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "BISMOOTH_PLAN": str(tmp_path / "plan.json")}
    done = subprocess.run([BISMOOTH, "doctor", "--plan"], capture_output=True, text=True, env=environment)
    assert done.returncode == status and re.search(line, done.stdout), done.stdout + done.stderr


@pytest.mark.engine
def test_a_plugin_that_is_switched_off():
    environment = os.environ | {"VLLM_PLUGINS": "", "VLLM_API_KEY": "swordfish"}
    done = subprocess.run([BISMOOTH, "doctor"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "VLLM_PLUGINS='' keeps vLLM from loading the plugin; add w8a8_bismooth to it." in done.stdout
    assert re.search(r"VLLM_API_KEY +\*\*\*\n", done.stdout) and "swordfish" not in done.stdout


@pytest.fixture
def without_vllm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_without_vllm(without_vllm):
    found = doctor.diagnose()
    assert found.serving is None and ["vLLM is not installed" in problem.what for problem in found.problems] == [True]
    code, message = run("doctor")
    assert code == 1 and "Problem: serving: vLLM is not installed" in message


def test_a_switch_that_is_none(monkeypatch):
    monkeypatch.setenv("BISMOOTH_KERNELS", "yes")
    code, message = run("doctor")
    assert code == 1
    assert "Problem: environment: BISMOOTH_KERNELS='yes' is unknown; expected auto, on or off; set it to one" in message


def test_what_fails_its_self_test_is_a_problem(monkeypatch):
    found = {"words": "7 of 8 kernels passed the self-test; not per-channel tile 3 (wrong)", "faults": {"x": "wrong"}}
    answer = {"problem": None, "registered": True, "tests": {"NVIDIA H200": found}, "layers": {}, "plan_problem": None}
    monkeypatch.setattr(engine, "ask", lambda *_: answer | {"platform": "cuda", "device": "", "capability": "9.0"})
    code, message = run("doctor")
    assert code == 1 and "self-test\n  NVIDIA H200  7 of 8 kernels passed the self-test; not per-channel" in message
    assert "Problem: self-test: on NVIDIA H200, 7 of 8 kernels" in message and "BISMOOTH_KERNELS=off does" in message


def test_the_plan_is_printed_when_asked_for(monkeypatch):
    answer = {"problem": None, "registered": True, "tests": {}, "layers": {}, "plan_problem": None}
    answer |= {
        "platform": "cuda",
        "device": "",
        "capability": "9.0",
        "plan": {"torch.bfloat16: 32 x 64": "stock (...)"},
    }
    monkeypatch.setattr(engine, "ask", lambda *_: answer)
    assert "plan\n" not in run("doctor")[1]
    assert "plan\n  torch.bfloat16: 32 x 64  stock (...)\n" in run("doctor", "--plan")[1]
    answer["plan"] = {}
    assert "plan\n  nothing  was measured here, and nothing is given\n" in run("doctor", "--plan")[1]
    answer["plan_problem"] = "p.json is no plan of kernels"
    message = run("doctor", "--plan")[1]
    assert "plan\n" not in message and "Problem: environment: p.json is no plan of kernels; mend the file" in message


@pytest.mark.parametrize(
    ("value", "remedy"),
    [("auto", "install the package again on this machine"), ("off", "do without BISMOOTH_KERNELS=off")],
)
def test_remedies_fit_the_switch(monkeypatch, value, remedy):
    """And what may be behind a wrong or slow kernel is shown."""
    layers = {"per-channel": ("vLLM's own kernel", "of a reason", False)}
    answer = {"problem": None, "registered": True, "tests": {}, "layers": layers, "plan": {}, "plan_problem": None}
    monkeypatch.setattr(engine, "ask", lambda *_: answer | {"platform": "cpu", "device": "", "capability": None})
    monkeypatch.setenv("BISMOOTH_KERNELS", value)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    code, message = run("doctor")
    assert code == 1 and re.search(r"ONEDNN_MAX_CPU_ISA +AVX2\n", message)
    assert f"Problem: per-channel layers: they would run on vLLM's own kernel, because of a reason; {remedy}" in message


def test_without_kernels(without_vllm, monkeypatch):
    monkeypatch.setattr(ops, "server", lambda device: ops.REFERENCE)
    found = doctor.diagnose()
    assert found.kernels == {"cpu": None, "cuda": None, "xpu": None}
    assert any("the compiled kernels are absent" in problem.what for problem in found.problems)


def test_a_broken_torch(without_vllm, monkeypatch):
    def broken(device: str) -> bool:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(ops, "server", broken)
    assert any("libcudart.so.13: cannot open" in problem.what for problem in doctor.diagnose().problems)


@pytest.mark.parametrize(
    ("server", "built", "kernels"),
    [
        ("compiled", {"cuda": "13.0"}, "compiled; torch has CUDA 13.0"),
        ("triton", {"cuda": "13.0"}, "Triton's, compiled when they are first used; torch has CUDA 13.0"),
        ("triton", {"hip": "7.2"}, "Triton's, compiled when they are first used; torch has ROCm 7.2"),
    ],
)
def test_kernels_of_gpus(without_vllm, monkeypatch, server, built, kernels):
    for name, version in built.items():
        monkeypatch.setattr(torch.version, name, version)
    monkeypatch.setattr(ops, "server", lambda device: server if device == "cuda" else ops.REFERENCE)
    assert doctor.diagnose().kernels == {"cpu": None, "cuda": kernels, "xpu": None}


@pytest.mark.slow
def test_a_vllm_that_does_not_start(monkeypatch, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('libtorch is too old')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert any(
        "libtorch is too old), so nothing can be served" in problem.what for problem in doctor.diagnose().problems
    )
