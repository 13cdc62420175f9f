"""A small Hub on this machine, with as much of the HTTP API as huggingface_hub needs to push and load repositories.

    with hub_server(folder) as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.environment())

huggingface_hub reads where its Hub and its cache are when it is imported, so what a user does is tried in a process of
its own. `connected` leads the present process to the Hub, for tests that have no time to start one. There are models and
data sets with one branch, and Git LFS for weights; there is no Xet, there are no pull requests, and everything is public
to read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

USER = "user"
TOKEN = "dummy"
LFS_SUFFIXES = (".safetensors", ".bin", ".npz", ".parquet", ".zip")
# The developer's own settings could lead a process to another Hub or cache.
_SETTINGS = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DIFFUSERS_")
_REPOSITORY = r"/api/(model|dataset)s/([^/]+/[^/]+)"
# What of `Hub` answers a method and path, given the groups of the path and the body.
_ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", rf"{_REPOSITORY}/preupload/([^/]+)", "preupload"),
    ("POST", r"/.+\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_upload"),
    ("POST", rf"{_REPOSITORY}/commit/main", "commit"),
    ("GET", rf"{_REPOSITORY}/refs", "references"),
    ("GET", rf"{_REPOSITORY}(?:/revision/([^/]+))?", "info"),
    ("GET", rf"{_REPOSITORY}/tree/([^/]+)(?:/(.+))?\?recursive=(true|false).*", "tree"),
    ("GET", r"/(?:(dataset)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "download"),
]


class HubError(Exception):
    """An answer other than success; from `code` huggingface_hub derives the type of its own error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Answer(NamedTuple):
    """What a client is sent."""

    status: int
    body: bytes
    headers: dict[str, str]

    @classmethod
    def json(cls, content: Any, status: int = 200, **headers: str) -> Answer:
        found = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        return cls(status, json.dumps(content).encode(), found)


class File(NamedTuple):
    """One file of a commit; its content lies on disk under its SHA-256."""

    sha256: str
    git_sha1: str
    size: int
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_sha1

    def entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.git_sha1}
        pointer = {"oid": self.sha256, "size": self.size, "pointerSize": 128}
        return {**entry, "lfs": pointer} if self.lfs else entry


Files = dict[str, File]


class Hub:
    """The repositories and the answers about them.

    Attributes:
        folder: holds the contents of all files, and the caches of the processes.
        url: for HF_ENDPOINT.
        repositories: by kind ("model" or "dataset") and full name: the files of every commit, by path.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.repositories: dict[tuple[str, str], dict[str, Files]] = {}
        (folder / "contents").mkdir(parents=True)

    def environment(self, home: str = "home") -> dict[str, str]:
        """For a process that uses this Hub: the present one's, and a cache of its own for every `home`."""
        foreign = [k for k in os.environ if k.startswith(_SETTINGS) or k.lower().endswith("_proxy")]
        kept = {key: value for key, value in os.environ.items() if key not in foreign}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.folder / home), "HF_TOKEN": TOKEN}
        disabled = ("PROGRESS_BARS", "TELEMETRY", "XET")
        return {**kept, **own, "HF_HUB_OFFLINE": "0", **{f"HF_HUB_DISABLE_{name}": "1" for name in disabled}}

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        """To a request; `path` with the query of listings."""
        for wanted, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == wanted:
                given = getattr(self, name)(*(part and unquote(part) for part in found.groups()), body)
                return given if isinstance(given, Answer) else Answer.json(given)
        raise HubError(501, "NotImplemented", f"This Hub does not know {method} {path}")

    def find(self, kind: str | None, name: str, revision: str | None = None) -> tuple[str, Files]:
        """A commit and its files; the last one's without a revision or for "main"."""
        commits = self.repositories.get((kind or "model", name))
        if commits is None:
            raise HubError(404, "RepoNotFound", "Repository not found")
        commit = list(commits)[-1] if revision in (None, "main") else str(revision)
        if commit not in commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, commits[commit]

    def content(self, sha256: str) -> Path:
        return self.folder / "contents" / sha256

    def store(self, content: bytes, lfs: bool = False) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        self.content(sha256).write_bytes(content)
        return File(
            sha256, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), len(content), lfs
        )

    def validate_yaml(self, _: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def whoami(self, _: bytes) -> Any:
        return {"type": "user", "name": USER, "orgs": []}

    def create(self, body: bytes) -> Any:
        wanted = json.loads(body)
        kind, name = wanted.get("type") or "model", f"{wanted.get('organization') or USER}/{wanted['name']}"
        made = {"name": name, "url": f"{self.url}/{'' if kind == 'model' else 'datasets/'}{name}"}
        if (kind, name) in self.repositories:
            return Answer.json(made, 409)  # with exist_ok the address of the error is read
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        first = hashlib.sha1(name.encode()).hexdigest()
        self.repositories[kind, name] = {first: {".gitattributes": self.store(rules.encode())}}
        return made

    def preupload(self, kind: str, name: str, revision: str, body: bytes) -> Any:
        _, present = self.find(kind, name, revision)
        answers = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = {"oid": present[path].etag} if path in present else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": answers}

    def lfs_batch(self, body: bytes) -> Any:
        objects = json.loads(body)["objects"]
        for wanted in objects:
            if not self.content(wanted["oid"]).is_file():
                wanted["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, sha256: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != sha256:
            raise HubError(400, "BadRequest", f"What was uploaded as {sha256} is something else")
        self.store(body)
        return {}

    def commit(self, kind: str, name: str, body: bytes) -> Any:
        parent, present = self.find(kind, name)
        files = dict(present)
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = self.store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = self.store(self.content(value["oid"]).read_bytes(), lfs=True)
            elif key.startswith("deleted"):
                gone = value["path"].rstrip("/")
                files = {p: f for p, f in files.items() if p != gone and not p.startswith(f"{gone}/")}
        commit = hashlib.sha1(parent.encode() + body).hexdigest()
        self.repositories[kind, name][commit] = dict(sorted(files.items()))
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"}

    def references(self, kind: str, name: str, _: bytes) -> Any:
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.find(kind, name)[0]}
        return {"branches": [main], "tags": [], "converts": [], "pullRequests": []}

    def info(self, kind: str, name: str, revision: str | None, _: bytes) -> Any:
        commit, files = self.find(kind, name, revision)
        siblings = [{"rfilename": path} for path in files]
        return {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}

    def tree(self, kind: str, name: str, revision: str, under: str | None, recursive: str, _: bytes) -> Any:
        start = f"{under}/" if under else ""
        listed: dict[str, Any] = {}
        for path, file in self.find(kind, name, revision)[1].items():
            if path.startswith(start):
                for folder in (path[:i] for i in range(len(start), len(path)) if path[i] == "/"):
                    listed[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
                listed[path] = file.entry(path)
        if under and not listed:
            raise HubError(404, "EntryNotFound", f"{under} does not exist")
        return [
            entry for path, entry in listed.items() if recursive == "true" or "/" not in path[len(start) :]
        ]

    def download(self, kind: str | None, name: str, revision: str, path: str, _: bytes) -> Answer:
        commit, files = self.find(kind, name, revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        file = files[path]
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        return Answer(200, self.content(files[path].sha256).read_bytes(), headers)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it holds every body back for 40 ms
    server: _Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path if "/tree/" in self.path else urlsplit(self.path).path
        needs_token = self.command == "POST" or path == "/api/whoami-v2"
        try:
            if (
                needs_token
                and path != "/api/validate-yaml"
                and self.headers.get("Authorization") != f"Bearer {TOKEN}"
            ):
                raise HubError(401, "Unauthorized", "Invalid username or password.")
            with self.server.lock:
                answer = self.server.hub.answer(self.command.replace("HEAD", "GET"), path, body)
        except HubError as error:
            text = str(error)
            answer = Answer.json({"error": text}, error.status, X_Error_Code=error.code, X_Error_Message=text)
        self.send_response(answer.status)
        for key, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: of what fails the client tells."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub
    lock: threading.Lock


@contextmanager
def hub_server(folder: Path) -> Iterator[Hub]:
    """An empty Hub that answers while the context lasts and keeps its files in `folder`, a new one."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.lock, server.hub = threading.Lock(), Hub(folder, f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.hub
        finally:
            server.shutdown()


@contextmanager
def connected(hub: Hub, home: str = "connected") -> Iterator[None]:
    """Within the block this process uses the Hub, with a cache of its own for every `home`, see `Hub.environment`."""
    from diffusers.utils import dynamic_modules_utils
    from huggingface_hub import constants, hf_api

    folder = hub.folder / home
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(sys, "path", [*sys.path])  # to which diffusers adds the folder below
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(hf_api.api, "endpoint", hub.url)
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        yield
