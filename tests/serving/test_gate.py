"""Who serves on a GPU whose kernels fail their self-test: vLLM's selection over real processes and a pretended device.

The processes run the kernels on the emulated GPU of ``tests/csrc``. vLLM's own classes choose, as far as without a GPU.
"""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support import selftest
from tests.support.emulation import ROOT, compile_library
from tests.support.quantization import STOCK, TOKEN, W8A8, config_class
from vllm_w8a8_bismooth import ops, switch
from vllm_w8a8_bismooth.ops import gate, kernels
from vllm_w8a8_bismooth.ops.selftest import cases, examination, machine, verdict
from vllm_w8a8_bismooth.serving import servers

slow = pytest.mark.slow
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU here is to be a pretended one")
GROUP = {"strategy": "group", "group_size": 128}
OURS, STOCKS, TRITON, REFERENCE = "our kernel", "vLLM's own kernel", "our Triton kernel", "the torch reference"
EITHER = f"{STOCKS} or {OURS}"
"""By plan, which needs a GPU to be made."""
TILES = (9,)  # which does all granularities
EVERY = [f"{each} tile 9" for each in kernels.GRANULARITIES]


class Pretended:
    """A CUDA device 9.0 with compiled kernels.

    Attributes:
        masks: what the kernels were told to leave out, as ``device_restrict`` takes it.
        examined: numbers of the devices that were examined.
    """

    def __init__(self, monkeypatch, tmp_path):
        self._monkeypatch = monkeypatch
        self.masks, self.examined, self.names = [], [], ["NVIDIA A", "NVIDIA B"]
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        for variable in (switch.VARIABLE, switch.PLAN):
            monkeypatch.delenv(variable, raising=False)
        compiled = {
            ("cuda", operation, each): ops.COMPILED
            for operation in ("scaled_mm", *machine.QUANTIZATIONS)
            for each in kernels.GRANULARITIES
        }
        monkeypatch.setattr(kernels, "_SERVERS", kernels._SERVERS | compiled)
        monkeypatch.setattr(kernels, "_BUILDS", {"cuda": "13.0"})
        native = SimpleNamespace(
            device_problem=lambda index: "",
            driver_version=lambda: 13000,
            device_restrict=lambda *arguments: self.masks.append(arguments),
        )
        for name, value in vars(native).items():
            monkeypatch.setattr(torch.ops.w8a8_bismooth, name, value, raising=False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=self.names[i], major=9, minor=0)
        )
        # It would ask the GPU, or Triton for the GPU's name.
        monkeypatch.setattr(servers, "unsupported", lambda *_, **__: "")
        self.platform(90)
        gate.settle.cache_clear()

    def platform(self, capability):
        from vllm import platforms

        found = SimpleNamespace(
            device_type="cuda",
            is_cuda=lambda: True,
            get_device_capability=lambda: SimpleNamespace(to_int=lambda: capability),
        )
        self._monkeypatch.setattr(platforms, "current_platform", found)

    def breaks(self, **broken):
        self.break_by({0: broken})

    def break_by(self, broken):
        def examine(index):
            self.examined.append(index)
            return self.examination(index, selftest.of_gpus(TILES, broken), selftest.LIMITS)

        self._monkeypatch.setattr(examination, "examine", examine)

    examination = staticmethod(examination.examine)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the kernels for the host")
    compile_library(ROOT / "tests/csrc/gemm.cpp")  # before a limit of time runs
    who()  # vLLM is imported before torch pretends
    yield Pretended(monkeypatch, tmp_path)
    gate.settle.cache_clear()


@pytest.fixture
def log_anew(log):
    """What the plugin tells vLLM's log, which says a line only once a process."""
    from vllm import logger

    for once in (logger._print_info_once, logger._print_warning_once):
        once.cache_clear()
    return log


def who(group: dict | None = None) -> tuple[str, str]:
    """The class of vLLM's scheme for a linear, and who serves it by the rules."""
    weights, inputs = (W8A8 | group, TOKEN | group) if group else (W8A8, TOKEN)
    groups = {"g": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    config = config_class().from_config(STOCK | {"config_groups": groups})
    scheme = config.get_scheme(torch.nn.Linear(1, 1, device="meta"), "model.layers.0.mlp.down_proj")
    rule = servers.per_group if group else servers.per_channel
    return type(scheme).__name__, rule(servers.here()).kernel


def test_what_passes_serves(gpu, log_anew):
    gpu.breaks()
    assert who() == ("Choice", EITHER) and who(GROUP) == ("W8A8Scheme", OURS)
    assert gpu.masks == [(0, 0, 0, 0, True, True)] and gpu.examined == [0]
    (line,) = log_anew.messages
    assert line.startswith(
        "w8a8_bismooth, BISMOOTH_KERNELS=auto: per-channel on vLLM's own kernel or our kernel (by plan, 8 of 8 kernels "
        "passed the self-test); per-group on our kernel"
    )
    gate.settle.cache_clear()  # as in the next worker
    assert who() == ("Choice", EITHER) and gpu.examined == [0]


@pytest.mark.parametrize(
    ("capability", "plan", "found"),
    [(90, "off", ("CompressedTensorsW8A8Int8", STOCKS)), (100, "auto", ("W8A8Scheme", OURS))],
)
def test_what_passed_but_is_not_measured(gpu, capability, plan, found, monkeypatch):
    """Serves only where vLLM has no kernel."""
    monkeypatch.setenv(switch.PLAN, plan)
    gpu.platform(capability)
    good = [cases.Tile(9, each, 16, 64, 512, True) for each in kernels.GRANULARITIES]
    monkeypatch.setattr(examination, "examine", lambda _: verdict.Verdict(good, EVERY))
    assert who() == found


@pytest.mark.parametrize(
    "way",
    ["wrong", "crash", pytest.param("hang", marks=pytest.mark.slow), pytest.param("exit", marks=pytest.mark.slow)],
)
def test_each_way_to_fail_ends_with_vllms_own_kernel(gpu, way, log_anew):
    """Per-channel; groups go on with the kernels that passed."""
    gpu.breaks(**{"per-channel tile 9": way})
    assert who() == ("CompressedTensorsW8A8Int8", STOCKS)
    assert who(GROUP) == ("W8A8Scheme", OURS)
    assert gpu.masks == [(0, 1 << 9, 0, 0, True, True)]
    (line,) = log_anew.messages
    assert "per-channel on vLLM's own kernel (per-channel tile 9: " in line and "per-group on our kernel" in line


@pytest.mark.parametrize(("triton", "portable"), [pytest.param(True, TRITON, marks=slow), (False, REFERENCE)])
def test_groups_fall_back_to_triton_else_aloud_to_the_reference(gpu, triton, portable, monkeypatch, log_anew):
    if not triton:
        monkeypatch.setitem(sys.modules, "triton", None)
        for name in [name for name in sys.modules if name.startswith("vllm_w8a8_bismooth.ops.triton")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr("vllm_w8a8_bismooth.ops.triton", raising=False)
    gpu.breaks(**{"groups of 128 tile 9": "wrong"})
    assert who(GROUP) == ("W8A8Scheme", portable)
    assert who() == ("Choice", EITHER)
    assert ops.server("cuda", group_size=64) == ops.COMPILED
    lines = [line for line in log_anew.messages if "run on the torch reference, which is slow" in line]
    assert len(lines) == (not triton)


@slow
def test_data_centre_blackwell_has_no_kernel_of_vllms(gpu):
    gpu.platform(100)
    gpu.breaks(**{"per-channel tile 9": "wrong"})
    assert who() == ("W8A8Scheme", TRITON)


@slow
def test_a_wrong_quantization_takes_its_linears_along(gpu):
    gpu.breaks(quantize_activations="wrong")
    assert who() == ("CompressedTensorsW8A8Int8", STOCKS) and who(GROUP) == ("W8A8Scheme", TRITON)
    assert ops.server("cuda", "scaled_mm") == ops.COMPILED  # the product itself stays, behind Triton's quantization


@slow
def test_launches_that_must_not_overlap(gpu):
    gpu.breaks(**{machine.OVERLAP: "wrong"})
    assert who() == ("Choice", EITHER) and who(GROUP) == ("W8A8Scheme", OURS)
    assert gpu.masks == [(0, 0, 0, 0, True, False)]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("another architecture", "the kernels were compiled for other architectures"),
        ("an old driver", "torch finds no GPU: The NVIDIA driver on your system is too old"),
        ("no memory", "the self-test did not run (RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB)"),
        ("no sense", "the self-test did not run (JSONDecodeError: Expecting value: line 1 column 1 (char 0))"),
        ("no process", "the self-test did not run (its process could not be started: [Errno 11] Resource temporarily"),
    ],
)
def test_what_keeps_the_gate_shut(gpu, fault, reason, monkeypatch, log_anew):
    """One line, and the engine starts: vLLM's own kernel, else Triton's."""
    if fault == "another architecture":
        monkeypatch.setattr(torch.ops.w8a8_bismooth, "device_problem", lambda index: f"{reason} (...)")
    elif fault == "an old driver":

        def current_device():
            raise RuntimeError(f"{reason.partition(': ')[2]} (found version 11040).\nPlease update")

        monkeypatch.setattr(torch.cuda, "current_device", current_device)
    elif fault == "no sense":
        command = [sys.executable, "-c", "print('Hello', flush=True); input()"]
        monkeypatch.setattr(examination, "examine", lambda _: gpu.examination(0, command))
    elif fault == "no memory":
        gpu.breaks(start="memory")
    else:
        gpu.breaks()

        def unable(*arguments, **options):
            raise BlockingIOError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(examination.subprocess, "Popen", unable)
    assert who() == ("CompressedTensorsW8A8Int8", STOCKS) and who(GROUP) == ("W8A8Scheme", TRITON)
    (line,) = log_anew.messages
    assert f"per-channel on vLLM's own kernel ({reason}" in line and "per-group on our Triton kernel" in line
    assert not list(verdict.folder().glob("*.json"))


@slow
def test_two_different_gpus_get_a_verdict_each(gpu):
    gpu.break_by({0: {"per-channel tile 9": "wrong"}, 1: {}})
    assert list(gate.judge(0).faults) == ["per-channel tile 9"] and not gate.judge(1).faults
    assert not gate.judge(1).faults and gpu.examined == [0, 1]
    gpu.names[0] = "NVIDIA B"  # and equal ones share it
    assert not gate.judge(0).faults and gpu.examined == [0, 1]


def test_on_serves_without_the_gate(gpu, monkeypatch):
    monkeypatch.setenv(switch.VARIABLE, "on")
    monkeypatch.setattr(examination, "examine", None)
    assert who() == who(GROUP) == ("W8A8Scheme", OURS)


def test_on_needs_code_all_the_same(gpu, monkeypatch):
    monkeypatch.setenv(switch.VARIABLE, "on")
    monkeypatch.setattr(torch.ops.w8a8_bismooth, "device_problem", lambda index: "no code")
    assert who() == ("CompressedTensorsW8A8Int8", STOCKS)


def test_off_leaves_all_that_vllm_can_do_to_vllm(gpu, monkeypatch):
    monkeypatch.setenv(switch.VARIABLE, "off")
    monkeypatch.setattr(examination, "examine", None)
    assert who() == ("CompressedTensorsW8A8Int8", STOCKS) and who(GROUP) == ("W8A8Scheme", TRITON)
    assert {ops.server("cuda", name) for name in ("scaled_mm", *machine.QUANTIZATIONS)} == {ops.TRITON}


def test_compiled_graphs_are_kept_apart_by_who_serves(monkeypatch):
    """vLLM's key does not hold what a layer runs on: a graph with our operations would be loaded for its own."""
    from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config

    keys = []
    for ruling in (gate.Ruling("auto"), gate.Ruling("off", "BISMOOTH_KERNELS=off"), gate.Ruling("auto")):
        monkeypatch.setattr(gate, "settle", lambda _, ruling=ruling: ruling)
        with set_current_vllm_config(VllmConfig()):
            who()
            keys.append(get_current_vllm_config().compute_hash())
    assert keys[0] == keys[2] != keys[1]


def test_an_unknown_value_is_one_error(monkeypatch):
    monkeypatch.setenv(switch.VARIABLE, "of")
    with pytest.raises(ValueError, match="BISMOOTH_KERNELS='of' is unknown; expected auto, on or off"):
        who()
