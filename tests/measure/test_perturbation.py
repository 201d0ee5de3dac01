"""What quantization of one linear does to its block, measured as the definition has it, and what is made of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_w8a8_bismooth.checkpoint.architectures import ARCHITECTURES, Layer
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.names import Names
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure import perturbation
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.measure.perturbation import CHANNEL, GROUP, Variant, choose, measure, units
from vllm_w8a8_bismooth.measure.text import read_text, tokenize
from vllm_w8a8_bismooth.method.balance import by_error
from vllm_w8a8_bismooth.method.rows import ALONE
from vllm_w8a8_bismooth.method.smooth import Smoothing, smooth_block

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
        offset = source.architecture.offset
        self.smoothing = smooth_block(self.tensors, read, self.layer, source.sizes, by_error, offset)

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

    hidden = block.hidden.float()
    with block.lend() as (module, run):
        true = run(hidden)
        half, _, name = linear.rpartition(".")
        original = getattr(module.get_submodule(half), name)
        setattr(module.get_submodule(half), name, Quantized(original))
        moved = run(hidden)
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
    smoothing = smooth_block(block.tensors, read, block.layer, block.source.sizes, by_error)
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
        true = run(block.hidden.float())
        folds = {name: block.smoothing.fold(name) for name in block.layer.linears}
        with pytest.raises(ZeroDivisionError), perturbation._quantized(module, folds, Variant()):
            assert not torch.equal(run(block.hidden.float()), true)
            assert not any(torch.equal(module.get_submodule(n).weight, before[f"{n}.weight"]) for n in folds)
            1 / 0  # noqa: B018
        after = module.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        assert torch.equal(run(block.hidden.float()), true), "no hook is left"


def test_a_block_that_fails_is_named(make_checkpoint, calibration_text):
    block = Block(make_checkpoint(), calibration_text)
    block.tensors["mlp.up_proj.weight"] = torch.ones(3, 3)
    with pytest.raises(BismoothError, match="forward pass failed in block 1"):
        block.measure(whole=Variant())


LLAMA = ARCHITECTURES["llama"].dense
UNITS = units(LLAMA)
LINEARS = len(LLAMA.linears)


def errors_of(blocks: int, size: float = 1.0, **special: tuple[float, float]) -> list[dict[str, dict[str, float]]]:
    """Per block, equal errors that groups halve, but for units ``<name>_<block>``: their errors in the two ways."""
    found = [{unit: {CHANNEL: size, GROUP: size / 2} for unit in UNITS} for _ in range(blocks)]
    for where, (channel, group) in special.items():
        name, _, index = where.rpartition("_")
        unit = next(unit for unit in UNITS if unit.endswith(name))
        found[int(index)][unit] = {CHANNEL: channel, GROUP: group}
    return found


def chosen(errors, budget: float, layer: Layer = LLAMA) -> list[str]:
    return [entry.unit for entry in choose(errors, [layer] * len(errors), budget) if entry.chosen]


@st.composite
def measured(draw) -> list[dict[str, dict[str, float]]]:
    size = st.floats(0, 1) | st.sampled_from([0.0, 1e-30, 1e6])
    blocks = draw(st.integers(1, 4))
    both = st.fixed_dictionaries({CHANNEL: size}, optional={GROUP: size})
    return [{unit: draw(both) for unit in UNITS} for _ in range(blocks)]


@given(measured(), st.floats(0, 1))
def test_the_budget_is_never_exceeded(errors, budget):
    layers = [LLAMA] * len(errors)
    found = choose(errors, layers, budget)
    assert found == choose(errors, layers, budget), "the same every time"
    names = [name for entry in found for name in entry.linears]
    assert sorted(names) == sorted(Names().block(i) + name for i in range(len(errors)) for name in LLAMA.linears)
    picked = [entry for entry in found if entry.chosen]
    assert sum(len(entry.linears) for entry in picked) <= budget * len(names) + 1e-6
    for entry in found:
        cost = len(entry.linears) / len(names)
        worth = entry.per_group is not None and entry.share >= perturbation.WORTH * cost
        assert entry.chosen <= worth
        assert not entry.chosen or entry.per_group < entry.per_channel
        expected = {
            "removes": entry.chosen,
            "too little": entry.per_group is not None and not worth,
            "not a multiple of the group size": entry.per_group is None,
            "the budget is spent": worth and not entry.chosen,
        }
        assert [said for said in expected if said in entry.reason.replace("remove ", "")] == [
            said for said, true in expected.items() if true
        ]
    value = [entry.share / len(entry.linears) for entry in found]
    assert value == sorted(value, reverse=True), "what is best spent on comes first"


@pytest.mark.parametrize("budget", [0.0, 0.03, 1.0])
def test_equal_errors_need_no_groups(budget):
    assert chosen(errors_of(12), budget) == chosen(errors_of(12, size=0.0), budget) == []


def test_where_the_error_sits_groups_are_spent():
    assert chosen(errors_of(12, down_proj_3=(40.0, 1.0)), 0.03) == ["model.layers.3.mlp.down_proj"]
    assert chosen(errors_of(12, down_proj_3=(40.0, 39.0)), 0.03) == [], "not where groups do not help"
    assert chosen(errors_of(12, down_proj_3=(40.0, 80.0)), 1.0) == [], "nor where they harm"
    assert chosen(errors_of(12, down_proj_3=(40.0, 1.0)), 0.0) == []


def test_fused_parts_go_together():
    errors, names = errors_of(12, qkv_proj_0=(90.0, 1.0)), [f"model.layers.0.self_attn.{c}_proj" for c in "qkv"]
    budget = 3 / (12 * LINEARS)
    best = choose(errors, [LLAMA] * 12, budget)[0]
    assert best.chosen and best.unit == "model.layers.0.self_attn.qkv_proj" and list(best.linears) == names
    assert chosen(errors, budget * 0.99) == [], "two of the three would be no use"


def test_a_share_of_a_unit_is_what_its_linears_are_worth():
    """The same gain for one linear is better than for three; what does not fit is passed over for what does."""
    errors = errors_of(12, qkv_proj_0=(90.0, 1.0), o_proj_5=(80.0, 1.0))
    assert chosen(errors, 0.03) == ["model.layers.5.self_attn.o_proj"]
    assert chosen(errors, 0.05) == ["model.layers.5.self_attn.o_proj", "model.layers.0.self_attn.qkv_proj"]
    assert chosen(errors_of(12, qkv_proj_0=(900.0, 1.0), o_proj_5=(200.0, 1.0)), 0.03) == [
        "model.layers.5.self_attn.o_proj"
    ]


def test_what_is_said_can_be_checked():
    first, *_, last = choose(errors_of(12, down_proj_3=(42.0, 0.0)), [LLAMA] * 12, 0.03)
    total = 42 + 12 * len(UNITS) - 1
    assert first.share == pytest.approx(42 / total) and (first.per_channel, first.per_group) == (42.0, 0.0)
    assert first.reason == f"removes {42 / total:.1%} of the error for {1 / 84:.1%} of the linears"
    assert "too little for 3.6% of the linears" in last.reason and not last.chosen


def test_experts_have_no_part_in_it():
    layer = ARCHITECTURES["mixtral"].sparse.expanded(4)
    assert units(layer).keys() == {"self_attn.qkv_proj", "self_attn.o_proj"}
    errors = [{unit: {CHANNEL: 1.0, GROUP: 0.0} for unit in units(layer)}]
    assert chosen(errors, 1.0, layer) == ["model.layers.0.self_attn.o_proj"]
