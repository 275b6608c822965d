"""A local server that speaks the Hub's HTTP for models, so that tests use the real client and no network.

As a pytest fixture: `from hub_server import hub`, then `hub.endpoint`, `hub.env`.
From a shell, with the same environment for the client (read when huggingface_hub is imported):

    python tests/hub_server.py --port 8000 --root DIR
    HF_ENDPOINT=http://127.0.0.1:8000 HF_HUB_DISABLE_XET=1 HF_HUB_DISABLE_TELEMETRY=1 lfrns push out/ user/name
"""

import argparse
import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

USER = "tester"
TOKEN = "hf_local_test_token"
LFS_SUFFIXES = (".safetensors", ".bin", ".png")
SHA = re.compile(r"[0-9a-f]{64}")


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind: what happens, to which, how often.

    An integer is answered as the status, as a proxy does it: with a page, not JSON. "cut" closes the connection in the
    middle of an upload or of an answer, "lost" does what was asked and closes it without an answer, "flip" changes a
    bit of the answer, "moved" has somebody else commit first.
    """

    what: int | str
    request: str
    times: int = 1

    def meets(self, request: str) -> bool:
        """Return whether a request, "METHOD /path", is one of those, and count it."""
        if self.times < 1 or not re.search(self.request, request):
            return False
        self.times -= 1
        return True


class Store:
    """Repositories on disk: one JSON per repository (branches, and the files of every commit), blobs by their hash."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        (root / "blobs").mkdir(parents=True, exist_ok=True)

    def read(self, repo: str) -> dict[str, Any] | None:
        """Read a repository, None where there is none."""
        path = self._path(repo)
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, repo: str, state: dict[str, Any]) -> None:
        """Write a repository at once."""
        path = self._path(repo)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(state, indent=1))
        path.with_suffix(".part").replace(path)

    def put(self, content: bytes) -> str:
        """Keep a blob, give its SHA-256."""
        oid = hashlib.sha256(content).hexdigest()
        (self.root / "blobs" / oid).write_bytes(content)
        return oid

    def get(self, oid: str) -> bytes | None:
        """Read a blob."""
        path = self.root / "blobs" / oid
        return path.read_bytes() if SHA.fullmatch(oid) and path.exists() else None

    def add_file(self, content: bytes, lfs: bool) -> dict[str, Any]:
        """Keep a file, and describe it as git and LFS do."""
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"sha256": self.put(content), "git": git, "size": len(content), "lfs": lfs}

    def create(self, repo: str, private: bool) -> None:
        """Make an empty repository with one commit."""
        state = {"private": private, "refs": {}, "commits": {}, "messages": {}}
        state["refs"]["main"] = self.add_commit(state, {}, "initial commit")
        self.write(repo, state)

    @staticmethod
    def add_commit(state: dict[str, Any], files: dict[str, Any], message: str) -> str:
        """Add a commit to a repository's state, give its id."""
        text = json.dumps([sorted(files.items()), len(state["commits"]), message])
        sha = hashlib.sha1(text.encode()).hexdigest()
        state["commits"][sha] = files
        state["messages"][sha] = message
        return sha

    def _path(self, repo: str) -> Path:
        """Place a repository, whatever its name."""
        return self.root / "repos" / (re.sub(r"[^\w.-]", "--", repo) + ".json")


class Handler(BaseHTTPRequestHandler):
    """The routes that huggingface_hub calls to create, upload, list and download."""

    protocol_version = "HTTP/1.1"
    store: Store
    token: str | None = None
    log: list[str]
    faults: list[Fault]
    fault: int | str | None = None

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        """Find the handler of a path."""
        parts = urlsplit(self.path)
        request = f"{method} {parts.path}"
        self.fault = next((fault.what for fault in self.faults if fault.meets(request)), None)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length // 2 if self.fault == "cut" else length)
        self.query = parse_qs(parts.query)
        self.log.append(request)
        if self.fault == "cut" and method in ("POST", "PUT"):
            return self._hang_up()
        if isinstance(self.fault, int):
            headers = {"Retry-After": "1"} if self.fault == 429 else {}
            return self._send(self.fault, b"<html>a page of the proxy</html>", "text/html", headers)
        routes = [
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/collections", self._collection),
            ("POST", r"/api/collections/([^/]+/[^/]+)/items", self._collect),
            ("GET", r"/api/collections/([^/]+/[^/]+)", self._collected),
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/models/(.+?)/preupload/(.+)", self._preupload),
            ("POST", r"/api/models/(.+?)/commit/(.+)", self._commit),
            ("POST", r"/api/models/(.+?)/branch/(.+)", self._branch),
            ("POST", r"/(.+?)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/([0-9a-f]{64})", self._put),
            ("POST", r"/lfs/([0-9a-f]{64})/verify", self._verify),
            ("GET", r"/api/models/(.+?)/tree/([^/]+)(?:/.*)?", self._tree),
            ("GET", r"/api/models/(.+?)/refs", self._refs),
            ("GET", r"/api/models/(.+?)/revision/(.+)", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)", self._info),
            ("GET|HEAD", r"/(.+?)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for methods, pattern, handler in routes:
            match = re.fullmatch(pattern, parts.path)
            if match and method in methods.split("|"):
                if method in ("POST", "PUT") and not self._is_authorised(parts.path):
                    return self._error(401, "Unauthorized", "Invalid credentials in Authorization header")
                with self.store.lock:
                    return handler(*(unquote(group) for group in match.groups()))
        return self._error(404, "EntryNotFound", f"{method} {parts.path} is not served")

    def _is_authorised(self, path: str) -> bool:
        """Ask for the token where something is written; blobs are uploaded by an address that was handed out."""
        by_address = re.fullmatch(r"/lfs/[0-9a-f]{64}", path)
        return not self.token or bool(by_address) or self.headers.get("Authorization") == f"Bearer {self.token}"

    def _hang_up(self) -> None:
        """Close the connection as if the wire were cut."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _create(self) -> None:
        wish = json.loads(self.body)
        repo = f"{wish.get('organization') or USER}/{wish['name'].rpartition('/')[2]}"
        if self.store.read(repo) is not None:
            return self._json({"error": "You already created this model repo", "url": f"{self._base()}/{repo}"}, 409)
        self.store.create(repo, wish.get("visibility") == "private")
        return self._json({"url": f"{self._base()}/{repo}", "name": repo, "id": repo})

    def _collection(self) -> None:
        wish = json.loads(self.body)
        words = re.sub(r"[^a-z0-9]+", "-", wish["title"].lower()).strip("-")
        slug = f"{wish['namespace']}/{words}-{hashlib.sha1(wish['title'].encode()).hexdigest()[:24]}"
        if self.store.read(f"collections/{slug}") is not None:
            return self._json({"error": "This collection already exists", "slug": slug}, 409)
        self.store.write(
            f"collections/{slug}",
            {"slug": slug, "title": wish["title"], "owner": {"name": wish["namespace"]}, "items": [],
             "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "private": wish["private"], "theme": "blue",
             "upvotes": 0, "description": wish.get("description")},
        )  # fmt: skip
        return self._collected(slug)

    def _collect(self, slug: str) -> None:
        state, item = self.store.read(f"collections/{slug}"), json.loads(self.body)["item"]
        if state is None or self.store.read(item["id"]) is None:
            return self._error(404, "EntryNotFound", "no such collection, or no such model")
        if item["id"] in [one["id"] for one in state["items"]]:
            return self._json({"error": "This item is in the collection already"}, 409)
        place = len(state["items"])
        state["items"].append({"_id": str(place), "id": item["id"], "type": item["type"], "position": place})
        self.store.write(f"collections/{slug}", state)
        return self._json(state)

    def _collected(self, slug: str) -> None:
        state = self.store.read(f"collections/{slug}")
        return self._error(404, "EntryNotFound", "no such collection") if state is None else self._json(state)

    def _validate(self) -> None:
        import yaml

        header = json.loads(self.body)["content"].split("---")
        try:
            problem = None if len(header) < 3 or isinstance(yaml.safe_load(header[1]), dict) else "not a mapping"
        except yaml.YAMLError as error:
            problem = str(error)
        if problem:
            return self._json({"errors": [{"message": problem}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def _whoami(self) -> None:
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def _preupload(self, repo: str, revision: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return None
        answer = []
        for file in json.loads(self.body)["files"]:
            known = files.get(file["path"])
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10_000_000 else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if known:
                answer[-1]["oid"] = known["sha256"] if known["lfs"] else known["git"]
        return self._json({"files": answer})

    def _batch(self, repo: str) -> None:
        objects = []
        for wish in json.loads(self.body)["objects"]:
            objects.append({"oid": wish["oid"], "size": wish["size"]})
            if self.store.get(wish["oid"]) is None:
                href = f"{self._base()}/lfs/{wish['oid']}"
                objects[-1]["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "BadRequest", "content does not match its oid")
        self.store.put(self.body)
        return self._json({})

    def _verify(self, oid: str) -> None:
        content = self.store.get(oid)
        if content is None or len(content) != json.loads(self.body)["size"]:
            return self._error(404, "EntryNotFound", "no such object")
        return self._json({})

    def _commit(self, repo: str, revision: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return None
        files, state, message = dict(files), self.store.read(repo), ""
        if self.fault == "moved":
            state["refs"][revision] = self.store.add_commit(state, dict(files), "somebody else's")
            self.store.write(repo, state)
        for line in self.body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                message = value.get("summary", "")
                if value.get("parentCommit") not in (None, self._sha(state, revision)):
                    return self._error(
                        412, "PreconditionFailed", "A commit has happened since. Please refresh and try again."
                    )
            elif kind == "file":
                files[value["path"]] = self.store.add_file(base64.b64decode(value["content"]), lfs=False)
            elif kind == "lfsFile":
                content = self.store.get(value["oid"])
                if content is None:
                    return self._error(400, "BadRequest", f"{value['path']}: its content was not uploaded")
                files[value["path"]] = self.store.add_file(content, lfs=True)
            elif kind == "deletedFile":
                files.pop(value["path"], None)
            elif kind == "deletedFolder":
                files = {name: entry for name, entry in files.items() if not name.startswith(value["path"])}
        sha = self.store.add_commit(state, files, message)
        answer = {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self._base()}/{repo}/commit/{sha}",
            "hookOutput": "",
        }
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in state["refs"])
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self._base()}/{repo}/discussions/{number}"
        state["refs"][revision] = sha
        self.store.write(repo, state)
        return self._json(answer)

    def _branch(self, repo: str, branch: str) -> None:
        state = self.store.read(repo)
        if state is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        if branch.startswith("refs/"):
            return self._error(400, "BadRequest", f"Invalid reference for a branch: {branch}")
        if branch in state["refs"]:
            return self._json({"error": "Reference already exists"}, 409)
        start = self._sha(state, json.loads(self.body or b"{}").get("startingPoint") or "main")
        if start is None:
            return self._error(404, "RevisionNotFound", "Invalid starting point")
        state["refs"][branch] = start
        self.store.write(repo, state)
        return self._json({})

    def _refs(self, repo: str) -> None:
        state = self.store.read(repo)
        if state is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in state["refs"].items()
            if not name.startswith("refs/")
        ]
        return self._json({"branches": branches, "tags": [], "converts": []})

    def _info(self, repo: str, revision: str = "main") -> None:
        files = self._files(repo, revision)
        if files is None:
            return None
        state = self.store.read(repo)
        siblings = [{"rfilename": name, "size": entry["size"], "blobId": entry["git"]} for name, entry in files.items()]
        return self._json(
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": self._sha(state, revision),
                "private": state["private"],
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _tree(self, repo: str, revision: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return None
        tree = []
        for name, entry in files.items():
            tree.append({"type": "file", "path": name, "size": entry["size"], "oid": entry["git"]})
            if entry["lfs"]:
                tree[-1]["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 130}
        return self._json(tree)

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return None
        sha = self._sha(self.store.read(repo), revision)
        entry = files.get(name)
        if entry is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        content = self.store.get(entry["sha256"])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["git"]}"', "Accept-Ranges": "bytes"}
        if entry["lfs"]:
            headers |= {"X-Linked-Etag": f'"{entry["sha256"]}"', "X-Linked-Size": str(entry["size"])}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            return self._send(200, content, "application/octet-stream", headers)
        first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        if first >= len(content):
            return self._send(416, b"", "application/octet-stream", headers)
        return self._send(206, content[first : last + 1], "application/octet-stream", headers)

    def _files(self, repo: str, revision: str) -> dict[str, Any] | None:
        """Return the files of a revision; otherwise answer with the error and give None."""
        state = self.store.read(repo)
        if state is None or (state["private"] and not self._is_authorised(self.path)):
            self._error(404, "RepoNotFound", "Repository not found")
            return None
        sha = self._sha(state, revision)
        if sha is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return state["commits"][sha]

    @staticmethod
    def _sha(state: dict[str, Any], revision: str) -> str | None:
        """Find the commit of a branch or commit id."""
        return state["refs"].get(revision) or (revision if revision in state["commits"] else None)

    def _base(self) -> str:
        """Return the address under which the client sees this server."""
        return f"http://{self.headers['Host']}"

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), "application/json", headers)

    def _json(self, value: Any, status: int = 200, kind: str = "application/json") -> None:
        self._send(status, json.dumps(value).encode(), kind, {})

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        if self.fault == "lost":
            return self._hang_up()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        half = len(content) // 2
        if self.fault == "flip":
            content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        if self.command != "HEAD":
            self.wfile.write(content[:half] if self.fault == "cut" else content)
        if self.fault == "cut":
            self._hang_up()
        return None

    def log_message(self, *args: Any) -> None:
        """Stay silent; `log` holds the requests."""


class Hub:
    """A running server: where it is, what the client's environment must hold, what it was asked, what goes wrong."""

    def __init__(self, server: ThreadingHTTPServer, store: Store, log: list[str], faults: list[Fault]) -> None:
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        self.store = store
        self.log = log
        self.faults = faults
        self.env = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(store.root / "home"),
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Read what a repository holds."""
        state = self.store.read(repo)
        return {n: self.store.get(e["sha256"]) for n, e in state["commits"][state["refs"][revision]].items()}

    def collections(self) -> dict[str, list[str]]:
        """Read the models of every collection, by its title."""
        states = [json.loads(path.read_text()) for path in self.store.root.glob("repos/collections--*.json")]
        return {state["title"]: [item["id"] for item in state["items"]] for state in states}

    def write(self, repo: str, name: str, content: bytes, revision: str = "main") -> None:
        """Commit one file as somebody in a browser does; b"" deletes it."""
        state = self.store.read(repo)
        files = dict(state["commits"][state["refs"][revision]])
        files.pop(name, None)
        if content:
            files[name] = self.store.add_file(content, name.endswith(LFS_SUFFIXES))
        state["refs"][revision] = self.store.add_commit(state, files, f"Edit {name}")
        self.store.write(repo, state)


def make_server(root: Path, port: int = 0, token: str | None = None) -> tuple[ThreadingHTTPServer, Hub]:
    """Build a server on the loopback address; port 0 takes a free one."""
    store, log, faults = Store(Path(root)), [], []
    handler = type("BoundHandler", (Handler,), {"store": store, "token": token, "log": log, "faults": faults})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    return server, Hub(server, store, log, faults)


@contextmanager
def serve(root: Path, token: str | None = TOKEN) -> Iterator[Hub]:
    """Run a server in a thread while the block lasts."""
    server, hub = make_server(root, token=token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A fresh local Hub; writing asks for hub_server.TOKEN."""
    with serve(tmp_path / "hub") as running:
        yield running


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--token", default=None, help="asked for where something is written (default: nobody is asked)")
    options = parser.parse_args()
    running_server, running_hub = make_server(options.root, options.port, options.token)
    print(running_hub.endpoint, flush=True)
    try:
        running_server.serve_forever()
    except KeyboardInterrupt:
        running_server.server_close()
