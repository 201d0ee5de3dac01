"""torch.compile, and what vLLM's hook for quantized activations makes of our fused kernel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks.score import engine_environment
from benchmarks.testbed import PYTHON
from tests.support.agreement import assert_same_up_to_near_ties
from tests.support.conversion import convert
from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.method.quantize import quantize_weight
from vllm_w8a8_bismooth.recipe import Recipe

TEXT = Path(PYTHON.model).parent / "calibration.txt"
NOISE = 0.3
"""Nats between the compiled and the eager engine, which run different norms and rotary embeddings: 0.15 at most and
0.031 on average over these prompts' steps. Between stock vLLM's, with its own INT8 linears, it was 0.18 and 0.031."""
compiled_only = pytest.mark.skipif(
    not ops.has_kernel("cpu", "silu_mul_quantize"), reason="the CPU kernels are not built (see setup.py)"
)


@pytest.fixture(scope="module")
def activate():
    """``activate(x, layer)`` as vLLM's Llama does it, from 0.32 on; ``activate(x)`` not fused."""
    hook = pytest.importorskip("vllm.model_executor.layers.fusion.fused_act_quant")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.activation import SiluAndMul

    with set_current_vllm_config(VllmConfig()):
        module = SiluAndMul()

    def activate(x, layer=None):
        return module.forward_native(x) if layer is None else hook.maybe_fused_act_quant(module, x, layer)

    return activate


@pytest.fixture
def make_layer(on_rank):
    """``make_layer(group_size)``: a linear of 96 to 64 features as it is after loading."""
    from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

    def make(group_size: int | None) -> torch.nn.Module:
        on_rank(0, 1)
        layer, scheme = torch.nn.Module(), W8A8Scheme(group_size, group_size)
        scheme.create_weights(layer, [64], 96, torch.bfloat16, weight_loader=lambda *a: None)
        codes, scales = quantize_weight(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), group_size)
        layer.weight.data.copy_(codes)
        layer.weight_scale.data.copy_(scales)
        layer.scheme = scheme
        scheme.process_weights_after_loading(layer)
        return layer

    return make


@pytest.mark.slow
@compiled_only
def test_rows_serve_our_linears_alone(make_layer, activate):
    """Another model's linear that takes INT8 per token, by vLLM's own key, finds no row of ours."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import kInt8DynamicTokenSym

    from vllm_w8a8_bismooth.serving import fusion

    def stock() -> dict:
        return {row: producer for row, producer in fusion.REGISTRY.items() if not isinstance(row[1], fusion.Key)}

    before = stock()
    ours, other = make_layer(None), torch.nn.Module()
    other._input_quant_key = kInt8DynamicTokenSym
    assert stock() == before
    x = torch.randn(3, 192, dtype=torch.bfloat16)
    assert isinstance(activate(x, ours), fusion.QuantizedActivation)
    assert isinstance(activate(x, other), torch.Tensor)
    ours.requires_unquantized_input = True  # as vLLM's wrapper of a layer with an adapter says
    assert isinstance(activate(x, ours), torch.Tensor)


@pytest.mark.parametrize("lacking", ["kernel", "hook"])
def test_nothing_is_offered_without_a_kernel_or_the_hook(make_layer, activate, monkeypatch, lacking):
    from vllm_w8a8_bismooth.serving import fusion

    if lacking == "hook":  # vLLM before 0.32
        monkeypatch.setattr(fusion, "REGISTRY", None)
    else:
        monkeypatch.setattr(ops, "server", lambda *_: ops.REFERENCE)
    layer = make_layer(None)
    x = activate(torch.randn(3, 192), layer)
    assert isinstance(x, torch.Tensor) and layer.scheme.apply_weights(layer, x, None).shape == (3, 64)


@compiled_only
def test_an_activation_for_another_linear_is_refused(make_layer, activate):
    per_token, per_group = make_layer(None), make_layer(32)
    given = activate(torch.randn(3, 192), per_group)
    per_group.scheme.apply_weights(per_group, given, None)
    with pytest.raises(AssertionError, match="QuantizedActivation key"):
        per_token.scheme.apply_weights(per_token, given, None)


@compiled_only
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fusing_changes_no_bit_and_compiles_once(make_layer, activate, group_size, dtype):
    layer, bias, counter = make_layer(group_size), torch.randn(64), CompileCounter()

    def block(x):
        return layer.scheme.apply_weights(layer, activate(x, layer), bias)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for m in (5, 7, 40, 64):
        x = torch.randn(m, 192, generator=torch.Generator().manual_seed(m)).to(dtype)
        unfused = layer.scheme.apply_weights(layer, activate(x), bias)
        assert torch.equal(block(x), unfused) and torch.equal(compiled(x), unfused)
    assert counter.frame_count == 1
    deep = torch.randn(2, 3, 192).to(dtype)
    assert torch.equal(block(deep), block(deep.view(6, 192)).view(2, 3, 64))
    assert block(deep[:, :0]).shape == (2, 0, 64)


def mean_difference(first: dict, second: dict) -> float:
    """Mean difference of the log-probabilities of all tokens that both engines list for a prompt's first step."""
    pairs = [(mine[0], theirs[0]) for mine, theirs in zip(first["logprobs"], second["logprobs"], strict=True)]
    differences = [abs(mine[t] - theirs[t]) for mine, theirs in pairs for t in mine.keys() & theirs.keys()]
    return sum(differences) / len(differences)


@pytest.mark.engine
def test_engine_eager_and_compiled(checkpoints, tmp_path):
    """One compilation for all batch sizes, our fused op in it, and the answers of the eager engine."""
    model, answer = tmp_path / "model", tmp_path / "answer.json"
    grouped = dict(group_size=32, group_layers=r"layers\.0\.mlp\.down_proj")
    convert(checkpoints["planted"], model, Recipe.of("bismooth", calibration_tokens=4096, **grouped), read_text(TEXT))
    environment = engine_environment() | {"VLLM_CACHE_ROOT": str(tmp_path), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "tests.support.workers.compiled", model, TEXT, answer]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800
    )
    assert answer.exists(), done.stdout[-3000:]
    found = json.loads(answer.read_text())
    assert found["rows_at_registration"] == 0
    eager, unfused, compiled = (found[mode] for mode in ("eager", "unfused", "compiled"))

    blocks, linears = 6, 4
    plain = {"quantize_activations": blocks * linears, "scaled_mm": blocks * linears}
    fused = plain
    if ops.has_kernel("cpu", "linear"):
        plain = {"linear": blocks * linears}
        fused = {"linear": blocks * (linears - 1), "linear with silu": blocks}
    assert unfused["ops"] == plain and eager["ops"] == compiled["ops"] == fused
    assert eager["tokens"] == unfused["tokens"] and eager["logprobs"] == unfused["logprobs"]

    assert compiled["compiling"]["num_models_seen"] == 1 and compiled["compiling"].get("graph_breaks", 0) == 0
    assert not compiled["compiled_later"]
    assert_same_up_to_near_ties(compiled, eager, NOISE)
    assert mean_difference(compiled, eager) < 0.05
