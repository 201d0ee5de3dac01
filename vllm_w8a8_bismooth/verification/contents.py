"""The values in a converted checkpoint's shards, and whether the shards are those that the conversion wrote."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vllm_w8a8_bismooth.checkpoint.files import REPORT, read_json, sha256
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted, Problem
from vllm_w8a8_bismooth.method.rows import Threads
from vllm_w8a8_bismooth.progress import Progress

AGAIN = "copy the file again from where it is whole, or convert the source again"
SCALE = ".weight_scale"
_LARGEST = torch.finfo(torch.float32).max / 127


@dataclass
class Contents:
    """What the shards hold.

    Attributes:
        digests: shard -> SHA-256.
        problems: one for each tensor with values that cannot be worked with.
        silent: INT8 weights that have no code but 0.
    """

    digests: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)


def read(checkpoint: Checkpoint, marked: bool, progress: Progress) -> Contents:
    """Read every shard once, and what is packed in them once more.

    Args:
        checkpoint: to be read.
        marked: whether its codes must keep to -127 to 127, as ours do.
        progress: counts shards in the stage ``read``.
    """
    files: dict[str, list[str]] = {}
    for name in sorted(checkpoint.stored, key=lambda name: checkpoint.stored[name].offset):
        files.setdefault(checkpoint.stored[name].file, []).append(name)
    found = Contents()
    with Threads() as threads:
        shards = threads.map(lambda file: _read_shard(checkpoint, file, files[file], marked), files)
        for done, shard in enumerate(shards, 1):
            found.digests |= shard.digests
            found.problems += shard.problems
            found.silent += shard.silent
            progress("read", done, len(files), 0)
        for packed in threads.map(lambda name: _read_packed(checkpoint, name), checkpoint.encodings):
            found.problems += packed.problems
            found.silent += packed.silent
    return found


def _read_packed(checkpoint: Checkpoint, name: str) -> Contents:
    """What a packed weight stands for, which none of its parts says alone."""
    found, used = Contents(), False
    try:
        for piece in checkpoint.pieces(name):
            used = used or bool(piece.any())
    except Interrupted:
        raise
    except BismoothError as error:
        found.problems += error.problems
    else:
        found.silent += [] if used else [name]
    return found


def _read_shard(checkpoint: Checkpoint, file: str, names: Sequence[str], marked: bool) -> Contents:
    path, digest, whole, found = checkpoint.folder / file, hashlib.sha256(), True, Contents()
    with open(path, "rb") as head:
        digest.update(head.read(checkpoint.stored[names[0]].offset))
    for name in names:
        try:
            _values(found, checkpoint, name, digest, marked)
        except Interrupted:
            raise
        except BismoothError as error:  # NaN or infinity; the rest of the tensor has not been read
            found.problems += error.problems
            whole = False
    found.digests[file] = digest.hexdigest() if whole else sha256(path)
    return found


def _values(found: Contents, checkpoint: Checkpoint, name: str, digest, marked: bool) -> None:
    """Add what is to be said of the finite values of one tensor."""
    header, first, used, count, example = checkpoint.stored[name], 0, False, 0, ""
    is_scale, is_weight = name.endswith(SCALE), header.dtype == "I8" and name in checkpoint.headers
    for piece in checkpoint.stored_pieces(name, digest):
        wrong = None
        if is_weight:
            low, high = piece.aminmax()
            used = used or bool(low) or bool(high)
            wrong = piece == -128 if marked and low == -128 else None  # others may use it
        elif is_scale:
            wrong = (piece <= 0) | (piece > _LARGEST)  # a row of subnormal weights has such a scale
        if wrong is not None and wrong.any():
            at = int(wrong.nonzero()[0])
            place = [int(i) for i in torch.unravel_index(torch.tensor(first + at), header.shape)]
            example = example or f"{piece[at].item()} at {place}"
            count += int(wrong.sum())
        first += len(piece)
    if count:
        says = "scales that are not between 0 and 2.7e36" if is_scale else "codes outside -127 to 127"
        found.problems.append(Problem(name, f"holds {says}: {example} ({count} such values)", AGAIN))
    if is_weight and first and not used:
        found.silent.append(name)


@dataclass
class Noted:
    """What the conversion noted in ``report.json``.

    Attributes:
        digests: shard -> SHA-256; ``None`` if it noted none.
        exact: linears that rounding did not change at all. One that has no code but 0 was 0 in the source, too.
        beside: files that were copied from the source.

    Raises:
        BismoothError: on construction, if ``report.json`` cannot be read.
    """

    digests: Mapping[str, str] | None = None
    exact: frozenset[str] = frozenset()
    beside: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path) -> "Noted":
        stored = read_json(folder / REPORT) if (folder / REPORT).exists() else {}
        digests, linears = stored.get("sha256"), stored.get("linears")
        entries = linears.items() if isinstance(linears, dict) else ()
        exact = (name for name, e in entries if isinstance(e, dict) and e.get("column_error") == 0)
        beside = stored.get("beside")  # 0.1.0 did not note it
        files = tuple(file for file in beside if isinstance(file, str)) if isinstance(beside, list) else ()
        return cls(digests if isinstance(digests, dict) else None, frozenset(exact), files)


def changed(noted: Mapping[str, str], digests: Mapping[str, str]) -> Iterator[Problem]:
    """Shards whose SHA-256 is not the one that the conversion noted."""
    for file in sorted(noted.keys() | digests.keys()):
        if file not in digests:
            yield Problem(file, f"is named by {REPORT} but absent", AGAIN)
        elif file not in noted:
            yield Problem(file, f"is not among the shards that {REPORT} names", AGAIN)
        elif noted[file] != digests[file]:
            what = f"has SHA-256 {digests[file]}, {REPORT} noted {noted[file]} when it was written"
            yield Problem(file, what, AGAIN)


def lost(folder: Path, noted: Iterable[str]) -> Iterator[Problem]:
    """Files that the conversion copied from the source, and that are there no more; engines do not always miss them."""
    for file in noted:
        if not (folder / file).is_file():
            yield Problem(file, f"is absent; {REPORT} says that it was copied from the source", AGAIN)
