"""What a config.json says, in Python's numbers, and where in it a language model's own part is."""

import re
from collections.abc import Mapping
from typing import Any

_FLOAT = "__float__"
"""The key under which transformers writes infinities and NaN, which JSON does not have."""
_TEXT = ("text_config", "llm_config", "language_config", "thinker_config")
_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
CHOSEN = re.compile(r"\w*experts?_per_tok(en)?|moe_(top)?k|moe_top_k|top_k_experts|num_selected_experts|moe_topk")
"""Keys under which configs have how many experts a token is sent to."""
_PREDICTORS = re.compile(r"(num_(mtp|nextn)|(mtp|nextn)_num)(_\w+)?_(layers|modules)")
_TIES = "tie_word_embeddings"
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")


def decoded(value: Any) -> Any:
    """A deep copy of a parsed config, with the numbers that JSON does not have."""
    if isinstance(value, dict):
        if value.keys() == {_FLOAT} and isinstance(value[_FLOAT], str):
            return float(value[_FLOAT]) if value[_FLOAT] in ("Infinity", "-Infinity", "NaN") else value
        return {key: decoded(item) for key, item in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that is of the language model, where others have theirs beside it."""
    return next((config[key] for key in _TEXT if isinstance(config.get(key), dict)), config)


def ties(config: Mapping[str, Any]) -> Any:
    """What a config says of whether the head is the embedding; ``None`` if that is left to the model's class."""
    return config.get(_TIES, text_of(config).get(_TIES))


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says that the head is not the embedding, wherever readers look for that."""
    text = text_of(config)
    parts = {key: {**text, _TIES: False} for key, value in config.items() if value is text}
    return {**config, **parts, _TIES: False}


def positions_of(config: Mapping[str, Any]) -> int | None:
    """How many positions the model has; ``None`` if it does not say."""
    text = text_of(config)
    found = (text[key] for key in _POSITIONS if type(text.get(key)) is int and text[key] > 0)
    return next(found, None)


def chosen_of(config: Mapping[str, Any]) -> int | None:
    """How many experts a token is sent to; ``None`` if the config does not say."""
    found = (value for key, value in text_of(config).items() if CHOSEN.fullmatch(key) and type(value) is int)
    return next((number for number in found if number > 0), None)


def count_of(config: Mapping[str, Any]) -> tuple[str, int | None]:
    """The key that says how many blocks the model has, and what it says; ``None`` if nothing does."""
    text = text_of(config)
    found = ((key, text[key]) for key in _BLOCKS if type(text.get(key)) is int and text[key] > 0)
    return next(found, (_BLOCKS[0], None))


def predictors_of(config: Mapping[str, Any]) -> int:
    """How many blocks behind the last one predict further tokens (MTP)."""
    return max((value for key, value in config.items() if _PREDICTORS.fullmatch(key) and type(value) is int), default=0)
