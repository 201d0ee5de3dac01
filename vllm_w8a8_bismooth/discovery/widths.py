"""A smaller config of the same class: every width divided by one factor, every count kept but those of the experts."""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_w8a8_bismooth.model.configs import CHOSEN

_WIDTH = re.compile(
    r"\w*_(size|dim|dims|rank|width)(_mlp|_per_layer_input)?|n_embd|d_model|n_inner|dim|d_(ff|kv|head|inner|state)|"
    r"mamba_(d_ssm|d_head|d_state|headdim)|kv_channels|dim_model_base|rotary_dim|\w*head_dim\w*"
)
"""Keys whose numbers become sides of matrices, in all spellings of transformers' configs."""
_NO_WIDTH = re.compile(
    r".*(vocab|window|chunk|patch|image|kernel|batch|tensor_parallel|group|block_size|cache|conv_L|sample|pretraining_tp|state)"
    r".*|max_.*|num_.*"
)
_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts|moe_num_experts|num_moe_experts")
_COUNT = re.compile(r"(\w+_)?(num|n)_\w+|\w*heads|\w*experts")
_GROUPS = re.compile(r"n_group|topk_group|num_expert_group|n_expert_groups?|n_limited_groups")
_BLOCKS = re.compile(r"num_hidden_layers|n_layers?|num_layers|depth|num_decoder_layers|encoder_layers|decoder_layers")
_HEADS = re.compile(r"num_(attention_|key_value_)?heads|encoder_attention_heads|n_heads?")
_LENGTHS = re.compile(
    r"sliding_window(_size)?|attention_chunk_size|index_topk|(mamba_)?chunk_size|local_attention_window"
)
"""Numbers of tokens, made so small that they matter in a short text."""
_POSITIONS = re.compile(
    r"max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|seq_length|model_max_length|max_sequence_length"
)
_TEXT = re.compile(r"(text|llm|language|decoder|attn|ffn)_config")
_UNUSED = ("transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id")
_ROTARY_LISTS = ("short_factor", "long_factor")
"""A number for each pair of a head's channels."""

_TOWER = 8
_NARROWEST, _LEAST, _LARGEST = 4, 2, 256
VOCABULARY = 256
RESERVED = 8
"""The first tokens: those that a config names (padding, images) are among them, and no text has them."""
_WINDOW, _POSITIONS_KEPT, _ORIGINAL = 16, 256, 128


def is_tower(key: object, value: object) -> bool:
    """Whether a part of a config is of something beside the language model: a vision tower, an audio encoder."""
    return (
        isinstance(value, dict)
        and str(key).endswith("_config")
        and not _TEXT.fullmatch(str(key))
        and "vocab_size" not in value
        and not all(_is_number(inner) for inner in value)
    )


def _is_number(key: object) -> bool:
    """Whether a key is the number of a block (Gemma 4), or a label of a classifier."""
    return str(key).isdigit()


def numbers(value: object) -> list[int]:
    """The integers that stand for one thing: one, or one a block."""
    items: list[Any] = value if isinstance(value, list) else [value]
    return items if items and all(type(item) is int and item > 0 for item in items) else []


def walk(config: Mapping, inside: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Every entry of a config's language model, also of the configs inside it: (where, key, value)."""
    for key, value in config.items():
        key = str(key)  # some number their blocks
        if isinstance(value, dict) and not is_tower(key, value):
            yield from walk(value, (*inside, key))
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                yield from walk(item, (*inside, key, str(index)))
        else:
            yield inside, key, value


def is_width(key: str, value: object) -> bool:
    return bool(_WIDTH.fullmatch(key)) and not _NO_WIDTH.fullmatch(key) and bool(numbers(value))


def is_experts(key: str) -> bool:
    """Whether a key's number is how many experts a mixture has."""
    return bool(_EXPERTS.fullmatch(key))


def counts(config: Mapping) -> Iterator[int]:
    """Numbers of things (heads, experts) that a config names, and what a matrix has that makes up to three for each."""
    for _, key, value in walk(config):
        if _COUNT.fullmatch(key):
            yield from (number * times for number in numbers(value) for times in (1, 2, 3))


def factors(config: Mapping) -> list[int]:
    """What the widths can be divided by, in the order in which it is tried; 1 is the last.

    All widths are divided, the more the better; those that leave one below four come late, as a norm of so few channels
    knows little but signs. Only if nothing divides them all are the hidden size's divisors tried: a width that stands
    in the way is then kept.
    """
    widths = [number for _, key, value in walk(config) if is_width(key, value) for number in numbers(value)]
    widths += [hidden // heads for hidden, heads, said in _heads(config) if not said and hidden % heads == 0]
    widths = widths or [1]
    common = math.gcd(*widths)
    divisors = [f for f in range(min(common, _LARGEST), 1, -1) if common % f == 0]
    found = [f for narrowest in (_NARROWEST, _LEAST) for f in divisors if min(widths) // f >= narrowest]
    if not found:
        hidden = max((size for size, _, _ in _heads(config)), default=1)
        found = [f for f in (64, 32, 16, 8, 4, 2) if hidden % f == 0]
    return [*dict.fromkeys(found), 1]


def _heads(config: Mapping) -> Iterator[tuple[int, int, bool]]:
    """Hidden size, heads, and whether the width of a head is said, of each part of a config."""
    inner = [value for key, value in config.items() if isinstance(value, dict) and not is_tower(str(key), value)]
    for part in (config, *inner):
        hidden, heads = (
            next((part[key] for key in keys if type(part.get(key)) is int and part[key] > 0), None)
            for keys in (("hidden_size", "n_embd", "d_model"), ("num_attention_heads", "n_head", "n_heads"))
        )
        if hidden and heads:
            yield hidden, heads, any("head_dim" in key and value for key, value in part.items() if isinstance(key, str))


def shrunk(config: Mapping, factor: int, experts: int, blocks: int | None = None) -> dict[str, Any]:
    """The config with its widths divided by ``factor``.

    Args:
        config: of transformers' own keys, not modified.
        factor: see :func:`factors`. Widths that it does not divide are kept.
        experts: of each mixture, all of them chosen for every token, in one group.
        blocks: only the first so many; ``None`` for all.

    Returns:
        A config whose models are small in memory: few tokens, short windows; towers for images and sound have a
        single block.
    """
    out: dict[str, Any] = {}
    total = next((config[key] for key in config if _BLOCKS.fullmatch(str(key)) and type(config[key]) is int), None)
    for key, value in config.items():
        if key in _UNUSED:
            continue
        if blocks and _is_number(key) and int(key) >= blocks:
            continue
        if is_tower(key, value):
            out[key] = {k: _tower_entry(str(k), v) for k, v in value.items()}
        elif isinstance(value, dict):
            out[key] = shrunk(value, factor, experts, blocks)
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            out[key] = [shrunk(item, factor, experts) for item in value[: blocks if len(value) == total else None]]
        else:
            out[key] = _entry(str(key), value, factor, experts)
            if blocks and total and isinstance(value, list | str) and len(value) == total:
                out[key] = out[key][:blocks]
            elif blocks and _BLOCKS.fullmatch(str(key)) and type(value) is int:
                out[key] = min(blocks, value)
    return out


def _tower_entry(key: str, value: Any) -> Any:
    """One entry of a tower's config. It does not run: it must only be built, and be small."""
    if type(value) is not int:
        return copy.deepcopy(value)
    if _BLOCKS.fullmatch(key) or _HEADS.fullmatch(key):
        return 1
    return value // _TOWER if is_width(key, value) and value % _TOWER == 0 else value


def _entry(key: str, value: Any, factor: int, experts: int) -> Any:
    """One entry of :func:`shrunk`."""
    found = numbers(value)
    if key.endswith(("token_id", "token_index", "token_ids")):
        changed = None if value is None else [1] if isinstance(value, list) else 1
    elif key in _ROTARY_LISTS and isinstance(value, list):
        changed = value[:: factor if len(value) % factor == 0 else 1]
    elif key == "mrope_section" and found:
        parts = [number // factor for number in found]
        changed = [parts[0] + sum(found) // factor - sum(parts), *parts[1:]]
    elif not found:
        changed = copy.deepcopy(value)
    else:
        change = next((change for pattern, change in _CHANGES if pattern.fullmatch(key)), None)
        if change is None and is_width(key, value):
            changed = [n // factor if n % factor == 0 else n for n in found]
        else:
            changed = [change(n, experts) if change else n for n in found]
        changed = changed if isinstance(value, list) else changed[0]
    return changed


_CHANGES = (
    (_EXPERTS, lambda number, experts: min(number, experts)),
    (CHOSEN, lambda number, experts: experts),
    (_GROUPS, lambda number, experts: 1),
    (_LENGTHS, lambda number, experts: min(number, _WINDOW)),
    (_POSITIONS, lambda number, experts: min(number, _POSITIONS_KEPT)),
    (re.compile("original_max_position_embeddings"), lambda number, experts: min(number, _ORIGINAL)),
    (re.compile(r"\w*vocab_size\w*"), lambda number, experts: VOCABULARY),
)
"""Key -> what becomes of its number; every other number is kept."""
