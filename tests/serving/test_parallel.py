"""Tensor parallelism at the level of weights: vLLM's own linears and loaders, every rank of every size."""

import random
from itertools import product

import pytest
import torch

from tests.support import packed
from vllm_w8a8_bismooth import fourbits, ops
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


def config_of(group_size: int | None, *targets: str, rows: int | None = None):
    """With ``rows``, those of per-channel linears are packed in groups of so many columns."""
    from vllm_w8a8_bismooth.serving.config import BiSmoothConfig

    sizes = {"strategy": "group", "group_size": group_size} if group_size else {}
    weights, inputs = ({"strategy": s} | sizes for s in ("channel", "token"))
    group = {
        "targets": ["Linear", *targets],
        "weights": W8A8 | weights,
        "input_activations": W8A8 | inputs | {"dynamic": True},
    }
    names = {"quant_method": "compressed-tensors", "format": "int-quantized", "bismooth": {}}
    if rows:
        marker = {"rows": {"bits": 4.5, "group_size": rows}}
        names = {"quant_method": "w8a8_bismooth", "format": "int4-int8-rows", "bismooth": marker}
    config = BiSmoothConfig.from_config({**names, "config_groups": {"g": group}})
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


def packed_parts(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Weights in float -> their codes, which four bits hold but for some rows, and what the checkpoint has of them."""
    found = {}
    for name, weight in tensors.items():
        codes, scale = quantize_weight(weight)
        rows = torch.arange(0, len(codes), 7) if name != "k" else torch.tensor([], dtype=torch.int64)
        codes = packed.rounded(codes, rows, GROUP)
        stored = packed.parts("weight", fourbits.pack(codes, rows, GROUP))
        found[name] = {"codes": codes, "weight_scale": scale, **stored}
    return found


def load_packed(layer, parts: dict, tensors: dict[str, dict[str, torch.Tensor]], order: int = 0) -> None:
    """As :func:`load`, in an order that a number stands for."""
    arriving = [(own, part, shard) for part, shard in parts.items() for own in tensors[part] if own != "codes"]
    for own, part, shard in random.Random(order).sample(arriving, len(arriving)):
        parameter = getattr(layer, own)
        parameter.weight_loader(parameter, tensors[part][own], *(() if shard is None else (shard,)))


def unpacked(layer) -> torch.Tensor:
    """int8 ``[N, K]`` that a layer serves."""
    if hasattr(layer, "weight_order"):
        parts = (getattr(layer, f"weight{end}").data for end in ("", "_four", "_steps", "_order"))
        return ops.unpack_rows(ops.PackedRows(*parts))
    return ops.unpack_weight(layer.weight, layer.weight_scale, layer.input_size_per_partition)


def scale_of(layer) -> torch.Tensor:
    """fp32 ``[N, 1]``, in the order of the weight."""
    scale = layer.weight_scale.data
    if hasattr(layer, "weight_order"):
        scale = torch.empty_like(scale).index_copy_(0, layer.weight_order.long(), scale)
    return scale


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
            for own, at in ((unpacked(layer), 0), (layer.weight_scale, 1)):
                expected = torch.cat([share(part, quantized[part][at], rank, size) for part in PARTS[name]])
                assert torch.equal(own, expected), (name, rank)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_rank_has_its_share_of_packed_rows(rank_of, stored, size):
    """Whatever the order in which its parts come."""
    tensors, config = packed_parts(stored), config_of(None, rows=GROUP)
    for rank in range(size):
        rank_of(rank, size)
        for name, layer in linears(config).items():
            load_packed(layer, PARTS[name], tensors, order=rank)
            layer.quant_method.process_weights_after_loading(layer)
            own = {"codes": unpacked(layer), "weight_scale": scale_of(layer)}
            for key, tensor in own.items():
                expected = torch.cat([share(part, tensors[part][key], rank, size) for part in PARTS[name]])
                assert torch.equal(tensor, expected), (name, rank)
            more = {"weight_four", "weight_steps", "weight_order"} if ops.has_kernel("cpu", "linear_rows") else set()
            assert {name for name, _ in layer.named_parameters()} == {"weight", "weight_scale", *more}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("name", "shard"), [("qkv", None), ("gate_up", None), ("gate_up", (0, 1))])
def test_packed_rows_of_linears_that_are_merged_on_disk(rank_of, stored, size, name, shard):
    whole = packed_parts({name: torch.cat([stored[part] for part in PARTS[name]])})
    sizes = [len(stored[part]) for part in PARTS[name]]
    rank_of(size - 1, size)
    layer = linears(config_of(None, rows=GROUP))[name]
    load_packed(layer, {name: shard}, whole)
    layer.quant_method.process_weights_after_loading(layer)
    expected = torch.cat([part.chunk(size)[-1] for part in whole[name]["codes"].split(sizes)])
    assert torch.equal(unpacked(layer), expected)


@pytest.mark.parametrize("last", ["weight_packed", "weight_scale", "weight_rows", "weight_low"])
def test_packed_rows_are_loaded_again(rank_of, stored, last):
    """By vLLM's own reloading, which has layers processed as soon as it thinks that they are whole."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    rank_of(0, 2)
    model = torch.nn.ModuleDict(linears(config_of(None, rows=GROUP)))
    record_metadata_for_reloading(model)
    for values in (stored, {name: weight.flip(0) for name, weight in stored.items()}):
        tensors = packed_parts(values)
        if values is not stored:
            initialize_layerwise_reload(model)
        for name, layer in model.items():
            late = {part: {own: t for own, t in tensors[part].items() if own == last} for part in PARTS[name]}
            early = {part: {own: t for own, t in tensors[part].items() if own != last} for part in PARTS[name]}
            load_packed(layer, PARTS[name], early)
            load_packed(layer, PARTS[name], late)
            if values is stored:
                layer.quant_method.process_weights_after_loading(layer)
        if values is not stored:
            finalize_layerwise_reload(model, None)
        for name, layer in model.items():
            expected = torch.cat([share(part, tensors[part]["codes"], 0, 2) for part in PARTS[name]])
            assert torch.equal(unpacked(layer), expected), name


def test_without_weights_packed_rows_are_zeros(rank_of):
    """``--load-format dummy`` fills what is float with small numbers, and leaves integers as they are."""
    rank_of(0, 1)
    layer = linears(config_of(None, rows=GROUP))["qkv"]
    layer.weight_scale.data.uniform_(-1e-3, 1e-3)
    layer.quant_method.process_weights_after_loading(layer)
    assert not unpacked(layer).any()


@pytest.mark.parametrize("own", ["scale", "packed", "multiplier", "offset", "rows", "low"])
@pytest.mark.parametrize(("name", "part"), [("qkv", "v"), ("gate_up", "up"), ("down", "down")])
def test_what_is_missing_of_packed_rows_is_named(rank_of, stored, name, part, own):
    rank_of(0, 2)
    tensors = packed_parts(stored)
    del tensors[part][f"weight_{own}"]
    layer = linears(config_of(None, rows=GROUP))[name]
    load_packed(layer, PARTS[name], tensors)
    with pytest.raises(ValueError, match=rf"^{PREFIX}\.\w+\.{part}_proj\.weight_{own} is missing; the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)


UNFIT = {
    "packed": ("packed", lambda t: t[:-1], r"has shape \[511, 64\], but config.json makes it \[512, 64\]"),
    "multiplier": ("multiplier", lambda t: t[:, :1], r"has shape \[512, 1\], but config.json makes it \[512, 4\]"),
    "offset": ("offset", lambda t: t[0], r"has shape \[4\], but config.json makes it \[512, 4\]"),
    "dtype": ("packed", lambda t: t.float(), r"is torch.float32, and must be torch.uint8"),
    "dtype of rows": ("rows", lambda t: t.long(), r"is torch.int64, and must be torch.int32"),
    "low": ("low", lambda t: t[:, 1:], r"has shape \[74, 63\], but config.json makes it \[n, 64\]"),
    "fewer low": ("low", lambda t: t[1:], r"has 73 rows, and weight_rows beside it 74"),
    "descending": ("rows", lambda t: t.flip(0), r"does not hold ascending numbers below 512"),
    "beyond": ("rows", lambda t: t + 512, r"does not hold ascending numbers below 512"),
    "negative": ("rows", lambda t: t - 1, r"does not hold ascending numbers below 512"),
    "a multiplier of 0": ("multiplier", lambda t: t * 0, r"holds values that are missing or 0"),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_what_does_not_fit_of_packed_rows_is_named(rank_of, stored, fault):
    own, damage, message = UNFIT[fault]
    rank_of(1, 2)
    tensors = packed_parts(stored)
    tensors["up"][f"weight_{own}"] = damage(tensors["up"][f"weight_{own}"])
    layer = linears(config_of(None, rows=GROUP))["gate_up"]
    with pytest.raises(ValueError, match=rf"^{PREFIX}.mlp.up_proj.weight_{own} {message}"):
        load_packed(layer, PARTS["gate_up"], tensors)
        layer.quant_method.process_weights_after_loading(layer)


def test_codes_that_are_none_are_refused(rank_of, stored):
    rank_of(0, 1)
    tensors = packed_parts(stored)
    tensors["down"]["weight_offset"][5] = 127
    layer = linears(config_of(None, rows=GROUP))["down"]
    load_packed(layer, PARTS["down"], tensors)
    with pytest.raises(ValueError, match=rf"^{PREFIX}.mlp.down_proj.weight_packed: row 5 has codes beyond -127 to 127"):
        layer.quant_method.process_weights_after_loading(layer)


def test_packed_rows_that_a_rank_cannot_have(rank_of):
    """A quarter of 256 columns of o_proj is half a group of 128."""
    rank_of(0, 4)
    with pytest.raises(ValueError, match=r"self_attn.o_proj: K = 64 is not .* group_size = 128; .* use a smaller"):
        linears(config_of(None, rows=128))


def test_a_head_is_int8_beside_packed_rows(rank_of):
    from vllm_w8a8_bismooth.serving.rows import RowsScheme

    rank_of(0, 1)
    config = config_of(None, r"re:(.*\.)?lm_head$", rows=GROUP)
    assert all(isinstance(layer.scheme, RowsScheme) for layer in linears(config).values())
    assert not isinstance(head(config).scheme, RowsScheme)
    grouped = linears(config_of(GROUP, rows=GROUP))
    assert not any(isinstance(layer.scheme, RowsScheme) for layer in grouped.values())


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
