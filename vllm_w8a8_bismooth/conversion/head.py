"""A head that is stored although the config says that the embedding is the head."""

import itertools

from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint, Headers
from vllm_w8a8_bismooth.model.architectures import architecture_of

_IGNORED = (
    "vLLM ignores it and takes the embedding; if the head was trained apart, set tie_word_embeddings to false in the "
    "source's config.json"
)


def is_tied(headers: Headers) -> bool | None:
    """Whether the config makes the embedding the head; ``None`` if it leaves that to a model type that is unknown."""
    architecture = architecture_of(headers.config)
    return headers.config.get("tie_word_embeddings", architecture.tied if architecture else None)


def notes(source: Headers) -> list[str]:
    """What the headers say: there may be nothing, or a sentence without its full stop."""
    if source.names.head not in source.headers or not is_tied(source):
        return []
    return [f"{source.names.head} is stored, though config.json ties the head to the embedding: {_IGNORED}"]


def notes_with_values(source: Checkpoint) -> list[str]:
    """What headers and values say; a head that equals the embedding is not worth a word."""
    if found := notes(source):
        names, headers = (source.names.embedding, source.names.head), source.headers
        pieces = (source.pieces(name) for name in names)
        if len({headers[name].dtype for name in names}) == 1 and all(
            a is not None and b is not None and a.equal(b) for a, b in itertools.zip_longest(*pieces)
        ):
            return []
        return [f"{source.names.head} differs from the embedding, though config.json ties them: {_IGNORED}"]
    return found
