"""Which files of a checkpoint hold its weights: by its index, or by their names where there is none that is right."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_w8a8_bismooth.checkpoint.files import INDEX, SINGLE, Place, read_json
from vllm_w8a8_bismooth.errors import BismoothError, Problem

SUFFIX = ".safetensors"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,6})-of-(?P<total>\d{5,6})\.safetensors")
_NOT_THE_MODEL = ("adapter_", "consolidated")
"""Beginnings of names that mean something else than the model in Hugging Face's format."""


@dataclass
class Shards:
    """Where the weights are.

    Attributes:
        files: in order; empty if there are none.
        weight_map: tensor -> file, as the index says; empty without one, where each file says itself what it holds.
        problems, notes: why there are none or too many; what was passed over.
        lost: tensors whose place in the index is no shard.
        unlike: what is taken otherwise than the index has it, so that vLLM would not load the files; ``None`` if it
            would, as far as their names go.
    """

    files: list[str] = field(default_factory=list)
    weight_map: Mapping[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    unlike: str | None = None


def may_be_weights(file: str) -> bool:
    """Whether a file's name is that of weights in Hugging Face's format, of this model or another."""
    return "/" not in file and file.endswith(SUFFIX) and not file.startswith(_NOT_THE_MODEL)


def find(place: Place) -> Shards:
    """The files of a checkpoint's weights, of which only their names are looked at, and the index."""
    present = [file for file in place.files() if "/" not in file and file.endswith(SUFFIX)]
    if not place.has(INDEX):
        return _by_names(place, present)
    indexed = _by_index(place)
    if indexed.files and all(map(place.has, indexed.files)):
        return indexed
    others = [file for file in present if file not in indexed.files]
    if misnamed := {file: other for file in indexed.files if not place.has(file) and (other := _like(file, others))}:
        return _without(indexed, place, misnamed)
    whole = _by_names(place, others)
    if whole.problems:
        return indexed
    absent = next((file for file in indexed.files if not place.has(file)), None)
    reason = f"names {absent}, which is absent" if absent else "cannot be used"
    whole.unlike = reason
    whole.notes = [f"{INDEX} {reason}: it is stale, and {_listed(whole.files)} read in its place"]
    return whole


def _listed(files: list[str]) -> str:
    return f"{files[0]} was" if len(files) == 1 else f"{files[0]} to {files[-1]} were"


def _by_names(place: Place, present: list[str]) -> Shards:
    """``model.safetensors``, or else the one set of files that is there, which is what vLLM reads without an index."""
    if SINGLE in present:
        return Shards([SINGLE])
    sets: dict[str, list[str]] = {}
    for file in filter(may_be_weights, present):
        match = _NUMBERED.fullmatch(file)
        sets.setdefault(f"{match['stem']}-of-{match['total']}" if match else file, []).append(file)
    if not sets:
        return Shards(problems=[_no_weights(place)])
    absent = {file: _like(file, present) for files in sets.values() for file in _absent(files)}
    if misnamed := [_misnamed(place, file, other) for file, other in absent.items() if other]:
        return Shards(problems=misnamed)
    if len(sets) > 1:
        return Shards(problems=[_several(place, list(sets.values()))])
    if absent:
        return Shards(problems=[Problem(f"{place}/{next(iter(absent))}", "absent", "download the shard again")])
    files = next(iter(sets.values()))
    note = f"there is no {INDEX}: {_listed(files)} read, as by vLLM"
    return Shards(files, notes=[note])


def _absent(files: list[str]) -> list[str]:
    """The shards that a numbered set lacks, in order, no more than are there and one: the total is not trusted."""
    if not (match := _NUMBERED.fullmatch(files[0])):
        return []
    width, total = len(match["number"]), int(match["total"])
    numbers = range(1, min(total, 2 * len(files) + 1) + 1)
    names = (f"{match['stem']}-{number:0{width}d}-of-{match['total']}{SUFFIX}" for number in numbers)
    present = set(files)
    return [name for name in names if name not in present]


def _like(file: str, others: list[str]) -> str | None:
    """The file that is probably this shard under another name, as browsers and file managers give it."""
    stem = file.removesuffix(SUFFIX)
    is_shard = _NUMBERED.fullmatch(file)
    return next((other for other in others if is_shard and stem in other and _is_renamed(other)), None)


def _is_renamed(file: str) -> bool:
    return not _NUMBERED.fullmatch(file) or file.lower().startswith("copy of ")


def _misnamed(place: Place, file: str, other: str) -> Problem:
    match = _NUMBERED.fullmatch(file)
    which = f"shard {int(match['number'])} of {int(match['total'])} is absent" if match else "absent"
    return Problem(f"{place}/{file}", f"{which}, and {other} looks like it", f"rename {other} to {file}")


def _without(found: Shards, place: Place, misnamed: Mapping[str, str]) -> Shards:
    """The same without files that have another name: what they hold is lost, and there is a problem for each."""
    found.problems += [_misnamed(place, file, other) for file, other in misnamed.items()]
    found.lost |= {name for name, file in found.weight_map.items() if file in misnamed}
    found.weight_map = {name: file for name, file in found.weight_map.items() if file not in misnamed}
    found.files = [file for file in found.files if file not in misnamed]
    return found


def _several(place: Place, sets: list[list[str]]) -> Problem:
    """The problem that there are files of several models, or seem to be, and nothing that tells them apart."""
    shown = ", ".join(files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}" for files in sets)
    copy = next((o for files in sets for file in files for other in sets if (o := _like(file, other))), None)
    if copy:
        what = f"holds {shown} and no {INDEX}; {copy} looks like a second copy of one of them"
        return Problem(str(place), what, f"move {copy} out of the folder")
    single = next((files[0] for files in sets if not _NUMBERED.fullmatch(files[0])), None)
    remedy = "leave only the files of one in the folder"
    remedy += f", or give {single} the name {SINGLE} if it is the model" if single else ""
    remedy += f", or write {INDEX} if all are parts of one"
    return Problem(str(place), f"holds several models' weights ({shown}) and no {INDEX} that says which", remedy)


def _no_weights(place: Place) -> Problem:
    pickles = [file for file in place.files() if file.endswith((".bin", ".pt", ".pth", ".ckpt")) and "/" not in file]
    if pickles:
        return Problem(
            str(place),
            f"neither {SINGLE} nor {INDEX}: only safetensors checkpoints can be converted, and {pickles[0]} is a "
            "pickle, which can run code when it is opened",
            "pickled files are refused: open the model with transformers where you trust it, and save it again with "
            "model.save_pretrained(FOLDER), which writes safetensors",
        )
    return Problem(
        str(place),
        f"neither {SINGLE} nor {INDEX}: only safetensors checkpoints can be converted",
        "give the folder that holds them, or save the model with model.save_pretrained(FOLDER)",
    )


def _by_index(place: Place) -> Shards:
    """What the index says."""
    path, found = f"{place}/{INDEX}", Shards()
    try:
        weight_map = read_json(place.local(INDEX)).get("weight_map")
    except BismoothError as error:
        return Shards(problems=[*error.problems])
    if not isinstance(weight_map, dict) or not weight_map:
        return Shards(problems=[Problem(path, "no weight_map", "download the file again")])
    written = {name: file for name, file in weight_map.items() if isinstance(file, str) and file.startswith("./")}
    found.unlike = next((f"calls a file {file}" for file in written.values()), None)
    weight_map |= {name: os.path.normpath(file) for name, file in written.items()}
    for name, file in weight_map.items():
        fits = isinstance(file, str) and Path(file).name == file and file.endswith(SUFFIX)
        if not fits or not file.isprintable():
            what = f"{name} is said to be in {file!r}, which is not a shard of this folder"
            found.problems.append(Problem(path, what, "download the file again"))
            found.lost.add(name)
    found.weight_map = {name: file for name, file in weight_map.items() if name not in found.lost}
    found.files = sorted(set(found.weight_map.values()))
    return found
