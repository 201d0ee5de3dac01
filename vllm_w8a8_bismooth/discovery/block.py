"""One decoder block of a small model, run alone with what the model gave it, and folds of its parameters."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vllm_w8a8_bismooth.discovery.watch import Unit, Watch

SAME = 1e-10
"""Largest relative difference of outputs that are equal but for fp64's rounding."""
_STILL = re.compile(r"conv|norm|A_log|embed|(^|[._])bias|_bias$|scale_shift|positions?")
"""Parts of names of what tokens are not multiplied with as with a matrix."""


@dataclass(frozen=True)
class Tie:
    """Rows of a producer that scale columns of consumers; found in a small model, and indices of its sizes.

    Attributes:
        producer: parameter: a gain, a matrix, or stacked matrices, of which each scales its own expert's consumers.
        rows: of the producer (channels of a gain), ascending.
        consumers: matrix -> (row, column) pairs: the row whose factor the column takes.
        offset: what the model adds to the stored gain.
        power: a column takes a row's factor to this power.
    """

    producer: str
    rows: tuple[int, ...]
    consumers: Mapping[Unit, tuple[tuple[int, int], ...]]
    offset: float = 0.0
    power: float = 1.0

    @property
    def columns(self) -> set[tuple[Unit, int]]:
        """Every column that takes a factor."""
        return {(unit, column) for unit, pairs in self.consumers.items() for _, column in pairs}


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference between two tensors, relative to the largest value of the second; infinite for NaN."""
    if a.shape != b.shape:
        return torch.inf
    difference = ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
    return difference if difference == difference else torch.inf


class Block:
    """A module with the arguments that the model gave it.

    Args:
        name: in the model.
        module: in fp64.
        args, kwargs: of its forward.
        generator: of random factors.

    Attributes:
        parameters: by name inside the block.
        output: everything that it returns, fp64 ``[n]``.
        inputs: matrix -> what it is multiplied with, fp64 ``[tokens, K]``.
        axes: parameter that something is multiplied with -> axis of the matrix that is summed over.
        unseen: parameters of two and more axes that nothing was multiplied with, though they look like matrices.
    """

    def __init__(
        self, name: str, module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any], generator: torch.Generator
    ):
        self.name, self.module, self._args, self._kwargs = name, module, args, kwargs
        self.generator = generator
        self._undo: list[tuple[torch.Tensor, Any, torch.Tensor]] | None = None
        self.parameters = dict(module.named_parameters())
        self.output, self.inputs = self.run()
        self.axes = {unit.name: unit.columns for unit in self.inputs}
        experts: dict[str, int] = {}
        for unit in self.inputs:
            experts[unit.name] = experts.get(unit.name, 0) + (unit.expert is not None)
        self.unseen = [
            name
            for name, p in self.parameters.items()
            if p.ndim > 1
            and not _STILL.search(name)
            and (name not in self.axes or (p.ndim > 2 and experts[name] < p.shape[0]))
        ]
        self._biases = {name: bias for name in self.axes if (bias := self._find_bias(name))}

    def call(self) -> object:
        """What the module returns, given what the model gave it."""
        return self.module(*_copied(self._args), **_copied(self._kwargs))

    def run(self) -> tuple[torch.Tensor, dict[Unit, torch.Tensor]]:
        """What it returns now, and the inputs of its matrices."""
        with Watch(self.parameters) as watch:
            out = self.call()
        output = torch.cat([tensor.double().flatten() for tensor in _tensors(out) if tensor.is_floating_point()])
        return output, {unit: torch.cat(rows) for unit, rows in watch.seen.items()}

    def returned(self) -> object:
        """What its module returns, as it returns it."""
        with Watch({}):
            return self.module(*self._args, **self._kwargs)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is put into parameters while the context lasts is taken back, exactly."""
        undo, self._undo = self._undo, []
        try:
            yield
        finally:
            for tensor, index, value in reversed(self._undo):
                tensor[index] = value
            self._undo = undo

    def put(self, tensor: torch.Tensor, index: Any, value: torch.Tensor) -> None:
        """Write a part of a parameter, or of a view of one."""
        if self._undo is not None:
            self._undo.append((tensor, index, tensor[index].clone()))
        tensor[index] = value

    def _scale(self, tensor: torch.Tensor, index: Any, factors: torch.Tensor) -> None:
        self.put(tensor, index, tensor[index] * factors)

    def matrix(self, unit: Unit) -> torch.Tensor:
        """A view of the matrix as ``[rows, columns]``, whichever way it is stored."""
        whole = self.parameters[unit.name].data
        one = whole if unit.expert is None else whole[unit.expert]
        return one if unit.columns == 1 else one.T

    def bias_of(self, name: str) -> str | None:
        """What is added to what a matrix makes."""
        return self._biases.get(name)

    def units(self, name: str) -> list[Unit]:
        """The matrices that a parameter consists of."""
        whole = self.parameters[name]
        experts = [None] if whole.ndim == 2 else list(range(whole.shape[0]))
        return [Unit(name, expert, self.axes[name]) for expert in experts]

    def is_gain(self, name: str) -> bool:
        """Whether a parameter may be what a norm multiplies its channels with: a vector, and nothing's bias."""
        vector = self.parameters[name].ndim == 1 and self.parameters[name].numel() > 1
        beside = name.endswith("bias") and f"{name[:-4]}weight" in self.parameters
        return vector and not beside and name not in self._biases.values()

    def random(self, *shape: int) -> torch.Tensor:
        """Factors between 0.6 and 1.6, fp64."""
        return torch.rand(*shape, dtype=torch.float64, generator=self.generator) + 0.6

    def touched(self, tie: Tie) -> set[str]:
        """The parameters that a fold changes."""
        names = {tie.producer, self._beside(tie.producer), *(unit.name for unit in tie.consumers)}
        return names & self.parameters.keys()

    def _beside(self, name: str) -> str:
        """The name that a producer's bias would have."""
        return self._biases.get(name) or re.sub(r"weight$", "bias", name)

    def scale_gain(self, name: str, s: torch.Tensor, offset: float) -> None:
        """Multiply a gain, and its bias, by ``s`` ``[channels]``."""
        gain, every = self.parameters[name].data, slice(None)
        self.put(gain, every, (gain + offset) * s - offset)
        bias = self._beside(name)
        if bias != name and bias in self.parameters:
            self._scale(self.parameters[bias].data, every, s)

    def scale_rows(self, name: str, rows: list[int], s: torch.Tensor) -> None:
        """Multiply rows of a matrix, and of its bias, by ``s`` ``[experts or 1, rows]``."""
        bias = self._biases.get(name)
        for index, unit in enumerate(self.units(name)):
            self._scale(self.matrix(unit), rows, s[index][:, None])
            if bias:
                vector = self.parameters[bias].data
                self._scale(vector if vector.ndim == 1 else vector[index], rows, s[index])

    def scale_columns(self, unit: Unit, factors: torch.Tensor) -> None:
        """Multiply columns of a matrix by ``factors`` ``[K]``."""
        columns = (factors != 1).nonzero()[:, 0]
        self._scale(self.matrix(unit), (slice(None), columns), factors[columns])

    def fold(self, tie: Tie, skip: str | None = None) -> None:
        """Fold fresh random factors in, one for each row; ``skip`` leaves a consumer out."""
        whole = self.parameters[tie.producer]
        rows = list(tie.rows)
        s = torch.ones(max(whole.shape), dtype=torch.float64)
        s[rows] = self.random(len(rows))
        if whole.ndim == 1:
            self.scale_gain(tie.producer, s[: whole.numel()], tie.offset)
        else:
            self.scale_rows(tie.producer, rows, s[rows].expand(len(self.units(tie.producer)), -1))
        for unit, pairs in tie.consumers.items():
            if unit.name != skip:
                factors = torch.ones(self.matrix(unit).shape[1], dtype=torch.float64)
                factors[[column for _, column in pairs]] = s[[row for row, _ in pairs]] ** -tie.power
                self.scale_columns(unit, factors)

    def change(self, ties: Collection[Tie], skip: str | None = None) -> float:
        """How far folds at all these sites at once move the output."""
        with self.kept():
            for tie in ties:
                self.fold(tie, skip)
            return differ(self.run()[0], self.output)

    def _find_bias(self, name: str) -> str | None:
        """What is added to what this matrix makes: found by owner, shape and name."""
        whole, (owner, _, leaf) = self.parameters[name], name.rpartition(".")
        axis = self.axes[name] + whole.ndim - 2
        shape = whole.shape[:axis] + whole.shape[axis + 1 :]
        for other, p in self.parameters.items():
            place, _, own = other.rpartition(".")
            if place == owner and "bias" in own and p.shape == shape and (leaf == "weight" or own.startswith(leaf)):
                return other
        return None


def _tensors(value: object) -> list[torch.Tensor]:
    """The tensors in nested results."""
    items = list(value.values()) if isinstance(value, dict) else value
    if isinstance(items, torch.Tensor):
        return [items]
    return [tensor for item in items for tensor in _tensors(item)] if isinstance(items, tuple | list) else []


def _copied(value: Any) -> Any:
    """Nested arguments with containers of their own: blocks that share keys and values put them into one."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value


def capture(
    model: torch.nn.Module, run: Callable[[], torch.Tensor], lists: Collection[str], generator: torch.Generator
) -> tuple[torch.Tensor, list[Block]]:
    """What a run returns, and the members of these module lists that took part in it and multiply something."""
    calls: dict[str, tuple[torch.nn.Module, tuple, dict]] = {}

    def note(name: str) -> Callable:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            calls.setdefault(name, (module, _copied(args), _copied(kwargs)))

        return hook

    hooks = [
        module.register_forward_pre_hook(note(f"{name}.{index}"), with_kwargs=True)
        for name in lists
        for index, module in enumerate(model.get_submodule(name).children())
    ]
    try:
        out = run()
    finally:
        for hook in hooks:
            hook.remove()
    blocks = [Block(name, *call, generator=generator) for name, call in calls.items()]
    return out, [block for block in blocks if block.axes]
