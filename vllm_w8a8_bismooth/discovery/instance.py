"""Models of a config's class: a small one with random weights, and the real one without storage."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vllm_w8a8_bismooth.discovery import widths
from vllm_w8a8_bismooth.discovery.watch import Watch
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.model.configs import decoded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MOST_BLOCKS, MOST_EXPERTS, WIDEST = 1024, 2048, 2**24
"""A config.json is not trusted: more is refused before anything is built."""
_COUNT = re.compile(r"\w*(layers?|depth|blocks)|\w*experts")
_MOST_ITEMS = 2**14
_TOKENS = 3.0
_REMEDY = "mend config.json, or convert with --method rtn, which does not run the model"


def refused(what: str) -> BismoothError:
    """The error of a config of which no model can be made."""
    return BismoothError.of("config.json", what, _REMEDY)


def explained(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def check_bounds(config: Mapping) -> None:
    """Raises :class:`BismoothError` for a config whose model would have absurdly many parts, or absurdly wide ones."""
    stack: list[tuple[str, Any]] = list(config.items())
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict):
            stack += value.items()
        elif isinstance(value, list):
            if len(value) > _MOST_ITEMS and "token" not in key:
                raise refused(f"{key} has {len(value)} entries, more than a model has parts")
            stack += ((key, item) for item in value)
        elif type(value) is int:
            bound = (MOST_EXPERTS if "expert" in key else MOST_BLOCKS) if _COUNT.fullmatch(key) else WIDEST
            if value > bound and (_COUNT.fullmatch(key) or widths.is_width(key, value) or "heads" in key):
                raise refused(f"{key} = {value} is beyond what is built (up to {bound})")


def config_of(config: Mapping, trust_remote_code: bool = False) -> "PretrainedConfig":
    """transformers' own config object, with the defaults of its class.

    Raises:
        BismoothError: transformers does not know the type, or refuses the config.
    """
    from transformers import AutoConfig

    entries = {k: decoded(v) for k, v in config.items() if k not in ("model_type", "quantization_config", "auto_map")}
    try:
        return AutoConfig.for_model(config["model_type"], **entries)
    except Exception as error:
        raise refused(f"transformers refuses it ({explained(error)})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def build(config: "PretrainedConfig", device: str = "cpu") -> "PreTrainedModel":
    """The causal language model of a config, whatever else belongs to it, in fp32.

    Raises:
        Exception: whatever its class raises.
    """
    import transformers

    autos = [transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText]
    autos += [getattr(transformers, "AutoModelForMultimodalLM", autos[1])]
    if any(widths.is_tower(key, value) for key, value in config.to_dict().items()):
        autos = [*autos[1:], autos[0]]
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), autos[0])
    with _quiet(), torch.device(device):
        model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


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
            noise *= _TOKENS  # what tokens have in common must not outweigh them: units would be dead for all
        elif "bias" in name.rpartition(".")[2]:
            noise *= 0.1
        else:
            noise *= 0.4 if "conv" in name else 1.5 / max(1, p.shape[-1]) ** 0.5
        p.copy_(noise)


def small(config: "PretrainedConfig", factor: int, experts: int, blocks: int | None, most: int) -> "PreTrainedModel":
    """A model with widths divided by ``factor``, in fp64, with random weights that depend on nothing else.

    Raises:
        ValueError: it has more than ``most`` parameters.
        Exception: whatever its class raises.
    """
    entries = widths.shrunk(config.to_dict(), factor, experts, blocks)
    entries.pop("model_type", None)
    shrunk = type(config)(**entries)
    count = sum(p.numel() for p in build(shrunk, "meta").parameters())
    if count > most:
        raise ValueError(f"{count} parameters at widths divided by {factor}")
    torch.manual_seed(0)  # of the class's own beginning
    model = build(shrunk)
    randomize(model, torch.Generator().manual_seed(factor))
    return model.double()


def logits(model: "PreTrainedModel", tokens: torch.Tensor) -> torch.Tensor:
    """fp64 ``[1, length, vocab]``, everything computed in fp64."""
    with torch.no_grad(), Watch({}):
        return model(input_ids=tokens, use_cache=False).logits


def text(length: int, generator: torch.Generator) -> torch.Tensor:
    """Random tokens int64 ``[1, length]``, of those that have no special meaning."""
    return torch.randint(widths.RESERVED, widths.VOCABULARY, (1, length), generator=generator)
