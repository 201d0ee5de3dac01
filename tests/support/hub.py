"""A server on this machine that speaks as much of the Hub's protocol as huggingface_hub asks for, and counts bytes.

Uploads go by Git LFS: clients must be started with HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_writes"
"""A token of the account ``me``, a member of ``org`` and a reader of ``readers``, that may write."""
_ORGS = [{"type": "org", "name": name, "roleInOrg": role} for name, role in (("org", "write"), ("readers", "read"))]


def _scoped(*scopes: tuple[str, str, str]) -> dict:
    """The rights of a fine-grained token: type and name of what it is for, and a permission."""
    entries = [{"entity": {"type": kind, "name": name}, "permissions": [right]} for kind, name, right in scopes]
    return {"role": "fineGrained", "fineGrained": {"canReadGatedRepos": True, "global": [], "scoped": entries}}


ACCOUNTS: dict[str, dict] = {
    TOKEN: {"role": "write"},
    "hf_reads": {"role": "read"},
    "hf_fine": _scoped(("org", "org", "repo.write")),
    "hf_one": _scoped(("model", "org/out", "repo.write")),
    "hf_fine_reads": _scoped(("user", "me", "repo.write"), ("org", "org", "repo.content.read")),
}
"""Token -> what it may do; all are of the account ``me``."""


@dataclass
class Hub:
    """Repositories: id -> folder, each on its branch ``main`` with the one commit that it has.

    Attributes:
        repositories: those that are read, and those that clients made.
        endpoint: what HF_ENDPOINT must be.
        storage: where repositories of clients go, and their large files; ``None`` takes no uploads.
        gated: ids whose files are refused, though everybody may know that they are there.
        private: ids that only a token sees.
        served: path of a file -> bytes of it that were sent.
        received: SHA-256 of a large file -> bytes of it that arrived, over all attempts.
        commits: id -> commits that clients made, the last one last.
        titles: commit -> its title.
        trees: commit -> what was in the repository then, as the Hub tells it.
        drops: bytes of large files until the connection is cut, once.
        full: how many more large files are taken; ``None``: any number. Others are refused with status 403.
        invalid: what the Hub says against a card's metadata; empty: nothing.
        lock: for whoever counts; a client sends several files at a time.
    """

    repositories: dict[str, Path]
    endpoint: str
    storage: Path | None = None
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    served: Counter = field(default_factory=Counter)
    received: Counter = field(default_factory=Counter)
    commits: dict[str, list[str]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    trees: dict[str, list[dict]] = field(default_factory=dict)
    drops: int | None = None
    full: int | None = None
    invalid: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def head(self, hub_id: str) -> str:
        return self.commits.get(hub_id, [COMMIT])[-1]

    def commit(self, hub_id: str, title: str = "Somebody's") -> str:
        """A new last commit of a repository, of what is in its folder now."""
        made = self.commits.setdefault(hub_id, [])
        made.append(hashlib.sha1(f"{hub_id} {len(made)}".encode()).hexdigest())
        self.titles[made[-1]], self.trees[made[-1]] = title, self.siblings(hub_id)
        return made[-1]

    def files(self, hub_id: str) -> list[tuple[str, Path]]:
        folder = self.repositories[hub_id]
        return [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file()]

    def siblings(self, hub_id: str) -> list[dict]:
        """What is in a repository's folder now, as the Hub tells it."""
        found = []
        for name, path in self.files(hub_id):
            size = path.stat().st_size
            found.append({"rfilename": name, "size": size, "blobId": _git_oid(path)})
            if self.storage is not None and _is_large(name):
                found[-1]["lfs"] = {"size": size, "sha256": _sha256(path), "pointerSize": 134}
        return found

    def create(self, hub_id: str, private: bool) -> None:
        """A repository as the Hub makes it: with ``.gitattributes`` and a first commit."""
        assert self.storage is not None
        folder = self.repositories[hub_id] = self.storage / "repositories" / hub_id
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        (self.private.add if private else self.private.discard)(hub_id)
        self.commit(hub_id, "initial commit")

    def blob(self, digest: str) -> Path:
        """Where a large file is that arrived whole."""
        assert self.storage is not None
        return self.storage / "blobs" / digest


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git_oid(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            self.whoami()
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path):
            hub_id, what, revision = match.groups()
            if self.exists(hub_id, revision):
                self.answer_json(self.tree(hub_id) if what == "tree" else self.info(hub_id, revision))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commits/main", path):
            if self.exists(match[1], None):
                self.answer_json(self.history(match[1]))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            hub_id, revision, name = match.groups()
            if not self.exists(hub_id, revision):
                return
            file = self.hub.repositories[hub_id] / name
            if hub_id in self.hub.gated:
                self.refuse(401, "GatedRepo")
            elif not file.is_file():
                self.refuse(404, "EntryNotFound")
            else:
                self.serve(hub_id, file, name)
        else:
            self.refuse(404, "")

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        if path == "/api/validate-yaml":
            errors = [{"message": self.hub.invalid}] if self.hub.invalid else []
            self.answer_json({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif self.rights() is None:
            self.refuse(401, "")
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            self.answer_json({"files": [self.mode(match[1], file) for file in json.loads(body)["files"]]})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [self.instruction(file) for file in json.loads(body)["objects"]]
            self.answer_json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.refuse(404, "")

    def do_PUT(self) -> None:
        digest, left = self.path.rpartition("/")[2], int(self.headers["Content-Length"])
        if not self.has_room():
            self.body()
            self.refuse(403, "the storage is full")
            return
        data = bytearray()
        while left > 0 and (piece := self.rfile.read(min(left, 2**14))):
            data += piece
            left -= len(piece)
            if self.cuts(digest, len(piece)):
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
        if hashlib.sha256(data).hexdigest() != digest:
            self.refuse(400, "not what it was said to be")
            return
        self.hub.blob(digest).parent.mkdir(parents=True, exist_ok=True)
        self.hub.blob(digest).write_bytes(data)
        self.answer_json({})

    def has_room(self) -> bool:
        """Whether one more large file is taken."""
        with self.hub.lock:
            room = self.hub.full != 0
            if self.hub.full is not None and room:
                self.hub.full -= 1
        return room

    def cuts(self, digest: str, count: int) -> bool:
        """Counts bytes of a large file that arrived; whether the connection is to be cut now."""
        with self.hub.lock:
            self.hub.received[digest] += count
            if self.hub.drops is not None:
                self.hub.drops -= count
                if self.hub.drops <= 0:
                    self.hub.drops = None
                    return True
        return False

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def rights(self) -> Mapping | None:
        """What the client's token may do; ``None`` for one that is not known, or none."""
        return ACCOUNTS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def whoami(self) -> None:
        if (rights := self.rights()) is None:
            self.refuse(401, "")
        else:
            token = {"type": "access_token", "accessToken": {"displayName": "mine", **rights}}
            self.answer_json({"type": "user", "name": "me", "orgs": _ORGS, "auth": token})

    def create(self, asked: Mapping) -> None:
        hub_id = f"{asked['organization']}/{asked['name']}"
        if hub_id in self.hub.repositories:
            self.refuse(409, "it is there already")
        else:
            self.hub.create(hub_id, asked["visibility"] == "private")
            self.answer_json({"url": f"{self.hub.endpoint}/{hub_id}", "name": hub_id})

    def mode(self, hub_id: str, file: Mapping) -> dict:
        large, there = _is_large(file["path"]), self.hub.repositories[hub_id] / file["path"]
        oid = (_sha256 if large else _git_oid)(there) if there.is_file() else None
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def instruction(self, file: Mapping) -> dict:
        if self.hub.blob(file["oid"]).is_file():
            return dict(file)
        return {**file, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{file['oid']}"}}}

    def commit(self, hub_id: str, lines: list[dict]) -> None:
        header, *operations = lines
        if header["value"].get("parentCommit") not in (None, self.hub.head(hub_id)):
            self.refuse(412, "a commit has happened since")
            return
        for operation in operations:
            value = operation["value"]
            path = self.hub.repositories[hub_id] / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if operation["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            else:
                shutil.copyfile(self.hub.blob(value["oid"]), path)
        made = self.hub.commit(hub_id, header["value"]["summary"])
        self.answer_json({"commitUrl": f"{self.hub.endpoint}/{hub_id}/commit/{made}", "commitOid": made})

    def exists(self, hub_id: str, revision: str | None) -> bool:
        hidden = hub_id in self.hub.private and self.rights() is None
        if hub_id not in self.hub.repositories or hidden:
            self.refuse(401, "RepoNotFound")
        elif revision not in (None, "main", self.hub.head(hub_id), *self.hub.commits.get(hub_id, [])):
            self.refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def info(self, hub_id: str, revision: str | None) -> dict:
        """What is in the folder now, or was there at an earlier commit."""
        siblings = self.hub.trees.get(revision or "") or self.hub.siblings(hub_id)
        commit = revision if revision in self.hub.trees else self.hub.head(hub_id)
        hidden = hub_id in self.hub.private
        return {"id": hub_id, "modelId": hub_id, "sha": commit, "private": hidden, "siblings": siblings}

    def history(self, hub_id: str) -> list[dict]:
        made = reversed(self.hub.commits.get(hub_id, []))
        date = "2025-01-01T00:00:00.000Z"
        return [{"id": i, "title": self.hub.titles[i], "message": "", "authors": [], "date": date} for i in made]

    def tree(self, hub_id: str) -> list[dict]:
        return [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": self.etag(path)}
            for name, path in self.hub.files(hub_id)
        ]

    def etag(self, path: Path) -> str:
        return hashlib.sha1(f"{path.name} {path.stat().st_size}".encode()).hexdigest()

    def serve(self, hub_id: str, path: Path, name: str) -> None:
        data, status = path.read_bytes(), 200
        commit = self.hub.head(hub_id)
        headers = {"ETag": f'"{self.etag(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if self.command == "GET":
            self.hub.served[name] += len(data)
        self.answer(data, status, headers)

    def refuse(self, status: int, code: str) -> None:
        self.answer(b"{}", status, {"X-Error-Code": code, "X-Error-Message": code})

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def answer(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving(repositories: dict[str, Path], storage: Path | None = None) -> Iterator[Hub]:
    """A :class:`Hub` of these repositories, while the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
    server.daemon_threads = True
    hub = server.RequestHandlerClass.hub = Hub(repositories, f"http://127.0.0.1:{server.server_port}", storage)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
