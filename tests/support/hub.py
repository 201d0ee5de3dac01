"""A server on this machine that speaks as much of the Hub's protocol as huggingface_hub asks for, and counts bytes."""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories: id -> folder, each with the one commit :data:`COMMIT`, on its branch ``main``.

    Attributes:
        gated: ids whose files are refused, though everybody may know that they are there.
        served: path of a file -> bytes of it that were sent.
        endpoint: what HF_ENDPOINT must be.
    """

    def __init__(self, repositories: dict[str, Path], endpoint: str):
        self.repositories, self.gated, self.served, self.endpoint = repositories, set(), Counter(), endpoint


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path):
            hub_id, what, revision = match.groups()
            if self.exists(hub_id, revision):
                self.answer(json.dumps(self.tree(hub_id) if what == "tree" else self.info(hub_id)).encode())
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
                self.serve(file, name)
        else:
            self.refuse(404, "")

    def exists(self, hub_id: str, revision: str | None) -> bool:
        if hub_id not in self.hub.repositories:
            self.refuse(401, "RepoNotFound")
        elif revision not in (None, "main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def files(self, hub_id: str) -> list[tuple[str, Path]]:
        folder = self.hub.repositories[hub_id]
        return [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file()]

    def info(self, hub_id: str) -> dict:
        siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in self.files(hub_id)]
        return {"id": hub_id, "modelId": hub_id, "sha": COMMIT, "private": False, "siblings": siblings}

    def tree(self, hub_id: str) -> list[dict]:
        return [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": self.etag(path)}
            for name, path in self.files(hub_id)
        ]

    def etag(self, path: Path) -> str:
        return hashlib.sha1(f"{path.name} {path.stat().st_size}".encode()).hexdigest()

    def serve(self, path: Path, name: str) -> None:
        data, status = path.read_bytes(), 200
        headers = {"ETag": f'"{self.etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if self.command == "GET":
            self.hub.served[name] += len(data)
        self.answer(data, status, headers)

    def refuse(self, status: int, code: str) -> None:
        self.answer(b"{}", status, {"X-Error-Code": code, "X-Error-Message": code})

    def answer(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[Hub]:
    """A :class:`Hub` of these repositories, while the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
    server.daemon_threads = True
    hub = server.RequestHandlerClass.hub = Hub(repositories, f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
