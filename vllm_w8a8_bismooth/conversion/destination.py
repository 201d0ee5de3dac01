"""Whether the place to write to is free, is ours, or holds the result already."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.checkpoint.files import RECIPE, partial_folder, read_json
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.conversion.part import PART, Part, outline_of
from vllm_w8a8_bismooth.conversion.plan import span
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.recipe import Recipe

_ELSEWHERE = "remove it or choose another folder"
_MARKS = {RECIPE: "a whole checkpoint", PART: "a part of a checkpoint"}


def refuse_overlap(folder: Path, destination: Path, what: str = "source") -> None:
    """Raises :class:`BismoothError` if what is written would lie in a folder that is read, or around it."""
    read = Path(os.path.realpath(folder))
    for written in (destination, partial_folder(destination)):
        if written == read or written in read.parents or read in written.parents:
            raise BismoothError.of(written, f"overlaps the {what} {folder}", "choose a destination beside it")


def _is_free(destination: Path, mark: str) -> bool:
    """Whether nothing is at the destination; raises if what is there lacks the file that marks what is to be there."""
    if destination.is_symlink():
        raise BismoothError.of(destination, "a link in a circle", _ELSEWHERE)
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return True
    found = [name for name in _MARKS if (destination / name).is_file()]
    if mark not in found:
        what = f"holds {_MARKS[found[0]]}" if found else "exists and is no result of bismooth"
        raise BismoothError.of(destination, what, _ELSEWHERE)
    return False


def _refuse_another(destination: Path, differences: Sequence[str]) -> None:
    if differences:
        more = ["..."] if len(differences) > 10 else []
        what = f"holds another conversion ({'; '.join([*differences[:10], *more])})"
        raise BismoothError.of(destination, what, _ELSEWHERE)


def already_a_part(destination: Path, identity: Mapping[str, Any], blocks: range, source: Source) -> bool:
    """Whether the destination holds just this part already; raises as :func:`already_converted`."""
    if _is_free(destination, PART):
        return False
    found, outline = Part(destination), outline_of(source)
    if found.blocks != blocks:
        _refuse_another(destination, [f"blocks: {span(found.blocks)} there, {span(blocks)} now"])
    _refuse_another(destination, found.unlike(identity, outline, {}))
    checksums = {name: source.checkpoint.digest(name) for name in found.checksums}
    _refuse_another(destination, found.unlike(identity, outline, checksums))
    return True


def already_converted(destination: Path, recipe: Recipe, fingerprint: Callable[[], str]) -> bool:
    """Whether the destination holds the result of this recipe already, on the source with this fingerprint.

    Raises:
        BismoothError: it holds anything else.
    """
    if _is_free(destination, RECIPE):
        return False
    stored = read_json(destination / RECIPE).get("recipe")
    stored = stored if isinstance(stored, dict) else {}
    differences = replace(recipe, source=stored.get("source")).differences(stored)
    if not differences:  # only then is it worth reading every byte of the source
        differences = replace(recipe, source=fingerprint()).differences(stored)
    _refuse_another(destination, differences)
    return True
