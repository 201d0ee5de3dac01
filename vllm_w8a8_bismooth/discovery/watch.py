"""Sees every product of a tensor with a parameter while a model runs, and makes all of its arithmetic fp64."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_NARROW = {torch.float32, torch.float16, torch.bfloat16}
_NARROWING = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}
_ADDING = {torch.addmm, torch.Tensor.addmm, torch.baddbmm, torch.Tensor.baddbmm}
_FACTORS = ("mat1", "mat2", "batch1", "batch2")
_PRODUCTS = {
    torch.matmul, torch.mm, torch.bmm,
    torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__,
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """A matrix that something is multiplied with: a parameter, or one expert's slice of it.

    Attributes:
        name: of the parameter.
        expert: the slice; ``None`` if the parameter is the matrix.
        columns: the axis of the matrix that the product sums over: 1, or 0 where it is stored transposed.
    """

    name: str
    expert: int | None
    columns: int


class Watch(TorchFunctionMode):
    """While active, computes in fp64 whatever dtype is asked for, and notes what matrices are multiplied with.

    ``nn.Linear``, GPT-2's transposed ``Conv1D`` and slices of stacked experts are seen alike, where the product
    happens.

    Args:
        parameters: those of interest, by name. fp64.
        differentiable: keep how the inputs came about, for derivatives.

    Attributes:
        seen: matrix -> its inputs, fp64 ``[tokens, K]`` each.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], differentiable: bool = False):
        super().__init__()
        self._differentiable = differentiable
        self._owner = {p.untyped_storage().data_ptr(): (n, p) for n, p in parameters.items() if p.ndim > 1}
        self.seen: dict[Unit, list[torch.Tensor]] = defaultdict(list)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tuple(map(_wide, args)), {key: _wide(value) for key, value in (kwargs or {}).items()}
        func = torch.Tensor.double if func in _NARROWING else func
        if self._owner:
            self._watch(func, args, kwargs)
        return func(*args, **kwargs)

    def _watch(self, func, args, kwargs) -> None:
        if func is functional.linear:
            self._note(args[0], args[1] if len(args) > 1 else kwargs["weight"], -1)
        elif func in _ADDING:
            left, right = [*args[1:], *(kwargs[key] for key in _FACTORS if key in kwargs)][:2]
            self._note(left, right, -2)
        elif func in _PRODUCTS:
            left, right = args[:2] if len(args) > 1 else (args[0], next(iter(kwargs.values())))
            if not self._note(left, right, -2):
                self._note(right.transpose(-1, -2) if right.ndim > 1 else right, left, -1)

    def _note(self, inputs: torch.Tensor, matrix: object, axis: int) -> bool:
        """Whether ``matrix`` is a parameter or a part of one, of which ``axis`` is contracted with the last of
        ``inputs``."""
        if not isinstance(matrix, torch.Tensor) or matrix.ndim < 2:
            return False
        name, whole = self._owner.get(matrix.untyped_storage().data_ptr(), ("", None))
        if whole is None:
            return False
        strides, size = matrix.stride(axis), matrix.shape[axis]
        axes = [a for a in range(whole.ndim) if whole.stride(a) == strides and whole.shape[a] == size]
        if not axes and whole.ndim == matrix.ndim == 2 and strides == whole.stride(0) and size < len(whole):
            before = (matrix.storage_offset() - whole.storage_offset()) // strides  # DBRX's experts: some of the rows
            inputs = functional.pad(inputs, (before, len(whole) - before - size))
            axes = [0]
        if not axes:
            return False
        columns = axes[-1] - (whole.ndim - 2)
        if whole.ndim == 2:
            slices: list[tuple[int | None, torch.Tensor]] = [(None, inputs)]
        elif matrix.ndim == 2:
            slices = [(matrix.storage_offset() // whole.stride(0), inputs)]
        else:
            slices = [(expert, inputs[expert]) for expert in range(whole.shape[0])]
        for expert, rows in slices:
            flat = rows.reshape(-1, rows.shape[-1])
            self.seen[Unit(name, expert, columns)].append(flat if self._differentiable else flat.detach().clone())
        return True


def _wide(value: object) -> object:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value
