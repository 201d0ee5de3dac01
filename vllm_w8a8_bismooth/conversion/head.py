"""A head that is stored although the config says that the embedding is the head."""

import itertools

from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint, Headers

_IGNORED = (
    "vLLM ignores it and takes the embedding; if the head was trained apart, set tie_word_embeddings to false in the "
    "source's config.json"
)


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
