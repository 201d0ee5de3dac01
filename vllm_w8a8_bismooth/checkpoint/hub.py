"""Checkpoints on the Hugging Face Hub: their headers without their weights, or a download. Tokens are the library's."""

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.checkpoint import shards
from vllm_w8a8_bismooth.checkpoint.basis import Means
from vllm_w8a8_bismooth.checkpoint.companions import companions
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, INDEX, Folder, check_space
from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.checkpoint.reader import Headers
from vllm_w8a8_bismooth.errors import BismoothError, refuse_empty

_HUB_ID = re.compile(r"(?a:(\w[\w.-]*/\w[\w.-]*))(?:@(.+))?")
_SNAPSHOT = re.compile(r"(?a:/models--((?:(?!--)[\w.-])+)--((?:(?!--)[\w.-])+)/snapshots/([0-9a-f]{40}))/?$")
"""A checkpoint's folder in the Hub's cache. No name on the Hub has two hyphens in a row."""
_ALONE = Means()
_PUBLISHER = "tell the publisher"


class _Unreachable(BismoothError):
    """The Hub does not answer."""


def parse(source: str) -> tuple[str, str | None] | None:
    """``org/name`` and the revision of ``org/name@revision``; ``None`` for what can only be, or is, a local path."""
    match = _HUB_ID.fullmatch(source)
    return None if match is None or Path(source).exists() else (match[1], match[2])


def find(source: str) -> "Folder | Repository":
    """Where a checkpoint is, for reading its headers: nothing big is downloaded.

    Args:
        source: a folder, or ``org/name[@revision]`` on the Hub. What exists on this machine is never looked for there.

    Raises:
        BismoothError: no such folder or repository, no access to it, or neither a connection nor a complete copy.
    """
    if (parsed := parse(source)) is None:
        return _local(source)
    try:
        return Repository(*parsed)
    except _Unreachable:
        if (folder := _cached(*parsed)) is None:
            raise
        return folder


def fetch(source: str, means: Means = _ALONE) -> Folder:
    """A checkpoint with its weights, downloaded into the Hub's cache where it is not there yet.

    Before that, its headers are audited: what cannot be converted is not worth a download.

    Args:
        source: see :func:`find`.
        means: for its layout.

    Raises:
        BismoothError: see :func:`find`; or the audit found problems, or the disk is too small.
    """
    place = find(source)
    if isinstance(place, Folder):
        return place
    headers = Headers(place)
    Layout(headers, means).refuse()
    return place.download(headers.files)


def cached(source: str) -> Folder | None:
    """As :func:`fetch`, but from this machine alone; ``None`` for a repository that is not in the cache."""
    return _local(source) if (parsed := parse(source)) is None else _cached(*parsed)


def cache_entry(path: Path) -> Path | None:
    """What the Hub's cache holds of a repository, if the folder is one of its snapshots; all of it is the cache's."""
    return path.absolute().parents[1] if _SNAPSHOT.search(path.absolute().as_posix()) else None


def _local(source: str) -> Folder:
    """A folder; one in the Hub's cache says by its path what it is a copy of."""
    refuse_empty("the checkpoint", source)
    path = Path(source)
    match = _SNAPSHOT.search(path.absolute().as_posix())
    return Folder(path, f"{match[1]}/{match[2]}", match[3]) if match else Folder(path)


class Repository:
    """A revision of a repository, as the place of a checkpoint; see :class:`files.Place`.

    Attributes:
        hub_id: ``org/name``.
        revision: the commit.

    Raises:
        BismoothError: on construction, if there is no such thing, no access, or no connection.
    """

    def __init__(self, hub_id: str, revision: str | None = None):
        from huggingface_hub import HfApi

        self.hub_id, self._asked = hub_id, revision
        with self._translated():
            info = HfApi().model_info(hub_id, revision=revision, files_metadata=True)
        self.revision: str | None = info.sha
        self._sizes = {file.rfilename: file.size for file in info.siblings or []}
        if self.has(CONFIG):
            self._fetch(CONFIG)  # everybody may see what there is, but not everybody may read it

    def __str__(self) -> str:
        return self.hub_id if self._asked is None else f"{self.hub_id}@{self._asked}"

    def files(self) -> dict[str, int]:
        return {file: size or 0 for file, size in sorted(self._sizes.items()) if "/." not in f"/{file}"}

    def has(self, file: str) -> bool:
        return file in self._sizes

    def local(self, file: str) -> Path:
        if not self.has(file):
            raise BismoothError.of(
                f"{self}/{file}", "not in the repository", "name a repository that holds a Hugging Face checkpoint"
            )
        return self._fetch(file)

    def code(self) -> Path:
        for file in self.files():
            if file.endswith(".py") and "/" not in file:
                self._fetch(file)
        return self._fetch(CONFIG).parent

    def header(self, file: str) -> tuple[int, dict[str, Any]]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import SafetensorsParsingError

        if not self.has(file):
            raise BismoothError.of(f"{self}/{file}", f"named by {INDEX} but absent", _PUBLISHER)
        try:
            with self._translated():
                parsed = HfApi().parse_safetensors_file_metadata(self.hub_id, file, revision=self.revision)
        except (SafetensorsParsingError, AttributeError, TypeError, ValueError) as error:
            raise BismoothError.of(f"{self}/{file}", f"truncated or corrupt ({error})", _PUBLISHER) from None
        entries: dict[str, Any] = {
            name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
            for name, tensor in parsed.tensors.items()
        }
        end = 8 + max((tensor.data_offsets[1] for tensor in parsed.tensors.values()), default=0)
        if (size := self._sizes[file]) is not None and size < end:
            raise BismoothError.of(f"{self}/{file}", f"truncated ({size} bytes of more than {end})", _PUBLISHER)
        return 0, entries  # where the data begin is of no use here

    def download(self, weights: list[str]) -> Folder:
        """Download these files of weights, and what goes with them."""
        from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

        absent = [
            file
            for file in weights
            if not isinstance(try_to_load_from_cache(self.hub_id, file, revision=self.revision), str)
        ]
        check_space(Path(constants.HF_HUB_CACHE), sum(self._sizes[file] or 0 for file in absent), f"download of {self}")
        files = [CONFIG, INDEX, *companions(self), *weights]
        patterns = [glob.escape(file) for file in files if self.has(file)]
        with self._translated():
            path = Path(snapshot_download(self.hub_id, revision=self._asked, allow_patterns=patterns))
        return Folder(path, self.hub_id, path.name)

    def _fetch(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        with self._translated():  # by the name that was asked for, so that the cache knows it when offline
            return Path(hf_hub_download(self.hub_id, file, revision=self._asked))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turns the errors of the Hub's library into a problem with its remedy."""
        from huggingface_hub import constants, errors

        url = f"{constants.ENDPOINT}/{self.hub_id}"
        try:
            yield
        except errors.GatedRepoError:
            what, remedy = "access is restricted", f"accept the licence at {url}, then log in with: hf auth login"
        except errors.RepositoryNotFoundError:
            what = f"neither a folder here nor a repository on the Hub ({url})"
            remedy = "check the name, or log in with: hf auth login, if it is private"
        except errors.RevisionNotFoundError:
            what = f"the repository has no revision {self._asked!r}"
            remedy = f"choose one of those at {url}/refs"
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status >= 500 or status == 429:
                raise self._unreachable(f"status {status}") from None
            what = f"the Hub refuses (status {status}: {error.server_message})"
            remedy = f"check access at {url}"
        except errors.HFValidationError as error:
            what, remedy = f"neither a folder here nor a name that the Hub allows ({error})", "check it"
        except _connection_errors() as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise self._unreachable("HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else reason) from None
        else:
            return
        raise BismoothError.of(self, what, remedy)

    def _unreachable(self, why: str) -> BismoothError:
        return _Unreachable.of(
            self,
            f"no such folder here, no complete copy in the cache, and the Hub cannot be reached ({why})",
            "mend the connection and run the same command again, or give the path of a local folder",
        )


def _connection_errors() -> tuple[type[Exception], ...]:
    """What the Hub's library raises when the Hub is out of reach, before or during a download."""
    from huggingface_hub import errors

    # The base of the HTTP library's errors (not the same library in all versions), and what downloads by Xet raise.
    others = (errors.HfHubHTTPError.__bases__[0], getattr(errors, "XetDownloadError", RuntimeError), RuntimeError)
    return (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, *others)


def _cached(hub_id: str, revision: str | None) -> Folder | None:
    """The copy in the Hub's cache, if config and all shards are there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, CONFIG, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Folder(Path(config).parent, hub_id, Path(config).parent.name)
    found = shards.find(folder)
    return folder if found.files and all(map(folder.has, found.files)) else None
