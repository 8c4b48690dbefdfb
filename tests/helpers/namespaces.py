"""Two Ray nodes on one machine: a raylet in each of two network namespaces, which a virtual cable (veth) joins.

A node has an address of its own, and of the disk what the other one lends it: `hidden` folders are empty on the second.
Needs Linux, root and iproute2.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.process import child

ADDRESSES = ("10.77.0.1", "10.77.0.2")
JOB_SERVER = f"http://{ADDRESSES[0]}:8265"
GCS = f"{ADDRESSES[0]}:6399"
# `ray start` gives up after 30 s, which a machine with other work may need.
ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Two nodes of one Ray cluster; the first has its head and its job server."""

    namespaces: tuple[str, str]
    environment: dict[str, str]  # of both nodes, the cluster's token included
    folder: Path  # of the first node's Ray
    hidden: tuple[Path, ...]  # from the second one

    def start(self, index: int) -> None:
        """Start a node's raylet; returns when it runs."""
        if index == 0:
            head = [f"--port={GCS.rpartition(':')[2]}", f"--dashboard-host={ADDRESSES[0]}"]
            _start(self, 0, ["--head", *head, "--ray-client-server-port=8077"], hidden=())
        else:
            _start(self, index, [f"--address={GCS}"], hidden=[self.folder, *self.hidden])

    def stop(self, index: int) -> None:
        """Kill every process of a node."""
        _kill(self.namespaces[index])

    def begin(self, *command: str, output: Path) -> subprocess.Popen[bytes]:
        """Start a command on the first node, which writes to the file `output`."""
        command = ("ip", "netns", "exec", self.namespaces[0], *command)
        with output.open("wb") as written:
            return child(command, env=self.environment, stdout=written, stderr=written)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end on the first node, as a user there would; stdout has its stderr, too."""
        return subprocess.run(
            ["ip", "netns", "exec", self.namespaces[0], *command],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )


def missing() -> str | None:
    """Why no namespace can be made here, or None."""
    if shutil.which("ip") is None:
        return "ip (iproute2) is not installed"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_namespace("probe"))
        except subprocess.CalledProcessError as error:
            return f"no network namespace can be made: {error.stderr.strip()}"
    return None


@contextlib.contextmanager
def two_nodes(hidden: Sequence[Path]) -> Iterator[Nodes]:
    """A Ray cluster of two nodes with a processor each and token authentication; nothing of it outlives the block."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="hz"))  # short: the paths of sockets are limited
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        names = stack.enter_context(_namespace("1")), stack.enter_context(_namespace("2"))
        _join(names)
        nodes = Nodes(namespaces=names, environment=_environment(folder), folder=folder, hidden=tuple(hidden))
        for index in range(2):
            nodes.start(index)
        yield nodes


@contextlib.contextmanager
def _namespace(name: str) -> Iterator[str]:
    """A network namespace with a name of its own; every process in it is killed at the end."""
    name = f"horizon-{os.getpid()}-{name}"
    _ip("netns", "add", name)
    try:
        yield name
    finally:
        _kill(name)
        _ip("netns", "delete", name)


def _kill(name: str) -> None:
    """Kill every process in a namespace; returns when they are gone."""
    while pids := _ip("netns", "pids", name).split():
        for pid in map(int, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _join(names: tuple[str, str]) -> None:
    _ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
    for name, address in zip(names, ADDRESSES, strict=True):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
        for device in ("lo", "veth0"):
            _ip("-n", name, "link", "set", device, "up")


def _environment(folder: Path) -> dict[str, str]:
    """Without any other Ray's settings; the job's `python` is the one that runs the tests."""
    others = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return others | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }


def _start(nodes: Nodes, index: int, options: list[str], hidden: Sequence[Path]) -> None:
    """What is mounted over a hidden folder ends with the node's processes."""
    mount = 'for folder in $0; do mount -t tmpfs none "$folder" || exit; done; exec "$@"'
    command = ["ip", "netns", "exec", nodes.namespaces[index], "sh", "-c", mount, " ".join(map(str, hidden))]
    command += ["ray", "start", "--block", f"--node-ip-address={ADDRESSES[index]}", "--num-cpus=1"]
    command += ["--num-gpus=0", "--object-store-memory=200000000", *options]
    log = nodes.folder / f"node-{index}.log"
    for _ in range(ATTEMPTS):
        with log.open("w") as output:
            process = child(command, env=nodes.environment, cwd="/", stdout=output, stderr=output)
        while process.poll() is None:
            if "Ray runtime started" in log.read_text():
                return
            time.sleep(0.2)
    raise RuntimeError(f"node {index} did not start: {log.read_text()}")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
