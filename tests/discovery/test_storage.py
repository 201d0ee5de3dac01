"""A block of transformers' model is what the checkpoint's tensors are, put together as the record says."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.models import tiny_config
from vllm_w8a8_bismooth.discovery.find import find
from vllm_w8a8_bismooth.discovery.record import Discovery, Part, Stored, View

CONFIGS = {
    "apertus": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=160,
    ),
    "bloom": dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=160),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, vocab_size=160, n_positions=64),
    "gpt_oss": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, num_local_experts=6, num_experts_per_tok=2, vocab_size=160,
    ),
    "granitemoe": None,
    "llama4_text": None,
    "mixtral": None,
    "qwen3_moe": None,
}  # fmt: skip


def piece(part: Part, expert: int, tensors: dict[str, torch.Tensor], length: int) -> torch.Tensor:
    """What a part holds, as it lies in the parameter."""
    tensor = tensors[part.tensor.format(expert)]
    rows = tensor if part.into is None else tensor[part.start : part.start + length]
    return rows.mT if part.transposed else rows


def shown(stored: Stored, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a block as the record has them."""
    found = dict(tensors)
    for view in stored.views.values():
        found.pop(view.tensor, None)
    for template, view in stored.views.items():
        whole = tensors[view.tensor]
        assert whole.shape == view.whole
        for e, slab in enumerate(whole) if "{}" in template else [(0, whole)]:
            start, length = view.rows
            found[template.format(e)] = (slab.T if view.transposed else slab)[start : start + length]
    return found


@pytest.mark.parametrize("model_type", CONFIGS)
def test_blocks_can_be_filled_from_the_checkpoint(model_type, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    given = CONFIGS[model_type]
    config = tiny_config(model_type) if given is None else AutoConfig.for_model(model_type, **given)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    found = find(json.loads((tmp_path / "config.json").read_text()))
    assert Discovery.from_json(json.loads(json.dumps(found.to_json()))) == found
    inside_blocks = 0
    for index, block in enumerate(model.get_submodule(found.modules.blocks)):
        kind, prefix = found.blocks[index], f"{found.names.blocks}{index}."
        inside = {n[len(prefix) :]: t for n, t in saved.items() if n.startswith(prefix)}
        tensors = shown(found.stored[kind], inside)
        assert {n: tuple(t.shape) for n, t in tensors.items()} == found.layers[kind].tensors
        inside_blocks += len(inside)
        parameters = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        assert {name for name, _ in block.named_parameters()} <= set(found.stored[kind].parameters) <= set(parameters)
        for name, parts in found.stored[kind].parameters.items():
            whole, experts = parameters[name], "{}" in parts[0].tensor
            if not whole.ndim:  # a single number
                assert torch.equal(tensors[parts[0].tensor], whole), name
                continue
            for expert, slice_ in enumerate(whole) if experts else [(0, whole)]:
                put = torch.full_like(slice_, torch.nan)
                for part in parts:
                    axis = -1 if part.transposed else 0
                    start, length = part.into or (0, slice_.shape[axis])
                    put.narrow(axis, start, length).copy_(piece(part, expert, tensors, length))
                assert torch.equal(put, slice_), (name, expert)
    outside = {n: tuple(t.shape) for n, t in saved.items() if not n.startswith(found.names.blocks)}
    assert outside == found.outside and len(saved) == len(outside) + inside_blocks
    assert saved[found.names.embedding].equal(model.get_submodule(found.modules.embedding).weight)
    assert saved[found.names.norm].equal(model.get_submodule(found.modules.norm).weight)


def test_what_is_stored_the_other_way_round_is_said(tmp_path):
    from transformers import AutoConfig

    found = find(AutoConfig.for_model("gpt2", **CONFIGS["gpt2"]).to_dict())
    (layer,), (stored,) = found.layers, found.stored
    assert stored.views.keys() == {f"{linear}.weight" for linear in layer.linears}
    assert layer.linears["attn.c_attn"] == layer.tensors["attn.c_attn.weight"] == (192, 64)
    assert stored.views["attn.c_attn.weight"] == View("attn.c_attn.weight", (64, 192), (0, 192), transposed=True)
    (site,) = (site for site in layer.sites if site.producer == "attn.c_attn")
    assert site.rows == ((128, 64),) and site.consumers == ("attn.c_proj",)


def test_stacked_experts_with_biases_stay_in_float():
    from transformers import AutoConfig

    found = find(AutoConfig.for_model("gpt_oss", **CONFIGS["gpt_oss"]).to_dict())
    for layer in found.layers:
        assert "one tensor, with biases" in layer.floats["mlp.experts.gate_up_proj"]
        assert set(layer.linears) == {f"self_attn.{letter}_proj" for letter in "qkvo"}
        assert not layer.experts


@pytest.mark.parametrize(
    ("model_type", "stacks", "transposed"),
    [
        ("granitemoe", ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"), False),
        ("llama4_text", ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"), True),
    ],
)
def test_stacked_experts_are_linears_of_their_own(model_type, stacks, transposed):
    found = find(tiny_config(model_type).to_dict())
    experts, stored = found.experts[-1], found.stored[-1]
    layer, owner = found.layers[-1], stacks[0].split(".")[0]
    assert experts == 4 and len(layer.experts) == 4 * 3
    assert {view.tensor for view in stored.views.values()} == set(stacks)
    gate, up, down = (stored.views[f"{owner}.experts.{{}}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    assert gate.rows == (0, 96) and up.rows == (96, 96) and down.rows == (0, 64), "the later half is what is multiplied"
    assert gate.transposed is up.transposed is down.transposed is transposed
    (router,) = layer.floats
    (behind,) = (site for site in layer.sites if router in site.consumers)
    assert set(behind.consumers) >= {f"{owner}.experts.{e}.{name}_proj" for e in range(4) for name in ("gate", "up")}
    between = {site.producer: site.consumers for site in layer.sites if site.producer in layer.experts}
    inside = f"{owner}.experts"
    assert between == {f"{inside}.{e}.up_proj": (f"{inside}.{e}.down_proj",) for e in range(4)}
