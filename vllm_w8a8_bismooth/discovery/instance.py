"""A small model with random weights, and texts for it."""

import copy
from typing import TYPE_CHECKING, Any

import torch

from vllm_w8a8_bismooth.discovery import widths
from vllm_w8a8_bismooth.discovery.origin import Origin
from vllm_w8a8_bismooth.discovery.watch import Watch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_TOKENS = 3.0
"""Size of embeddings: what tokens have in common must not outweigh them, or units would be dead for all of them."""


@torch.no_grad()
def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Values under which nothing is equal by accident: vectors moved away from how their class begins, matrices whose
    products are about as large as what they read."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.ndim == 1 or "A_log" in name:
            start = torch.where(p.isfinite() & (p.abs() < 100), p, 0)
            noise = start + noise * 0.2
        elif id(p) in embeddings:
            noise *= _TOKENS
        elif "bias" in name.rpartition(".")[2]:
            noise *= 0.1
        else:
            noise *= 0.4 if "conv" in name else 1.5 / max(1, p.shape[-1]) ** 0.5
        p.copy_(noise)


class TooLarge(Exception):
    """A small model that is none."""


def _resized(config: "PretrainedConfig", entries: dict[str, Any]) -> "PretrainedConfig":
    """A config with these entries. Its class may ask for ratios that its models do not need (that a head's width times
    their number is the hidden size); then they are put in place one by one."""
    entries = {key: value for key, value in entries.items() if key != "model_type"}
    try:
        return type(config)(**entries)
    except Exception:
        changed = copy.deepcopy(config)
        _put(changed, entries)
        return changed


def _put(config: "PretrainedConfig", entries: dict[str, Any]) -> None:
    for key, value in entries.items():
        old = getattr(config, key, None)
        if hasattr(old, "to_dict"):
            _put(old, value)
        elif old != value and key != "model_type":
            setattr(config, key, value)


def small(origin: Origin, factor: int, experts: int, blocks: int | None, most: int) -> "PreTrainedModel":
    """A model with widths divided by ``factor``, in fp64, with random weights that depend on nothing else.

    Raises:
        TooLarge: it has more than ``most`` parameters.
        Exception: whatever its class raises.
    """
    entries = widths.shrunk(origin.config.to_dict(), factor, experts, blocks)
    shrunk = _resized(origin.config, entries)
    count = sum(p.numel() for p in origin.build(shrunk, "meta").parameters())
    if count > most:
        raise TooLarge(f"{count} parameters at widths divided by {factor}")
    torch.manual_seed(0)  # of the class's own beginning
    model = origin.build(shrunk)
    randomize(model, torch.Generator().manual_seed(factor))
    return model.double()


def logits(model: "PreTrainedModel", tokens: torch.Tensor) -> torch.Tensor:
    """fp64 ``[1, length, vocab]``, everything computed in fp64."""
    with torch.no_grad(), Watch({}):
        return model(input_ids=tokens, use_cache=False).logits


def text(length: int, generator: torch.Generator) -> torch.Tensor:
    """Random tokens int64 ``[1, length]``, of those that have no special meaning."""
    return torch.randint(widths.RESERVED, widths.VOCABULARY, (1, length), generator=generator)
