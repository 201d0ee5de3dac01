"""What quantization of one linear does to its block, measured as the definition has it, and what is made of it."""

import pytest
import torch

from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.measure.perturbation import Variant, measure, quantized, units
from vllm_w8a8_bismooth.measure.text import read_text, tokenize
from vllm_w8a8_bismooth.method.balance import by_error
from vllm_w8a8_bismooth.method.rows import ALONE
from vllm_w8a8_bismooth.method.smooth import Smoothing, smooth_block
from vllm_w8a8_bismooth.model.names import Names

slow = pytest.mark.slow
NOTHING = Variant(weights=False, activations=False)


class Block:
    """A block of a small checkpoint, what it reads, and its smoothing."""

    def __init__(self, folder, text, index: int = 1):
        self.source = source = Source(folder)
        self.index, self.layer = index, source.layers[index]
        tokens = tokenize(read_text(text), source.checkpoint, 256)
        self.calibration = Calibration(source, tokens, torch.device("cpu"))
        for i in range(index + 1):
            self.tensors = {name: source.checkpoint.read(Names().block(i) + name) for name in source.blocks[i]}
            self.hidden = self.calibration.hidden.clone()
            read = self.calibration.advance(i, self.tensors, ALONE)
        self.smoothing = smooth_block(self.tensors, read, self.layer, by_error)

    def measure(self, smoothing: Smoothing | None = None, **variants: Variant) -> dict[str, dict[str, float]]:
        smoothing = smoothing or self.smoothing
        return measure(self.calibration, self.index, self.tensors, smoothing, self.hidden, variants)

    def lend(self):
        return self.calibration.lend(self.index, self.tensors, torch.float32)


@pytest.mark.parametrize(
    "model_type",
    ["gemma2", "phi3", "qwen2_moe", *(pytest.param(t, marks=slow) for t in ("llama", "mixtral", "qwen2", "qwen3"))],
)
def test_every_unit_is_measured(make_checkpoint, calibration_text, model_type):
    block = Block(make_checkpoint(model_type), calibration_text)
    before = {name: tensor.clone() for name, tensor in block.tensors.items()}
    whole, weights = Variant(), Variant(activations=False)
    found = block.measure(nothing=NOTHING, whole=whole, weights=weights, grouped=Variant(group_size=32))
    parts = [part for unit in units(block.layer).values() for part in unit]
    assert sorted(parts) == sorted(block.layer.linears.keys() - block.layer.experts), "all but experts, once"
    assert found.keys() == units(block.layer).keys()
    for unit, errors in found.items():
        assert errors["nothing"] == 0, unit
        assert all(0 < errors[name] < 1e-2 for name in ("whole", "weights", "grouped")), unit
    assert all(torch.equal(before[name], tensor) for name, tensor in block.tensors.items())
    assert block.measure(whole=whole) == {unit: {"whole": errors["whole"]} for unit, errors in found.items()}


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """INT8 with one step a row."""
    step = rows.abs().amax(dim=-1, keepdim=True) / 127
    return (rows / step).round() * step


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(("linear", "bias"), [("self_attn.o_proj", False), ("mlp.down_proj", True)])
@torch.no_grad()
def test_an_error_is_that_of_the_whole_block(make_checkpoint, calibration_text, linear, bias, smoothed):
    block = Block(make_checkpoint(mlp_bias=bias), calibration_text)
    s = block.smoothing.fold(linear).columns if smoothed else torch.tensor(1.0)
    assert smoothed == (s.numel() > 1)

    class Quantized(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear):
            super().__init__()
            self.weight, self.bias = rounded(linear.weight * s), linear.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(rounded(x / s), self.weight, self.bias)

    hidden, windows = block.hidden.float(), range(len(block.hidden))
    with block.lend() as (module, run):
        true = run(hidden, windows)
        half, _, name = linear.rpartition(".")
        original = getattr(module.get_submodule(half), name)
        setattr(module.get_submodule(half), name, Quantized(original))
        moved = run(hidden, windows)
        setattr(module.get_submodule(half), name, original)
    by_hand = ((moved - true).square().sum(-1) / true.square().sum(-1)).mean()
    assert block.measure(v=Variant(smoothed=smoothed))[linear]["v"] == pytest.approx(float(by_hand), rel=1e-5)


def test_smoothing_helps_where_a_channel_is_large(make_checkpoint, calibration_text):
    source = make_checkpoint(dtype=torch.float32)
    block = Block(source, calibration_text)
    norm, size = "input_layernorm.weight", torch.ones(64).index_fill_(0, torch.tensor([5]), 300.0)
    block.tensors[norm] = block.tensors[norm] / size
    for letter in "qkv":
        block.tensors[f"self_attn.{letter}_proj.weight"] = block.tensors[f"self_attn.{letter}_proj.weight"] * size
    read = block.calibration.advance(block.index, block.tensors, ALONE)
    smoothing = smooth_block(block.tensors, read, block.layer, by_error)
    found = block.measure(smoothing, plain=Variant(smoothed=False), smoothed=Variant())["self_attn.qkv_proj"]
    assert found["smoothed"] < found["plain"] / 50


def test_groups_that_do_not_divide_the_columns_are_left_out(make_checkpoint, calibration_text):
    block = Block(make_checkpoint(intermediate_size=160), calibration_text)
    found = block.measure(channel=Variant(), group=Variant(group_size=64))
    assert {unit for unit, errors in found.items() if "group" not in errors} == {"self_attn.o_proj", "mlp.down_proj"}
    assert all("channel" in errors for errors in found.values())


def test_one_group_is_per_channel(make_checkpoint, calibration_text):
    found = Block(make_checkpoint(), calibration_text).measure(channel=Variant(), group=Variant(group_size=64))
    assert all(errors["group"] == errors["channel"] for errors in found.values() if "group" in errors)


@torch.no_grad()
def test_weights_are_given_back(make_checkpoint, calibration_text):
    """Also when the block fails in between."""
    block = Block(make_checkpoint(), calibration_text)
    with block.lend() as (module, run):
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        hidden, windows = block.hidden.float(), range(len(block.hidden))
        true = run(hidden, windows)
        folds = {name: block.smoothing.fold(name) for name in block.layer.linears}
        with pytest.raises(ZeroDivisionError), quantized(module, folds, Variant()):
            assert not torch.equal(run(hidden, windows), true)
            assert not any(torch.equal(module.get_submodule(n).weight, before[f"{n}.weight"]) for n in folds)
            1 / 0  # noqa: B018
        after = module.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        assert torch.equal(run(hidden, windows), true), "no hook is left"


def test_a_block_that_fails_is_named(make_checkpoint, calibration_text):
    block = Block(make_checkpoint(), calibration_text)
    block.tensors["mlp.up_proj.weight"] = torch.ones(3, 3)
    with pytest.raises(BismoothError, match="forward pass failed in block 1"):
        block.measure(whole=Variant())
