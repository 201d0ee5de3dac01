"""Which kernels setup.py compiles, and that a machine which asked for CUDA's has them."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(monkeypatch, tmp_path):
    """The module setup.py, where nothing is asked for and no GPU is seen."""
    for variable in ("BISMOOTH_CPU", "BISMOOTH_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(folder: Path, name: str, status: int) -> None:
    (folder / name).write_text(f"#!/bin/sh\nexit {status}\n")
    (folder / name).chmod(0o755)


def test_nothing_here_runs_cuda(build, tmp_path, capfd):
    assert not build.wanted("CUDA", None, build.cuda_unused(tmp_path / "torch"))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("CUDA kernels: left out, because there is no GPU") and "BISMOOTH_CUDA=1" in line
    command(tmp_path, "nvidia-smi", 9)  # a driver without a device
    assert build.cuda_unused(tmp_path / "torch") is not None


def test_a_gpu_is_seen(build, tmp_path):
    command(tmp_path, "nvidia-smi", 0)
    assert build.wanted("CUDA", None, build.cuda_unused(tmp_path / "torch"))


def test_torch_is_built_for_cuda(build, tmp_path):
    """As in an image that is built on a machine without a GPU."""
    (tmp_path / "torch/lib").mkdir(parents=True)
    (tmp_path / "torch/lib/libtorch_cuda.so").touch()
    assert build.wanted("CUDA", None, build.cuda_unused(tmp_path / "torch"))


def test_architectures_are_named(build, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert build.wanted("CUDA", None, build.cuda_unused(tmp_path / "torch"))
    assert not build.wanted("CUDA", "there is no nvcc", build.cuda_unused(tmp_path / "torch"))
    assert "left out, because there is no nvcc" in capfd.readouterr().err


def test_architectures_without_kernels_are_left_out(build, capfd):
    """As in vLLM's own Dockerfile. One line says which; of those that are left, nothing changes."""
    known = "".join(f"compute_{number}\n" for number in (75, 80, 86, 89, 90, 100, 103, 120))
    listed = "7.0 7.5 8.0 8.9;9.0a 10.0f 12.0+PTX"
    assert build.architectures(listed, known) == ["8.0", "8.9", "9.0a", "10.0f", "12.0+PTX"]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("CUDA kernels: not for 7.0, 7.5 of TORCH_CUDA_ARCH_LIST")
    assert build.architectures("9.0a 13.0", known) == ["9.0a"] and "not for 13.0 of" in capfd.readouterr().err
    assert build.architectures("8.0 9.0", known) == ["8.0", "9.0"] and not capfd.readouterr().err
    assert build.architectures("", known) == build.CUDA_ARCHES
    assert build.architectures("7.5 Turing", known) == []


def test_the_variable_has_the_last_word(build, monkeypatch):
    monkeypatch.setenv("BISMOOTH_CUDA", "1")
    assert build.wanted("CUDA", None, "nobody runs them")
    with pytest.raises(SystemExit, match="BISMOOTH_CUDA=1, but there is no nvcc"):
        build.wanted("CUDA", "there is no nvcc")
    monkeypatch.setenv("BISMOOTH_CUDA", "0")
    assert not build.wanted("CUDA", None)
    monkeypatch.setenv("BISMOOTH_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset"):
        build.wanted("CUDA", None)


def test_only_what_changed_is_compiled_again(build, tmp_path):
    source, header, target = tmp_path / "a.cpp", tmp_path / "a.h", tmp_path / "a.o"
    used, record = tmp_path / "a.d", tmp_path / "a.command"
    for path, when in ((source, 1), (header, 1), (target, 2)):
        path.touch()
        os.utime(path, (when, when))
    used.write_text(f"{target}: {source} \\\n {header}\n")
    record.write_text("g++ a")
    files = target, used, record
    assert build.up_to_date(*files, "g++ a") and not build.up_to_date(*files, "g++ -O3 a")
    os.utime(header, (3, 3))
    assert not build.up_to_date(*files, "g++ a")
    header.unlink()
    assert not build.up_to_date(*files, "g++ a")


@pytest.mark.skipif(os.environ.get("BISMOOTH_CUDA") != "1", reason="BISMOOTH_CUDA=1 did not ask for CUDA kernels")
def test_cuda_kernels_are_where_they_were_asked_for():
    """Without them, or without cuobjdump, the tests of their machine code would be skipped, in CI too."""
    try:
        from tests.support.sass import dump
    except pytest.skip.Exception as reason:
        pytest.fail(str(reason))
    assert all("Function : " in dump("-sass", "-arch", architecture) for architecture in ("sm_80", "sm_90a"))


def test_help_lists_every_target():
    listed = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    makefile = (ROOT / "Makefile").read_text()
    targets = makefile.split(".PHONY: ")[1].splitlines()[0].split()
    assert [line.split()[1] for line in listed.stdout.splitlines()] == targets
