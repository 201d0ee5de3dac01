"""Tensor parallelism at the level of weights: vLLM's own linears and loaders, every rank of every size."""

from itertools import product

import pytest
import torch

from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.method.quantize import quantize_weight

HEADS, KV_HEADS, HEAD, HIDDEN, INTERMEDIATE = 8, 2, 32, 128, 512
GROUP = 32
W8A8 = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
PREFIX = "model.layers.0"
STORED = {
    "q": (HEADS * HEAD, HIDDEN),
    "k": (KV_HEADS * HEAD, HIDDEN),
    "v": (KV_HEADS * HEAD, HIDDEN),
    "gate": (INTERMEDIATE, HIDDEN),
    "up": (INTERMEDIATE, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD),
    "down": (HIDDEN, INTERMEDIATE),
}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def config_of(group_size: int | None, *targets: str):
    from vllm_w8a8_bismooth.serving.config import BiSmoothConfig

    sizes = {"strategy": "group", "group_size": group_size} if group_size else {}
    weights, inputs = ({"strategy": s} | sizes for s in ("channel", "token"))
    group = {
        "targets": ["Linear", *targets],
        "weights": W8A8 | weights,
        "input_activations": W8A8 | inputs | {"dynamic": True},
    }
    config = BiSmoothConfig.from_config(
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"g": group}, "bismooth": {}}
    )
    config.packed_modules_mapping = FUSED
    return config


@pytest.fixture
def rank_of(monkeypatch, on_rank):
    """``rank_of(rank, size)``: vLLM's linears and heads made from now on, too, believe to be there."""

    def be(rank: int, size: int) -> None:
        on_rank(rank, size)
        values = {"rank": rank, "world_size": size}
        for room, (name, value) in product(("linear", "vocab_parallel_embedding"), values.items()):
            place = f"vllm.model_executor.layers.{room}.get_tensor_model_parallel_{name}"
            monkeypatch.setattr(place, lambda v=value: v)

    return be


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in STORED.items()}


def linears(config) -> dict:
    """The four linears of a block on this rank, by their last name."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    more = {"bias": False, "quant_config": config, "params_dtype": torch.bfloat16}
    with set_current_vllm_config(VllmConfig()):
        return {
            "qkv": QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, prefix=f"{PREFIX}.self_attn.qkv_proj", **more),
            "gate_up": MergedColumnParallelLinear(
                HIDDEN, [INTERMEDIATE, INTERMEDIATE], prefix=f"{PREFIX}.mlp.gate_up_proj", **more
            ),
            "o": RowParallelLinear(HEADS * HEAD, HIDDEN, prefix=f"{PREFIX}.self_attn.o_proj", **more),
            "down": RowParallelLinear(INTERMEDIATE, HIDDEN, prefix=f"{PREFIX}.mlp.down_proj", **more),
        }


PARTS: dict[str, dict] = {
    "qkv": {"q": "q", "k": "k", "v": "v"},
    "gate_up": {"gate": 0, "up": 1},
    "o": {"o": None},
    "down": {"down": None},
}
"""vLLM's linear -> its stored parts, and how its loader calls them."""


def load(layer, parts: dict, tensors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for part, shard in parts.items():
        for parameter, tensor in zip((layer.weight, layer.weight_scale), tensors[part], strict=True):
            parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))


def share(name: str, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What a rank should hold of a stored tensor, said anew."""
    if name in ("o", "down"):
        return tensor if tensor.shape[1] == 1 else tensor.chunk(size, dim=1)[rank]
    if name in ("k", "v") and size > KV_HEADS:
        return tensor.chunk(KV_HEADS)[rank // (size // KV_HEADS)]
    return tensor.chunk(size)[rank]


@pytest.mark.parametrize("group_size", [None, GROUP])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_rank_has_its_share(rank_of, stored, size, group_size):
    """Merged, with heads of keys and values replicated where there are more ranks; columns cut with their scales."""
    quantized = {name: quantize_weight(weight, group_size) for name, weight in stored.items()}
    config = config_of(group_size)
    for rank in range(size):
        rank_of(rank, size)
        for name, layer in linears(config).items():
            load(layer, PARTS[name], quantized)
            layer.quant_method.process_weights_after_loading(layer)
            weight = ops.unpack_weight(layer.weight, layer.weight_scale, layer.input_size_per_partition)
            for own, at in ((weight, 0), (layer.weight_scale, 1)):
                expected = torch.cat([share(part, quantized[part][at], rank, size) for part in PARTS[name]])
                assert torch.equal(own, expected), (name, rank)


@pytest.mark.parametrize("name", ["o", "down"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_partial_products_add_up(rank_of, stored, size, name):
    """With groups no scale depends on the ranks: what they add up to is the product of one, but for the order."""
    codes, scales = quantize_weight(stored[name], GROUP)
    x = torch.randn(5, codes.shape[1], generator=torch.Generator().manual_seed(1))
    config, total = config_of(GROUP), torch.zeros(5, HIDDEN)
    for rank in range(size):
        rank_of(rank, size)
        layer = linears(config)[name]
        load(layer, {name: None}, {name: (codes, scales)})
        layer.quant_method.process_weights_after_loading(layer)
        total += layer.quant_method.apply(layer, x.chunk(size, dim=1)[rank], None)
    torch.testing.assert_close(total, ops.linear(x, codes, scales, GROUP), rtol=1e-5, atol=1e-4)


def test_a_rank_whose_share_cuts_a_group_is_refused(rank_of):
    """256 columns of o_proj on 8 ranks are 32 each: a quarter of a group of 128."""
    rank_of(0, 8)
    with pytest.raises(ValueError, match=r"self_attn.o_proj: K = 32 is not .* group_size = 128; .* use a smaller"):
        linears(config_of(128))


@pytest.mark.parametrize(("name", "part"), [("qkv", "v"), ("gate_up", "up"), ("down", "down")])
@pytest.mark.parametrize("size", [1, 8])
def test_what_did_not_arrive_or_does_not_fit_is_named(rank_of, stored, name, part, size):
    rank_of(size - 1, size)
    quantized = {name: quantize_weight(weight, GROUP) for name, weight in stored.items()}
    kind = "self_attn" if name == "qkv" else "mlp"
    layer = linears(config_of(GROUP))[name]
    with pytest.raises(ValueError, match=rf"{PREFIX}.{kind}.{part}_proj.weight_scale holds values that are missing"):
        load(layer, {p: shard for p, shard in PARTS[name].items() if p != part}, quantized)
        layer.quant_method.process_weights_after_loading(layer)
    wide = quantized | {part: [torch.cat((tensor, tensor)) for tensor in quantized[part]]}
    with pytest.raises(ValueError, match=rf"{PREFIX}.{kind}.{part}_proj.weight has shape \[\d+, \d+\], but config"):
        load(linears(config_of(GROUP))[name], PARTS[name], wide)


VOCABULARY, PADDED = 1000, 1024
"""Tokens, and the rows that vLLM gives a head for them."""


def head(config):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    with set_current_vllm_config(VllmConfig()):
        return ParallelLMHead(VOCABULARY, HIDDEN, params_dtype=torch.bfloat16, quant_config=config, prefix="lm_head")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_rank_has_its_share_of_the_head(rank_of, size):
    """What the ranks make of a token is what one linear would, and 0 where vLLM has rows for no token."""
    generator = torch.Generator().manual_seed(0)
    codes, scales = quantize_weight(torch.randn(VOCABULARY, HIDDEN, generator=generator))
    x, found = torch.randn(5, HIDDEN, generator=generator).bfloat16(), []
    for rank in range(size):
        rank_of(rank, size)
        layer = head(config_of(None, r"re:(.*\.)?lm_head$"))
        load(layer, {"lm_head": None}, {"lm_head": (codes, scales)})
        layer.quant_method.process_weights_after_loading(layer)
        found.append(layer.quant_method.apply(layer, x, bias=None))
    whole = torch.cat(found, dim=1)
    assert whole.shape == (5, PADDED) and not whole[:, VOCABULARY:].any()
    assert torch.equal(whole[:, :VOCABULARY], ops.linear(x, codes, scales, None))


def test_a_head_of_another_vocabulary_is_refused(rank_of):
    rank_of(0, 2)
    layer = head(config_of(None, "lm_head"))
    codes, scales = quantize_weight(torch.randn(VOCABULARY - 1, HIDDEN))
    with pytest.raises(ValueError, match=r"^lm_head.weight has shape \[999, 128\], but .* makes it \[1000, 128\]"):
        load(layer, {"lm_head": None}, {"lm_head": (codes, scales)})


@pytest.mark.parametrize("ours", [True, False])
def test_a_head_is_served_by_its_name(ours):
    """By stock compressed-tensors, too; of *Linear* alone neither makes a head INT8."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    for targets, quantized in (([r"re:(.*\.)?lm_head$"], True), ([], False)):
        config = config_of(None, *targets)
        config = config if ours else CompressedTensorsConfig.from_config(config.config)
        module = type("ParallelLMHead", (torch.nn.Module,), {})()
        for name in ("lm_head", "language_model.lm_head"):
            scheme = config.get_scheme(module, name)
            assert (scheme is not None) is quantized
