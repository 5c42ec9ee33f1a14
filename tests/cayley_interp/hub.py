"""A Hub in this process: as much of huggingface.co's HTTP API as its own client uses to make, fill and read models.

    with Hub() as hub:
        hub.python("load_pretrained('owner/name')", home=tmp_path)

Repositories have branches of commits; a commit is files by path. Large files go through Git LFS: a batch request, one
PUT for each, and a commit that names their hashes. What a client sends is checked as far as the real one would.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_a_test"
Files = dict[str, bytes]


class Hub:
    """A server on a free port of this machine. `requests` is its log, "POST /api/repos/create" and so on."""

    def __init__(self):
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, Files] = {}
        self.large: Files = {}
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo_id: str, branch: str, changed: Files) -> str:
        """Files on top of a branch's; returns the hash of the commit."""
        heads = self.branches.setdefault(repo_id, {})
        files = self.commits.get(heads.get(branch, ""), {}) | changed
        parts = [repo_id, *(f"{path} {hashlib.sha256(content).hexdigest()}" for path, content in sorted(files.items()))]
        sha = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[sha], heads[branch] = files, sha
        return sha

    def files(self, repo_id: str, branch: str = "main") -> Files:
        return self.commits[self.branches[repo_id][branch]]

    def python(self, code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run code in a process whose Hub this is, with its cache in `home`."""
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "OMP_NUM_THREADS": "1",
        }
        imports = "import torch\nfrom cayley_interp import load_pretrained, push_to_hub\n"
        return subprocess.run(
            [sys.executable, "-c", imports + code],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | settings | environment,
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":  # a PUT goes to storage
            return self._json({"error": "Invalid username or password."}, 401)
        for method, pattern, handler in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return handler(self, *match.groups())
        return self._error(404, "EntryNotFound", f"no route for {self.command} {path}")

    # ---- Making and filling a repository ----

    def create_repo(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        if repo_id in self.hub.branches:
            return self._json({"error": "you already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
        self.hub.commit(repo_id, "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return self._json({"url": f"{self.hub.url}/{repo_id}", "id": "1"})

    def create_branch(self, repo_id: str, branch: str) -> None:
        heads = self.hub.branches[repo_id]
        if branch in heads:
            return self._json({"error": "Reference already exists"}, 409)
        heads[branch] = heads["main"]
        return self._json({})

    def validate_yaml(self) -> None:
        front_matter = json.loads(self.body)["content"].split("---")[1]
        errors = [] if isinstance(yaml.safe_load(front_matter), dict) else [{"message": "not a mapping"}]
        return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo_id: str, revision: str) -> None:
        if self._sha(repo_id, revision) is None:
            return None
        asked = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if path.endswith((".safetensors", ".pt")) else "regular" for path in asked]
        return self._json(
            {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(asked, modes, strict=True)]}
        )

    def lfs_batch(self, _repo_id: str) -> None:
        objects = json.loads(self.body)["objects"]
        for o in objects:
            o["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}
        return self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._json({"error": "hash does not match"}, 400)
        self.hub.large[oid] = self.body
        return self._json({})

    def make_commit(self, repo_id: str, revision: str) -> None:
        if self._sha(repo_id, revision) is None:
            return None
        changed: Files = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.hub.large[value["oid"]]
        sha = self.hub.commit(repo_id, revision, changed)
        return self._json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    # ---- Reading it ----

    def info(self, repo_id: str, revision: str = "main") -> None:
        if sha := self._sha(repo_id, revision):
            siblings = [{"rfilename": path} for path in self.hub.commits[sha]]
            self._json({"id": repo_id, "modelId": repo_id, "sha": sha, "siblings": siblings, "tags": []})

    def tree(self, repo_id: str, revision: str) -> None:
        if sha := self._sha(repo_id, revision):
            files = self.hub.commits[sha].items()
            self._json([{"type": "file", "path": p, "size": len(c), "oid": _blob_id(c)} for p, c in files])

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if (sha := self._sha(repo_id, revision)) is None:
            return
        content = self.hub.commits[sha].get(path)
        if content is None:
            self._error(404, "EntryNotFound", f"no file {path}")
        else:
            self._send(200, content, {"ETag": f'"{_blob_id(content)}"', "X-Repo-Commit": sha})

    def _sha(self, repo_id: str, revision: str) -> str | None:
        """The commit that a branch or a hash names; answers with an error and returns None if there is none."""
        heads = self.hub.branches.get(repo_id)
        if heads is None:
            self._error(404, "RepoNotFound", "Repository not found")
            return None
        sha = heads.get(revision, revision)
        if sha not in self.hub.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha

    # ---- Answers ----

    def _json(self, value: dict | list, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _blob_id(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", _Handler.create_branch),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", _Handler.preupload),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", _Handler.make_commit),
    ("GET", r"/api/models/([^/]+/[^/]+)", _Handler.info),
    ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", _Handler.info),
    ("GET", r"/api/models/([^/]+/[^/]+)/tree/(.+)", _Handler.tree),
    ("GET HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
]
