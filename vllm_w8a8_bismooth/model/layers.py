"""What one decoder block holds: tensors, linears that become INT8, and where magnitude can move between them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_EXPERT = re.compile(r"\.experts?\.(\d+)\.")
Runs = tuple[tuple[int, int], ...]
"""Indices as (first, number) of consecutive ones."""
NONE = -1
"""The first index of a run of columns that hold no channel of a site."""


@dataclass(frozen=True)
class Site:
    """A producer whose output channels are its consumers' input columns, so that magnitude can move between them.

    Attributes:
        name: of the site in its block.
        producer: a norm, whose gain is divided, or a linear, whose rows are.
        consumers: what reads it, whose columns are multiplied; linears and routers. The last one sees every token.
        rows: of the producer, those that feed the consumers, channel by channel.
        columns: of each consumer, in order: the channels that they hold. Query heads that share a value head repeat its
            channels. ``None`` is one channel each, in order.
        gate: the linear whose first rows, through the activation function, multiply what the producer makes; ``None``
            if nothing does.
        offset: what the model adds to the producer's stored gain; Gemma's norms multiply by ``1 + stored``.
        power: consumers see a producer's factor to this power: 2 behind a squared ReLU.
    """

    name: str
    producer: str
    consumers: tuple[str, ...]
    rows: Runs
    columns: Runs | None = None
    gate: str | None = None
    offset: float = 0.0
    power: float = 1.0

    @property
    def channels(self) -> int:
        """How many factors the site has."""
        return sum(number for _, number in self.rows)


@dataclass(frozen=True)
class View:
    """A matrix ``[N, K]`` that is not stored as such: it is a part of another tensor, or transposed, or both.

    Attributes:
        tensor: that has it. The same name as the matrix's where that is only transposed, which it stays when it is
            written.
        whole: shape of that: ``[rows, columns]``, or ``[experts, rows, columns]``.
        shape: (N, K).
        expert: the index of its slab in a stack; ``None`` without one.
        start: the first of the N rows among those of the slab, or columns if it is transposed.
        transposed: whether the slab is ``[K, rows]``.
    """

    tensor: str
    whole: tuple[int, ...]
    shape: tuple[int, int]
    expert: int | None = None
    start: int = 0
    transposed: bool = False

    @property
    def offset(self) -> int:
        """How many of the tensor's elements are before the matrix's first."""
        *_, height, width = self.whole
        return (self.expert or 0) * height * width + self.start * (1 if self.transposed else width)


@dataclass(frozen=True)
class Layer:
    """One kind of decoder block. Names are those inside it, without ``.weight`` where they are of modules.

    Attributes:
        tensors: every tensor that such a block has -> shape, as whoever reads them is shown them.
        views: those of them that may be stored otherwise -> how.
        linears: linear -> (rows, columns). All of them become INT8.
        sites: couplings. Those whose producer is itself a linear come first, because dividing the producer's rows
            changes the column ranges that the sites behind the norms balance.
        routers: matrices that read what a norm wrote and keep their dtype -> why. The norm's factor goes into their
            columns, but they have no say in it.
        posts: norms behind the linears that end a half of the block -> what the model adds to their stored gains.
        writers: what adds to the residual stream: the linears that end in it, and the norms behind them (Gemma's). No
            site divides their rows or gains, so that whatever reads the stream reads what it read before.
        fused: what vLLM merges into one linear -> its parts, which must share factor and granularity.
        row_parallel: linears that tensor parallelism cuts along their columns.
        experts: linears of experts, which vLLM serves alike: all in float, or all INT8 in one granularity.
    """

    tensors: Mapping[str, tuple[int, ...]]
    linears: Mapping[str, tuple[int, int]]
    sites: tuple[Site, ...]
    routers: Mapping[str, str] = field(default_factory=dict)
    posts: Mapping[str, float] = field(default_factory=dict)
    writers: frozenset[str] = frozenset()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    row_parallel: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    views: Mapping[str, View] = field(default_factory=dict)

    def linear_of(self, tensor: str) -> str | None:
        """The linear whose weight a tensor of the block is, ``None`` for anything else (norms, biases, routers)."""
        linear = tensor.removesuffix(".weight")
        return linear if linear != tensor and linear in self.linears else None

    def expert_of(self, linear: str) -> int | None:
        """The number of the expert that a linear belongs to, ``None`` for others."""
        match = _EXPERT.search(f".{linear}") if linear in self.experts else None
        return int(match[1]) if match else None

    def with_siblings(self, names: Iterable[str]) -> set[str]:
        """Names inside the block, and the siblings that vLLM fuses them with: a fused linear has one granularity."""
        chosen = set(names)
        for parts in self.fused.values():
            if chosen & set(parts):
                chosen |= set(parts)
        return chosen

    def alike(self, names: Iterable[str]) -> set[str]:
        """Names inside the block, and all that must have their granularity: siblings, and with an expert all others."""
        chosen = self.with_siblings(names)
        return chosen | self.experts if chosen & self.experts else chosen
