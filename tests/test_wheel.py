"""The wheel, as a user gets it: what it holds, where it installs, and that vLLM serves from it without a compiler."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from benchmarks.server import running
from benchmarks.testbed import PYTHON

ROOT = Path(__file__).parents[1]
SITE = Path(pytest.__file__).parents[1]
COMPILERS = re.compile(r"(.*-)?(gcc|g\+\+|cc|c\+\+|cpp|clang|clang\+\+|nvcc|ptxas|ld|as|ninja|cmake|make)(-[\d.]+)?")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SITE / "auditwheel").exists(), reason="auditwheel is not installed; .ci/setup does it"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The one that WHEEL names, or else a new one."""
    if named := os.environ.get("WHEEL"):
        return Path(named).resolve()
    built = subprocess.run([ROOT / ".ci/wheel", tmp_path_factory.mktemp("wheel")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return Path(built.stdout.strip())


def test_it_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        listed = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    package = ROOT / "vllm_w8a8_bismooth"
    modules = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    ours = {name for name in names if not name.startswith("vllm_w8a8_bismooth-")}
    data = {f"data/{name}" for name in ("LICENSES.txt", "calibration.jsonl.gz")}
    assert ours == modules | {f"vllm_w8a8_bismooth/{name}" for name in {"_C.so", "py.typed", *data}}
    assert {name.split("/", 1)[1] for name in names - ours} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"),
        "licenses/vllm_w8a8_bismooth/data/LICENSES.txt",
    }
    assert "w8a8_bismooth = vllm_w8a8_bismooth:register" in listed


@pytest.mark.parametrize(("python", "fits"), [("3.9", False), ("3.10", True), ("3.12", True), ("3.14", True)])
def test_pip_takes_it_for_every_python_from_3_10_on(wheel, tmp_path, python, fits):
    """By its tags and metadata: those Pythons are not here."""
    assert re.fullmatch(r"vllm_w8a8_bismooth-[\d.]+-py3-none-manylinux_2_\d+_x86_64\.whl", wheel.name)
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-index", "--only-binary=:all:"]
    tried = subprocess.run([*pip, f"--python-version={python}", "--target", tmp_path, wheel], capture_output=True)
    assert (tried.returncode == 0) == fits, tried.stderr.decode()


@pytest.fixture
def fresh(tmp_path) -> tuple[Path, dict[str, str]]:
    """Folder of commands of a new virtual environment, and the variables with which they find no compiler.

    vLLM and all that it depends on are not installed anew, which would take 3.5 GB and minutes: the new environment
    sees those of the tests' environment through links, after its own packages. This package is not among them, so
    pip and Python find the wheel's or none.
    """
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    commands = tmp_path / "venv/bin"
    # Up to Python 3.11 it has a setuptools of its own, which is too old for torch.
    subprocess.run([commands / "python", "-m", "pip", "--quiet", "uninstall", "--yes", "setuptools"], check=True)
    (shared := tmp_path / "shared").mkdir()
    for path in SITE.iterdir():
        if "w8a8_bismooth" not in path.name and path.name.partition("-")[0] != "pip":
            (shared / path.name).symlink_to(path)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "shared.pth").write_text(f"{shared}\n")
    (tools := tmp_path / "tools").mkdir()
    for folder in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for path in Path(folder).iterdir() if Path(folder).exists() else []:
            if not COMPILERS.fullmatch(path.name) and not (tools / path.name).is_symlink():
                (tools / path.name).symlink_to(path)
    variables = {
        "PATH": f"{commands}:{tools}",
        "HOME": str(tmp_path),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for compiler in ("cc", "gcc", "g++", "c++", "clang", "nvcc", "ld"):
        assert shutil.which(compiler, path=variables["PATH"]) is None
    return commands, variables


@pytest.mark.engine
def test_vllm_serves_from_it(wheel, fresh, tmp_path):
    """Installed without a compiler: the converter runs, vLLM finds the plugin, the CPU kernel serves an answer.

    Eager: compiling a model on a CPU is torch's work, and needs a compiler of the user's.
    """
    commands, variables = fresh

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(commands / "python", "-m", "pip", "install", "--quiet", "--no-index", wheel)
    where = run(commands / "python", "-c", "import vllm_w8a8_bismooth as package; print(package.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    diagnosis = json.loads(run(commands / "bismooth", "doctor", "--json"))
    assert diagnosis["kernels"]["cpu"] in ("amx", "avx512_vnni", "avx_vnni", "avx512", "avx2", "portable")
    assert diagnosis["serving"]["registered"]

    run(commands / "bismooth", "convert", PYTHON.model, tmp_path / "int8", "--calibration", "none")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = [commands / "python", shutil.which("vllm", path=Path(sys.executable).parent), "serve", tmp_path / "int8"]
    serve += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "256"]
    log = tmp_path / "log"
    body = {"model": str(tmp_path / "int8"), "prompt": "import ", "max_tokens": 8, "temperature": 0}
    with running(list(map(str, serve)), variables, log) as server:
        answer = post(server, f"http://127.0.0.1:{port}/v1/completions", body, log)
    assert answer["usage"]["completion_tokens"] == 8 and answer["choices"][0]["text"].strip()
    assert "w8a8_bismooth: per-channel linears run on the cpu kernel" in log.read_text()


def post(server: subprocess.Popen, url: str, body: dict, log: Path) -> dict:
    """The server's answer, as soon as it is up."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
