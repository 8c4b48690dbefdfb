"""The report of running jobs on loopback: rendered again when their files change, and reloaded by the page."""

import sys
import threading
from collections.abc import Callable, Sequence
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common.types import UserError
from launch.reporting.data.runs import expanded

NAMES = ("127.0.0.1", "localhost")
FAILED = (
    '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="2"><title>Horizon report</title><p>{}'
)
FILES = ("config.toml", "metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl")


def fingerprint(folders: Sequence[Path]) -> str:
    """Of the sizes and times of all files that the report is made from: changes when one of them has changed."""
    marks = [(str(path), *_mark(path)) for folder in expanded(folders) for name in FILES for path in [folder / name]]
    return f"{hash(tuple(marks)) & (2**64 - 1):016x}"


def _mark(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


class Server(ThreadingHTTPServer):
    """Serves / (the report) and /version (its fingerprint) on 127.0.0.1, and nothing else."""

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], render: Callable[[], str], port: int) -> None:
        self.folders = folders
        self.render = render
        self.made = "", b""  # the newest page's version, and the page
        self.failed_of = ""  # the last version that could not be rendered
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)

    def page(self) -> bytes:
        """The report of the files as they are now; the last good one during another rendering, or if that fails.

        Raises UserError or OSError if there is none yet and rendering fails.
        """
        if not self.lock.acquire(blocking=not self.made[1]):  # two open pages share one rendering
            return self.made[1]
        try:
            current = fingerprint(self.folders)
            if current != self.made[0]:
                self._make(current)
            return self.made[1]
        finally:
            self.lock.release()

    def _make(self, version: str) -> None:
        try:
            page = self.render().replace("<body>", f'<body data-version="{version}">', 1)  # which the page polls
            self.made = version, page.encode("utf-8", errors="replace")
        except (UserError, OSError) as error:
            if version != self.failed_of:
                print(f"the last report is kept: {error}", file=sys.stderr, flush=True)
            self.failed_of = version
            if not self.made[1]:
                raise

    def version(self) -> str:
        """The version of the page to load: the last good one's during another rendering, or if that failed."""
        current = fingerprint(self.folders)
        stays = self.made[1] and (self.lock.locked() or current == self.failed_of)
        return self.made[0] if stays else current


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        # A foreign name may resolve to this machine. The port may differ: that of a tunnel's other end.
        if (self.headers.get("Host") or "").partition(":")[0].lower() not in NAMES:
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            try:
                page, status = self.server.page(), HTTPStatus.OK
            except (UserError, OSError) as error:
                page = FAILED.format(escape(str(error))).encode("utf-8", errors="replace")
                status = HTTPStatus.INTERNAL_SERVER_ERROR
            self._answer("text/html; charset=utf-8", page, status)
        elif self.path == "/version":
            self._answer("text/plain; charset=utf-8", self.server.version().encode())
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
        """Nothing: a page that polls every two seconds would fill the terminal."""


def serve(folders: Sequence[Path], render: Callable[[], str], port: int) -> None:
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
