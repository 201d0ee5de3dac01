"""The place to write to: whether it can be written, is free, is ours, or holds the result already."""

import json
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth import MARKER
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, RECIPE, REPORT, partial_folder, read_json, sha256
from vllm_w8a8_bismooth.checkpoint.hub import cache_entry
from vllm_w8a8_bismooth.checkpoint.journal import FOLDER, NAMES, RUN, readable
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.conversion import proposal
from vllm_w8a8_bismooth.conversion.part import PART, Part, outline_of
from vllm_w8a8_bismooth.conversion.plan import span
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.method.rows import Threads
from vllm_w8a8_bismooth.recipe import BF16, FP32, Recipe, names_of_hashes
from vllm_w8a8_bismooth.report import record
from vllm_w8a8_bismooth.report.outcome import Outcome
from vllm_w8a8_bismooth.shell import refuse_tilde, word

_MARKS = {RECIPE: "a whole checkpoint", PART: "a part of a checkpoint"}
PARTIAL = partial_folder(Path("-")).suffix
_QUANTIZATION = "quantization_config"
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Destination:
    """The folder to be. It grows beside its place and is renamed in the end, so its place must let itself be taken.

    Attributes:
        given: as the user wrote it; resolved where a ``..`` in it, or in a link on the way, leads through what does not
            exist: no file can be opened under that name.
        target: resolved; a link is followed, also one that leads nowhere yet.
        name: of the model, for proposals.
    """

    given: Path
    target: Path
    name: str

    @classmethod
    def of(cls, given: str | Path, name: str) -> "Destination":
        """Resolve a path.

        Raises:
            BismoothError: it is empty, an address, or what a folder is called while it grows; it begins with a ``~``
                that no shell has expanded, or has characters in it that a terminal takes for something else.
        """
        text = str(given)
        if not text:
            raise BismoothError.of(
                "the destination",
                "its name is empty",
                f"give a folder, like {word(proposal.inside(Path(), name))}",
            )
        if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text):
            what = "the destination's name has a control character, or bytes that are no text"
            raise BismoothError.of(repr(text), what, "choose a name without")
        refuse_tilde(text)
        if "://" in text:
            remedy = f"give a folder on this machine, like {word(proposal.inside(Path(), name))}"
            raise BismoothError.of(text, "an address, not a folder", remedy)
        target = Path(os.path.realpath(text))  # unlike Path.resolve it survives links in a circle
        if target.name.endswith(PARTIAL):
            whole = target.name.removesuffix(PARTIAL).strip(".") or f"{name}-int8"
            remedy = f"give {word(Path(text).parent / whole)}"
            raise BismoothError.of(text, "the name of a conversion that is not finished", remedy)
        for around in target.parents:
            if around.name.endswith(PARTIAL) and (around / FOLDER).is_dir():
                what = f"lies in {around}, which an unfinished conversion fills"
                raise BismoothError.of(text, what, f"give {word(proposal.inside(around.parent, name))}")
        return cls(target if _is_lost(Path(text)) else Path(given), target, name)

    def refuse_overlap(self, folder: Path, what: str = "source") -> None:
        """Raises :class:`BismoothError` if what is written would lie in a folder that is read, or around it."""
        read = Path(os.path.realpath(folder))
        whole = cache_entry(read) or read
        for written in (self.target, partial_folder(self.target)) if self.target.name else (self.target,):
            if written == whole or written in whole.parents or whole in written.parents:
                place = "beside it" if whole == read else "outside the Hub's cache"
                remedy = f"choose a destination {place}, like {word(proposal.beside(read, self.name))}"
                raise BismoothError.of(written, f"overlaps the {what} {folder}", remedy)

    def check(self) -> None:
        """Refuse a place that could not be taken, before anything is read, unless something of ours is there.

        Raises:
            BismoothError: the name is too long, nothing can be written there, a disk is mounted there, or it is the
                current folder or one around it.
        """
        if self.target.is_symlink():
            raise BismoothError.of(self.given, "a link in a circle", "remove it or choose another folder")
        if self._marks():
            return
        if why := self._fixed():
            raise BismoothError.of(self.given, why, self.elsewhere())
        partial = partial_folder(self.target)
        try:
            os.lstat(partial)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise BismoothError.of(self.given, f"cannot be written ({error.strerror})", "choose another name") from None
        if partial.is_symlink() or str(partial) in mounts():
            what = "is a link or a mounted disk, and the result grows there before it gets its name"
            raise BismoothError.of(partial, what, "remove it or choose another destination")
        _check_writable(self.given, partial)

    def holds(self, mark: str) -> bool:
        """Whether what the mark stands for is there; ``False`` if nothing is.

        Raises:
            BismoothError: anything else is there.
        """
        if mark in (found := self._marks()):
            return True
        if not self.target.exists() or (self.target.is_dir() and not any(self.target.iterdir())):
            return False
        if found:
            raise BismoothError.of(self.given, f"holds {_MARKS[found[0]]}", self.elsewhere())
        remedy = "choose another name"  # not to remove it: nobody knows whose it is
        if self.target.is_dir():
            remedy = f"choose a folder inside it, like {word(proposal.inside(self.given, self.name))}"
        raise BismoothError.of(self.given, "exists and is no result of bismooth", remedy)

    def compute_dtype(self) -> str | None:
        """In which dtype the conversion computed that is here, whole, in part or unfinished; ``None`` if none is, or it
        was data-free. A machine that would choose another one goes on with it."""
        places = {
            self.target / RECIPE: ("recipe",),
            self.target / PART: ("part", "identity", "recipe"),
            partial_folder(self.target) / FOLDER / RUN: ("recipe",),
        }
        for path, keys in places.items():
            found: Any = _json(path)
            for key in (*keys, "compute_dtype"):
                found = found.get(key) if isinstance(found, dict) else None
            if found in (FP32, BF16):
                return found
        return None

    def refuse_another(self, differences: Sequence[str]) -> None:
        """Raises :class:`BismoothError` if there are differences to what is there."""
        if differences:
            more = ["..."] if len(differences) > 10 else []
            what = f"holds another conversion ({'; '.join([*differences[:10], *more])})"
            raise BismoothError.of(self.given, what, self.elsewhere())

    def _marks(self) -> list[str]:
        return [name for name in _MARKS if os.path.isfile(self.target / name) and self._is_ours(name)]

    def _is_ours(self, mark: str) -> bool:
        """Whether the file is ours; others call theirs recipe.json too."""
        return mark != RECIPE or isinstance(_json(self.target / mark).get("recipe"), dict)

    def _fixed(self) -> str | None:
        """Why no other folder can take this one's place, if that is so."""
        if str(self.target) in mounts() or os.path.ismount(self.target):
            return "a disk is mounted there, so that no folder can take its place"
        try:
            here = Path(os.path.realpath(os.getcwd()))
        except FileNotFoundError:
            here = None
        if here is not None and (self.target == here or self.target in here.parents):
            return "is the current folder, or around it; a new folder would take its place"
        inside, around = (os.access(path, os.W_OK | os.X_OK) for path in (self.target, self.target.parent))
        if self.target.is_dir() and inside and not around:
            return f"the result grows beside it, and {self.target.parent} cannot be written"
        return None

    def elsewhere(self) -> str:
        """Where to go instead of a place that holds something of ours."""
        if self._fixed():
            return f"choose a folder inside it, like {word(proposal.inside(self.given, self.name))}"
        return "remove it or choose another folder"


def _is_lost(path: Path, links: int = 40) -> bool:
    """Whether a ``..`` in a path, or in a link on the way, of which there may be so many, leads through nothing."""
    if ".." in path.parts and not path.parent.exists():
        return True
    dangling = [place for place in (path, *path.parents) if place.is_symlink() and not place.exists()]
    return links > 0 and any(_is_lost(place.parent / os.readlink(place), links - 1) for place in dangling[-1:])


def mounts() -> set[str]:
    """Paths at which disks, or folders of disks, are mounted, as far as the system says."""
    try:
        lines = os.fsdecode(_MOUNTS.read_bytes()).split("\n")
    except OSError:
        return set()
    places = (line.split(" ")[4] for line in lines if line)
    return {re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), place) for place in places}


def _check_writable(destination: Path, folder: Path) -> None:
    """Raises :class:`BismoothError` if a folder, which may have to be made, cannot be written."""
    nearest = folder
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise BismoothError.of(destination, f"cannot be written ({nearest} is no folder)", "check the path")
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        what = f"cannot be written (the disk of {nearest} is mounted read-only)"
        raise BismoothError.of(destination, what, "choose a folder on another disk")
    if not os.access(nearest, os.W_OK | os.X_OK):
        what = f"cannot be written (no permission in {nearest})"
        raise BismoothError.of(destination, what, "choose a folder that you may write, or ask for the permissions")


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing, if it cannot be read."""
    try:
        return read_json(path)
    except BismoothError:
        return {}


def _refuse_damaged(place: Destination, noted: object, beside: object = None) -> None:
    """Raises :class:`BismoothError` if a result is no longer what it was: then there is something to do.

    Args:
        place: holds it.
        noted: file -> SHA-256, as the result itself has it.
        beside: files that were copied from the source, as the result itself has it; 0.1.0 did not note them.
    """
    files = noted.items() if isinstance(noted, dict) else [(REPORT, None)]
    with Threads() as threads:
        same = threads.map(lambda file: _is(place.target / file[0], file[1]), files)
        wrong = [file for (file, _), right in zip(files, same, strict=True) if not right]
    copied = beside if isinstance(beside, list) else []
    wrong += [file for file in copied if isinstance(file, str) and not (place.target / file).is_file()]
    if wrong:
        what = f"holds this conversion, but {', '.join(wrong[:4])} is absent or damaged"
        raise BismoothError.of(place.given, what, place.elsewhere())


def _is(path: Path, digest: str | None) -> bool:
    """Whether a file is there and has that SHA-256."""
    return path.is_file() and sha256(path) == digest


def already_a_part(destination: Destination, identity: Mapping[str, Any], blocks: range, source: Source) -> bool:
    """Whether the destination holds just this part already; raises as :func:`already_converted`."""
    if not destination.holds(PART):
        return False
    found, outline = Part(destination.target), outline_of(source)
    if found.blocks != blocks:
        destination.refuse_another([f"blocks: {span(found.blocks)} there, {span(blocks)} now"])
    names = {**found.names(), **identity[NAMES]}
    destination.refuse_another(readable(found.unlike(identity, outline, {}), names))
    checksums = {name: source.checkpoint.digest(name) for name in found.checksums}
    destination.refuse_another(found.unlike(identity, outline, checksums))
    _refuse_damaged(destination, found.files())
    return True


def already_converted(
    destination: Destination,
    recipe: Recipe,
    source: Source,
    fingerprint: Callable[[], str],
    provenance: Mapping[str, Any],
) -> bool:
    """Whether the destination holds the result of this recipe already, on the source with this fingerprint.

    Raises:
        BismoothError: it holds anything else, or not all of the result, as far as its shards and its config say, and
            the names of the files that were copied.
    """
    if not destination.holds(RECIPE):
        return False
    content = read_json(destination.target / RECIPE)
    stored, before = (found if isinstance(found := content.get(key), dict) else {} for key in ("recipe", "provenance"))
    now = replace(recipe, source=stored.get("source"))
    differences = now.differences(stored)
    differences = differences or _other_layout(content.get("layout"), source)
    if not differences:  # only then is it worth reading every byte of the source
        now = replace(recipe, source=fingerprint())
        differences = now.differences(stored)
    names = {**names_of_hashes(stored, before), **names_of_hashes(asdict(now), provenance)}
    destination.refuse_another(readable(differences, names))
    if _is_config(_json(destination.target / CONFIG), source.checkpoint.config):
        report = _json(destination.target / REPORT)
        _refuse_damaged(destination, report.get("sha256"), report.get("beside"))
        record.read(destination.target, Outcome(destination.given))  # refused here, as the dry run must say it too
    else:
        _refuse_damaged(destination, {CONFIG: None})
    return True


def _other_layout(noted: object, source: Source) -> list[str]:
    """That a result was made by another layout, as a readable line; what an early version noted of them is nothing."""
    now = source.basis.identity
    before = {key: str(noted.get(key)) for key in now} if isinstance(noted, dict) else now
    shown = [f"by {found['from']} ({found['sha256'][:12]})" for found in (before, now)]
    return [] if before == now else [f"layout: {shown[0]} there, {shown[1]} now"]


def _is_config(found: Mapping[str, Any], original: Mapping[str, Any]) -> bool:
    """Whether a result's config is the source's, with what it says of quantization."""
    quantization = found.get(_QUANTIZATION)
    rest, expected = (
        json.dumps({**config, _QUANTIZATION: None}, sort_keys=True) for config in (found, original)
    )  # as text, in which even NaN equals itself
    return isinstance(quantization, dict) and MARKER in quantization and rest == expected
