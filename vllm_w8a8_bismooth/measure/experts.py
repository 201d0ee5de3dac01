"""The experts of a mixture as modules of their own, so that what each one reads can be measured."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from vllm_w8a8_bismooth.model.construction import Construction


def separate_experts(blocks: Iterable[torch.nn.Module], construction: Construction) -> None:
    """Make every expert of the decoder blocks a module of its own, of linears with the names of the checkpoint.

    Experts that compute something else than those of most models stay as they are.
    """
    for index, block in enumerate(blocks):
        mixture = construction.experts(index)
        if mixture is None or not any(name == mixture.module for name, _ in block.named_modules()):
            continue
        stacked, names = block.get_submodule(mixture.module), [name.rpartition(".")[2] for name in mixture.linears]
        if (kind := _KINDS.get(_given_to(stacked))) and _is_usual(stacked):
            transposed = construction.parts(index, f"{mixture.module}.down_proj")[0].transposed
            block.set_submodule(mixture.module, kind(stacked, names, transposed))


def _given_to(stacked: torch.nn.Module) -> tuple[str, ...]:
    """What transformers' experts are called with."""
    return tuple(inspect.signature(type(stacked).forward).parameters)[1:]


def _is_usual(stacked: Any) -> bool:
    """Whether each expert is ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``, and no more."""
    from transformers.integrations import moe

    gate = getattr(type(stacked), "_apply_gate", moe._default_apply_gate)
    return (
        callable(getattr(stacked, "act_fn", None))
        and gate is moe._default_apply_gate
        and not getattr(stacked, "has_bias", False)
        and getattr(stacked, "is_concatenated", True)
    )


class Experts(torch.nn.Module):
    """Experts as modules of their own, named by their numbers.

    Takes the place of transformers' experts, whose weights are stacked: a forward of (hidden states ``[T, H]``, chosen
    experts ``[T, k]``, their weights ``[T, k]``).

    Args:
        stacked: transformers'.
        names: of the linears of each.
        transposed: whether their weights are ``[E, K, N]``.
    """

    def __init__(self, stacked: Any, names: Sequence[str], transposed: bool):
        super().__init__()
        self._reached: set[int] = set()
        self._given: torch.Tensor | None = None
        for e in range(stacked.num_experts):
            self.add_module(str(e), _Expert(stacked, names, transposed))

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for e in range(len(self._modules)):
            token, rank = torch.where(chosen == e)
            if len(token):
                made = self._read(e, hidden[token])
                out.index_add_(0, token, (made * weights[token, rank, None]).to(out.dtype))
        self._given = hidden
        return out

    def _read(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        self._reached.add(expert)
        return self.get_submodule(str(expert))(hidden)

    def read_rest(self) -> list[int]:
        """Give the experts that no token was sent to what the others were given last; returns their numbers."""
        rest = [e for e in range(len(self._modules)) if e not in self._reached]
        if self._given is not None:
            for e in rest:
                self._read(e, self._given)
        return rest

    def forget(self) -> None:
        """Begin anew, as if there had been no token."""
        self._reached, self._given = set(), None


class Sorted(Experts):
    """As :class:`Experts`, where each is given a row for every token, times its weight: a forward of ``[E * T, H]``."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        out = torch.zeros_like(hidden)
        given, made = (rows.view(len(self._modules), -1, rows.shape[-1]) for rows in (hidden, out))
        for e, rows in enumerate(given):
            token = rows.any(dim=-1).nonzero()[:, 0]
            if len(token):
                made[e, token] = self._read(e, rows[token])
        self._given = hidden[hidden.any(dim=-1)]
        return out


_KINDS: Mapping[tuple[str, ...], type[Experts]] = {
    ("hidden_states", "top_k_index", "top_k_weights"): Experts,
    ("hidden_states",): Sorted,
}
"""What transformers' experts are called with -> what takes their place."""


class _Expert(torch.nn.Module):
    """One expert; its linears are gate (if there is one), up and down."""

    def __init__(self, stacked: Any, names: Sequence[str], transposed: bool):
        super().__init__()
        whole = stacked.down_proj
        _, hidden, inner = (whole.mT if transposed else whole).shape
        for name in names[:-1]:
            self.add_module(name, torch.nn.Linear(hidden, inner, bias=False, dtype=whole.dtype))
        self.add_module(names[-1], torch.nn.Linear(inner, hidden, bias=False, dtype=whole.dtype))
        self._activation = getattr(stacked.act_fn, "forward", stacked.act_fn)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        *gates, up, down = self.children()
        made = up(hidden)
        for gate in gates:
            made = self._activation(gate(hidden)) * made
        return down(made if gates else self._activation(made))
