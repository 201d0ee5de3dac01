"""Which matrices of a block stay in float, and why: what vLLM does not multiply in INT8, or what would gain nothing."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from vllm_w8a8_bismooth.model.floats import INDEXER, MAMBA1, MULTIPLE, PER_LAYER, is_mamba1


@dataclass(frozen=True)
class Matrix:
    """A tensor of two and more axes.

    Attributes:
        name: inside the block, ``{}`` for an expert's number.
        shape: as stored, at real size.
        rows, columns: of the product at real size; 0 if none was seen.
        counted: whether its rows are a number of things (experts, heads, one) and not a width.
        owner: name of the module's class.
        beside: names that stand beside it in its module, and beside the module.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    counted: bool
    owner: str
    beside: frozenset[str]


_STACKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"experts\.gate_up_proj", ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight")),
    (r"experts\.(up|down)_proj", (r"experts.{}.\1_proj.weight",)),
    (r"(block_sparse_moe)\.input_linear\.weight", (r"\1.experts.{}.gate_proj.weight", r"\1.experts.{}.up_proj.weight")),
    (r"(block_sparse_moe)\.output_linear\.weight", (r"\1.experts.{}.down_proj.weight",)),
)
"""Endings of the names of stacks that vLLM also loads expert by expert -> what it calls the parts of each expert, which
follow each other in the stack's rows."""


def parts_of(stack: str) -> tuple[str, ...]:
    """The matrices of an expert, with ``{}`` for its number, that a stack of experts has behind each other; none if
    vLLM loads such a stack only as it is."""
    for ending, parts in _STACKS:
        if match := re.search(rf"(?:^|(?<=\.)){ending}$", stack):
            return tuple(stack[: match.start()] + match.expand(part) for part in parts)
    return ()


_RULES: tuple[tuple[Callable[[Matrix], bool], str], ...] = (
    (lambda m: bool(re.search(r"A_log|(^|\.)[AD]$", m.name)), "a state-space parameter"),
    (lambda m: len(m.shape) > 2 and (m.rows > 0 or "expert" in m.name.lower()), "experts stored as one tensor"),
    (lambda m: m.name.endswith("bias"), "biases of experts"),
    (lambda m: not m.rows and "norm" in m.owner.lower(), "a norm's gain"),
    (lambda m: not m.rows and "conv" in f"{m.owner} {m.name}".lower(), "a convolution"),
    (lambda m: not m.rows, "nothing was seen to be multiplied with it"),
    (lambda m: m.counted, "a router or gate: one row for each expert or head"),
    (lambda m: "router" in m.name or (m.name.endswith(".gate.weight") and "experts" in m.beside), "a router"),
    (lambda m: is_mamba1(m.beside), MAMBA1),
    (lambda m: bool(re.search(r"indexer\.(wk|weights_proj|k_proj)\b", m.name)), INDEXER),
    (lambda m: "per_layer" in m.name, PER_LAYER),
    # DBRX has its experts below each other in one matrix.
    (lambda m: not m.name.endswith(".weight"), "a parameter of its own, and no linear's, which vLLM loads as it is"),
    (lambda m: m.columns % MULTIPLE > 0, f"its columns are no multiple of {MULTIPLE}"),
    (lambda m: min(m.rows, m.columns) < MULTIPLE, "it is tiny"),
)
"""The first that applies counts."""


def reason(matrix: Matrix) -> str | None:
    """Why a matrix stays in float; ``None`` if it becomes INT8."""
    return next((why for applies, why in _RULES if applies(matrix)), None)
