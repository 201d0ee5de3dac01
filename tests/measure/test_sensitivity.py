"""What quantization of each linear costs the predictions: gradients carried block by block, and costs that are KL."""

import pytest
import torch

from benchmarks import emulate
from benchmarks.testbed import BEDS
from tests.support.models import tiny_model, write_checkpoint
from tests.support.sweep import sweep
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.measure import sensitivity
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.measure.logits import Logits
from vllm_w8a8_bismooth.measure.passing import Passing
from vllm_w8a8_bismooth.method.rows import ALONE
from vllm_w8a8_bismooth.method.smooth import Smoothing

CPU = torch.device("cpu")


def measured(folder, tokens: torch.Tensor, draws: int = 2, group_size: int = 32):
    """Per block, what :func:`sensitivity.measure` finds without smoothing, and the gradients of what each one reads."""
    source = Source(folder)
    calibration, states, blocks = Calibration(source, tokens, CPU), [], []
    for index, inside in enumerate(source.blocks):
        blocks.append({name: source.checkpoint.read(source.names.block(index) + name) for name in inside})
        states.append(calibration.hidden.clone())
        calibration.advance(index, blocks[-1], ALONE)
    gradients = Logits(source, CPU, torch.float32).gradients(calibration.hidden, draws)
    found, carried = [], [gradients]
    for index in reversed(range(len(blocks))):
        passing = Passing(calibration, index, blocks[index], Smoothing(), states[index], gradients)
        costs, gradients = sensitivity.measure(passing, group_size)
        found.insert(0, costs)
        carried.insert(0, gradients)
    return found, carried


@pytest.mark.parametrize("model_type", sweep(["gemma2", "qwen2_moe", "phi3", "mixtral", "llama"], fast=2))
def test_gradients_are_those_of_the_whole_model(tmp_path, model_type):
    model = tiny_model(model_type).eval()
    model.set_attn_implementation(emulate.attention_of(model.config))
    folder = write_checkpoint(tmp_path / "source", model, torch.float32)
    tokens = torch.randint(2, 160, (2, 24), generator=torch.Generator().manual_seed(0))
    found, carried = measured(folder, tokens)
    entered, left = [], []

    def enter(module, inputs):
        entered.append(inputs[0].detach().requires_grad_())
        return (entered[0],)

    model.model.layers[0].register_forward_pre_hook(enter)
    model.model.norm.register_forward_pre_hook(lambda module, inputs: left.append(inputs[0]))
    model(input_ids=tokens)
    for draw in range(2):
        (true,) = torch.autograd.grad(left[0], entered[0], carried[-1][draw], retain_graph=True)
        torch.testing.assert_close(carried[0][draw], true, rtol=1e-3, atol=1e-5 * float(true.abs().max()))
    layers = Source(folder).layers
    assert [set(costs) for costs in found] == [set(sensitivity.measured_units(layer)) for layer in layers]


@pytest.mark.parametrize("group_size", [64, 32])
def test_experts_and_odd_columns(tmp_path, group_size):
    """Experts are one unit, whose linears must all have whole groups."""
    folder = write_checkpoint(tmp_path / "source", tiny_model("mixtral"), torch.float32)
    tokens = torch.randint(2, 160, (2, 24), generator=torch.Generator().manual_seed(0))
    found, _ = measured(folder, tokens, group_size=group_size)
    fit = {"self_attn.qkv_proj"} if group_size == 64 else {"self_attn.qkv_proj", "self_attn.o_proj", "experts"}
    for costs in found:
        assert {unit for unit, ways in costs.items() if "per_group" in ways} == fit  # K = 64, 96
        assert costs.keys() == {"self_attn.qkv_proj", "self_attn.o_proj", "experts"}
        assert all(cost > 0 for ways in costs.values() for way in ways.values() for cost in way.values())


@pytest.mark.parametrize("what", ["weights", "activations"])
def test_costs_are_the_divergence_of_predictions(tmp_path, what):
    """Of a trained model of which everything is rounded, on the tokens that were measured: summed up over linears."""
    bed = BEDS["headers"]
    tokens = torch.from_numpy(bed.heldout_windows(4)).long()
    found, _ = measured(bed.model, tokens)
    costs = {
        way: sum(ways[way][what] for block in found for ways in block.values()) for way in ("per_channel", "per_group")
    }
    model = emulate.load(bed.model)
    with torch.no_grad():
        true = model(input_ids=tokens).logits.log_softmax(-1)
        for way, group_size in (("per_channel", None), ("per_group", 32)):
            changed = emulate.load(bed.model)
            for name, linear in changed.named_modules():
                if isinstance(linear, torch.nn.Linear) and ".layers." in f".{name}":
                    _round(linear, what, group_size)
            after = changed(input_ids=tokens).logits.log_softmax(-1)
            kl = float((true.exp() * (true - after)).sum(-1).mean())
            assert costs[way] == pytest.approx(kl, rel=0.25), way


def _round(linear: torch.nn.Linear, what: str, group_size: int | None) -> None:
    def rounded(rows: torch.Tensor) -> torch.Tensor:
        pieces = rows.unflatten(-1, (-1, group_size or rows.shape[-1]))
        step = pieces.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
        return ((pieces / step).round() * step).flatten(-2)

    if what == "weights":
        linear.weight.data = rounded(linear.weight.data)
    else:
        linear.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]),))
