"""Matrices that the files have as parts of other tensors, or transposed: experts in a stack, GPT-2's linears.

To everybody else such a matrix is a tensor ``[N, K]`` under its own name. Nothing but its elements is read.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vllm_w8a8_bismooth.checkpoint.files import CONFIG
from vllm_w8a8_bismooth.checkpoint.formats import Tensor
from vllm_w8a8_bismooth.errors import Problem
from vllm_w8a8_bismooth.model.layers import View

if TYPE_CHECKING:
    import torch

_TOGETHER = 2**22  # elements that are transposed at once

Fetch = Callable[[int, tuple[int, int], int], "torch.Tensor"]
"""Reads rows of a stored tensor: its first element, the shape to give them, elements from one row to the next."""


@dataclass
class Shown:
    """The tensors of a checkpoint, with matrices in the place of what they are parts of.

    Attributes:
        headers: by name, in the order of the files.
        views: those that are matrices in others' place -> where they are.
        lost: matrices whose tensors cannot be read; there is a problem for each of these.
        problems: what does not fit.
    """

    headers: dict = field(default_factory=dict)
    views: dict[str, View] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def of(cls, headers: Mapping[str, Tensor], views: Mapping[str, View], lost: Collection[str]) -> "Shown":
        """Those of a checkpoint; where it has matrices under their own names, it is taken as it is.

        Args:
            headers: the tensors in its files.
            views: matrices that may be parts of them, with full names.
            lost: tensors that are known to be missing.
        """
        found = cls()
        parts: dict[str, dict[str, View]] = {}
        for name, view in views.items():
            parts.setdefault(view.tensor, {})[name] = view
        found.lost |= {name for tensor in lost for name in parts.get(tensor, ())}
        for name, header in headers.items():
            inside = _fitting(header.shape, parts.get(name, {}))
            beside = next((part for part in parts.get(name, ()) if part in headers and part != name), None)
            if beside is not None:
                what, remedy = f"holds {beside}, which is stored beside it", "remove one of them"
            elif inside is None:
                whole = next(iter(parts[name].values())).whole
                what = f"has shape {list(header.shape)}, {CONFIG} implies {list(whole)}"
                remedy = "mend the one that is wrong"
            else:
                found._add(name, header, inside)
                continue
            found.problems.append(Problem(name, what, remedy))
            found.lost |= {part for part in parts[name] if part not in headers or part == name}
        return found

    def _add(self, name: str, header: Tensor, parts: Mapping[str, View]) -> None:
        """What a stored tensor appears as."""
        if all(view.shape == view.whole and not view.transposed for view in parts.values()):  # second names, if any
            self.headers[name] = header
        size = header.nbytes // max(1, math.prod(header.shape))
        for part, view in parts.items():
            self.views[part] = view
            self.headers[part] = replace(header, shape=view.shape, nbytes=size * math.prod(view.shape))


def _fitting(shape: tuple[int, ...], parts: Mapping[str, View]) -> Mapping[str, View] | None:
    """The matrices of a tensor of this shape; of a stack with its last two axes the other way round, as publishers of
    one model type have it who do not use transformers 5, too; ``None`` if they are no parts of it."""
    if all(view.whole == shape for view in parts.values()):
        return parts
    if len(shape) == 3 and all(view.whole == (shape[0], shape[2], shape[1]) for view in parts.values()):
        return {name: replace(view, whole=shape, transposed=not view.transposed) for name, view in parts.items()}
    return None


def fill(values: "torch.Tensor", view: View, first: int, fetch: Fetch) -> None:
    """Fill a ``[n]`` with the elements of a transposed matrix from number ``first`` on, some columns at a time."""
    columns, width = view.shape[1], view.whole[-1]
    top, bottom = first // columns, math.ceil((first + len(values)) / columns)
    whole = (bottom - top) * columns == len(values)
    rows = values.view(-1, columns) if whole else values.new_empty(bottom - top, columns)
    step = max(1, _TOGETHER // max(1, bottom - top))
    for begin in range(0, columns, step):
        shape = (min(step, columns - begin), bottom - top)
        rows[:, begin : begin + step] = fetch(view.offset + begin * width + top, shape, width).T
    if not whole:
        values.copy_(rows.view(-1)[first - top * columns :][: len(values)])
