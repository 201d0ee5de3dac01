import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import emulate
from benchmarks.demo import serve
from benchmarks.testbed import MODEL
from benchmarks.testbed.plant import plant
from tests import engine
from tests.conftest import edit_json
from vllm_w8a8_bismooth import register
from vllm_w8a8_bismooth.calibrate import read_text
from vllm_w8a8_bismooth.convert import convert
from vllm_w8a8_bismooth.recipe import Recipe

PROMPTS = [
    "import os\n\ndef main():\n    ",
    "class Node:\n    def __init__(self, ",
    "for i in range(",
    '"""Return the ',
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


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
    assert get_quantization_config("w8a8_bismooth").__name__ == "BiSmoothConfig"
    assert {name: get_quantization_config(name) for name in before} == before
    assert dict(vars(CompressedTensorsConfig)) == stock


def test_registration_never_raises():
    script = (
        "import sys, types; sys.modules['vllm'] = types.ModuleType('vllm')\n"
        "import vllm_w8a8_bismooth; vllm_w8a8_bismooth.register(); vllm_w8a8_bismooth.register()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "w8a8_bismooth is not available" in done.stderr


def config_class():
    from vllm_w8a8_bismooth.serving.config import BiSmoothConfig

    return BiSmoothConfig


W8A8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
TOKEN = W8A8 | {"strategy": "token", "dynamic": True}
STOCK = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": W8A8, "input_activations": TOKEN}}}
W4 = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": W8A8 | {"num_bits": 4}}}}


@pytest.mark.parametrize(
    ("checkpoint", "flag", "claimed"),
    [
        (STOCK | {"bismooth": {}}, None, True),
        (STOCK | {"bismooth": {}}, "w8a8_bismooth", True),
        (STOCK | {"bismooth": {}}, "compressed-tensors", False),
        (STOCK, None, False),
        (STOCK, "w8a8_bismooth", True),
        (W4, "w8a8_bismooth", False),
        ({"quant_method": "gptq", "bismooth": {}}, None, False),
        (None, "w8a8_bismooth", False),
    ],
)
def test_which_checkpoints_are_claimed(checkpoint, flag, claimed):
    answer = config_class().override_quantization_method(checkpoint, flag, hf_config=None)
    assert answer == ("w8a8_bismooth" if claimed else None)


@given(JSON, JSON, st.sampled_from([None, "w8a8_bismooth", "fp8"]))
def test_any_config_is_tolerated(groups, whole, flag):
    for checkpoint in (whole, {"quant_method": "compressed-tensors", "config_groups": groups}):
        config_class().override_quantization_method(checkpoint, flag, hf_config=None)


def row_parallel_scheme(weight_groups, columns):
    """Parameters of a linear as vLLM would ask for them."""
    from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

    layer, scheme = torch.nn.Module(), W8A8Scheme(weight_groups, weight_groups)
    layer.prefix = "model.layers.0.mlp.down_proj"
    scheme.create_weights(layer, [64], columns, torch.bfloat16, weight_loader=lambda *a: None)
    return layer, scheme


@pytest.fixture
def one_rank(monkeypatch):
    for name, value in {"rank": 0, "world_size": 1}.items():
        monkeypatch.setattr(f"vllm.model_executor.parameter.get_tensor_model_parallel_{name}", lambda v=value: v)


def test_group_size_must_divide_the_share_of_a_rank(one_rank):
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj: K = 352 on this rank .* group_size = 128"):
        row_parallel_scheme(128, 352)
    layer, _ = row_parallel_scheme(128, 256)
    assert layer.weight.shape == (64, 256) and layer.weight_scale.shape == (64, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_must_have_arrived(one_rank, value):
    layer, scheme = row_parallel_scheme(None, 256)
    with pytest.raises(ValueError, match="down_proj.weight_scale .* missing"):
        scheme.process_weights_after_loading(layer)
    layer.weight_scale.data.fill_(1)
    scheme.process_weights_after_loading(layer)
    layer.weight_scale.data[5] = value
    with pytest.raises(ValueError, match="down_proj.weight_scale"):
        scheme.process_weights_after_loading(layer)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The planted test bed, bi-smoothed and mixed, and the former without our marker."""
    folder = tmp_path_factory.mktemp("serving")
    names = {name: folder / name for name in ("planted", "bismooth", "mixed", "unmarked")}
    plant(MODEL, names["planted"])
    text = read_text(Path(MODEL).parent / "calibration.txt")
    convert(names["planted"], names["bismooth"], Recipe.of("bismooth", calibration_tokens=4096), text)
    convert(names["planted"], names["mixed"], Recipe.of("mixed", group_size=32))
    convert(names["planted"], names["unmarked"], Recipe.of("bismooth", calibration_tokens=4096), text)
    edit_json(names["unmarked"] / "config.json", lambda c: c["quantization_config"].pop("bismooth"))
    return names


def assert_same_up_to_near_ties(first: dict, second: dict, tie: float = 0.05) -> None:
    """Greedy tokens agree until, in a prompt, the first rates both choices within ``tie`` nats of each other."""
    agreed = 0
    for tokens, others, steps in zip(first["tokens"], second["tokens"], first["logprobs"], strict=True):
        for token, other, step in zip(tokens, others, steps, strict=True):
            if token != other:
                gap = step[str(token)] - step.get(str(other), -100)
                assert gap < tie, f"token {token} against {other}: {gap} nats apart"
                break
            agreed += 1
    assert agreed >= len(PROMPTS) * 4


def assert_close_to_emulation(model: Path, logprobs: list[float]) -> None:
    """The best first token of each prompt has the log-probability that fp32 on the reference ops gives it."""
    from transformers import AutoTokenizer

    emulated, encode = emulate.load(model), AutoTokenizer.from_pretrained(model)
    for prompt, logprob in zip(PROMPTS, logprobs, strict=True):
        with torch.no_grad():
            logits = emulated(encode(prompt, return_tensors="pt").input_ids).logits[0, -1]
        assert logprob == pytest.approx(logits.log_softmax(-1).max().item(), abs=0.05)


def ask(folder: Path, model: Path, plugins: str | None = None, **options) -> dict:
    """Greedy answers to all prompts; fails with the engine's log if there are none."""
    request = {"options": {"model": model, **options}, "prompts": PROMPTS, "max_tokens": 24}
    result, log = engine.run(folder, plugins, **request)
    assert result is not None, log[-3000:]
    return result | {"log": log}


@pytest.fixture(scope="module")
def stock(checkpoints, tmp_path_factory) -> dict:
    """The bi-smoothed checkpoint in vLLM without plugins."""
    return ask(tmp_path_factory.mktemp("stock"), checkpoints["bismooth"], plugins="", enforce_eager=True)


@pytest.mark.engine
def test_marked_checkpoint_is_detected_and_stock_serves_it_alike(checkpoints, stock, tmp_path):
    """Auto-detected, torch.compile on (vLLM's default); without the plugin the same greedy tokens up to near-ties."""
    ours = ask(tmp_path, checkpoints["bismooth"])
    assert ours["quantization"] == "w8a8_bismooth" and "per-channel linears run on" in ours["log"]
    assert stock["quantization"] == "compressed-tensors" and "w8a8_bismooth:" not in stock["log"]
    assert_same_up_to_near_ties(ours, stock)


@pytest.mark.engine
def test_stock_vllm_refuses_the_mixed_checkpoint(checkpoints, tmp_path):
    options = {"model": checkpoints["mixed"], "enforce_eager": True}
    result, log = engine.run(tmp_path, "", options=options, prompts=PROMPTS[:1], max_tokens=1)
    assert result is None and "No compressed-tensors compatible scheme was found" in log


@pytest.mark.engine
def test_mixed_checkpoint_in_eager_mode(checkpoints, tmp_path):
    ours = ask(tmp_path, checkpoints["mixed"], enforce_eager=True)
    assert ours["quantization"] == "w8a8_bismooth"
    assert_close_to_emulation(checkpoints["mixed"], [max(steps[0].values()) for steps in ours["logprobs"]])


@pytest.mark.engine
def test_other_models_are_not_touched(checkpoints, stock, tmp_path):
    """With and without the plugin: the same method, the same log-probabilities to the last bit."""
    plain = [ask(tmp_path, checkpoints["planted"], plugins, enforce_eager=True) for plugins in (None, "")]
    unmarked = [ask(tmp_path, checkpoints["unmarked"], enforce_eager=True), stock]
    for pair, method in ((plain, None), (unmarked, "compressed-tensors")):
        assert [result["quantization"] for result in pair] == [method, method]
        assert "w8a8_bismooth:" not in pair[0]["log"]
        assert pair[0]["tokens"] == pair[1]["tokens"] and pair[0]["logprobs"] == pair[1]["logprobs"]


@pytest.mark.engine
def test_server_with_the_explicit_flag(checkpoints, tmp_path, monkeypatch):
    """`vllm serve --quantization w8a8_bismooth` on the mixed checkpoint, compiled, in several processes, over HTTP."""
    from openai import OpenAI

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    flags = ("--quantization", "w8a8_bismooth", "--served-model-name", "mixed", "--max-model-len", "256")
    with serve(checkpoints["mixed"], tmp_path / "log", *flags) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused")
        assert [m.id for m in client.models.list().data] == ["mixed"]
        asked = {"model": "mixed", "max_tokens": 8, "temperature": 0, "logprobs": 5}
        answers = [client.completions.create(prompt=prompt, **asked).choices[0] for prompt in PROMPTS]
    assert all(answer.finish_reason == "length" for answer in answers)
    log = (tmp_path / "log").read_text()
    assert "per-group (32) linears run on" in log and "per-channel linears run on" in log
    assert_close_to_emulation(checkpoints["mixed"], [answer.logprobs.token_logprobs[0] for answer in answers])
