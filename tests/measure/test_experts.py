"""Experts as modules of their own compute what transformers' stacked ones do, and each sees its own tokens."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.models import tiny_config
from vllm_w8a8_bismooth.measure.experts import Experts, separate_experts
from vllm_w8a8_bismooth.model.construction import Experts as Mixture
from vllm_w8a8_bismooth.model.construction import Found, Inventory, Part

GATED = ("gate_proj", "up_proj", "down_proj")
TYPES = {
    # model type -> path of the experts, linears, whether they are stored transposed
    "granitemoe": ("block_sparse_moe.experts", GATED, False),
    "llama4_text": ("feed_forward.experts", GATED, True),
    "nemotron_h": ("mixer.experts", GATED[1:], False),
}


def block_of(model_type: str) -> torch.nn.Module:
    if model_type == "nemotron_h":
        config = AutoConfig.for_model(
            model_type, hidden_size=64, layers_block_type=["moe"], n_routed_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, n_group=1, topk_group=1, vocab_size=160,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        )  # fmt: skip
    else:
        config = tiny_config(model_type)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    path = TYPES[model_type][0]
    return next(m for m in model.modules() if any(name == path for name, _ in m.named_modules()) and m is not model)


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_they_compute_what_stacked_ones_do(model_type):
    path, linears, transposed = TYPES[model_type]
    block = block_of(model_type)
    mixture = block.get_submodule(path.rpartition(".")[0])
    hidden = torch.randn(2, 9, 64, dtype=torch.float64)
    expected = mixture(hidden)
    state = copy.deepcopy(dict(block.get_submodule(path).named_parameters()))
    parts = {f"{path}.{name}": (Part("?", transposed=transposed),) for name in state}
    names = tuple(f"{path}.{{}}.{name}" for name in linears)
    separate_experts([block], Found(kinds=(Inventory(parts, Mixture(path, names)),), kind=(0,)))
    own = block.get_submodule(path)
    assert isinstance(own, Experts)
    for e, expert in enumerate(own.children()):
        down = state["down_proj"][e]
        inner = state["gate_up_proj" if len(linears) == 3 else "up_proj"][e]
        down, inner = (down.T, inner.T) if transposed else (down, inner)
        for linear, weight in zip(expert.children(), (*inner.chunk(len(linears) - 1), down), strict=True):
            linear.weight.copy_(weight)
    seen = dict.fromkeys(range(4), 0)
    for e, expert in enumerate(own.children()):
        expert.register_forward_pre_hook(lambda m, given, e=e: seen.update({e: seen[e] + len(given[0])}))
    found = mixture(hidden)
    first, again = (made if torch.is_tensor(made) else made[0] for made in (expected, found))
    # NemotronH adds up in fp32, whatever it is given.
    assert (again - first).norm() < (1e-6 if model_type == "nemotron_h" else 1e-12) * first.norm()
    assert sum(seen.values()) == 18 * (1 if model_type == "llama4_text" else 2), "each token where it was sent"


@torch.no_grad()
def test_those_that_no_token_was_sent_to_read_what_others_were_given():
    block = block_of("granitemoe")
    path, linears, _ = TYPES["granitemoe"]
    names = tuple(f"{path}.{{}}.{name}" for name in linears)
    parts = {f"{path}.down_proj": (Part("?"),)}
    separate_experts([block], Found(kinds=(Inventory(parts, Mixture(path, names)),), kind=(0,)))
    own = block.get_submodule(path)
    given = torch.randn(5, 64, dtype=torch.float64)
    chosen = torch.tensor([[0, 3]] * 5)
    seen = []
    for expert in own.children():
        expert.register_forward_pre_hook(lambda m, rows: seen.append(rows[0]))
    own(given, chosen, torch.full((5, 2), 0.5, dtype=torch.float64))
    assert len(seen) == 2
    assert own.read_rest() == [1, 2]
    assert len(seen) == 4 and torch.equal(seen[2], given) and torch.equal(seen[3], given)
    own.forget()
    assert own.read_rest() == [0, 1, 2, 3] and len(seen) == 4, "nothing was given"
