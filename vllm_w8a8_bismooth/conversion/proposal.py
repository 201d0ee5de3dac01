"""Where a result could go, for messages."""

import os
from pathlib import Path

from vllm_w8a8_bismooth.checkpoint.files import Folder
from vllm_w8a8_bismooth.checkpoint.hub import Repository, cache_entry


def name_of(place: Folder | Repository) -> str:
    """What a checkpoint is called: the last part of its name on the Hub, or of its folder."""
    whole = place.path.resolve().name if isinstance(place, Folder) and place.hub_id is None else place.hub_id
    return (whole or "").rpartition("/")[2] or "model"


def inside(folder: Path, name: str) -> Path:
    """A folder for the result of the model of that name."""
    return folder / f"{name}-int8"


def beside(folder: Path, name: str) -> Path:
    """The same beside a folder, by its whole path; the Hub's cache, which others clear, is no place for it."""
    read, here = Path(os.path.realpath(folder)), Path(os.path.realpath(""))
    if (entry := cache_entry(read)) is None:
        return inside(read.parent, name)
    return inside(Path.home() if entry in (here, *here.parents) else here, name)


def propose(place: Folder | Repository) -> str:
    """The same in the current folder, or beside the source where that lies around it."""
    name, here = name_of(place), Path(os.path.realpath(""))
    if isinstance(place, Folder):
        read = Path(os.path.realpath(place.path))
        if read == here or read in here.parents:
            return str(beside(read, name))
    return f"./{inside(Path(), name)}"
