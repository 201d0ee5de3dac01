"""How large a config's model may be; without torch, so that what is known already is read at once."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_w8a8_bismooth.discovery import widths
from vllm_w8a8_bismooth.errors import BismoothError, Problem
from vllm_w8a8_bismooth.model.configs import CHOSEN, text_of

MOST_BLOCKS, MOST_EXPERTS, WIDEST = 1024, 2048, 2**24
"""A config.json is not trusted: more is refused before anything is built."""
_COUNT = re.compile(r"\w*(layers?|depth|blocks)|\w*experts")
_MOST_ITEMS, _DEEPEST = 2**14, 32
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""What every model has that names it so; some have a list, of a number for each block."""
_MAYBE = re.compile(r"(moe_)?intermediate_size|num_key_value_heads|head_dim")
"""What may be absent, or null where it follows from others."""


def check_bounds(config: Mapping) -> None:
    """Raises :class:`BismoothError` for a config whose model would have absurdly many parts, or absurdly wide ones, or
    sizes that are none: no such model is converted in any way."""
    if problems := list(_strange(text_of(config))):
        raise BismoothError(*problems)
    stack: list[tuple[str, Any, int]] = [(key, value, 0) for key, value in config.items()]

    def refuse(what: str) -> None:
        raise BismoothError.of("config.json", what, "mend it")

    while stack:
        key, value, depth = stack.pop()
        if depth > _DEEPEST:
            refuse(f"holds objects that are nested more than {_DEEPEST} deep")
        if isinstance(value, dict):
            stack += ((inner, item, depth + 1) for inner, item in value.items())
        elif isinstance(value, list):
            if len(value) > _MOST_ITEMS and "token" not in key:
                refuse(f"{key} has {len(value)} entries, more than a model has parts")
            stack += ((key, item, depth + 1) for item in value)
        elif type(value) is int:
            bound = (MOST_EXPERTS if "expert" in key else MOST_BLOCKS) if _COUNT.fullmatch(key) else WIDEST
            if value > bound and (_COUNT.fullmatch(key) or widths.is_width(key, value) or "heads" in key):
                shown = value if value < 2**64 else "a larger number"
                refuse(f"{key} = {shown} is beyond what any model has (up to {bound})")


def _strange(config: Mapping) -> Iterator[Problem]:
    """Sizes that are none, all of them."""
    for key, value in config.items():
        counted = widths.is_experts(key) or CHOSEN.fullmatch(key)
        if isinstance(value, list) or not (key in _SIZES or _MAYBE.fullmatch(key) or counted):
            continue
        if key not in _SIZES and (value is None or (value == 0 and type(value) is int)):
            continue  # nothing of that kind
        if type(value) is not int or value < 1:
            yield Problem("config.json", f"{key} = {repr(value)[:80]} is no positive integer", "mend it")
    experts = [(key, value) for key, value in config.items() if widths.is_experts(key) and type(value) is int]
    chosen = [(key, value) for key, value in config.items() if CHOSEN.fullmatch(key) and type(value) is int]
    if experts and chosen and chosen[0][1] > max(value for _, value in experts) > 0:
        what = "{} = {} is more than {} = {}".format(*chosen[0], *experts[0])
        yield Problem("config.json", what, "mend it")
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if type(heads) is type(kv_heads) is int and 0 < kv_heads < WIDEST and 0 < heads < WIDEST and heads % kv_heads:
        what = f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        yield Problem("config.json", what, "mend it")
