"""The report of running jobs on loopback: rendered again when their files change, and reloaded by the page."""

import threading
from collections.abc import Callable, Sequence
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common.types import UserError
from launch.reporting.data.runs import FILES, expanded

NAMES = ("127.0.0.1", "localhost")
FAILED = (
    '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="2"><title>Horizon report</title><p>{}'
)


def fingerprint(folders: Sequence[Path]) -> str:
    """Of the sizes and times of all files that the report is made from: changes when one of them has changed."""
    files = [folder / name for folder in expanded(folders) for name in FILES]
    marks = [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return f"{hash(tuple(marks)) & (2**64 - 1):016x}"


class Server(ThreadingHTTPServer):
    """Serves / (the report) and /version (its fingerprint) on 127.0.0.1, and nothing else."""

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], render: Callable[[], str], port: int) -> None:
        self.folders = folders
        self.render = render
        self.made = "", ""  # the newest page's version, and the page
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)

    def page(self) -> str:
        """The report of the files as they are now. Raises UserError or OSError if rendering fails."""
        with self.lock:  # two open pages share one rendering
            version = fingerprint(self.folders)
            if version != self.made[0]:
                page = self.render().replace("<body>", f'<body data-version="{version}">', 1)  # which the page polls
                self.made = version, page
            return self.made[1]


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
                page, status = FAILED.format(escape(str(error))), HTTPStatus.INTERNAL_SERVER_ERROR
            self._answer("text/html; charset=utf-8", page, status)
        elif self.path == "/version":
            self._answer("text/plain; charset=utf-8", fingerprint(self.server.folders))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, kind: str, text: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        body = text.encode("utf-8", errors="replace")
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
