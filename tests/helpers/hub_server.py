"""Stands in for the hub's HTTP interface: who am I, repositories, uploads (git and LFS), commits."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

TOKEN = "hf_standInToken0123456789"


class Hub:
    """What the server was sent: repositories with their files and commits. `refuse` maps a path to a status."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict] = {}  # name -> what it was made with
        self.private: set[str] = set()
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.requests: list[tuple[str, str]] = []  # method, path
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.refuse: dict[str, int] = {}
        self.address = ""

    def answer(self, method: str, path: str, body: bytes) -> dict:
        if path == "/api/whoami-v2":
            return {"name": "ada", "orgs": []}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization'] or 'ada'}/{made['name']}"
            self.repositories[name] = made
            self.files.setdefault(name, {})
            return {"url": f"{self.address}/{name}", "name": name, "id": name}
        if method == "PUT":
            self.objects[path.removeprefix("/lfs/")] = body
            return {}
        name = "/".join(path.removeprefix("/api/models/").removeprefix("/").split("/")[:2]).removesuffix(".git")
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in files]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {"transfer": "basic", "objects": [self.place(each) for each in objects]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                self.commit(name, line["key"], line["value"])
            return {"commitUrl": f"{self.address}/{name}/commit/0", "commitOid": "0" * 40}
        return {"id": name, "private": name in self.private, "siblings": []} if name in self.repositories else {}

    def place(self, wanted: dict) -> dict:
        return {**wanted, "actions": {"upload": {"href": f"{self.address}/lfs/{wanted['oid']}"}}}

    def commit(self, name: str, key: str, value: dict) -> None:
        if key == "header":
            self.commits.append(value["summary"])
        elif key == "file":
            self.files[name][value["path"]] = base64.b64decode(value["content"])
        else:
            content = self.objects[value["oid"]]
            assert hashlib.sha256(content).hexdigest() == value["oid"]
            self.files[name][value["path"]] = content


def mode(file: dict) -> str:
    return "lfs" if file["path"].endswith(".safetensors") else "regular"


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            path = self.path.split("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self.chunks()
            hub.requests.append((self.command, path))
            known = self.command == "PUT" or self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status = hub.refuse.get(path, 200 if known else 401)
            found = hub.answer(self.command, path, body) if status == 200 else {"error": "the stand-in refuses"}
            content = json.dumps(found).encode()
            missing = found == {} and self.command == "GET"
            self.send_response(404 if missing else status)
            if missing:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            return body

        def log_message(self, *_: object) -> None:
            """Nothing: the test's output is what it is about."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def connect(monkeypatch: pytest.MonkeyPatch, address: str, token: str = TOKEN) -> None:
    """Let huggingface_hub, which reads its environment once, use this hub; without Xet, which is another protocol."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", token)
