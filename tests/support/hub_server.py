"""A small Hub on localhost that the real `huggingface_hub` client talks to: repositories, LFS, commits, downloads.

It keeps what a git server would: every commit has a parent and a tree; an LFS object must have arrived, and hash to its
name, before a commit may refer to it. A fault is handed to one request that fits it, once for each of its `times`:
a status code is answered instead, `reset` closes the connection before anything is done, `lost` does the work and closes
the connection instead of answering, `overtaken` lets somebody else commit first, `gated` asks for an account with access.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writeTokenOfTheTests", "hf_readTokenOfTheTests"
LARGE = (".safetensors", ".pt")


@dataclass
class Fault:
    """What happens to requests of this method whose path holds this text."""

    method: str
    path: str
    kind: int | str
    times: int = 1


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def add_commit(self, branch: str, tree: dict[str, bytes], title: str) -> str:
        parent = self.branches.get(branch)
        content = json.dumps([parent, title, [(name, hashlib.sha256(data).hexdigest()) for name, data in tree.items()]])
        sha = hashlib.sha1(f"{len(self.commits)}{content}".encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        self.log.append({"branch": branch, "parent": parent, "sha": sha, "title": title})
        return sha

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class HubServer(ThreadingHTTPServer):
    """The state, and the server that serves it; a context manager."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is none of our errors; anything else is a fault of this server and must be seen."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def make_repo(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.add_commit("main", {".gitattributes": b"*.pt filter=lfs\n", **(files or {})}, "initial commit")
        return repo

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return {name: data for name, data in repo.commits[repo.branches[branch]].items() if name != ".gitattributes"}

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.read_body()
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
            fault = self.next_fault(path)
        self.mute = fault == "lost"
        if fault == "overtaken":
            repo = self.server.repos[re.search(r"models/([^/]+/[^/]+)/", path)[1]]
            repo.add_commit("main", {"theirs.txt": b"first"}, "somebody else's")
        if fault == "reset":
            self.drop()
        elif fault == "gated":
            self.refuse(403, "Access to it is restricted.", "GatedRepo")
        elif isinstance(fault, int):
            self.refuse(fault, f"injected, for {self.headers.get('Authorization', 'nobody')}")
        else:
            with self.server.lock:
                self.route(path)
            if self.mute:
                self.drop()

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def next_fault(self, path: str) -> int | str | None:
        for fault in self.server.faults:
            if fault.times and fault.method == self.command and fault.path in path:
                fault.times -= 1
                return fault.kind
        return None

    def drop(self) -> None:
        """Close with a reset, not a goodbye."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def reply(self, value: object, status: int = 200, **headers: str) -> None:
        if self.mute:
            return
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.reply({"error": message}, status, **headers)

    def route(self, path: str) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/lfs/"):  # the address of the storage carries its own permission
            self.store(path.rsplit("/", 1)[1])
            return
        if token and token not in (WRITER, READER):
            self.refuse(401, "Invalid credentials in Authorization header")
            return
        writing = re.search(r"/(create|preupload|commit|branch|batch)(/|$)", path) is not None
        if writing and token != WRITER:
            self.refuse(403 if token else 401, "You don't have the rights to do this")
            return
        if path == "/api/whoami-v2":
            self.reply({"name": "org", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        elif path == "/api/validate-yaml":
            bad = not json.loads(self.body)["content"].startswith("---\n")
            self.reply({"errors": [{"message": "no metadata"}] if bad else [], "warnings": []}, 400 if bad else 200)
        elif path == "/api/repos/create":
            self.create()
        elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self.batch()
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/(.+))?)?", path):
            self.model(found[1], token, found[2] or "revision", found[3] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], token, found[2], found[3])
        else:
            self.refuse(404, f"no such page: {path}")

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.url}/{repo_id}"}
        if repo_id in self.server.repos:
            self.reply({**url, "error": "You already created this model repo"}, 409)
            return
        self.server.make_repo(repo_id, private=asked.get("visibility") == "private")
        self.reply(url)

    def repo(self, repo_id: str, token: str) -> Repo | None:
        found = self.server.repos.get(repo_id)
        if found is None or (found.private and not token):
            self.refuse(404 if token else 401, "Repository not found", "RepoNotFound")
            return None
        return found

    def model(self, repo_id: str, token: str, what: str, revision: str) -> None:
        repo = self.repo(repo_id, token)
        if repo is None:
            return
        if what == "branch":
            known = revision in repo.branches
            repo.branches.setdefault(revision, repo.branches["main"])
            self.refuse(409, "Reference already exists") if known else self.reply({})
            return
        commit = repo.find(revision)
        if commit is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        tree = repo.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": name} for name in tree]
            self.reply({"id": repo_id, "sha": commit, "private": repo.private, "siblings": siblings})
        elif what == "tree":
            self.reply([tree_entry(name, data) for name, data in tree.items()])
        elif what == "preupload":
            self.reply({"files": [self.upload_mode(asked["path"], tree) for asked in json.loads(self.body)["files"]]})
        elif what == "commit":
            self.commit(repo_id, repo, revision)
        else:
            self.refuse(404, f"no such page: {what}")

    def upload_mode(self, name: str, tree: dict[str, bytes]) -> dict:
        mode = "lfs" if name.endswith(LARGE) else "regular"
        known = tree.get(name)
        oid = None if known is None else hashlib.sha256(known).hexdigest() if mode == "lfs" else git_sha(known)
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch(self) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            if asked["oid"] not in self.server.objects:
                href = f"{self.server.url}/lfs/{asked['oid']}"
                verify = f"{self.server.url}/lfs/verify/{asked['oid']}"
                asked["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(asked)
        self.reply({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                self.refuse(400, "the content does not hash to its name")
                return
            self.server.objects[oid] = self.body
            self.reply({})
        else:
            asked = json.loads(self.body)
            whole = len(self.server.objects.get(oid, b"")) == asked["size"]
            self.reply({}, 200 if whole else 404)

    def commit(self, repo_id: str, repo: Repo, branch: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        wants_pr = "create_pr=1" in urlsplit(self.path).query
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            self.refuse(412, "A commit has happened since. Please refresh and try again.")
            return
        tree = dict(repo.commits[repo.branches[branch]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    self.refuse(400, f"LFS object {value['oid']} was never uploaded")
                    return
                tree[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        number = sum(name.startswith("refs/pr/") for name in repo.branches) + 1
        target = f"refs/pr/{number}" if wants_pr else branch
        if wants_pr:
            repo.branches[target] = repo.branches[branch]
        sha = repo.add_commit(target, tree, header["summary"])
        url = f"{self.server.url}/{repo_id}"
        pull_request = {"pullRequestUrl": f"{url}/discussions/{number}"} if wants_pr else {}
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **pull_request})

    def resolve(self, repo_id: str, token: str, revision: str, name: str) -> None:
        repo = self.repo(repo_id, token)
        if repo is None:
            return
        commit = repo.find(revision)
        data = repo.commits[commit].get(name) if commit else None
        if data is None:
            self.refuse(404, "Entry not found", "EntryNotFound")
            return
        etag = hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else git_sha(data)
        self.reply(data, 200, ETag=f'"{etag}"', X_Repo_Commit=str(commit))


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def tree_entry(name: str, data: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(data), "oid": git_sha(data)}
    if name.endswith(LARGE):
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        entry |= {"oid": git_sha(pointer), "lfs": {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}}
    return entry
