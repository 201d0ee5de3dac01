"""The language model's head: whether it can become INT8, and what is said of one that is stored beside the embedding
although the config says that the embedding is the head."""

import itertools

from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint, Headers
from vllm_w8a8_bismooth.checkpoint.untied import BESIDE
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.model.classes import class_of, float_head, head_of
from vllm_w8a8_bismooth.patterns import found_by
from vllm_w8a8_bismooth.recipe import INT8, Recipe

_OPTION, _OUT = "--head int8", "leave it out: the head stays in float"
_SERVED, _WIDTH = "lm_head.weight", 16
_IGNORED = (
    "vLLM ignores it and takes the embedding; if the head was trained apart, set tie_word_embeddings to false in the "
    "source's config.json"
)


def check(source: Layout, recipe: Recipe) -> None:
    """Raises :class:`BismoothError` if the head is to be INT8 and cannot, or is named among what stays in float."""
    if recipe.head != INT8:
        return
    name = source.names.head.removesuffix(".weight")
    if what := obstacle(source):
        raise BismoothError.of(_OPTION, what, _OUT)
    if pattern := next((pattern for pattern in recipe.ignore or () if name in found_by(pattern, [name])), None):
        raise BismoothError.of(f"{_OPTION} and --ignore {pattern!r}", f"both name {name}", "leave it out of one")


def obstacle(source: Layout) -> str | None:
    """Why the head cannot become INT8, or be served so; ``None`` if it can."""
    config, name = source.checkpoint.config, source.names.head
    if head_of(config) != "language":
        return f"the model is a {class_of(config)}, without a language model's head"
    if not name.endswith(_SERVED):
        return f"the head is {name}, and vLLM serves one in INT8 only where it is called lm_head"
    if (why := float_head(config)) is not None:
        return f"{why} (model_type {config['model_type']})"
    if source.tied and name in source.checkpoint.headers:
        return f"{name} {BESIDE}"
    if not source.tied and name not in source.checkpoint.headers:
        return f"{name} is not in the files"
    if (columns := source.checkpoint.headers[source.names.embedding if source.tied else name].shape[1]) % _WIDTH:
        return f"{name} has K = {columns}, which is no multiple of {_WIDTH}, as vLLM's kernels need"
    return None


def notes(source: Headers, tied: bool) -> list[str]:
    """What the headers say: there may be nothing, or a sentence without its full stop.

    Args:
        source: laid out, so that its names are known.
        tied: whether the model takes its embedding for its head.
    """
    if source.names.head not in source.headers or not tied:
        return []
    return [f"{source.names.head} is stored, though config.json ties the head to the embedding: {_IGNORED}"]


def notes_with_values(source: Checkpoint, tied: bool) -> list[str]:
    """What headers and values say; a head that equals the embedding is not worth a word."""
    if found := notes(source, tied):
        names, headers = (source.names.embedding, source.names.head), source.headers
        pieces = (source.pieces(name) for name in names)
        if len({headers[name].dtype for name in names}) == 1 and all(
            a is not None and b is not None and a.equal(b) for a, b in itertools.zip_longest(*pieces)
        ):
            return []
        return [f"{source.names.head} differs from the embedding, though config.json ties them: {_IGNORED}"]
    return found
