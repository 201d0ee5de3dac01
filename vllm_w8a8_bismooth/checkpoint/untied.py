"""A model that takes its embedding for its head, seen as one whose head is a tensor of its own with the same values."""

from dataclasses import replace

from vllm_w8a8_bismooth.checkpoint.basis import Means
from vllm_w8a8_bismooth.checkpoint.blueprint import Blueprint
from vllm_w8a8_bismooth.checkpoint.files import CONFIG
from vllm_w8a8_bismooth.checkpoint.reader import Headers
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.model.classes import head_of
from vllm_w8a8_bismooth.model.configs import ties, untied
from vllm_w8a8_bismooth.model.layers import View

BESIDE = "is stored, though the model takes its embedding for its head: --head int8 could mean either"
"""Why a tied head cannot be untied, said of one that is stored all the same."""


def untie(headers: Headers, means: Means, blueprint: Blueprint) -> Blueprint:
    """What follows from the config once it says that head and embedding are two, as :attr:`Headers.config` then does.

    Args:
        headers: of a checkpoint.
        means: by which it was laid out.
        blueprint: what follows from its own config; this again if head and embedding are two in it already.

    Raises:
        BismoothError: nothing shows which tensor the head would be, or one is stored that the model does not use.
    """
    config, head = headers.config, blueprint.names.head
    # What an earlier step has proven, it has proven of the untied model.
    known = means.known is not None and head not in headers.headers and ties(config) is not False
    if head_of(config) != "language" or not (blueprint.tied or known):
        return blueprint
    if head in headers.headers:
        remedy = f"remove it, or set tie_word_embeddings to false in {CONFIG} if it is the model's head"
        raise BismoothError.of(head, BESIDE, remedy)
    headers.config = untied(config)
    found = Blueprint.of(headers, means)
    if found.tied:
        what = "nothing shows what its head would be called apart from the embedding"
        raise BismoothError.of("--head int8", what, "leave it out")
    rows, columns = found.outside[found.names.embedding]
    shape = (rows, columns)
    return replace(found, views={**found.views, found.names.head: View(found.names.embedding, shape, shape)})
