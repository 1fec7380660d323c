"""A stand-in for the hub's HTTP interface: repositories of datasets in memory, on this machine. Knows no records.

It answers what huggingface_hub and datasets ask to make a repository, push to it in one commit, list and download it:
Git LFS for Parquet and Arrow files, JSON lines for a commit, tokens, private and gated repositories.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

WRITES, READS = "hf_of_me", "hf_reads"  # tokens of the user `me`
LARGE = (".parquet", ".arrow")


@dataclass
class Repository:
    """A repository: its commits' files by hash, and the last commit of each branch."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class Refused(Exception):
    """An answer of the hub that refuses a request: its status and error code."""


class Hub:
    """The stand-in.

    Attributes:
        repositories: by `owner/name`.
        uploaded: the bytes that were put to Git LFS, by their SHA-256.
        requests: method and path of every request.
        broken: a part of a path: such requests lose their connection, or are refused where they would be repeated.
        damage: bytes in a file and those that arrive in their place, as many.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploaded: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: str | None = None
        self.damage: tuple[bytes, bytes] | None = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def everything(self) -> bytes:
        """All bytes that anybody has sent."""
        files = [
            file for each in self.repositories.values() for files in each.commits.values() for file in files.items()
        ]
        return b"\n".join([*self.uploaded.values(), *(name.encode() + data for name, data in files)])

    def repository(self, name: str, token: str | None) -> Repository:
        found = self.repositories.get(name)
        if found is None or (found.private and token is None):
            raise Refused(404 if token else 401, "RepoNotFound")
        return found


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.broken and self.hub.broken in path:
            self.close_connection = True
            return None if "/commit/" in path else self.answer(400, b"{}")
        try:
            self.route(path, sent)
        except Refused as refused:
            status, code = refused.args
            self.answer(status, b'{"error": "refused"}', {"X-Error-Code": code} if code else {})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    @property
    def token(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in (WRITES, READS):
            raise Refused(401, "")
        return token or None

    def may_write(self, owner: str) -> None:
        if self.token is None:
            raise Refused(401, "")
        if self.token != WRITES or owner != "me":
            raise Refused(403, "")

    def route(self, path: str, sent: bytes) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]  # `a%2Fb` is one
        if path == "/api/whoami-v2":
            if self.token is None:
                raise Refused(401, "")
            return self.json({"name": "me", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self.json({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            return self.create(json.loads(sent))
        if parts[0] == "lfs":
            assert hashlib.sha256(sent).hexdigest() == parts[1]
            self.hub.uploaded[parts[1]] = sent
            return self.answer(200, b"")
        if ".git/info/lfs/" in path:
            return self.batch(json.loads(sent))
        if parts[:2] == ["api", "datasets"]:
            return self.api("/".join(parts[2:4]), parts[4:], sent)
        if parts[0] == "datasets" and parts[3] == "resolve":
            return self.resolve("/".join(parts[1:3]), parts[4:])
        if "resolve" in parts:  # it has no models
            raise Refused(404, "RepoNotFound")
        raise Refused(404, "")

    def create(self, asked: dict[str, Any]) -> None:
        owner, name = asked.get("organization") or "me", asked["name"]
        if self.token is None:
            raise Refused(401, "")
        known = f"{owner}/{name}" in self.hub.repositories
        if not known:
            self.may_write(owner)
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.repositories[f"{owner}/{name}"] = Repository(private)
        self.json({"url": f"{self.hub.url}/datasets/{owner}/{name}"}, 409 if known else 200)

    def batch(self, asked: dict[str, Any]) -> None:
        found = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}} for each in asked["objects"]
        ]
        self.json({"transfer": "basic", "objects": found})

    def api(self, name: str, what: list[str], sent: bytes) -> None:
        repository = self.hub.repository(name, self.token)
        kind, rest = (what[0], what[1:]) if what else ("revision", ["main"])
        if kind == "preupload":
            self.may_write(name.split("/")[0])
            files = [{"path": each["path"], "shouldIgnore": False, "oid": None,
                      "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular"}
                     for each in json.loads(sent)["files"]]  # fmt: skip
            return self.json({"files": files})
        if kind == "commit":
            return self.commit(name, repository, "/".join(rest), sent)
        if kind == "branch":
            there = repository.branches.setdefault("/".join(rest), repository.branches["main"])
            return self.json({"oid": there})
        revision, folder = self.revision(repository, rest)
        files = repository.commits[revision]
        if kind == "revision":
            siblings = [{"rfilename": each} for each in files]
            return self.json({"id": name, "sha": revision, "siblings": siblings, "private": repository.private,
                              "gated": repository.gated, "disabled": False, "tags": [], "downloads": 0})  # fmt: skip
        if kind == "paths-info":
            asked = parse_qs(sent.decode())["paths"] if sent[:1] != b"{" else json.loads(sent)["paths"]
            return self.json([entry(each, files[each]) for each in asked if each in files])
        if kind == "tree":
            begin, everything = f"{folder}/" if folder else "", "true" in self.query.get("recursive", [""])[0].lower()
            inside = {each: data for each, data in files.items() if each.startswith(begin)}
            if folder and not inside:
                raise Refused(404, "EntryNotFound")
            folders = {begin + each[len(begin) :].split("/")[0] for each in inside if "/" in each[len(begin) :]}
            found = [entry(each, data) for each, data in inside.items() if everything or "/" not in each[len(begin) :]]
            return self.json([*found, *({"type": "directory", "path": each, "oid": "0" * 40} for each in folders)])
        raise Refused(404, "")

    def revision(self, repository: Repository, parts: list[str]) -> tuple[str, str]:
        """The commit that a path begins with, and what follows."""
        for length in (3, 1):  # refs/pr/1
            name = "/".join(parts[:length])
            name = repository.branches.get(name, name)
            if name in repository.commits:
                return name, "/".join(parts[length:])
        raise Refused(404, "RevisionNotFound")

    def commit(self, name: str, repository: Repository, branch: str, sent: bytes) -> None:
        self.may_write(name.split("/")[0])
        lines = [json.loads(line) for line in sent.splitlines()]
        assert lines[0]["key"] == "header"
        files = dict(repository.files(branch))
        for each in lines[1:]:
            value = each["value"]
            if each["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif each["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
            else:
                assert each["key"] == "deletedFile"
                del files[value["path"]]
        asks = "create_pr" in self.query
        branch = f"refs/pr/{len(repository.branches)}" if asks else branch
        oid = hashlib.sha1(repr((len(repository.commits), sorted(files.items()))).encode()).hexdigest()
        repository.commits[oid], repository.branches[branch] = files, oid
        url = f"{self.hub.url}/datasets/{name}"
        pull = {"pullRequestUrl": f"{url}/discussions/{branch.split('/')[-1]}"} if asks else {}
        self.json({"commitOid": oid, "commitUrl": f"{url}/commit/{oid}", **pull})

    def resolve(self, name: str, parts: list[str]) -> None:
        repository = self.hub.repository(name, self.token)
        revision, path = self.revision(repository, parts)
        if repository.gated:
            raise Refused(403, "GatedRepo")
        if path not in repository.commits[revision]:
            raise Refused(404, "EntryNotFound")
        data = repository.commits[revision][path]
        sent = data if self.hub.damage is None else data.replace(*self.hub.damage)
        self.answer(200, sent, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": revision})


def entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def set_offline(patch: pytest.MonkeyPatch, offline: bool) -> None:
    """Let huggingface_hub and datasets be offline, as HF_HUB_OFFLINE=1 at the start of a process does, or not."""
    import datasets.config
    from huggingface_hub import constants, utils

    for module in (constants, datasets.config):
        patch.setattr(module, "HF_HUB_OFFLINE", offline)
    if reset := getattr(utils, "reset_sessions", None):  # before 1.0, a session knows how it began
        reset()


@contextlib.contextmanager
def serving(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A stand-in to which huggingface_hub and datasets turn, with a cache of their own, and nobody logged in."""
    import datasets.config
    from huggingface_hub import constants, file_download

    hub = Hub()
    threading.Thread(target=hub.server.serve_forever, args=(0.05,), daemon=True).start()
    set_offline(patch, False)
    patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    changes = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)}
    for name, value in {**changes, "HF_HUB_DISABLE_XET": True}.items():
        patch.setattr(constants, name, value)
    if hasattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):  # before 1.0
        patch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setenv("HF_TOKEN", WRITES)
    try:
        yield hub
    finally:
        set_offline(patch, True)  # what an older version has opened stays so
        hub.server.shutdown()
        hub.server.server_close()
