"""The report of running jobs on loopback: made anew when their files change, and loaded anew by the page."""

import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common.types import UserError

FILES = ("config.toml", "metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl")


def fingerprint(folders: Sequence[Path]) -> str:
    """Changes when a file that the report is made of has changed: sizes and times of all of them."""
    found = [folder / name for folder in folders for name in FILES]
    marks = [(path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None for path in found]
    return f"{hash(tuple(marks)) & (2**64 - 1):016x}"


class Server(ThreadingHTTPServer):
    """Serves / (the report) and /version (its fingerprint) on 127.0.0.1, and nothing else."""

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], render: Callable[[str], str], port: int) -> None:
        self.folders = folders
        self.render = render
        self.made_of = ""
        self.html = b""
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)

    def page(self) -> bytes:
        """The report of the files as they are now."""
        with self.lock:  # two open pages are one rendering
            current = fingerprint(self.folders)
            if current != self.made_of:
                self.html = self.render(current).encode("utf-8", errors="replace")
                self.made_of = current
            return self.html


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        allowed = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}
        if self.headers.get("Host") not in allowed:  # a foreign name that resolves to this machine
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            try:
                self._answer("text/html; charset=utf-8", self.server.page())
            except UserError as error:
                self._answer("text/plain; charset=utf-8", str(error).encode(), HTTPStatus.INTERNAL_SERVER_ERROR)
        elif self.path == "/version":
            self._answer("text/plain; charset=utf-8", fingerprint(self.server.folders).encode())
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, kind: str, body: bytes, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a page that asks every two seconds would fill the terminal."""


def serve(folders: Sequence[Path], render: Callable[[str], str], port: int) -> None:
    """Serve until Ctrl-C. Raises UserError if the port is taken."""
    try:
        server = Server(folders, render, port)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--watch {port} cannot be served ({error}); name another port, or 0 for any free one"
        ) from None
    with server:
        print(f"watching on http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
