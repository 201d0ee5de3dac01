"""A finished checkpoint goes to the Hub, as it was written: it is verified first."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vllm_w8a8_bismooth import MARKER
from vllm_w8a8_bismooth.checkpoint import upload
from vllm_w8a8_bismooth.checkpoint.companions import companions
from vllm_w8a8_bismooth.checkpoint.files import (
    CONFIG,
    INDEX,
    RECIPE,
    REPORT,
    WEIGHT_SUFFIXES,
    Folder,
    partial_folder,
    read_json,
    sha256,
)
from vllm_w8a8_bismooth.checkpoint.journal import FOLDER as JOURNAL
from vllm_w8a8_bismooth.conversion.part import PART
from vllm_w8a8_bismooth.errors import BismoothError, Problem
from vllm_w8a8_bismooth.progress import Progress, silent
from vllm_w8a8_bismooth.report import card
from vllm_w8a8_bismooth.report.labels import Labels
from vllm_w8a8_bismooth.verification import contents, verify

_OURS = "give the folder that bismooth convert or bismooth merge wrote"
_UNFINISHED = (".partial", ".tmp", ".incomplete", ".lock")


@dataclass(frozen=True)
class Publication:
    """What is on the Hub now.

    Attributes:
        hub_id: ``org/name``.
        url: of its page.
        commit: that holds it.
        public: whether everybody may read it.
        files: how many it has of the checkpoint.
        nbytes: their size.
        labels: what its card says.
        left_out: files of the folder that are none of a checkpoint and stay here.
    """

    hub_id: str
    url: str
    commit: str
    public: bool
    files: int
    nbytes: int
    labels: Labels
    left_out: list[str]


def check(destination: Path, hub_id: str, public: bool = False) -> None:
    """Check before a conversion what :func:`push` would refuse after it; nothing is created or sent.

    Args:
        destination: the folder to be. If it is there already, the repository may hold it already.
        hub_id, public: see :func:`push`.

    Raises:
        BismoothError: see :func:`upload.look`; or the repository holds other files.
    """
    target = upload.look(hub_id, public)
    if (destination / REPORT).is_file():
        weights = _weights(destination, contents.Noted.of(destination).digests or {})
        target.refuse_others(weights)
        target.refuse_changed(_small(_contents(destination, weights, hub_id), weights), destination)
    else:
        target.refuse_others({})
        target.refuse_changed({card.CARD: b""}, None)


def push(folder: Path, hub_id: str, public: bool = False, progress: Progress = silent) -> Publication:
    """Upload a finished checkpoint to a repository on the Hub, in one commit.

    The folder is only read. In the repository's card the commands name the repository. A push that was interrupted
    goes on with the same call, and one that is done is not done again.

    Args:
        folder: of a checkpoint that ``convert`` or ``merge`` wrote.
        hub_id: ``org/name``. It is created if it does not exist; one that exists must be empty or hold this checkpoint,
            and what somebody changed there since the last push must be in the folder, too.
        public: whether everybody may read it; see :func:`upload.look`.
        progress: counts shards in the stage ``read``.

    Raises:
        BismoothError: the folder is no finished checkpoint of ours, or ``bismooth verify`` would find a fault in it;
            see also :func:`upload.look` and :func:`upload.upload`.
        Interrupted: the connection was lost.
    """
    shards = _shards(folder)
    weights = _weights(folder, shards)
    target = upload.look(hub_id, public)
    target.refuse_others(weights)
    files = _contents(folder, weights, hub_id)
    target.refuse_changed(_small(files, weights), folder)
    _check(folder, shards, progress)
    commit = upload.upload(target, files, weights)
    nbytes = sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in files.values())
    url = upload.page(hub_id)
    left_out = sorted(set(_files(folder)) - files.keys())
    return Publication(hub_id, url, commit, public, len(files), nbytes, card.labels_of(folder), left_out)


def _shards(folder: Path) -> Mapping[str, str]:
    """The shards of a finished checkpoint of ours -> the SHA-256 that they had when they were written."""
    if (folder / PART).is_file():
        raise BismoothError.of(folder, "a part of a checkpoint", "bismooth merge makes a checkpoint of all its parts")
    grows = folder.absolute().name.endswith(".partial") and (folder / JOURNAL).is_dir()
    if grows or (not folder.exists() and partial_folder(folder).is_dir()):
        remedy = "run the command again that began it, and then push"
        raise BismoothError.of(folder, "not finished", remedy)
    if not folder.is_dir():
        raise BismoothError.of(folder, "no such folder", _OURS)
    config = read_json(folder / CONFIG).get("quantization_config") if (folder / CONFIG).is_file() else None
    noted = contents.Noted.of(folder).digests
    if not isinstance(config, dict) or MARKER not in config or not (folder / RECIPE).is_file() or not noted:
        what = f"not written by bismooth (its {CONFIG}, {RECIPE} or {REPORT} does not say so)"
        raise BismoothError.of(folder, what, _OURS)
    return noted


def _weights(folder: Path, shards: Mapping[str, str]) -> dict[str, str]:
    """The shards, and the small weights in folders of their own that go with some models -> SHA-256."""
    inside = [file for file in companions(Folder(folder)) if "/" in file and _is_weights(file)]
    return {file: sha256(folder / file) for file in inside} | dict(shards)


def _is_weights(file: str) -> bool:
    return PurePosixPath(file).suffix in WEIGHT_SUFFIXES


def _check(folder: Path, shards: Mapping[str, str], progress: Progress) -> None:
    """Raises :class:`BismoothError` with all that ``bismooth verify`` calls a fault, without asking vLLM."""
    problems = list(_strays(folder, shards)) or verify(folder, progress=progress, engine=False).findings
    if problems:
        raise BismoothError(*problems)


def _strays(folder: Path, shards: Mapping[str, str]) -> Iterator[Problem]:
    for file in _files(folder):
        if "/" not in file and _is_weights(file) and file not in shards:
            yield Problem(str(folder / file), f"no shard that {REPORT} names", "move it out of the folder")


def _going(folder: Path, weights: Mapping[str, str]) -> list[str]:
    """What goes to the Hub: what a conversion writes and serving needs, and nothing else that lies in the folder."""
    ours = {CONFIG, INDEX, RECIPE, card.CARD, *card.OURS, *weights, *companions(Folder(folder))}
    return [file for file in _files(folder) if file in ours]


def _contents(folder: Path, weights: Mapping[str, str], hub_id: str) -> dict[str, Path | bytes]:
    """What is sent: place in the repository -> a file, or what is to be in it."""
    files: dict[str, Path | bytes] = {name: folder / name for name in _going(folder, weights)}
    if card.CARD in files:
        text = (folder / card.CARD).read_bytes().decode(errors="replace")
        files[card.CARD] = card.for_repository(text, hub_id).encode()
    return files


def _small(files: Mapping[str, Path | bytes], weights: Mapping[str, str]) -> dict[str, Path | bytes]:
    return {place: content for place, content in files.items() if place not in weights}


def _files(folder: Path) -> Iterator[str]:
    """What could go to the Hub: nothing hidden, and no file that is being written."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and not path.name.endswith(_UNFINISHED):
            yield relative.as_posix()
