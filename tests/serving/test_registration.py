"""The entry point: cheap in every process, silent where nothing is wrong, one warning where something is."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from tests.support.sweep import sweep
from vllm_w8a8_bismooth import register, serving

MARKED = {"quant_method": "compressed-tensors", "bismooth": {}}


def test_entry_point():
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "w8a8_bismooth"]
    assert found.load() is register


def test_registration_is_idempotent_and_patches_nothing():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    before = {name: get_quantization_config(name) for name in QUANTIZATION_METHODS if name != "w8a8_bismooth"}
    stock = dict(vars(CompressedTensorsConfig))
    register()
    register()
    assert QUANTIZATION_METHODS.count("w8a8_bismooth") == 1
    registered = get_quantization_config("w8a8_bismooth")
    assert {name: get_quantization_config(name) for name in before} == before
    groups = {"g": {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}}
    config = registered.from_config(MARKED | {"format": "int-quantized", "config_groups": groups})
    assert isinstance(config, CompressedTensorsConfig) and config.get_name() == "w8a8_bismooth"
    assert dict(vars(CompressedTensorsConfig)) == stock


@pytest.mark.parametrize("process", sweep(["vllm.engine.arg_utils", "vllm.model_executor.models.registry"]))
def test_cost(process):
    """Of processes that load plugins, these two have imported least by then: any that parses arguments, and the one
    that looks at a model's class. They import nothing more but what is ours, and of that only what claims."""
    script = (
        f"import json, sys, {process}\n"
        "before = set(sys.modules)\n"
        "import vllm_w8a8_bismooth; vllm_w8a8_bismooth.register()\n"
        "print('\\n' + json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    modules = json.loads(done.stdout.splitlines()[-1])
    own = ("serving", "serving.claim", "serving.versions")
    assert modules == ["vllm_w8a8_bismooth", *(f"vllm_w8a8_bismooth.{name}" for name in own)]


@pytest.fixture
def unregistered(monkeypatch):
    """As in a process where nothing was registered or imported of serving/."""
    for function in (register, serving.register):
        function.cache_clear()
    for name in [n for n in sys.modules if n.startswith("vllm_w8a8_bismooth.serving.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(serving, name.rpartition(".")[2])
    yield
    for function in (register, serving.register):
        function.cache_clear()


def test_without_vllm():
    script = (
        "import sys; sys.modules['vllm'] = None\n"
        "import vllm_w8a8_bismooth; vllm_w8a8_bismooth.register(); vllm_w8a8_bismooth.register()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 0 and line.startswith("w8a8_bismooth is not available in this process: ModuleNotFound")


def test_a_module_moved(unregistered, log, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization.base_config", None)
    register()
    register()
    (line,) = log.messages
    assert line.startswith("w8a8_bismooth is not available in this process: ModuleNotFoundError: import of vllm.model_")


def test_vllm_refuses(unregistered, log, monkeypatch):
    from vllm.model_executor.layers import quantization

    def refuse(name: str):
        raise ValueError(f"{name} is taken")

    monkeypatch.setattr(quantization, "register_quantization_config", refuse)
    register()
    register()
    assert log.messages == ["w8a8_bismooth is not available in this process: ValueError: w8a8_bismooth is taken"]


@pytest.mark.parametrize("release", [(0, 25, 1), (0, 34, 0), (1, 0, 0), (0, 0, "dev")])
def test_an_untested_release(unregistered, log, monkeypatch, release):
    """It is tried."""
    import vllm
    from vllm.model_executor.layers.quantization import get_quantization_config

    monkeypatch.setattr(vllm, "__version_tuple__", release)
    monkeypatch.setattr(vllm, "__version__", "made up")
    register()
    register()
    assert log.messages == ["vLLM made up is outside the range that w8a8_bismooth is tested with (0.26 to 0.33)"]
    assert get_quantization_config("w8a8_bismooth").override_quantization_method(MARKED, None) == "w8a8_bismooth"


def test_a_tested_release(unregistered, log):
    register()
    assert log.messages == []


def test_what_serves_moved(unregistered, log, monkeypatch):
    """The checkpoint is left to vLLM, which may serve it as what it also is; other models hear nothing."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    monkeypatch.setitem(sys.modules, "vllm.model_executor.parameter", None)
    register()
    registered = get_quantization_config("w8a8_bismooth")
    assert registered.override_quantization_method({"quant_method": "fp8"}, None) is None
    assert log.messages == []
    assert registered.override_quantization_method(MARKED, None) is None
    (line,) = log.messages
    assert line.startswith("w8a8_bismooth cannot serve this checkpoint with this vLLM: ModuleNotFoundError")
