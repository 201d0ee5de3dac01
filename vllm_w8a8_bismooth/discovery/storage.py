"""Where a checkpoint has the parameters of a model: found by value, from transformers' own way to save it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Region:
    """A matrix, or a whole tensor, of a parameter, and where a checkpoint's tensor has it.

    Attributes:
        parameter: its name in the model.
        expert: the slice that it is a part of; ``None`` if the parameter is no stack, or it is all of a stack.
        rows: (start, length) along the first axis of the parameter or slice, or along its last if it is transposed: of
            the parameter's what the tensor's rows are.
        tensor: the checkpoint's.
        start: the first of the tensor's rows that are meant.
        transposed: whether the tensor's last two axes are the parameter's in reverse.
    """

    parameter: str
    expert: int | None
    rows: tuple[int, int]
    tensor: str
    start: int
    transposed: bool


def own_state(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """What the model would save under transformers' own names: parameters and buffers, tied ones once."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    ignored = set(model._keys_to_ignore_on_save or ())
    tied = (
        set(getattr(model, "all_tied_weights_keys", None) or ())
        if getattr(model.config, "tie_word_embeddings", False)
        else set()
    )
    for late in (False, True):
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in ignored and (name in tied) is late and id(tensor) not in seen:
                seen.add(id(tensor))
                found[name] = tensor
    return found


def as_saved(model: "PreTrainedModel", state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as a checkpoint has them, by the conversion that transformers applies when it saves."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


def shapes(model: "PreTrainedModel") -> dict[str, tuple[int, ...]]:
    """Name in the checkpoint -> shape; the model may be without storage."""
    return {name: tuple(tensor.shape) for name, tensor in as_saved(model, own_state(model)).items()}


def regions(model: "PreTrainedModel") -> dict[str, list[Region]]:
    """Tensor in the checkpoint -> the parameters' regions that it consists of; empty where values were rearranged.

    Every element gets a number of its own, and is looked for in what would be saved.
    """
    numbered, begin, owners = {}, 0, []
    state = own_state(model)
    for name, tensor in state.items():
        numbered[name] = torch.arange(begin, begin + tensor.numel()).view(tensor.shape)
        owners.append((begin, name))
        begin += tensor.numel()
    bounds = torch.tensor([start for start, _ in owners])
    names = [name for _, name in owners]
    found: dict[str, list[Region]] = {}
    for saved, values in as_saved(model, dict(numbered)).items():
        found[saved] = _split(saved, values, bounds, names, numbered) if values.numel() else []
    return found


def _split(
    tensor: str, values: torch.Tensor, bounds: torch.Tensor, names: list[str], numbered: Mapping[str, torch.Tensor]
) -> list[Region]:
    """The regions of one tensor, whose rows may come from several parameters."""
    values = torch.atleast_1d(values)
    first = values.reshape(len(values), -1)[:, 0].contiguous()
    owners = (torch.searchsorted(bounds, first, right=True) - 1).tolist()
    found, row = [], 0
    while row < len(owners):
        owner = names[owners[row]]
        length = next((n for n in range(1, len(owners) - row) if owners[row + n] != owners[row]), len(owners) - row)
        region = _region(tensor, values[row : row + length], row, owner, torch.atleast_1d(numbered[owner]))
        if region is None:
            return []
        found.append(region)
        row += length
    return found


def _region(tensor: str, part: torch.Tensor, start: int, owner: str, whole: torch.Tensor) -> Region | None:
    """Where a part of a tensor lies in a parameter, if its elements lie there as they do in a matrix."""
    offset = int(part.flatten()[0] - whole.flatten()[0])
    if part.ndim == whole.ndim:
        stack, expert = whole, None
    elif part.ndim == whole.ndim - 1:
        size = whole[0].numel()
        expert = offset // size
        stack, offset = whole[expert], offset % size
    else:
        return None
    if part.shape[1:] == stack.shape[1:]:
        row = offset // max(1, stack[0].numel()) if stack.ndim > 1 else offset
        if torch.equal(part, stack[row : row + len(part)]):
            return Region(owner, expert, (row, len(part)), tensor, start, False)
    if part.ndim > 1 and torch.equal(part.mT, stack):
        return Region(owner, expert, (0, part.shape[-2]), tensor, start, True)
    return None
