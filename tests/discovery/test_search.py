"""What is no fold is never taken for one: small modules, each with one thing that stands in the way."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.toys import HIDDEN, INNER, Block, Experts, Model, Norm, named
from vllm_w8a8_bismooth.discovery.instance import randomize
from vllm_w8a8_bismooth.discovery.proof import Sample, prove
from vllm_w8a8_bismooth.progress import silent

NORM, UP = "norm.weight", "up.weight"


class Mixing(Block):
    def forward(self, x):
        normed = self.norm(x)
        return normed + self.down(self.up(normed))


class UsedTwice(Block):
    """``up`` reads what the norm made, and the residual stream too."""

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)) + self.up(x))


class MadeTwice(Block):
    """What the first rows of ``up`` make feeds ``down``, and is added to the stream as well."""

    def forward(self, x):
        made = self.up(self.norm(x))
        return x + self.down(made) + made[..., :HIDDEN]


class Unread(Block):
    """A matrix beside ``up`` that only other texts would reach."""

    def more(self):
        self.seldom = nn.Linear(HIDDEN, INNER, bias=False)

    def forward(self, x):
        normed = self.norm(x)
        made = self.up(normed) if x.shape[1] < 1000 else self.seldom(normed)
        return x + self.down(made)


class Gated(Block):
    def more(self):
        self.gate = nn.Linear(HIDDEN, INNER)

    def forward(self, x):
        normed = self.norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class ShiftedGain(Block):
    """The gain is stored as what is added to one."""

    def more(self):
        self.norm.forward = lambda x: (1 + self.norm.weight) * functional.rms_norm(x, x.shape[-1:])


class NormalizedGates(Block):
    """The gates' sum is one, whatever their rows are multiplied with."""

    def change(self, x):
        return x / x.sum(-1, keepdim=True).abs()


class Interleaved(Block):
    """Rows of ``up`` by turns: four through the activation, four that it multiplies."""

    def more(self):
        self.down = nn.Linear(INNER // 2, HIDDEN, bias=False)

    def change(self, x):
        one, other = x.unflatten(-1, (3, 2, 4)).unbind(-2)
        return (functional.silu(one) * other).flatten(-2)


SITES = {
    "plain": (Block, {NORM, UP}),
    "gated": (Gated, {NORM, UP}),
    "gain beside one": (ShiftedGain, {NORM, UP}),
    "ReLU": (named("Relu", change=lambda self, x: x.relu()), {NORM, UP}),
    "squared ReLU": (named("Squared", change=lambda self, x: x.relu() ** 2), {NORM, UP}),
    "GELU": (named("Gelu", change=lambda self, x: functional.gelu(x)), {NORM}),
    "soft cap": (named("Cap", change=lambda self, x: 3 * torch.tanh(x / 3)), {NORM}),
    "soft cap that seldom bites": (named("HighCap", change=lambda self, x: 50 * torch.tanh(x / 50)), {NORM}),
    "values are normed": (named("VNorm", change=lambda self, x: functional.rms_norm(x, (INNER,))), {NORM}),
    "gates are normalised": (NormalizedGates, {NORM}),
    "the residual is the norm's output": (Mixing, {UP}),
    "a matrix is used twice": (UsedTwice, {UP}),
    "rows are added to the stream": (MadeTwice, {NORM}),
}


def searched(block, **given) -> tuple[Sample, list, list]:
    """A model of two such blocks, the sites of each that are left, and what was dropped."""
    torch.manual_seed(0)
    model = Model(block, **given)
    model.requires_grad_(False)
    randomize(model, torch.Generator().manual_seed(1))
    sample = Sample(model.double().eval())
    with torch.no_grad():
        proven = prove(sample, sample.search(silent))
    return sample, proven.left, proven.failures


@pytest.mark.parametrize("case", SITES)
def test_sites(case):
    block, expected = SITES[case]
    sample, left, _ = searched(block)
    for ties in left:
        assert {tie.producer for tie in ties} == expected
    with torch.no_grad():
        pairs = [(block, tie) for block, ties in zip(sample.blocks, left, strict=True) for tie in ties]
        assert sample.logits_change(pairs) < 1e-12
        # A fold that leaves a consumer out is noticed.
        for block, tie in pairs:
            for unit in tie.consumers:
                with block.kept():
                    block.fold(tie, skip=unit.name)
                    assert not torch.allclose(block.run()[0], block.output, rtol=1e-6)


def test_offset_and_power_are_found():
    _, left, _ = searched(ShiftedGain)
    assert {tie.producer: tie.offset for tie in left[0]} == {NORM: 1.0, UP: 0.0}
    _, left, _ = searched(SITES["squared ReLU"][0])
    assert {tie.producer: tie.power for tie in left[0]} == {NORM: 1.0, UP: 2.0}


def test_every_channel_is_in_its_place():
    _, left, _ = searched(Block)
    for tie in left[0]:
        for pairs in tie.consumers.values():
            assert pairs == tuple((i, i) for i in range(HIDDEN if tie.producer == NORM else INNER))


def test_a_clamp_is_noticed_where_weights_are_large():
    _, left, failures = searched(named("Clamp", change=lambda self, x: x.clamp(-20, 20)))
    for ties, failed in zip(left, failures, strict=True):
        assert {tie.producer for tie in ties} == {NORM}
        assert [(f.tie.producer, f.why) for f in failed] == [(UP, "does not hold where weights are large")]


def test_a_matrix_that_no_token_reached_refuses_the_norm_that_it_may_read():
    sample, left, failures = searched(Unread)
    assert sample.blocks[0].unseen == ["seldom.weight"]
    assert {tie.producer for tie in left[0]} == {UP}
    assert [(f.tie.producer, f.why) for f in failures[0]] == [
        (NORM, "nothing was seen to be multiplied with seldom.weight")
    ]


def test_a_router_and_all_experts_take_the_norms_factor():
    _, left, _ = searched(Experts)
    (norm,) = (tie for tie in left[0] if tie.producer == NORM)
    assert {unit.name for unit in norm.consumers} == {"up.weight", "router.weight", "ups"}
    (stack,) = (tie for tie in left[0] if tie.producer == "ups")
    assert sorted(unit.expert for unit in stack.consumers) == [0, 1, 2, 3]


def test_experts_that_are_never_chosen_are_unseen():
    class Lazy(Experts):
        def choose(self, x):
            scores, chosen = self.router(x).softmax(-1)[:, :3].topk(2)
            return scores, chosen

    sample, left, _ = searched(Lazy)
    assert "ups" in sample.blocks[0].unseen
    assert NORM not in {tie.producer for tie in left[0]}


def test_what_a_block_hands_to_the_next_beside_its_output_drops_the_site():
    """As blocks do that share keys and values."""

    class Giver(Block):
        def forward(self, x, shared):
            shared["made"] = self.up(self.norm(x))
            return x + self.down(shared["made"])

    class Taker(Block):
        def forward(self, x, shared):
            return x + self.down(self.up(self.norm(x))) + shared["made"][..., :HIDDEN]

    blocks = iter([Giver, Taker])
    _, left, failures = searched(lambda: next(blocks)(), shared={})
    assert {tie.producer for tie in left[0]} == {NORM} and {tie.producer for tie in left[1]} == {NORM, UP}
    assert [(f.tie.producer, f.why) for f in failures[0]] == [(UP, "changes what later blocks or the head compute")]


def test_a_parameter_of_two_blocks_is_left_alone():
    common = Norm()

    class Common(Block):
        def more(self):
            self.norm = common

    _, left, failures = searched(Common)
    for ties, failed in zip(left, failures, strict=True):
        assert {tie.producer for tie in ties} == {UP}
        assert [(f.tie.producer, f.why) for f in failed] == [(NORM, "several modules have one of its parameters")]


def test_rows_that_return_in_a_period_are_found_together():
    _, left, _ = searched(Interleaved)
    (tie,) = (tie for tie in left[0] if tie.producer == UP)
    assert tie.rows == tuple(row for start in (4, 12, 20) for row in range(start, start + 4))
