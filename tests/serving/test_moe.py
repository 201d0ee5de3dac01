"""Experts in vLLM's own layer, which needs no engine, and three kinds of mixtures in real ones."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, silu

from benchmarks import emulate
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.mixture import CHECKPOINT, PREFIX, vllms_layer
from tests.support.predictions import SPARSE, WINDOWS, divergence, transformers_predictions, write
from tests.support.quantization import TOKEN, W8A8, config_class
from tests.support.workers import engines
from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.method.quantize import dequantize_weight, quantize_weight
from vllm_w8a8_bismooth.ops.gate import Ruling
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.serving import servers
from vllm_w8a8_bismooth.serving.servers import Platform

ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": partial(gelu, approximate="tanh")}


def stored(
    experts: int, hidden: int, inner: int, seed: int = 0, group_size: int | None = None
) -> dict[str, torch.Tensor]:
    """The experts' tensors, as a checkpoint holds them, by their names inside the block's experts."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for expert in range(experts):
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            codes, scale = quantize_weight(torch.randn(shape, generator=generator) / shape[1] ** 0.5, group_size)
            tensors |= {f"{expert}.{name}_proj.weight": codes, f"{expert}.{name}_proj.weight_scale": scale}
    return tensors


def loaded(tensors: dict[str, torch.Tensor], **settings):
    """vLLM's layer after its loader and what vLLM calls behind it."""
    layer = vllms_layer(**settings)
    list(layer.load_weights(tensors.items()))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def run(layer, x, shares, chosen) -> torch.Tensor:
    return layer.forward_modular(x, shares, chosen.int())


def rounded(x: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
    """What a token is after its quantization, in fp64."""
    groups = x.double().unflatten(-1, (-1, group_size or len(x)))
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127
    return ((groups / scale).nan_to_num().round() * scale).flatten()


def emulated(tensors, x, shares, chosen, activation: str = "silu", group_size: int | None = None) -> torch.Tensor:
    """Token by token with dequantized weights, in fp64 but for the roundings that a dense MLP has."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (row, names, parts) in enumerate(zip(x, chosen, shares, strict=True)):
        for expert, share in zip(names.tolist(), parts, strict=True):
            weight = partial(weight_of, tensors, expert)
            gate, up = (torch.mv(weight(name), rounded(row, group_size)).to(x.dtype) for name in ("gate", "up"))
            inner = rounded(ACTIVATIONS[activation](gate) * up, group_size)
            out[token] += share.double() * (weight("down") @ inner)
    return out


def weight_of(tensors: dict[str, torch.Tensor], expert: int, name: str) -> torch.Tensor:
    linear = f"{expert}.{name}_proj.weight"
    return dequantize_weight(tensors[linear], tensors[f"{linear}_scale"]).double()


def routing(tokens: int, experts: int, top: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random shares and choices; an expert is never chosen twice."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator).topk(top)
    return scores.values.softmax(-1), scores.indices


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Where two values lie on both sides of a rounding boundary, a code differs by one of 127."""
    assert found.isfinite().all() and found.shape == expected.shape
    assert len(found) == 0 or (found.double() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.slow
@given(
    tokens=st.integers(0, 9),
    experts=st.integers(1, 6),
    width=st.sampled_from([32, 40, 64]),
    inner=st.sampled_from([16, 36, 96]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_a_layer_is_the_sum_of_its_experts(tokens, experts, width, inner, dtype, activation, seed, data):
    """From one token, which leaves experts idle, to several for each; widths that packing pads."""
    top = data.draw(st.integers(1, experts))
    tensors = stored(experts, width, inner, seed)
    layer = loaded(tensors, experts=experts, hidden=width, inner=inner, top=top, activation=activation)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    shares, chosen = routing(tokens, experts, top, seed)
    out = run(layer, x, shares, chosen)
    assert out.dtype == dtype and out.shape == x.shape
    assert_close(out, emulated(tensors, x, shares, chosen, activation))


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_add_up(expert_parallel, ranks):
    """As vLLM's own loader cuts them: 5 experts are unevenly spread, and some tokens have none on a rank."""
    tensors, (shares, chosen) = stored(5, 64, 96), routing(7, 5, 2, 1)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    parts = []
    for rank in range(ranks):
        layer = loaded(tensors, experts=5, rank=(rank, ranks), expert_parallel=expert_parallel)
        parts.append(run(layer, x, shares, chosen))
    whole = run(loaded(tensors, experts=5), x, shares, chosen)
    if expert_parallel:  # only the order of fp32 sums differs
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
    else:  # each rank quantizes its part of the inner channels by its own range: nothing that the whole does
        share = 96 // ranks
        for rank, part in enumerate(parts):
            mine = slice(rank * share, (rank + 1) * share)
            slices = {
                n: t[:, mine] if "down" in n and "scale" not in n else t[mine] if "down" not in n else t
                for n, t in tensors.items()
            }
            assert_close(part, emulated(slices, x, shares, chosen))
        assert (sum(parts) - whole).abs().max() < 0.05 * whole.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_does_not_see_the_others(dtype):
    """Alone, in other company, and with its experts in another order: the same bits."""
    layer = loaded(stored(6, 64, 96), experts=6, top=3)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    shares, chosen = routing(50, 6, 3, 0)
    whole = run(layer, x, shares, chosen)
    for token in range(50):
        mine = slice(token, token + 1)
        assert torch.equal(run(layer, x[mine], shares[mine].flip(1), chosen[mine].flip(1)), whole[mine])
    assert torch.equal(run(layer, x.flip(0), shares.flip(0), chosen.flip(0)).flip(0), whole)


GROUPED = [side | {"strategy": "group", "group_size": 32} for side in (W8A8, TOKEN)]


def scheme(weights: dict, inputs: dict | None, *targets: str) -> dict:
    return {"targets": list(targets), "weights": weights, "input_activations": inputs}


def grouped(activations: dict) -> dict:
    """A checkpoint all of whose linears have groups of 32 columns."""
    return CHECKPOINT | {"config_groups": {"g": scheme(GROUPED[0], activations, "Linear")}}


@pytest.mark.parametrize(("activations", "size"), [(GROUPED[1], 32), (TOKEN, None)])
def test_experts_with_groups(activations, size):
    tensors, (shares, chosen) = stored(4, 64, 96, group_size=32), routing(9, 4, 2, 0)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = loaded(tensors, checkpoint=grouped(activations))
    assert layer.w2_weight_scale.shape == (4, 64, 3)
    assert_close(run(layer, x, shares, chosen), emulated(tensors, x, shares, chosen, group_size=size))


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_ranks_add_up_with_groups(expert_parallel):
    """Each rank has whole groups, whose scales do not depend on the others: only the order of fp32 sums differs."""
    tensors, (shares, chosen) = stored(5, 64, 128, group_size=32), routing(7, 5, 2, 1)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    settings = {"experts": 5, "inner": 128, "checkpoint": grouped(GROUPED[1])}
    parts = [
        run(loaded(tensors, rank=(rank, 2), expert_parallel=expert_parallel, **settings), x, shares, chosen)
        for rank in (0, 1)
    ]
    torch.testing.assert_close(sum(parts), run(loaded(tensors, **settings), x, shares, chosen), rtol=1e-5, atol=1e-6)


def test_groups_must_fit_the_share_of_a_rank():
    with pytest.raises(ValueError, match=rf"{PREFIX}: K = 48 is not a multiple of group_size = 32.*smaller"):
        vllms_layer(rank=(0, 2), checkpoint=grouped(GROUPED[1]))


@pytest.mark.parametrize(
    ("platform", "method"),
    [
        (Platform("cuda", "compiled", "compiled", "triton", 90), "Experts"),
        (Platform("cuda", "compiled", "compiled", "reference", 90), None),
    ],
)
def test_experts_with_groups_on_a_gpu(monkeypatch, platform, method):
    """By Triton's kernels or not at all: no other could be in a CUDA graph."""
    monkeypatch.setattr(servers, "here", lambda: platform)
    if method is None:
        with pytest.raises(ValueError, match=rf"{PREFIX}: per-group experts cannot be served here: Triton, which"):
            vllms_layer(checkpoint=grouped(GROUPED[1]))
    else:
        assert type(vllms_layer(checkpoint=grouped(GROUPED[1])).quant_method).__name__ == method


@pytest.mark.parametrize("kernels_of_vllm", [True, False])
def test_experts_switched_off_on_a_cpu(monkeypatch, kernels_of_vllm):
    """vLLM's own method where it has kernels for the CPU; else ours, on the reference, which is said aloud at load."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8 as vllms,
    )

    def select(**_):
        if not kernels_of_vllm:
            raise NotImplementedError("No Int8 MoE backend supports the deployment configuration.")
        return None, None

    off = Platform("cpu", "reference", "reference", "reference", ruling=Ruling("off", "BISMOOTH_KERNELS=off"))
    monkeypatch.setattr(servers, "here", lambda: off)
    monkeypatch.setattr(vllms, "select_int8_moe_backend", select)
    assert type(vllms_layer().quant_method).__name__ == ("StockExperts" if kernels_of_vllm else "Experts")


def test_routing_weights_on_the_input():
    """Llama 4 multiplies the one expert's input; what comes out of it is then not multiplied again."""
    tensors, (shares, chosen) = stored(4, 64, 96), routing(5, 4, 1, 0)
    x, shares = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), shares * 0.3
    layer = loaded(tensors, top=1, apply_router_weight_on_input=True)
    assert_close(run(layer, x, shares, chosen), emulated(tensors, x * shares, torch.ones_like(shares), chosen))


def test_dummy_weights():
    """What ``--load-format dummy`` leaves: codes as they come, small scales of either sign."""
    from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

    layer, (shares, chosen) = vllms_layer(), routing(3, 4, 2, 0)
    for parameter in layer.parameters():
        initialize_single_dummy_weight(parameter)
    layer.quant_method.process_weights_after_loading(layer)
    assert run(layer, torch.randn(3, 64), shares, chosen).isfinite().all()


def test_packed_weights_replace_the_loaded_ones():
    """Under their own names, in as much memory, and so that each expert's can be unpacked."""
    tensors, layer = stored(4, 64, 96), vllms_layer()
    before = {name: (p.nbytes, p.weight_loader) for name, p in layer.named_parameters()}
    list(layer.load_weights(tensors.items()))
    layer.quant_method.process_weights_after_loading(layer)
    assert {name: (p.nbytes, p.weight_loader) for name, p in layer.named_parameters()} == before
    up = ops.unpack_weight(layer.w13_weight[2], layer.w13_weight_scale[2], 64)[96:]
    assert layer.w13_weight.dtype == torch.uint8 and torch.equal(up, tensors["2.up_proj.weight"])


@pytest.mark.parametrize("linear", ["gate", "up", "down"])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_scales_must_have_arrived(linear, value):
    """The second of two ranks has experts 2 and 3; of the whole list, it misses that of 3."""
    tensors = stored(4, 64, 96)
    scale = f"3.{linear}_proj.weight_scale"
    if value is None:
        del tensors[scale]
    else:
        tensors[scale][5] = value
    with pytest.raises(ValueError, match=rf"{PREFIX}.{scale} holds values .* missing .*\(0 more experts"):
        loaded(tensors, rank=(1, 2), expert_parallel=True)
    loaded(tensors, rank=(0, 2), expert_parallel=True)


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("2.gate_proj.weight", (64, 64)),
        ("2.up_proj.weight", (96, 128)),
        ("2.down_proj.weight", (64, 48)),
        ("2.gate_proj.weight_scale", (96, 2)),
        ("2.down_proj.weight_scale", (64,)),
    ],
)
def test_shapes_must_be_those_of_the_model(tensor, shape):
    """A smaller one would leave the rest of the expert to chance."""
    tensors = stored(4, 64, 96)
    tensors[tensor] = torch.ones(shape, dtype=tensors[tensor].dtype)
    with pytest.raises(ValueError, match=re.escape(f"{PREFIX}.{tensor} has shape {list(shape)}, but config.json")):
        loaded(tensors, rank=(1, 2))


def test_vllms_own_method_gets_the_same_check(monkeypatch):
    """On a GPU; a hidden size that vLLM pads leaves rows which no checkpoint fills."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8 as vllms,
    )

    from vllm_w8a8_bismooth.serving import moe

    monkeypatch.setattr(servers, "here", lambda: Platform("cuda", "compiled", "compiled", "triton", 90))
    monkeypatch.setattr(vllms, "select_int8_moe_backend", lambda **_: (None, None))
    layer, tensors = vllms_layer(hidden=80, hidden_dim_unpadded=64), stored(4, 64, 96)
    assert type(layer.quant_method) is moe.StockExperts
    missing = tensors.pop("1.up_proj.weight_scale")
    list(layer.load_weights(tensors.items()))
    with pytest.raises(ValueError, match=rf"{PREFIX}.1.up_proj.weight_scale holds"):
        layer.quant_method.process_weights_after_loading(layer)
    list(layer.load_weights([("1.up_proj.weight_scale", missing)]))
    moe.check_scales(layer)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"activation": "swigluoai"}, "the activation swigluoai"),
        ({"swiglu_limit": 7.0}, "a clamped activation"),
        ({"has_bias": True}, "biases"),
        ({"apply_router_weight_on_input": True}, "routing weights on the input, several per token,"),
    ],
)
def test_other_experts_are_refused_while_the_model_is_built(settings, what):
    with pytest.raises(ValueError, match=rf"{PREFIX}: INT8 experts with {what} are not served by"):
        vllms_layer(**settings)


PER_CHANNEL = scheme(W8A8, TOKEN, "Linear")


@pytest.mark.parametrize(
    ("groups", "ignore", "message"),
    [
        ([scheme(W8A8, W8A8 | {"strategy": "tensor"}, "Linear")], [], "input_activations .* per tensor, static;"),
        ([scheme(W8A8 | {"strategy": "tensor"}, TOKEN, "Linear")], [], "weights .* per tensor, static;"),
        ([scheme(*GROUPED, r"re:.*experts\.2\..*"), PER_CHANNEL], [], r"0.gate_proj and .*experts.2.gate_proj differ"),
        ([PER_CHANNEL], [r"re:.*experts\.3\.down_proj$"], r"0.gate_proj and .*experts.3.down_proj differ"),
    ],
)
def test_schemes_that_are_refused(groups, ignore, message):
    """Before any weight is loaded, with the layer's name and what to do."""
    checkpoint = CHECKPOINT | {"config_groups": dict(enumerate(groups)), "ignore": ignore}
    with pytest.raises(ValueError, match=rf"{PREFIX}.*{message}.*convert again"):
        vllms_layer(checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("group", "ignore"),
    [
        (PER_CHANNEL, [r"re:.*mlp\.experts\..*"]),
        (scheme(W8A8, TOKEN, r"re:.*self_attn.*"), []),
    ],
)
def test_experts_in_float_are_left_to_vllm(group, ignore):
    from vllm_w8a8_bismooth.serving.moe import method_of

    config = config_class().from_config(CHECKPOINT | {"config_groups": {"g": group}, "ignore": ignore})
    assert method_of(config, vllms_layer(), PREFIX) is None


@pytest.mark.parametrize("model_type", SPARSE)
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, None),
        ({"group_layers": r"self_attn|shared_expert\.|mlp\.(gate|up|down)_proj"}, None),
        ({"group_layers": "self_attn", "ignore": r"\.experts\."}, "float"),
        ({"group_layers": r"layers\.1\..*\.experts\.0"}, 32),
        ({"group_layers": "."}, 32),
    ],
    ids=["by the weights", "all but the experts", "experts in float", "experts of one block", "everything"],
)
def test_experts_of_our_checkpoints_have_a_method(tmp_path, model_type, options, size):
    """Whatever else is per-group, there is a target for them."""
    from vllm_w8a8_bismooth.serving.moe import Experts, method_of

    convert(write(tmp_path / "source", model_type), tmp_path / "out", Recipe.of("mixed", group_size=32, **options))
    config = config_class().from_config(
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    )
    block, names = (
        ("block_sparse_moe", "w1 w2 w3") if model_type == "mixtral" else ("mlp", "gate_proj down_proj up_proj")
    )
    ours = dict(zip(("ckpt_gate_proj_name", "ckpt_down_proj_name", "ckpt_up_proj_name"), names.split(), strict=True))
    method = method_of(config, vllms_layer(**ours), f"model.layers.1.{block}.experts")
    if size == "float":
        assert method is None
    else:
        assert isinstance(method, Experts) and method.weight_group_size == method.activation_group_size == size


@pytest.mark.parametrize("option", ["group_layers", "ignore"])
@pytest.mark.parametrize(
    ("model_type", "owner", "names"),
    [
        ("llama4_text", "feed_forward", ["gate_up_proj", "down_proj", "gate_up_proj"]),
        ("mixtral", "mlp", ["w1", "w2", "w3"]),
    ],
)
def test_experts_that_vllm_calls_otherwise(tmp_path, model_type, owner, names, option):
    """Llama 4's gate and up are one in vLLM; what MiniMax-M2 has in block_sparse_moe is in mlp there."""
    from vllm_w8a8_bismooth.serving.moe import method_of

    recipe = Recipe.of("mixed", group_size=64, **{option: r"\.experts\."})
    convert(write(tmp_path / "source", model_type), tmp_path / "out", recipe)
    config = config_class().from_config(
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    )
    ours = dict(zip(("ckpt_gate_proj_name", "ckpt_down_proj_name", "ckpt_up_proj_name"), names, strict=True))
    method = method_of(config, vllms_layer(**ours), f"model.layers.1.{owner}.experts")
    assert method is None if option == "ignore" else method.weight_group_size == 64


LAYERS = {
    "mixtral": {"None": 3},
    "qwen2_moe": {"None": 2},
    "qwen3_moe": {"None": 2},
    "mixtral-grouped": {"None": 1, "32": 2},
    "qwen2_moe-grouped": {"32": 2},
}
"""Converted mixtures -> how many layers of experts have which group size."""


@pytest.mark.engine
def test_mixtures_in_vllm(tmp_path, calibration_text):
    """Mixtral, Qwen2-MoE with its shared expert, Qwen3-MoE; one of them compiled, and loaded anew while it runs.

    All as close to the emulation as the dense types are to the original. The median over the tokens, because one
    whose router hesitates may be sent to another expert by any rounding; such tokens are few.
    """
    yardstick, recipe = {}, Recipe.of("bismooth", calibration_tokens=1024)
    for model_type in SPARSE:
        source = write(tmp_path / "sources" / model_type, model_type)
        yardstick[model_type] = transformers_predictions(source)[1]
        convert(source, tmp_path / model_type, recipe, read_text(calibration_text))
    grouped = replace(recipe, group_size=32, group_layers=r"layers\.[12]\..*experts\.0|self_attn")
    for name in LAYERS.keys() - SPARSE:
        convert(tmp_path / "sources" / name.partition("-")[0], tmp_path / name, grouped, read_text(calibration_text))
    convert(tmp_path / "sources" / "mixtral", tmp_path / "incomplete", recipe, read_text(calibration_text))
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight_scale"
    without(tmp_path / "incomplete", lost)
    # As if made by others, whose files this package does not check as a whole.
    edit_json(tmp_path / "incomplete" / "config.json", lambda c: c["quantization_config"].pop("bismooth"))

    engine = {name: {"model": tmp_path / name} for name in LAYERS}
    engine["compiled"] = engine["qwen2_moe"] | {"options": {"enforce_eager": False}, "reload": True}
    engine["incomplete"] = {"model": tmp_path / "incomplete", "options": {"quantization": "w8a8_bismooth"}}
    answers, log = engines.run(tmp_path, WINDOWS, engine)
    assert answers.keys() == engine.keys(), log[-3000:]
    assert lost in answers.pop("incomplete")["error"]
    for name, answer in answers.items():
        assert answer.get("quantization") == "w8a8_bismooth", (name, answer)
        model = Path(engine[name]["model"]).name
        assert answer["experts"] == LAYERS[model]
        expected = emulate.log_probabilities(emulate.load(tmp_path / model), WINDOWS)
        cost, scale = divergence(expected, answer["logprobs"]), yardstick[model.partition("-")[0]]
        assert np.median(cost) < 0.01 * scale and cost.mean() < 0.03 * scale, (name, cost.mean())
    assert "saved AOT compiled function" in log
    assert np.array_equal(answers["compiled"]["reloaded"], answers["compiled"]["logprobs"])


def without(folder: Path, tensor: str) -> None:
    """Remove a tensor from a checkpoint of one shard."""
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    del tensors[tensor]
    save_file(tensors, shard)
