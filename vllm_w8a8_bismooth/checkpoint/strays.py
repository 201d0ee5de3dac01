"""Tensors that the weights lack and that lie in other safetensors files beside them."""

from collections.abc import Callable, Iterator

from vllm_w8a8_bismooth.checkpoint.files import INDEX, SINGLE
from vllm_w8a8_bismooth.checkpoint.reader import Headers
from vllm_w8a8_bismooth.checkpoint.shards import may_be_weights
from vllm_w8a8_bismooth.errors import BismoothError, Problem


def strays(checkpoint: Headers, is_wanted: Callable[[str], bool]) -> dict[str, list[str]]:
    """Files at the top that hold tensors that are wanted -> those tensors.

    They count from then on as files that serving needs. A file that shares a tensor with the weights is another copy
    of the model, and no part of it.
    """
    found = {}
    for file in checkpoint.place.files():
        if file in checkpoint.files or not may_be_weights(file):
            continue
        try:
            _, entries = checkpoint.place.header(file)
        except BismoothError:
            continue  # nothing that could be said of it is of use here
        names = [name for name in entries if is_wanted(name)]
        if names and not entries.keys() & checkpoint.headers.keys():
            found[file] = names
    if found:
        checkpoint.apart |= found.keys()
    return found


def stray_problems(checkpoint: Headers, found: dict[str, list[str]]) -> Iterator[Problem]:
    """That they are missing where they are read, and where they are."""
    write = f"write {INDEX}, which says what is in which file, or join the files as {SINGLE}"
    for file, names in found.items():
        remedy = f"name in {INDEX} what it holds" if checkpoint.place.has(INDEX) else write
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        yield Problem(names[0], f"is missing{more} in what is read, and {file} holds it", remedy)
