"""Heads that ``architectures`` promises, held against those that are there."""

import json
from collections.abc import Iterator, Mapping, Sequence

from vllm_w8a8_bismooth.checkpoint.companions import MODULES
from vllm_w8a8_bismooth.checkpoint.files import CONFIG
from vllm_w8a8_bismooth.checkpoint.reader import FLOAT_DTYPES, Header, Headers
from vllm_w8a8_bismooth.checkpoint.strays import stray_problems, strays
from vllm_w8a8_bismooth.errors import Problem
from vllm_w8a8_bismooth.model.classes import HEADS, family_of, head_of, implied_by


def head_problems(checkpoint: Headers, tied: bool, tensors: Mapping[str, Header]) -> Iterator[Problem]:
    """A head that ``architectures`` promises and that is not there.

    Args:
        checkpoint: its config and names count.
        tied: whether the head is the embedding.
        tensors: those to be looked at.
    """
    config, names = checkpoint.config, checkpoint.names
    kind = head_of(config)
    if MODULES in checkpoint.place.files():
        return
    if kind != "other" and (names.head in tensors or names.head in checkpoint.lost):
        return
    known = {names.embedding, names.norm}
    others = [n for n, header in tensors.items() if names.inside(n) is None and header.dtype in FLOAT_DTYPES]
    others = [n for n in others if n not in known and "rotary_emb." not in n]
    heads = [n for n in (*others, *checkpoint.lost) if n.removeprefix(names.trunk).startswith(HEADS)]
    if kind == "language" and not tied:
        yield from _apart(checkpoint, (names.head,)) or [_no_language_head(checkpoint, tensors, others, heads)]
    # vLLM makes a classifier of a language model's head where the config says so.
    elif kind == "other" and not (config.get("classifier_from_token") or config.get("method")) and not heads:
        lacks = _no_other_head(config, [name for name in others if name != names.head])
        yield from _apart(checkpoint, HEADS) or [lacks]


def _apart(checkpoint: Headers, beginnings: tuple[str, ...]) -> list[Problem]:
    """That a head lies in a file that is not read; empty if none does."""
    trunk = checkpoint.names.trunk
    found = strays(checkpoint, lambda name: name.removeprefix(trunk).startswith(beginnings))
    return [*stray_problems(checkpoint, found)]


def _no_language_head(
    checkpoint: Headers, tensors: Mapping[str, Header], others: Sequence[str], heads: Sequence[str]
) -> Problem:
    config, names = checkpoint.config, checkpoint.names
    ties = f"tie_word_embeddings {json.dumps(config.get('tie_word_embeddings', 'not given'))}"
    promises = f"{CONFIG} promises it (architectures {config.get('architectures')}, {ties})"
    if heads:
        what = f"is missing, {promises}, and {heads[0]} is another head"
        return Problem(names.head, what, _class_of_head(config, heads))
    shape = tensors[names.embedding].shape if names.embedding in tensors else None
    alike = [n for n in others if tensors[n].shape == shape and not n.endswith("embed_tokens.weight")]
    if alike:
        return Problem(
            names.head,
            f"is missing, {promises}, and {alike[0]} has its shape",
            f"rename {alike[0] if len(alike) == 1 else 'the one that is the head'} to {names.head} in the files "
            "(and in their index)",
        )
    return Problem(
        names.head,
        f"is missing, and {promises}: these are the files of a bare decoder, as embedding models have them, or one "
        "file is missing",
        f"download the checkpoint again, or {_bare(config)} if it is one, or tie_word_embeddings to true if the "
        "embedding is the head",
    )


def _class_of_head(config: Mapping, heads: Sequence[str]) -> str:
    """What to do where a head is there whose class is not the one that is named."""
    ending = next(filter(None, map(implied_by, heads)), None)
    if ending is None:
        return f"set architectures in {CONFIG} to the class that has {heads[0]}, as its publisher calls it"
    return f"{_architectures(family_of(config) + ending)} if the model ends in it, or download the checkpoint again"


def _no_other_head(config: Mapping, others: Sequence[str]) -> Problem:
    given = config.get("architectures")
    if others:
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        return Problem(
            CONFIG,
            f"architectures is {given}, and what lies outside the decoder, {others[0]}{more}, is no head that vLLM or "
            f"transformers knows ({', '.join(HEADS)}): the result could not be served as such a model",
            "give a checkpoint in a form that they know, or rename the tensors if they are such a head under another "
            "name",
        )
    return Problem(
        CONFIG,
        f"architectures is {given}, but no tensor of such a head is in the files",
        f"download the checkpoint again, or {_bare(config)} if the model has no head",
    )


def _bare(config: Mapping) -> str:
    return _architectures(f"{family_of(config)}Model")


def _architectures(name: str) -> str:
    return f"set architectures to [{json.dumps(name)}] in {CONFIG}"
