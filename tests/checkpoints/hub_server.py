"""A hub on the loopback interface: the requests that huggingface_hub makes of a model repository, and ways to fail."""

import contextlib
import dataclasses
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass
class Repo:
    files: dict[str, bytes]
    gated: bool = False  # files only for the token "accepted"
    private: bool = False  # nothing at all without it
    revisions: tuple[str, ...] = ("main",)

    @property
    def commit(self) -> str:
        return etag(repr(sorted((name, etag(data)) for name, data in self.files.items())).encode())


@dataclasses.dataclass
class Request:
    method: str
    path: str
    range: str | None

    @property
    def file(self) -> str | None:
        """The name of the file that this request is about."""
        return self.path.split("/resolve/")[1].split("/", 1)[1] if "/resolve/" in self.path else None


class Hub(ThreadingHTTPServer):
    """Answers for `repos`, and notes every request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.cuts: dict[str, int] = {}  # file -> bytes after which its next download is cut off
        self.down_after_cut = False
        self.status: int | None = None  # answers everything with this

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, method: str = "GET") -> list[str]:
        """The files that were asked for since the last call."""
        names = sorted(request.file for request in self.requests if request.method == method and request.file)
        self.requests.clear()
        return names


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.server.requests.append(Request(self.command, path, self.headers.get("Range")))
        if self.server.status is not None:
            return self.refuse(self.server.status)
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo, rest = self.server.repos.get("/".join(parts[:2])), parts[2:]
        allowed = self.headers.get("Authorization") == "Bearer accepted"
        if self.headers.get("Authorization") == "Bearer expired":
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if repo is None or (repo.private and not allowed):
            # The hub does not tell which: 401 to those without a token.
            return self.refuse(404 if "Authorization" in self.headers else 401, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in (*repo.revisions, repo.commit):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id: " + revision)
        if rest[:1] == ["tree"]:
            files = [{"type": "file", "path": n, "size": len(d), "oid": etag(d)} for n, d in repo.files.items()]
            return self.answer(json.dumps(files).encode())
        if rest[:1] in ([], ["revision"]):
            blobs = "blobs" in urllib.parse.parse_qs(url.query)
            siblings = [{"rfilename": n} | ({"size": len(d)} if blobs else {}) for n, d in repo.files.items()]
            info = {"id": "/".join(parts[:2]), "sha": repo.commit, "siblings": siblings, "tags": [], "private": False}
            return self.answer(json.dumps(info).encode())
        if repo.gated and not allowed:
            return self.refuse(403 if "Authorization" in self.headers else 401, "GatedRepo", "Access is restricted.")
        name = "/".join(rest[2:])
        if name not in repo.files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        self.send(name, repo)

    def send(self, name: str, repo: Repo) -> None:
        data = repo.files[name]
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if self.command == "GET" and "Range" in self.headers:
            begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            return self.answer(data[begin:], 206, headers)
        cut = self.server.cuts.pop(name, None) if self.command == "GET" else None
        self.answer(data, 200, headers, cut)
        if cut is not None and self.server.down_after_cut:
            self.server.status = 503

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, cut: int | None = None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])

    def refuse(self, status: int, code: str | None = None, message: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.answer(b"", status, {key: value for key, value in headers.items() if value is not None})


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
