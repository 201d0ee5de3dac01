"""A block of transformers' model is what the checkpoint's tensors are, put together as the record says."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.models import tiny_config
from vllm_w8a8_bismooth.discovery.find import find
from vllm_w8a8_bismooth.discovery.record import Discovery, Part

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
    "mixtral": None,
    "qwen3_moe": None,
}  # fmt: skip


def piece(part: Part, expert: int, tensors: dict[str, torch.Tensor], length: int) -> torch.Tensor:
    """What a part holds, as it lies in the parameter."""
    tensor = tensors[part.tensor.format(expert)]
    tensor = tensor.transpose(-1, -2) if part.transposed else tensor
    return tensor if part.into is None else tensor[part.start : part.start + length]


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
        tensors = {n[len(prefix) :]: t for n, t in saved.items() if n.startswith(prefix)}
        assert {n: tuple(t.shape) for n, t in tensors.items()} == found.layers[kind].tensors
        inside_blocks += len(tensors)
        parameters = dict(block.named_parameters())
        assert set(found.stored[kind].parameters) == set(parameters)
        for name, parts in found.stored[kind].parameters.items():
            whole, experts = parameters[name], "{}" in parts[0].tensor
            for expert, slice_ in enumerate(whole) if experts else [(0, whole)]:
                put = torch.full_like(slice_, torch.nan)
                for part in parts:
                    start, length = part.into or (0, len(slice_))
                    put[start : start + length] = piece(part, expert, tensors, length)
                assert torch.equal(put, slice_), (name, expert)
    outside = {n: tuple(t.shape) for n, t in saved.items() if not n.startswith(found.names.blocks)}
    assert outside == found.outside and len(saved) == len(outside) + inside_blocks
    assert saved[found.names.embedding].equal(model.get_submodule(found.modules.embedding).weight)
    assert saved[found.names.norm].equal(model.get_submodule(found.modules.norm).weight)


def test_what_is_stored_the_other_way_round_is_said(tmp_path):
    from transformers import AutoConfig

    found = find(AutoConfig.for_model("gpt2", **CONFIGS["gpt2"]).to_dict())
    (layer,), (stored,) = found.layers, found.stored
    assert stored.transposed == layer.linears.keys()
    assert layer.linears["attn.c_attn"] == (192, 64) and layer.tensors["attn.c_attn.weight"] == (64, 192)
    (site,) = (site for site in layer.sites if site.producer == "attn.c_attn")
    assert site.rows == ((128, 64),) and site.consumers == ("attn.c_proj",)


def test_experts_that_are_one_tensor_stay_in_float():
    from transformers import AutoConfig

    found = find(AutoConfig.for_model("gpt_oss", **CONFIGS["gpt_oss"]).to_dict())
    for layer in found.layers:
        assert layer.floats["mlp.experts.gate_up_proj"] == "experts stored as one tensor"
        assert set(layer.linears) == {f"self_attn.{letter}_proj" for letter in "qkvo"}
        assert not layer.experts
