"""Which rows of which matrices a column of another's input is proportional to: seen from derivatives, in one pass.

The input of a consumer is homogeneous of degree one in a producer's row (of degree two behind a squared ReLU): its
derivative by the logarithm of the row's magnitude is once (twice) itself. This only points to where a search is worth
while; what it points to is tried, and proven, by folds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from vllm_w8a8_bismooth.discovery.block import Block
from vllm_w8a8_bismooth.discovery.watch import Unit, Watch

_DEGREES = (1.0, 2.0)
_NEAR = 1e-7


class Elasticity:
    """Derivatives of a block's inputs by its parameters.

    Args:
        block: as it was captured.
    """

    def __init__(self, block: Block):
        self._block = block
        self._rows = [name for name in block.axes if block.parameters[name].is_floating_point()]
        self._biases = {name: bias for name in self._rows if (bias := block.bias_of(name))}
        self._names = [*self._rows, *self._biases.values()]
        self._leaves = [block.parameters[name] for name in self._names]
        with self._differentiated(), Watch(block.parameters, differentiable=True) as watch:
            block.call()
        self._inputs = watch.seen

    @contextmanager
    def _differentiated(self) -> Iterator[None]:
        """Derivatives by the parameters are asked for while the context lasts."""
        for leaf in self._leaves:
            leaf.requires_grad_(True)
        try:
            with torch.enable_grad():
                yield
        finally:
            for leaf in self._leaves:
                leaf.requires_grad_(False)

    def rows(self, unit: Unit, column: int) -> set[tuple[str, int]]:
        """(matrix, row) of all that a column of a consumer's input is proportional to, at one token.

        Raises:
            RuntimeError: the block cannot be differentiated.
        """
        inputs = self._inputs[unit][0]
        token = int(inputs.detach()[:, column].abs().argmax())
        value = float(inputs.detach()[token, column])
        if not inputs.requires_grad or value == 0:
            return set()
        with self._differentiated():
            found = torch.autograd.grad(inputs[token, column], self._leaves, retain_graph=True, allow_unused=True)
        grads = dict(zip(self._names, found, strict=True))
        return {(name, row) for name in self._rows for row in self._proportional(name, grads, value)}

    def _proportional(self, name: str, grads: Mapping[str, torch.Tensor | None], value: float) -> list[int]:
        grad, whole = grads[name], self._block.parameters[name].detach()
        if grad is None:
            return []
        share = (grad * whole).sum(self._block.axes[name] + whole.ndim - 2)
        bias = self._biases.get(name)
        if bias and (more := grads[bias]) is not None:
            share = share + more * self._block.parameters[bias].detach()
        share = share.reshape(-1, share.shape[-1]) / value  # experts, rows
        hit = torch.stack([(share - degree).abs() < _NEAR for degree in _DEGREES]).any(0).any(0)
        return hit.nonzero()[:, 0].tolist()
