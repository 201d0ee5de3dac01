"""Which parameters of a block write to the residual stream: their output is added to it as it is."""

import torch
from torch.nn import functional

from vllm_w8a8_bismooth.discovery.block import Block

_HUGE = 1e7
"""What a weight is multiplied by, so that what it writes drowns all that later norms let through."""
_PARALLEL = 1e-3


def writers_of(block: Block) -> set[str]:
    """Matrices and gains whose output, once it is huge, is the block's output, token by token, but for a factor."""
    return {
        name
        for name in block.parameters
        if (_matrix_writes(block, name) if name in block.axes else block.is_gain(name) and _norm_writes(block, name))
    }


def _matrix_writes(block: Block, name: str) -> bool:
    """Of stacked experts, the first is asked."""
    unit = next((unit for unit in block.units(name) if unit in block.inputs), None)
    if unit is None:
        return False
    made = block.inputs[unit] @ block.matrix(unit).T
    with block.kept():
        block.put(block.matrix(unit), slice(None), block.matrix(unit) * _HUGE)
        now, _ = block.run()
    return _is_written(block, now, made)


def _norm_writes(block: Block, name: str) -> bool:
    made: list[torch.Tensor] = []

    def enlarge(module: torch.nn.Module, args: tuple, out: object) -> object:
        if not isinstance(out, torch.Tensor):
            return out
        made.append(out.detach().double())
        return out * _HUGE

    hook = block.module.get_submodule(name.rpartition(".")[0]).register_forward_hook(enlarge)
    try:
        now, _ = block.run()
    finally:
        hook.remove()
    return len(made) == 1 and _is_written(block, now, made[0])


def _is_written(block: Block, now: torch.Tensor, made: torch.Tensor) -> bool:
    """Whether each token's change of the output is a multiple of what was made larger for one of the tokens, which
    experts see in another order."""
    made = made.reshape(-1, made.shape[-1])
    if now.numel() < made.numel() or now.shape != block.output.shape:
        return False
    moved = ((now - block.output) / _HUGE)[: made.numel()].view_as(made)
    moved, made = (functional.normalize(rows, dim=1) for rows in (moved, made))
    return bool(((moved @ made.T).abs().amax(1) > 1 - _PARALLEL**2).all())
