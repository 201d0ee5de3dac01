"""Files to a repository on the Hugging Face Hub, in one commit. Tokens are the library's."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from vllm_w8a8_bismooth.checkpoint.files import WEIGHT_SUFFIXES
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted
from vllm_w8a8_bismooth.shell import word

_HUB_ID = re.compile(r"(?a:\w[\w.-]*/\w[\w.-]*)")
_CARD = "README.md"
_BLANK = (".gitattributes", _CARD)
"""What the Hub itself puts into a new repository."""
_FIRST, _OURS = "initial commit", "Upload by bismooth"
"""Titles of the commits that the Hub makes for a new repository, and that an upload makes."""
_TOKENS = "https://huggingface.co/settings/tokens"
_AGAIN = "run the same command again: what has arrived is not sent again"


@dataclass(frozen=True)
class Target:
    """A repository to upload to, as it was when :func:`look` saw it.

    Attributes:
        hub_id: ``org/name``.
        public: whether everybody may read it, or will once it is there.
        commit: the last one of its main branch; ``None``: there is no such repository yet.
        files: what is in it -> SHA-256 of a large file, git's own id (a SHA-1) of another.
        sent: the same as the last upload left it, or as the Hub made it if there was no upload.
    """

    hub_id: str
    public: bool
    commit: str | None
    files: Mapping[str, str | None]
    sent: Mapping[str, str | None] = field(default_factory=dict)

    def refuse_others(self, shards: Mapping[str, str]) -> None:
        """Raises :class:`BismoothError` unless the repository is empty, or its weights are among these.

        Args:
            shards: the files of weights that are to be there -> SHA-256.
        """
        weights = {file: digest for file, digest in self.files.items() if PurePosixPath(file).suffix in WEIGHT_SUFFIXES}
        strange = [file for file, digest in weights.items() if shards.get(file) != digest]
        if not weights:
            strange = [file for file in self.files if file not in _BLANK]
        if strange:
            more = ", ..." if len(strange) > 3 else ""
            raise BismoothError.of(
                self.hub_id,
                f"the repository holds something else than this checkpoint ({', '.join(strange[:3])}{more})",
                "name another repository: one that is empty, or does not exist yet",
            )

    def refuse_changed(self, files: Mapping[str, Path | bytes], folder: Path | None) -> None:
        """Raises :class:`BismoothError` if an upload would undo what somebody changed since the last one.

        Args:
            files: those that would be sent, but for weights: place in the repository -> a file, or what is in it.
            folder: that they are from, into which a change can be taken over; ``None``: there is none yet.
        """
        changed = [
            place
            for place, content in files.items()
            if place in self.files
            and self.files[place] != self.sent.get(place, "")
            and self.files[place] not in _ids(content)
        ]
        if changed:
            more = ", ..." if len(changed) > 3 else ""
            fetch = f"hf download {' '.join(map(word, [self.hub_id, *changed]))} --local-dir"
            take = f"take that over ({fetch} {word(folder)}), or " if folder is not None else ""
            raise BismoothError.of(
                self.hub_id,
                f"an upload would undo what somebody wrote there ({', '.join(changed[:3])}{more})",
                f"{take}remove it there, and run the same command again",
            )


def look(hub_id: str, public: bool = False) -> Target:
    """Check all that can be checked before an upload; nothing is created or sent.

    Args:
        hub_id: ``org/name``; there need not be such a repository yet.
        public: whether everybody may read it. One that exists must be so already, or not be so.

    Raises:
        BismoothError: no such name is possible, nobody is logged in, the token may not write there, the repository's
            visibility is the other one, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, errors

    if not _HUB_ID.fullmatch(hub_id):
        raise BismoothError.of(hub_id, "not the name of a repository on the Hub", "write org/name")
    if constants.HF_HUB_OFFLINE:
        what = "the Hub cannot be reached, because HF_HUB_OFFLINE is set"
        raise BismoothError.of(hub_id, what, "unset it and run the same command again")
    api = HfApi()
    with _translated(hub_id):
        _check_rights(hub_id, api.whoami())
        try:
            info = api.model_info(hub_id, files_metadata=True)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return Target(hub_id, public, None, {})
        if info.private is not None and info.private is public:
            where = f"{page(hub_id)}/settings"
            raise BismoothError.of(
                hub_id,
                "the repository is private, and --public was given" if public else "the repository is public",
                f"leave --public out, or make the repository public at {where}"
                if public
                else f"give --public if everybody is to read the checkpoint, or make the repository private at {where}",
            )
        return Target(hub_id, public, info.sha, _files(info), _sent(api, hub_id))


def upload(target: Target, files: Mapping[str, Path | bytes], shards: Mapping[str, str]) -> str:
    """Send files in one commit: the repository holds all of them, or is as it was.

    The repository is created where there is none. What the Hub has received before, also of an upload that was
    interrupted, is not sent again. The library shows its progress on stderr.

    Args:
        target: by :func:`look`.
        files: place in the repository -> a file, or what is to be in it.
        shards: those of them whose SHA-256 is known -> SHA-256, which what is sent must have.

    Returns:
        The commit.

    Raises:
        BismoothError: the Hub refuses, or the repository or a shard has changed meanwhile.
        Interrupted: the connection was lost; the same call goes on.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

    api, hub_id, parent = HfApi(), target.hub_id, target.commit
    there = {file for file, digest in shards.items() if target.files.get(file) == digest}
    with _translated(hub_id):
        if isinstance(card := files.get(_CARD), bytes):  # else the Hub says at the end what is wrong with it
            try:
                ModelCard(card.decode()).validate()
            except ValueError as error:
                what = f"the Hub refuses the card ({' '.join(str(error).split())})"
                remedy = f"mend {_CARD} between its first two lines of --- and push again"
                raise BismoothError.of(hub_id, what, remedy) from None
        if parent is None:
            api.create_repo(hub_id, private=not target.public)
            parent = api.model_info(hub_id).sha
        operations = [CommitOperationAdd(place, content) for place, content in files.items() if place not in there]
        api.preupload_lfs_files(hub_id, operations, free_memory=False)
        for operation in operations:  # what was read on the way up
            digest = operation.upload_info.sha256.hex()
            if (known := shards.get(operation.path_in_repo, digest)) != digest:
                what = f"changed while it was sent (SHA-256 {digest}, {known} before); nothing was committed"
                remedy = "copy the file again from where it is whole, and push again"
                raise BismoothError.of(operation.path_in_repo, what, remedy)
        return api.create_commit(hub_id, operations, commit_message=_OURS, parent_commit=parent).oid


def _files(info: Any) -> dict[str, str | None]:
    """What is in a repository at a commit -> the SHA-256 of a large file, git's own id of another."""
    return {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or []}


def _sent(api: Any, hub_id: str) -> dict[str, str | None]:
    """What the last upload left in a repository, or what the Hub made it with: no words of anybody."""
    commits = api.list_repo_commits(hub_id)  # the last one first
    ours = [commit for commit in commits if commit.title == _OURS]
    ours += [commit for commit in commits[-1:] if commit.title == _FIRST]
    return _files(api.model_info(hub_id, revision=ours[0].commit_id, files_metadata=True)) if ours else {}


def _ids(content: Path | bytes) -> tuple[str, str]:
    """What the Hub may call these bytes: git's own id of them, and their SHA-256."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return git.hexdigest(), hashlib.sha256(data).hexdigest()


def page(hub_id: str) -> str:
    """The address of a repository's page."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{hub_id}"


def _check_rights(hub_id: str, account: Mapping[str, Any]) -> None:
    """Raises :class:`BismoothError` if an account's token can certainly not write to a repository.

    Args:
        hub_id: ``org/name``.
        account: the Hub's answer to whoami.
    """
    namespace = hub_id.partition("/")[0]
    orgs = {org["name"].lower(): org.get("roleInOrg") for org in account.get("orgs", [])}
    known = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    if namespace.lower() not in {name.lower() for name in known}:
        what = f"the token is {account['name']}'s, who is no member of {namespace}"
        remedy = f"choose one of {', '.join(f'{name}/...' for name in known)}, or log in as another: hf auth login"
        raise BismoothError.of(hub_id, what, remedy)
    if orgs.get(namespace.lower()) == "read":
        what = f"{account['name']} may only read in {namespace}"
        raise BismoothError.of(hub_id, what, f"ask an administrator of {namespace} for the role to write")
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read" or not _may_write(hub_id, token.get("fineGrained")):
        what = f"the token {token.get('displayName')!r} may not write to it"
        raise BismoothError.of(hub_id, what, f"make one that may at {_TOKENS}, then: hf auth login --force")


def _may_write(hub_id: str, rights: Any) -> bool:
    """Whether the rights of a fine-grained token, if it is one, let it write to a repository."""
    if not isinstance(rights, dict):
        return True
    wanted = {hub_id.lower(), hub_id.partition("/")[0].lower()}
    return "repo.write" in rights.get("global", []) or any(
        "repo.write" in scope.get("permissions", []) and str(scope.get("entity", {}).get("name")).lower() in wanted
        for scope in rights.get("scoped", [])
    )


@contextmanager
def _translated(hub_id: str) -> Iterator[None]:
    """Turns the errors of the Hub's library into a problem with its remedy."""
    from huggingface_hub import errors

    try:
        yield
    except BismoothError:
        raise
    except errors.LocalTokenNotFoundError:
        what, remedy = "nobody is logged in to the Hub", "run: hf auth login, with a token that may write"
        raise BismoothError.of(hub_id, what, remedy) from None
    except errors.HFValidationError as error:
        what = f"not a name that the Hub allows ({error})"
        raise BismoothError.of(hub_id, what, "choose another") from None
    except errors.RepositoryNotFoundError:  # a gated one, too
        what = "the repository is there, but the token may not see into it"
        raise BismoothError.of(hub_id, what, f"ask for access at {page(hub_id)}, or choose another name") from None
    except Exception as error:
        # The library wraps what stopped a single file.
        found = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        if isinstance(found, errors.HfHubHTTPError):
            raise _refusal(hub_id, found) from None
        if isinstance(found, ValueError):
            what = f"the Hub refuses ({' '.join(str(found).split())})"
            raise BismoothError.of(hub_id, what, f"check the account at {_TOKENS}, then push again") from None
        if isinstance(found, (errors.HfHubHTTPError.__bases__[0], RuntimeError, ConnectionError, TimeoutError)):
            reason = f"{type(found).__name__}: {found}".partition("\n")[0]
            raise Interrupted.of(hub_id, f"the connection to the Hub was lost ({reason})", _AGAIN) from None
        raise


def _refusal(hub_id: str, error: Any) -> BismoothError:
    """What an answer of the Hub that is no success means to a user."""
    status, said = error.response.status_code, error.server_message or "no reason given"
    if status == 429 or status >= 500:
        return Interrupted.of(hub_id, f"the Hub does not take more now (status {status}: {said})", _AGAIN)
    if status == 401:
        remedy = "log in again: hf auth login --force, or correct HF_TOKEN if it is set"
        return BismoothError.of(hub_id, "the Hub does not know the token", remedy)
    if status == 409:
        what = "the repository is there already, but was not to be seen before"
        return BismoothError.of(hub_id, what, "choose another name, or run the same command again if you just made it")
    if status == 412:
        return BismoothError.of(hub_id, "somebody changed the repository during the upload", _AGAIN)
    what, remedy = f"the Hub refuses (status {status}: {said})", f"check what the token may do at {_TOKENS}"
    return BismoothError.of(hub_id, what, f"{remedy}, then run the same command again")
