"""llm-compressor's checkpoints by ``--quantization w8a8_bismooth``: served on our ops, or refused with the remedy."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from benchmarks.testbed import PYTHON
from tests.support import others
from tests.support.workers import engines
from vllm_w8a8_bismooth import ops, register

CONFIGS = json.loads((others.DATA / "configs.json").read_text())
SERVED = {
    "dynamic": (None, False, False),
    "static": (None, False, True),
    "tensor-dynamic": (None, True, False),
    "tensor-static": (None, True, True),
    "group": (32, False, False),
    "gptq": (None, False, False),
}
"""Kind -> weight_group_size, per_tensor and static of its scheme."""
REFUSED = {
    "asymmetric-dynamic": "asymmetric activations, with zero points",
    "asymmetric-static": "asymmetric activations, with zero points",
    "asymmetric-weights": "asymmetric weights, with zero points",
    "dynamic-tensor": "weights quantized per channel and activations dynamically per tensor",
    "group-static": "weights quantized per group and activations per tensor",
    "outputs": "quantized outputs",
    "w8a16": "activations in float",
    "w4a16": "weights in int4",
    "w4a8": "weights in int4",
    "fp8": "weights in float8",
}


def started(folder: Path, config: dict | None, flag: str | None):
    """What vLLM makes of a model and the flag, before it starts an engine; ``config`` is its quantization_config."""
    from vllm.engine.arg_utils import EngineArgs

    register()
    settings = json.loads((PYTHON.model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | ({"quantization_config": config} if config else {})))
    return EngineArgs(model=str(folder), quantization=flag, skip_tokenizer_init=True).create_engine_config()


def test_every_kind_is_recorded():
    assert set(CONFIGS) == set(others.KINDS) == {*SERVED, *REFUSED}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVED)
def test_served(tmp_path, kind):
    from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

    config = started(tmp_path, CONFIGS[kind], "w8a8_bismooth").quant_config
    linear = torch.nn.Linear(1, 1, device="meta")
    scheme = config.get_scheme(linear, "model.layers.0.mlp.down_proj")
    assert isinstance(scheme, W8A8Scheme) and scheme.activation_group_size is None
    assert (scheme.weight_group_size, scheme.per_tensor, scheme.static) == SERVED[kind]
    assert config.get_scheme(linear, "lm_head") is None


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_remedy(tmp_path, kind):
    with pytest.raises(ValueError, match=f"group 'group_0' has {REFUSED[kind]}; .* compressed-tensors, or convert the"):
        started(tmp_path, CONFIGS[kind], "w8a8_bismooth")


@pytest.mark.parametrize("kind", CONFIGS)
def test_left_alone_without_the_flag(tmp_path, kind):
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    config = started(tmp_path, CONFIGS[kind], None)
    assert config.model_config.quantization == "compressed-tensors"
    assert type(config.quant_config) is CompressedTensorsConfig


def test_one_group_of_several_is_enough_to_refuse(tmp_path):
    groups = {name: CONFIGS[name]["config_groups"]["group_0"] for name in ("static", "fp8", "w4a8")}
    with pytest.raises(ValueError, match="group 'fp8' has weights in float8 and its config group 'w4a8' has"):
        started(tmp_path, CONFIGS["static"] | {"config_groups": groups}, "w8a8_bismooth")


def test_what_is_not_quantized_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no quantization_config: convert the model with `bismooth convert`"):
        started(tmp_path, None, "w8a8_bismooth")
    with pytest.raises(ValueError, match="no linear is quantized"):
        started(tmp_path, CONFIGS["static"] | {"config_groups": {}}, "w8a8_bismooth")


@given(
    tokens=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.floats(2**-10, 8, width=32),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_static_linear_matches_the_definition(tokens, dtype, scale, biased, seed):
    """In NumPy's fp32 and int64; beyond 128 steps the codes are cut off."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(tokens, 48, generator=generator) * 60 * scale).to(dtype)
    weight = torch.randint(-128, 128, (24, 48), generator=generator, dtype=torch.int8)
    weight_scale, input_scale = torch.rand(24, 1, generator=generator), torch.tensor([[scale]])
    bias = torch.randn(24, generator=generator) if biased else None
    step = np.float32(scale)
    codes = np.clip(np.rint(x.float().numpy() * (np.float32(1) / step)), -128, 127).astype(np.int64)
    expected = (codes @ weight.numpy().astype(np.int64).T).astype(np.float32) * step * weight_scale.numpy().T
    expected = torch.from_numpy(expected if bias is None else expected + bias.numpy()).to(dtype)
    for stored in (weight, ops.pack_weight(weight, None)):
        got = ops.static_linear(x, stored, weight_scale, input_scale, bias)
        assert got.dtype == dtype and torch.equal(got, expected)


def test_static_linear_quantizes_as_stock_does(vllms_library):
    from vllm._custom_ops import scaled_int8_quant
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM's op for CUDA divides, and differs at near-ties")
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16() * 4
    for scale in (0.0313, 0.07, 1 / 3):
        codes = scaled_int8_quant(x, torch.tensor(scale))[0]
        product = ops.static_linear(x, torch.eye(256, dtype=torch.int8), torch.ones(256, 1), torch.tensor([[scale]]))
        assert torch.equal(product, (codes.float() * scale).bfloat16())


def test_static_linear_is_one_graph_for_any_number_of_tokens():
    counter = CompileCounter()
    compiled = torch.compile(ops.static_linear, backend=counter, fullgraph=True, dynamic=True)
    operands = torch.ones(16, 32, dtype=torch.int8), torch.ones(16, 1), torch.full((1, 1), 0.1)
    for tokens in (2, 5, 64):
        x = torch.randn(tokens, 32)
        assert torch.equal(compiled(x, *operands), ops.static_linear(x, *operands))
    assert counter.frame_count == 1


def fused_layer(shards: int, **options):
    """``shards`` linears ``[16, 64]`` fused, their scales not loaded, and the scheme."""
    from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

    layer, scheme = torch.nn.Module(), W8A8Scheme(None, None, fused={"qkv_proj": ["gate_proj", "up_proj"]}, **options)
    layer.prefix = "model.layers.3.self_attn.qkv_proj"
    scheme.create_weights(layer, [16] * shards, 64, torch.bfloat16, weight_loader=lambda *a: None)
    layer.weight.data.fill_(1)
    return layer, scheme


def test_scales_of_fused_linears(on_rank):
    """Each linear's rows have its weight scale; for activations the largest scale holds. Loaded as bf16 ``[1]``."""
    on_rank(0, 1)
    layer, scheme = fused_layer(3, per_tensor=True, static=True)
    for shard, name in enumerate("qkv"):
        layer.weight_scale.load_qkv_weight(torch.tensor([2.0**shard]).bfloat16(), shard_id=name)
        layer.input_scale.load_qkv_weight(torch.tensor([(0.25, 0.5, 0.125)[shard]]).bfloat16(), shard_id=name)
    scheme.process_weights_after_loading(layer)
    assert layer.weight_scale.flatten().tolist() == [1.0] * 16 + [2.0] * 16 + [4.0] * 16
    assert layer.input_scale.tolist() == [[0.5]]
    out = scheme.apply_weights(layer, torch.full((2, 64), 0.6, dtype=torch.bfloat16), None)  # code 1
    assert out[0].tolist() == [32.0] * 16 + [64.0] * 16 + [128.0] * 16


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0, -0.1])
def test_input_scale_must_have_arrived_and_be_positive(on_rank, wrong):
    on_rank(0, 1)
    layer, scheme = fused_layer(2, static=True)
    layer.weight_scale.data.fill_(1)
    layer.input_scale.load_merged_column_weight(torch.tensor([0.1]), shard_id=0)
    if wrong == wrong:  # NaN is what stands there if nothing arrives
        layer.input_scale.load_merged_column_weight(torch.tensor([wrong]), shard_id=1)
    with pytest.raises(ValueError, match="layers.3.self_attn.up_proj.input_scale holds .* missing or not positive"):
        scheme.process_weights_after_loading(layer)


def test_weight_scale_per_tensor_must_have_arrived(on_rank):
    on_rank(0, 1)
    layer, scheme = fused_layer(2, per_tensor=True)
    layer.weight_scale.load_merged_column_weight(torch.tensor([0.1]), shard_id=0)
    with pytest.raises(ValueError, match="layers.3.self_attn.up_proj.weight_scale .* missing"):
        scheme.process_weights_after_loading(layer)


def test_ranks_of_a_static_linear_add_up(on_rank):
    """Unlike dynamic scales, the fixed one is the same for each rank's part of a token."""
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(5, 128, generator=generator), torch.tensor([0.02])
    codes = torch.randint(-128, 128, (16, 128), generator=generator, dtype=torch.int8)
    outputs = []
    for rank in (0, 1):
        on_rank(rank, 2)
        layer, scheme = fused_layer(1, per_tensor=True, static=True)
        layer.weight.load_row_parallel_weight(codes)
        layer.weight_scale.load_row_parallel_weight(scale)
        layer.input_scale.load_row_parallel_weight(scale)
        scheme.process_weights_after_loading(layer)
        outputs.append(scheme.apply_weights(layer, x[:, rank * 64 : rank * 64 + 64], None))
    whole = ops.static_linear(x, codes, scale.expand(16, 1), scale.reshape(1, 1))
    torch.testing.assert_close(outputs[0] + outputs[1], whole, rtol=1e-5, atol=1e-4)


def answers(folder: Path, windows: np.ndarray, checkpoints: list[Path]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities of stock vLLM and of ours for each, all in one process."""
    flags = ("compressed-tensors", "w8a8_bismooth")
    requests = {
        f"{path.name}-{flag}": {"model": path, "options": {"quantization": flag}}
        for path in checkpoints
        for flag in flags
    }
    found, log = engines.run(folder, windows, requests)
    assert found.keys() == requests.keys(), log[-3000:]
    for name, answer in found.items():
        flag = requests[name]["options"]["quantization"]
        if flag == "compressed-tensors" and "BLOCK_N" in answer.get("error", ""):  # on a CPU with AMX, for odd widths
            pytest.skip(f"vLLM's own kernel does not take these shapes here: {answer['error']}")
        assert answer.get("quantization") == flag and bool(answer["schemes"]) == (flag == "w8a8_bismooth"), answer
    scores = [answer["logprobs"] for answer in found.values()]
    return list(zip(scores[::2], scores[1::2], strict=True))


def assert_same_up_to_near_ties(stock: np.ndarray, ours: np.ndarray, near: float) -> None:
    """At each position the best tokens' log-probabilities are ``near``, and so is the other's best where it differs."""
    best, other = stock.argmax(-1)[..., None], ours.argmax(-1)[..., None]
    for tokens in (best, other):
        difference = np.take_along_axis(stock, tokens, -1) - np.take_along_axis(ours, tokens, -1)
        assert np.abs(difference).max() < near
    assert (np.take_along_axis(stock, best, -1) - np.take_along_axis(stock, other, -1)).max() < near


@pytest.mark.engine
def test_served_as_stock_serves_it(tmp_path):
    """Scales per tensor and per channel, static and dynamic, in one checkpoint that llm-compressor wrote."""
    windows = np.random.default_rng(1).integers(2, 160, (4, 48))
    ((stock, ours),) = answers(tmp_path, windows, [others.DATA / "mixed"])
    assert_same_up_to_near_ties(stock, ours, near=0.08)


@pytest.mark.skipif("LLM_COMPRESSOR" not in os.environ, reason="no interpreter with llm-compressor in LLM_COMPRESSOR")
@pytest.mark.engine
def test_what_llm_compressor_writes_today(tmp_path):
    """The trained test bed through llm-compressor, and through both methods of vLLM."""
    served, refused = ("static", "tensor-dynamic", "gptq"), ("asymmetric-dynamic", "asymmetric-static")
    kinds = {name: {"group_0": others.KINDS[name]} for name in (*served, *refused)}
    others.convert(os.environ["LLM_COMPRESSOR"], PYTHON.model, tmp_path, PYTHON.heldout_windows(16), kinds)
    for kind in refused:
        config = json.loads((tmp_path / kind / "config.json").read_text())["quantization_config"]
        with pytest.raises(ValueError, match=REFUSED[kind]):
            started(tmp_path, config, "w8a8_bismooth")
    pairs = answers(tmp_path, PYTHON.heldout_windows(2), [tmp_path / kind for kind in served])
    for kind, (stock, ours) in zip(served, pairs, strict=True):
        assert_same_up_to_near_ties(stock, ours, near=0.25), kind
