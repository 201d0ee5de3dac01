"""The self-test of compiled kernels, in real processes, on this CPU and on an emulated GPU with broken kernels."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tests.support import selftest
from tests.support.emulation import ROOT, Kernels, compile_library
from tests.support.workers.selftest import Emulated
from vllm_w8a8_bismooth import ops, switch
from vllm_w8a8_bismooth.ops import gate, kernels
from vllm_w8a8_bismooth.ops.selftest import cases, examination, machine, verdict
from vllm_w8a8_bismooth.ops.selftest.verdict import Verdict

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the kernels for the host")
TOGETHER = (machine.SPLITS, machine.OVERLAP)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def emulation():
    """Compiled before a limit of time runs."""
    return Kernels(compile_library(ROOT / "tests/csrc/gemm.cpp"))


def examine(tiles, **broken):
    return examination.examine(0, selftest.command(tiles, **broken), selftest.LIMITS)


@needs_compiler
@pytest.mark.parametrize("tiles", [(2, 9), pytest.param(range(99), marks=pytest.mark.slow)], ids=["two", "all"])
def test_every_tile_passes_its_case(emulation, tiles):
    device = Emulated(tiles, {})
    there = [tile.granularities for tile in emulation.tiles if tile.index in tiles]
    assert len(device.tiles) == sum(bin(each).count("1") for each in there) >= 5
    for name in cases.names(device):
        assert cases.run(name, device) == "", name


@needs_compiler
def test_cases_reach_what_they_are_for(emulation):
    """Every tile's case goes round its ring twice, and fills no tile; the product that is captured is split."""
    for tile in Emulated(range(99), {}).tiles:
        k, groups = cases._shape(tile)
        assert k > 2 * tile.ring and k % 16 == 0 and k % groups == 0
        assert kernels.granularity(None if groups == 1 else k // groups) == tile.granularity
    for capability, sms, shared in ((90, 132, 232448), (80, 108, 166912), (89, 142, 101376), (120, 170, 101376)):
        assert emulation.choose(3, 1040, 4096, 0, capability, sms, shared)[2] > 1


@needs_compiler
def test_each_way_to_fail_costs_its_tile_alone(emulation):
    """A wrong number, an illegal access, an endless wait, an exit: named, and the rest is tried all the same."""
    began = time.monotonic()
    broken = {
        "per-channel tile 9": "wrong",
        "groups of 128 tile 9": "crash",
        "other groups tile 9": "hang",
        "per-channel tile 10": "exit",
        "groups of 128 tile 10": "raise",
    }
    found = examine([9, 10, 11], **broken)
    assert time.monotonic() - began < selftest.LIMITS.whole
    assert found.problem == "" and found.names[-2:] == TOGETHER and len(found.names) == 3 + 2 + 2 + 3 + 2
    assert "numbers are wrong at M = 1," in found.faults["per-channel tile 9"]
    assert {name: fault for name, fault in found.faults.items() if name != "per-channel tile 9"} == {
        "groups of 128 tile 9": "its process died of SIGSEGV",
        "other groups tile 9": "no answer in 8 s",
        "per-channel tile 10": "its process ended with status 7",
        "groups of 128 tile 10": "RuntimeError: CUDA error: an illegal memory access was encountered",
    }
    assert found.lost() == {"other groups": "other groups tile 9: no answer in 8 s"}
    assert found.words().startswith("7 of 12 kernels passed the self-test; not per-channel tile 9 (1 of ")
    assert Verdict.from_json(json.loads(json.dumps(found.to_json()))) == found


@needs_compiler
def test_quantization_and_launches_together_fail_alone(emulation):
    found = examine([9], rms_norm_quantize="wrong", **{machine.OVERLAP: "wrong"})
    assert list(found.faults) == ["rms_norm_quantize", machine.OVERLAP] and not found.lost()
    assert "codes or scales are wrong for x [1, 4096] in torch.float32" in found.faults["rms_norm_quantize"]


@needs_compiler
@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"start": "exit"}, "its process ended with status 7"),
        pytest.param({"start": "crash"}, "its process died of SIGSEGV", marks=pytest.mark.slow),
        pytest.param(
            {"start": "memory"},
            "RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB",
            marks=pytest.mark.slow,
        ),
        ({"per-channel tile 9": "memory"}, "RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB"),
    ],
)
def test_what_is_no_fault_of_a_kernel(emulation, broken, problem):
    found = examine([9], **broken)
    assert found.problem == problem
    assert set(found.faults) == set(found.names)  # nothing that was not tried is relied on
    verdict.keep({"device": "a"}, found)
    assert verdict.kept({"device": "a"}) is None  # the next process tries again


def test_a_process_that_cannot_be_started():
    found = examination.examine(0, ["/no/such/python"])
    assert found.words() == (
        "the self-test did not run (its process could not be started: [Errno 2] No such file or directory: "
        "'/no/such/python')"
    )
    found = examination.examine(0, [sys.executable, "-c", "raise SystemExit('no libcuda here')"])
    assert found.problem == "its process ended with status 1: no libcuda here"


def test_time_that_is_not_enough():
    limits = examination.Limits(start=1, case=1, whole=5)
    found = examination.examine(0, [sys.executable, "-c", "import time; time.sleep(60)"], limits)
    assert found.problem == "no answer in 1 s"


HANGS = """
import json, sys, time
done = json.loads(sys.stdin.readline())["ended"]
names = ["a", "b", "c", "d", "e", "f"]
print(json.dumps({"tiles": [], "names": names}), flush=True)
time.sleep(60)
"""


def test_kernels_that_all_hang():
    """What waiting has shown is kept, or every start would wait as long."""
    limits = examination.Limits(start=20, case=0.5, whole=1.5)
    began = time.monotonic()
    found = examination.examine(0, [sys.executable, "-c", HANGS], limits)
    assert time.monotonic() - began < 20
    assert found.problem == "" and set(found.faults) == {"a", "b", "c", "d", "e", "f"}
    assert found.faults["a"] == "no answer in 0.5 s" and found.faults["f"] == "not tried, as 1.5 s were not enough"


@pytest.mark.skipif(not ops.has_kernel("cpu"), reason="the CPU kernels are not built (see setup.py)")
def test_a_gpus_launches_rehearsed_on_this_cpu(monkeypatch):
    """What a GPU's process calls, with torch's and the kernels' functions for GPUs replaced."""
    native, masks = torch.ops.w8a8_bismooth, []
    rows = [9, 0, 32, 64, 512, 1, 9, 1, 32, 64, 512, 1, 9, 2, 32, 64, 512, 0]
    monkeypatch.setattr(native, "device_tiles", lambda index: rows, raising=False)
    monkeypatch.setattr(native, "device_restrict", lambda *given: masks.append(given), raising=False)
    one_tile = lambda *given: native.scaled_mm(*given[:6])  # noqa: E731
    monkeypatch.setattr(native, "scaled_mm_tile", one_tile, raising=False)
    monkeypatch.setattr(machine, "DEVICE", "cpu")
    monkeypatch.setattr(machine, "TURNS", 5)
    for name in ("synchronize", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=4))
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    device = machine.Gpu(0)
    device.operations = machine.QUANTIZATIONS
    assert len(cases.names(device)) == 3 + 3 + 2
    for name in cases.names(device):
        device.restrict({})
        assert cases.run(name, device) == "", name
    device.restrict({"groups of 128 tile 9": "wrong", machine.SPLITS: "wrong"})
    assert masks == [(0, 0, 0, 0, True, True)] * 8 + [(0, 0, 1 << 9, 0, False, True)]
    assert [group_size for *_, group_size in device._layers()] == [None, 32]
    product = native.scaled_mm  # broken when it begins early
    monkeypatch.setattr(native, "scaled_mm", lambda *given: product(*given[:6]) + (len(given) > 6))
    assert "begins before the quantization" in cases.run(machine.OVERLAP, device)


KEY = {"device": "NVIDIA H200", "driver": "580"}
TILE = cases.Tile(3, "per-channel", 128, 128, 768, True)
GOOD = Verdict((TILE,), (TILE.name, "quantize_activations"), {"quantize_activations": "wrong"})


def test_a_verdict_is_kept_for_its_key_alone():
    verdict.keep(KEY, GOOD)
    assert verdict.kept(KEY) == GOOD
    assert verdict.kept(KEY | {"driver": "590"}) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not JSON",
        "[]",
        "{}",
        json.dumps({"key": KEY, "verdict": {}}),
        json.dumps({"key": KEY, "verdict": GOOD.to_json() | {"tiles": [{"index": 1}]}}),
        json.dumps({"key": KEY, "verdict": GOOD.to_json() | {"faults": {"another": "wrong"}}}),
        json.dumps({"key": KEY | {"device": "another"}, "verdict": GOOD.to_json()}),
        "\0" * 100,
    ],
)
def test_a_file_that_holds_something_else(text, caplog):
    """Is named, left aside, and written anew."""
    verdict.keep(KEY, GOOD)
    (path,) = verdict.folder().glob("*.json")
    path.write_text(text)
    assert verdict.kept(KEY) is None
    (line,) = caplog.messages
    assert line.startswith(f"{path} is not what this version keeps") and line.endswith("the self-test runs anew")
    verdict.keep(KEY, GOOD)
    assert verdict.kept(KEY) == GOOD and len(list(verdict.folder().iterdir())) == 1


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with verdict.alone(KEY):
        verdict.keep(KEY, GOOD)
    assert verdict.kept(KEY) is None


@pytest.mark.skipif(not ops.has_kernel("cpu"), reason="the CPU kernels are not built (see setup.py)")
def test_this_cpu(monkeypatch):
    """The real processes, without any pretence; the second asks the file."""
    found = gate.judge(None)
    assert found.problem == "" and not found.faults
    assert {*kernels.GRANULARITIES, "quantize_activations"} <= {*found.names}
    monkeypatch.setattr(examination, "examine", None)
    assert gate.judge(None) == found


RELIEVED = """
import json, torch
from vllm_w8a8_bismooth import ops, switch
from vllm_w8a8_bismooth.ops import kernels, reference, schema
calls = []
def spy(*arguments):
    calls.append(arguments[3].shape[1])
    return reference.scaled_mm(*arguments)
schema.OPERATIONS["scaled_mm"] = spy
a, b = (torch.randint(-127, 128, (rows, 256), dtype=torch.int8) for rows in (4, 32))
scales = [torch.rand(32, groups) for groups in (1, 2, 4)]
seen = []
for granularities in ([], ["groups of 128"], ["per-channel", "other groups"]):
    kernels.relieve("cpu", "scaled_mm", granularities)
    for scale in scales:
        got = ops.scaled_mm(a, b, torch.rand(4, 1), scale, torch.float32)
    seen.append([calls[:], [ops.server("cpu", "scaled_mm", size) for size in (None, 128, 64)]])
    calls.clear()
print(json.dumps(seen))
"""


@pytest.mark.skipif(not ops.has_kernel("cpu"), reason="the CPU kernels are not built (see setup.py)")
def test_products_are_relieved_by_granularity():
    done = subprocess.run([sys.executable, "-c", RELIEVED], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        [[], ["compiled"] * 3],
        [[2], ["compiled", "reference", "compiled"]],
        [[1, 2, 4], ["reference"] * 3],
    ]
    assert "Warning" not in done.stderr


CHOSEN = """
import json, torch
from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.ops import kernels, reference, schema
calls = []
def spy(*arguments):
    calls.append(list(arguments[1].shape) + [arguments[3].shape[1]])
    return reference.scaled_mm(*arguments)
schema.OPERATIONS["scaled_mm"] = spy
weights = [torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((32, 256), (16, 256))]
seen = []
for step in (None, "reference", "compiled"):
    if step:
        kernels.choose("cpu", 32, 256, 2, step)
    for b in weights:
        for groups in (1, 2):
            a, a_scale, b_scale = torch.ones(4, 256, dtype=torch.int8), torch.ones(4, 1), torch.rand(len(b), groups)
            got = ops.scaled_mm(a, b, a_scale, b_scale, torch.float32)
            torch.testing.assert_close(got, reference.scaled_mm(a, b, a_scale, b_scale, torch.float32))
    seen.append([calls[:], ops.server("cpu")])
    calls.clear()
for who in ("triton", "stock"):
    try:
        kernels.choose("cpu", 32, 256, 2, who)
    except ValueError as error:
        seen.append(str(error))
print(json.dumps(seen))
"""


@pytest.mark.skipif(not ops.has_kernel("cpu"), reason="the CPU kernels are not built (see setup.py)")
def test_products_of_one_shape_go_to_who_is_chosen():
    done = subprocess.run([sys.executable, "-c", CHOSEN], capture_output=True, text=True, check=True)
    cannot = "the {} kernel cannot serve linears on cpu, where the compiled one does"
    assert json.loads(done.stdout) == [
        [[], "compiled"],
        [[[32, 256, 2]], "compiled"],
        [[], "compiled"],
        cannot.format("triton"),
        cannot.format("stock"),
    ]


def test_the_switch(monkeypatch):
    for value, wanted in ((None, "auto"), ("", "auto"), ("auto", "auto"), ("on", "on"), ("off", "off")):
        monkeypatch.delenv(switch.VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(switch.VARIABLE, value)
        assert switch.wanted() == wanted
    monkeypatch.setenv(switch.VARIABLE, "yes")
    with pytest.raises(ValueError, match="BISMOOTH_KERNELS='yes' is unknown; expected auto, on or off"):
        switch.wanted()


def test_a_device_can_be_asked_what_keeps_kernels_from_it():
    """It never raises: with a driver that is too old, or without one, as here, it says so."""
    if not hasattr(torch.ops.w8a8_bismooth, "device_problem"):
        pytest.skip("built without CUDA kernels (nvcc or nvidia-cutlass is missing)")
    if torch.cuda.is_available():
        assert torch.ops.w8a8_bismooth.device_problem(999) == "there is no CUDA device 999"
    else:
        assert "CUDA driver version is insufficient" in torch.ops.w8a8_bismooth.device_problem(0)
