"""The visit to a GPU and its benchmarks, without a GPU: nobody watches when they run, and the time there is short."""

import importlib.util
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import ceilings, check, gemm, pack, quant, tiles
from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.ops import timing

ROOT = Path(__file__).parents[2]
FILES = {"log.txt", "check.json", "quick.json", "tiles.json", "gemm.json", "quant.json", "linear.json"}
MOST_FILES = 8


def visit(out: Path, *arguments: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    variables = {"PYTHON": sys.executable, "OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = ["bash", root / "benchmarks/gpu.sh", *arguments]
    return subprocess.run(command, env=os.environ | variables | environment, capture_output=True, text=True)


def ended(process: int) -> bool:
    """Whether a process is gone within five seconds."""
    state = Path(f"/proc/{process}/stat")
    for _ in range(100):
        try:
            if ") Z " in state.read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def verdicts(output: str) -> dict[str, str]:
    summary = output[output.index("== summary of") :]
    return dict(re.findall(r"^(\w+) +\d+ s  (.*)$", summary, re.MULTILINE))


@pytest.fixture
def light_visit(tmp_path) -> Path:
    """The script in a tree whose Python modules only say what they were called with."""
    (tmp_path / "benchmarks/testbed/model").mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks/gpu.sh", tmp_path / "benchmarks")
    (tmp_path / "vllm.py").write_text("")
    (tmp_path / "benchmarks/__init__.py").write_text("")
    (tmp_path / "benchmarks/serve.py").write_text(
        "import pathlib, sys\n"
        "file = pathlib.Path(sys.argv[sys.argv.index('--json') + 1])\n"
        "print(sys.argv[1:])\n"
        "file.write_text('turns')\n"
        "sys.exit(124 if '--quick' not in sys.argv else 0)\n"  # as timeout does
    )
    return tmp_path


@pytest.mark.slow
def test_dry_run(tmp_path):
    sections = ["build", "check", "quick", "tiles", "gemm", "quant", "linear", "sanitize"]
    done = visit(tmp_path, "--dry", *sections)
    found = verdicts(done.stdout)
    assert done.returncode == 0 and list(found) == sections, done.stdout[-3000:]
    assert set(found.values()) == {"ok"}, done.stdout[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for file in FILES - {"log.txt"}:
        record = json.loads((tmp_path / file).read_text())
        assert f"== summary of {record['commit']}\n" in done.stdout, file
        assert record["rows"] and "dry" in (record.get("extent"), "dry" if record.get("dry") else None), file
    if importlib.util.find_spec("triton"):
        for file in ("quick.json", "linear.json"):
            rows = json.loads((tmp_path / file).read_text())["rows"]
            beside = {row["impl"] for row in rows if row.get("x stock")}
            assert {"ours-channel", "ours-group128", "triton-channel", "triton-group128", "vllm"} <= beside
        kernels = {(row["kernel"], row["grouped"]) for row in json.loads((tmp_path / "tiles.json").read_text())["rows"]}
        assert kernels == {(kernel, grouped) for kernel in ("compiled", "triton") for grouped in (False, True)}
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"tests/ops/test_gpu.py::test_product_on_real_shapes", log)
    assert re.search(r"^right \(self-test: .* kernels passed the self-test; tests: \d+/\d+ tests collected", log, re.M)
    assert re.search(r"^6/\d+ tests collected", log, re.MULTILINE)  # the sanitizer's


def test_files_of_a_whole_visit():
    script = (ROOT / "benchmarks/gpu.sh").read_text()
    order = re.search(r"^order=\((.*)\)$", script, re.MULTILINE).group(1).split()
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", script))
    assert sorted(limits) == sorted(order) and max(map(int, limits.values())) < 590
    written = set(re.findall(r"\$out/(\w+\.\w+)", script)) | {"serve-MODEL.json"}
    assert written == FILES | {"serve-MODEL.json"} and len(written) <= MOST_FILES


def test_two_calls_are_a_visit():
    """Of 15 minutes in all; the first three are for what all else rests on, with kernels that were brought along."""
    script = (ROOT / "benchmarks/gpu.sh").read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", script)}
    calls = [
        call.split() for call in re.findall(r"^#     .*  benchmarks/gpu.sh (build .*|gemm .*)$", script, re.MULTILINE)
    ]
    assert [call[0] for call in calls] == ["build", "gemm"] and limits["check"] == 180
    used = [sum(limits[name] for name in call if name != "build") for call in calls]
    assert max(used) < 590


def test_a_failing_section_does_not_stop_the_next(tmp_path):
    done = visit(tmp_path, "quick", "check", "quant", PYTHON="false")
    assert done.returncode == 1
    assert verdicts(done.stdout) == dict.fromkeys(["quick", "check", "quant"], "failed (1)")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    done = visit(tmp_path, "--dry", "check", "sanitize", PYTHON="false")
    assert done.returncode == 1 and set(verdicts(done.stdout).values()) == {"failed (1)"}


def test_skipped_tests_are_not_called_good(light_visit, tmp_path):
    (light_visit / "tests/ops").mkdir(parents=True)
    (light_visit / "pytest.ini").write_text("[pytest]\nmarkers = gpu")
    header = "import pytest\n@pytest.mark.gpu\n"
    for skip, found in (("@pytest.mark.skip('no GPU')\n", "left out (every test was skipped)"), ("", "ok")):
        (light_visit / "tests/ops/test_gpu.py").write_text(f"{header}{skip}def test_sanitizer(): pass")
        done = visit(tmp_path / "out", "sanitize", root=light_visit)
        assert done.returncode == 0 and verdicts(done.stdout) == {"sanitize": found}, done.stdout


def test_budget(tmp_path):
    done = visit(tmp_path, "--dry", "quick", "gemm", BUDGET="1")
    assert done.returncode == 0 and verdicts(done.stdout) == {}
    assert "not begun: benchmarks/gpu.sh quick gemm" in done.stdout and "== quick" not in done.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_visit(light_visit, tmp_path, number, status):
    """And the section that runs, with what that has started; a terminal sends it to the script alone."""
    (light_visit / "benchmarks/quant.py").write_text(
        "import os, pathlib, time\npathlib.Path('number').write_text(str(os.getpid()))\ntime.sleep(1000)\n"
    )
    variables = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    command = ["bash", light_visit / "benchmarks/gpu.sh", "quant", "gemm"]
    visiting = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    file = light_visit / "number"
    for _ in range(600):
        if file.exists() and file.read_text():
            break
        time.sleep(0.05)
    visiting.send_signal(number)
    said, _ = visiting.communicate(timeout=20)
    assert visiting.returncode == status and verdicts(said) == {"quant": "stopped"}
    assert "not begun: benchmarks/gpu.sh gemm" in said and ended(int(file.read_text()))


def test_unknown_sections(tmp_path):
    for mode in ([], ["--dry"]):
        done = visit(tmp_path / "out", *mode, "check", "nothing")
        assert done.returncode == 2 and "no section nothing; there are: build check quick tiles" in done.stderr
    assert not (tmp_path / "out").exists()


def test_serve_is_called(light_visit, tmp_path):
    """Cut short, what it has measured is there all the same; rehearsed, it begins anew."""
    out, state = tmp_path / "out", light_visit / "build/serve/random-tiny/runs-0.json"
    done = visit(out, "serve", root=light_visit)
    assert done.returncode == 0 and verdicts(done.stdout) == {"serve": "cut short"}, done.stdout + done.stderr
    assert f"['random:llama3-8b', '--json', '{out}/serve-random-llama3-8b.json']" in done.stdout
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    done = visit(out, "--dry", "serve", root=light_visit)
    asked = ["random:tiny", "--quick", "--arms", "per-channel", "--json", f"{out}/serve-random-tiny.json"]
    assert str(asked) in done.stdout
    assert not state.exists()
    assert {path.name for path in out.iterdir()} == {"log.txt", "serve-random-llama3-8b.json", "serve-random-tiny.json"}


def test_serve_without_its_parts(light_visit, tmp_path):
    (light_visit / "vllm.py").rename(light_visit / "other.py")
    done = visit(tmp_path / "out", "serve", root=light_visit, PYTHON=f"{sys.executable} -S", PYTHONPATH="")
    assert done.returncode == 0 and verdicts(done.stdout)["serve"].startswith("left out (no vLLM here: carry .gpu")


def test_engine_is_unpacked_beside_the_kernels(light_visit, tmp_path):
    """Once; with the library where vLLM looks for it, and before anything that is installed."""
    (light_visit / "vllm.py").unlink()
    for name, files in {
        "kernels": {"_C_stable_libtorch.abi3.so": b"code", "site/tool.py": b""},
        "engine": {"vllm/__init__.py": b"", "some.egg-info/PKG-INFO": b""},
    }.items():
        folder = tmp_path / name
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        (light_visit / ".gpu").mkdir(exist_ok=True)
        pack.archive(folder, light_visit / f".gpu/{name}.tar.xz")
    (light_visit / "benchmarks/serve.py").write_text(
        "import tool, vllm, pathlib\n"
        "print((pathlib.Path(vllm.__file__).parent / '_C_stable_libtorch.abi3.so').read_text())\n"
    )
    kernels = light_visit / ".gpu/kernels.tar.xz"
    kernels.rename(tmp_path / "aside")
    done = visit(tmp_path / "out", "serve", root=light_visit)
    assert verdicts(done.stdout) == {"serve": "left out (the engine needs .gpu/kernels.tar.xz too)"}
    (tmp_path / "aside").rename(kernels)
    for _ in range(2):
        done = visit(tmp_path / "out", "serve", root=light_visit)
        assert verdicts(done.stdout) == {"serve": "ok"} and "\ncode\n" in done.stdout, done.stdout
        for archive in (light_visit / ".gpu").glob("*.xz"):
            archive.unlink()


def fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """Of (kind, architecture, code)."""
    body = b"".join(
        struct.pack("<HHIQ", kind, 0x101, 64, len(code)) + bytes(12) + struct.pack("<I", sm) + bytes(32) + code
        for kind, sm, code in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_thin_keeps_one_architecture():
    ptx, elf, size = 1, 2, 24
    for_both = fat_binary((elf, 80, b"a" * size), (elf, 90, b"b" * size), (ptx, 90, b"c" * size))
    for_others = fat_binary((elf, 80, b"d" * size), (ptx, 120, b"e" * size))
    no_binary = b"\x50\xed\x55\xba" + struct.pack("<HHQ", 7, 16, 1 << 40)  # the same mark by chance
    library = b"head" + for_both + b"between" + no_binary + for_others + b"tail"
    got = pack.thin(library, 90)
    assert len(got) == len(library)
    assert got == library.replace(b"a" * size, bytes(size)).replace(b"c" * size, bytes(size))


def test_files_of_the_engine():
    kept = ["vllm/__init__.py", "vllm/spinloop.abi3.so", "vllm-0.26.0.dist-info/METADATA", "vllm/tuned.json"]
    left = [
        *("vllm/vllm-rs", "vllm/third_party/deep_gemm/__init__.py", "vllm/_moe_C_stable_libtorch.abi3.so"),
        *(pack.KERNELS, pack.ATTENTION, "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so"),
    ]
    assert list(filter(pack.needed, [*left, *kept])) == kept


def test_archives_are_whole_or_not_there(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("text")
    pack.archive(tmp_path / "in", tmp_path / "a.tar.xz")
    with tarfile.open(tmp_path / "a.tar.xz") as packed:
        assert packed.getnames() == ["file"]

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tarfile.TarFile, "add", full)
    with pytest.raises(OSError, match="full"):
        pack.archive(tmp_path / "in", tmp_path / "b.tar.xz")
    assert not (tmp_path / "b.tar.xz").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("module", "asked"),
    [*((module, ["--device", "cuda"]) for module in (ceilings, check, gemm, quant)), (tiles, [])],
)
def test_without_a_gpu(monkeypatch, module, asked):
    monkeypatch.setattr(sys, "argv", ["benchmark", *asked])
    with pytest.raises(SystemExit, match="no CUDA device"):
        module.main()


@pytest.fixture
def no_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "measure", lambda device, seconds: {"GB/s": 1.0})


@pytest.mark.parametrize("linear", [False, True])
def test_gemm_rows(no_ceilings, monkeypatch, tmp_path, capsys, linear):
    out = tmp_path / "gemm.json"
    asked = ["--device", "cpu", "--dry", "--m", "1,6", "--json", str(out), "--impl", "ours|torch", "--shapes", "o|down"]
    monkeypatch.setattr(sys, "argv", ["gemm", *asked, *(["--linear"] if linear else [])])
    gemm.main()
    record = json.loads(out.read_text())
    assert {"commit", "versions", "machine", "ceilings"} <= record.keys() and record["extent"] == "dry"
    names = {"ours-channel", "ours-group128", "ours-rows", "torch-bf16", "torch-fp32"} | (
        set() if linear else {"torch-int_mm"}
    )
    for m in (1, 6):
        rows = [row for row in record["rows"] if row["M"] == m]
        assert {row["impl"] for row in rows} == names
        assert {(row["N"], row["K"]) for row in rows} == {(256, 256), (256, 512)}
        assert all(row["us"] > 0 for row in rows)
    assert set(record["left_out"]) == (set() if not linear else {"torch-int_mm"})
    assert "ours-group128" in capsys.readouterr().out


def test_gemm_checks_results():
    weights = gemm.Weights(64, 256, "cpu", 2)
    problem = gemm.Problem(3, weights, False)
    for name, grouped in (("ours-channel", False), ("ours-group128", True), ("ours-rows", False)):
        out = gemm.IMPLEMENTATIONS["cpu"][name](problem)(0)
        gemm.check(name, problem, out)
        out[0, 0] += out.abs().max() / 8
        with pytest.raises(AssertionError, match="wrong in 1 of"):
            gemm.check(name, problem, out)
        assert grouped == ("group" in name)


CASES = {
    "passes": ("pass", "right", {"passed": True, "words": "1 passed", "failed": []}),
    "fails": ("assert not 1", "WRONG", {"passed": False, "words": "1 failed", "failed": ["test_gpu.py::test_one"]}),
    "skipped": (
        "pytest.skip('no GPU')",
        "left out: nothing is known",
        {"passed": None, "words": "1 skipped", "failed": []},
    ),
    "hangs": ("import time; time.sleep(60)", "left out: nothing is known", {"passed": None, "failed": []}),
    "exits": ("import os; os._exit(3)", "WRONG", {"passed": False, "failed": []}),
}


@pytest.mark.parametrize("case", CASES)
def test_verdicts(tmp_path, monkeypatch, case):
    body, word, found = CASES[case]
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu")
    (tmp_path / "test_gpu.py").write_text(f"import pytest\n@pytest.mark.gpu\ndef test_one():\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "TESTS", ["test_gpu.py"])
    *_, last = check.run_tests(6.0 if case == "hangs" else 100.0, False)
    assert found.items() <= last.items(), last
    if case == "hangs":
        assert last["words"] == "cut short after 6 s: nothing"
    assert check.verdict({"self-test": {"passed": None, "words": "-"}, "tests": last}).startswith(f"{word} (")
    if last["passed"] is not False:  # what failed is wrong, whatever else is right
        good = {"passed": True, "words": "2 of 2 kernels passed the self-test"}
        assert check.right({"self-test": good, "tests": last}) is True
        assert check.right({"self-test": good | {"passed": False}, "tests": last}) is False


@pytest.mark.skipif(not ops.has_kernel("cpu"), reason="there are no compiled kernels")
def test_the_gate_is_asked_where_no_doctor_answers(monkeypatch):
    """A machine with torch but without vLLM."""
    monkeypatch.setattr(check, "ask_doctor", lambda seconds: {"serving": None})
    found = check.self_test("cpu", 100.0)
    assert found["passed"] is True and found["words"] == "cpu: 5 of 5 kernels passed the self-test"
    assert found["faults"] == {} and found["doctor"] == {"serving": None}


@pytest.mark.skipif(not ops.has_kernel("cpu"), reason="there are no compiled kernels")
def test_one_bad_kernel_on_one_of_two_gpus_is_wrong(monkeypatch):
    fault = {"per-group tile 3": "wrong in 1 of 64 results"}
    tests = {
        "NVIDIA A": {"words": "the self-test did not run (no memory)", "faults": {}},
        "NVIDIA B": {"words": "7 of 8 kernels passed the self-test", "faults": fault},
    }
    monkeypatch.setattr(check, "ask_doctor", lambda seconds: {"serving": {"tests": tests}})
    found = check.self_test("cpu", 100.0)
    assert found["passed"] is False and list(found["faults"]) == ["NVIDIA B: per-group tile 3"]
    del tests["NVIDIA B"]
    assert check.self_test("cpu", 100.0)["passed"] is None


def test_a_doctor_that_takes_too_long_leaves_no_process(tmp_path, monkeypatch):
    """What it has started, vLLM's process for one, ends with it."""
    script, number = tmp_path / "python", tmp_path / "number"
    script.write_text(f"#!/bin/sh\nsleep 1000 &\necho $! >{number}\nwait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert check.ask_doctor(5.0) is None
    assert ended(int(number.read_text()))


@pytest.mark.skipif(not hasattr(torch.ops.w8a8_bismooth, "scaled_mm_tile"), reason="the CUDA kernels are not built")
def test_tiles_take_the_weights(monkeypatch):
    monkeypatch.setattr(timing, "prepare", lambda call, copies, device: call)
    problem = gemm.Problem(3, gemm.Weights(64, 256, "cpu", 2), False)
    for name, grouped in (("channel", False), ("group", True)):
        runs = tiles.compiled(problem, grouped)
        assert list(runs) == ["chosen"]  # tiles are those of a GPU
        gemm.check(name, problem, runs["chosen"](0))


def test_a_failing_implementation_is_left_out(monkeypatch, capsys):
    def broken(problem):
        raise OSError("libfoo.so: no such file\nmore")

    monkeypatch.setitem(gemm.IMPLEMENTATIONS, "cpu", {"ours-channel": gemm.ours(False, False), "vllm": broken})
    missing = {}
    calls = gemm.prepare_all(gemm.Problem(2, gemm.Weights(64, 128, "cpu", 2), False), "", missing)
    assert list(calls) == ["ours-channel"] and missing == {"vllm": "OSError: libfoo.so: no such file"}


def test_quant_rows(no_ceilings, monkeypatch, tmp_path):
    monkeypatch.setattr(ceilings, "bandwidth", lambda device, seconds: 1.0)
    monkeypatch.setattr(quant, "HIDDEN", 256)
    monkeypatch.setattr(quant, "MIDDLE", 512)

    def no_vllm(device):
        raise ImportError("no vLLM is installed")

    monkeypatch.setattr(quant, "load_vllm", no_vllm)
    monkeypatch.setattr(sys, "argv", ["quant", "--device", "cpu", "--dry", "--json", str(tmp_path / "quant.json")])
    quant.main()
    record = json.loads((tmp_path / "quant.json").read_text())
    assert set(record["left_out"]) == {"vllm", "vllm-fused"}
    found = {(row["op"], row["impl"], row["M"]) for row in record["rows"]}
    ops, names = ("plain", "add_norm", "silu_mul"), ("ours-token", "ours-group128", "torch")
    assert found == {(op, name, m) for op in ops for name in names for m in (1, 5)}
    assert all(row["us"] > 0 for row in record["rows"])


def test_turns_are_fair(monkeypatch):
    seen = []
    calls = {name: (lambda i, name=name: seen.append((name, i))) for name in "abc"}
    times = timing.times({name: timing.prepare(call, 2, "cpu") for name, call in calls.items()}, 0.0)
    assert [len(times[name]) for name in calls] == [5, 5, 5]
    turns = seen[3:]  # after the warm-up
    assert len(turns) == 15 and [turns.count((name, i)) for name in "abc" for i in (0, 1)] == [3, 2] * 3
    assert [turns[3 * t][0] for t in range(5)] == list("abcab")


def test_copies_outgrow_the_caches(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    assert [timing.copies_against_caches("cpu", size) for size in (10, 999, 5000)] == [201, 4, 2]


def test_layers_of_a_gpu():
    extents = gemm.EXTENTS["cuda"]
    shapes = extents["full"].layers()
    assert len(shapes) == 24 and shapes["LLaMA3-70B tp4 qkv"] == (2560, 8192)
    assert set(extents["quick"].layers()) < set(shapes) and len(extents["quick"].layers()) == 8


def test_ceilings_by_matrix_products():
    """The form that a GPU's INT8 ceiling takes, here on a CPU."""
    assert ceilings.int8_rate(0.0, device="cpu", size=64) > 0 and ceilings.gpu() == {}
    assert ceilings.answer(["no-such-command"])[0].startswith("no answer: ")
