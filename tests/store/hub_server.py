"""A hub on this machine: as much of the real one's HTTP protocol as repositories of models need, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

READER, WRITER = "hf_reader", "hf_writer"


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        whole = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        named = [(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(whole.items())]
        made = hashlib.sha1(json.dumps([len(self.commits), named]).encode()).hexdigest()
        self.commits[made], self.refs[ref] = whole, made
        return made


class Hub:
    """The server. cut: requests whose path holds this text break off;  seen: (method, path) of all requests;
    sent: paths of the files that were downloaded."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.cut: str | None = None
        self.seen: list[tuple[str, str]] = []
        self.sent: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def put(self, repo: str, files: dict[str, bytes], ref: str = "main", private: bool = False) -> str:
        """A commit in a repository, as if somebody had pushed it."""
        return self.repos.setdefault(repo, Repo(private)).commit(ref, files)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", url: str = "") -> None:
        self.url, self.status, self.headers = url, status, {"X-Error-Code": code, "X-Error-Message": message}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Not to the terminal."""

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.seen.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.cut is not None and self.hub.cut in path:
            self.close_connection = True
            self.connection.close()
            return
        try:
            answer = self.answer(path, parse_qs(url.query), body)
        except Refused as refused:
            said = {"error": refused.headers["X-Error-Message"], "url": refused.url}
            self.reply(refused.status, json.dumps(said), refused.headers)
            return
        if answer is not None:
            self.reply(200, json.dumps(answer))

    do_GET = do_POST = do_PUT = do_HEAD = handle_one

    def reply(self, status: int, body: bytes | str, headers: dict[str, str] | None = None) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def writer(self) -> None:
        if not self.token:
            raise Refused(401, message="Invalid username or password.")
        if self.token != WRITER:
            raise Refused(403, message="You don't have the rights to write there")

    def repo(self, name: str) -> Repo:
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.token not in (READER, WRITER)):
            raise Refused(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return found

    def files(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    def answer(self, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if path.startswith("/large/"):
            self.hub.large[path.rpartition("/")[2]] = body
            return self.reply(200, b"")
        if path.startswith("/api/models/"):
            name, _, rest = path.removeprefix("/api/models/").partition("/")
            second, _, rest = rest.partition("/")
            return self.model(f"{name}/{second}", *rest.partition("/")[::2], body)
        if "/resolve/" in path:
            name, _, rest = path.strip("/").partition("/resolve/")
            revision, _, inside = rest.partition("/")
            return self.resolve(self.repo(name), revision, inside)
        raise Refused(404)

    def validate(self, card: str) -> Any:
        front = yaml.safe_load(card.split("---\n")[1])
        base = front.get("base_model") or "a/b"
        if (
            not isinstance(front["library_name"], str)
            or base.startswith(("/", "."))
            or not isinstance(front["tags"], list)
        ):
            raise Refused(400, message="invalid metadata")
        return {"errors": [], "warnings": []}

    def create(self, asked: dict[str, Any]) -> Any:
        self.writer()
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            raise Refused(409, message="You already created this model repo", url=f"{self.hub.url}/{name}")
        self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.hub.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": f"{self.hub.url}/{name}"}

    def batch(self, asked: dict[str, Any]) -> Any:
        self.writer()
        places = [{"upload": {"href": f"{self.hub.url}/large/{o['oid']}"}} for o in asked["objects"]]
        objects = [{**o, "actions": actions} for o, actions in zip(asked["objects"], places, strict=True)]
        return {"transfer": "basic", "objects": objects}

    def model(self, name: str, kind: str, rest: str, body: bytes) -> Any:
        repo = self.repo(name)
        if kind in ("", "revision"):
            commit, files = self.files(repo, rest or "main")
            return {"id": name, "sha": commit, "private": repo.private, "siblings": [{"rfilename": n} for n in files]}
        if kind == "tree":
            _, files = self.files(repo, rest)
            return [self.entry(n, data) for n, data in files.items()]
        self.writer()
        if kind == "branch":
            if rest in repo.refs:
                raise Refused(409, message="Reference already exists")
            repo.refs[rest] = repo.refs["main"]
            return {}
        if kind == "preupload":
            modes = {True: "lfs", False: "regular"}
            asked = json.loads(body)["files"]
            said = [{"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")]} for f in asked]
            return {"files": [{**one, "shouldIgnore": False} for one in said]}
        if kind == "commit":
            files = {}
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "lfsFile":
                    files[line["value"]["path"]] = self.hub.large[line["value"]["oid"]]
            made = repo.commit(rest, files)
            return {"commitUrl": f"{self.hub.url}/{name}/commit/{made}", "commitOid": made}
        raise Refused(404)

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def resolve(self, repo: Repo, revision: str, name: str) -> None:
        commit, files = self.files(repo, revision)
        if name not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        if self.command == "GET":
            self.hub.sent.append(name)
        tag = hashlib.sha256(files[name]).hexdigest()
        self.reply(200, files[name], {"ETag": f'"{tag}"', "X-Repo-Commit": commit})
