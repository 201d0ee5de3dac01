"""Whether two checkpoints speak of the same tokens: else their predictions cannot be compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.checkpoint.files import CONFIG, read_json
from vllm_w8a8_bismooth.errors import BismoothError

TOKENIZER = "tokenizer.json"
_REMEDY = "name with --against the checkpoint that it was made from"


def refuse_unlike(folder: Path, source: Path) -> None:
    """Compare the sizes in config.json, and in tokenizer.json, where both have one, which token has which number.

    Other differences do not matter: what is scored is tokenized once, and tools write into that file how they cut text.

    Raises:
        BismoothError: they differ, or a file cannot be read.
    """
    here, there = size(read_json(folder / CONFIG)), size(read_json(source / CONFIG))
    if here != there:
        what = f"has a vocabulary of {here or 'unknown size'}, and {source} one of {there or 'unknown size'}"
        raise BismoothError.of(folder, what, _REMEDY)
    if not all((place / TOKENIZER).is_file() for place in (folder, source)):
        return
    ours, theirs = (_numbers(read_json(place / TOKENIZER)) for place in (folder, source))
    if ours != theirs:
        odd = sorted(str(token) for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        what = f"its {TOKENIZER} numbers tokens otherwise than that of {source} ({len(odd)} differ, {odd[0]!r} for one)"
        raise BismoothError.of(folder, what, _REMEDY)


def size(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model predicts, by its config; that of the text, in a model of several kinds of input."""
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, Mapping) else {}):
        if isinstance(found := place.get("vocab_size"), int):
            return found
    return None


def _numbers(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token -> its number, of a ``tokenizer.json`` of any kind; added ones count last."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list):  # Unigram: pairs of a token and its score, in order
        vocabulary = {str(pair[0] if isinstance(pair, list) and pair else pair): i for i, pair in enumerate(vocabulary)}
    added = tokenizer.get("added_tokens")
    more = {
        str(entry["content"]): entry["id"]
        for entry in (added if isinstance(added, list) else [])
        if isinstance(entry, Mapping) and "content" in entry and "id" in entry
    }
    return {**(vocabulary if isinstance(vocabulary, Mapping) else {}), **more}
