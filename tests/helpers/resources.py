"""What the processes of a run hold: memory, descriptors, threads, shared-memory segments, listening sockets."""

import contextlib
import csv
import os
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import psutil
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

SEGMENTS = "/dev/shm/"
ROLES = ("driver", "learner", "actor", "reward", "ray")
MIB = 2**20

Sample = dict[str, float]


def processes() -> list[psutil.Process]:
    """This process and all its descendants; a Ray that it started is among them."""
    driver = psutil.Process()
    return [driver, *driver.children(recursive=True)]


def title(process: psutil.Process) -> str:
    """The command without its options, which Ray's have many of."""
    return " ".join(process.cmdline()).partition(" --")[0].strip() or process.name()


def role(process: psutil.Process) -> str:
    if process.pid == os.getpid():
        return "driver"
    signs = {"ray::Learner": "learner", "ray::Actor": "actor", "reward_pool": "reward"}
    return next((name for sign, name in signs.items() if sign in title(process)), "ray")


def sample() -> Sample:
    """Private memory (MiB), descriptors and threads of each role; processes, segments and Ray's object store."""
    taken: Sample = dict.fromkeys(
        [f"{what} {name}" for name in ROLES for what in ("MiB", "descriptors", "threads")], 0.0
    )
    found = processes()
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            name = role(process)
            taken[f"MiB {name}"] += process.memory_full_info().uss / MIB
            taken[f"descriptors {name}"] += process.num_fds()
            taken[f"threads {name}"] += process.num_threads()
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    stats = get_memory_info_reply(state).store_stats
    return taken | {
        "processes": float(len(found)),
        "segments": float(len(held())),
        "MiB object store": stats.object_store_bytes_used / MIB,
        "objects": float(stats.num_local_objects),
    }


def held() -> set[str]:
    """Shared-memory segments that the processes of the run map."""
    return set().union(*map(_mapped, processes()))


def orphans() -> set[str]:
    """Shared-memory segments of this machine that no process maps."""
    return {SEGMENTS + name for name in os.listdir(SEGMENTS)} - set().union(*map(_mapped, psutil.process_iter()))


def _mapped(process: psutil.Process) -> set[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return {each.path for each in process.memory_maps(grouped=True) if each.path.startswith(SEGMENTS)}
    return set()


def slope(values: np.ndarray) -> float:
    """Theil and Sen's: the median of the slopes between any two of the values, per value."""
    first, second = np.triu_indices(len(values), 1)
    return float(np.median((values[second] - values[first]) / (second - first)))


def growth(samples: list[Sample], name: str) -> float:
    """How much a value has grown in the last three quarters of the samples, by their slope."""
    values = np.array([each[name] for each in samples[len(samples) // 4 :]])
    return slope(values) * (len(values) - 1)


def listening() -> Iterator[tuple[str, str, int]]:
    """Title, address and port of each TCP socket that one of the processes listens at."""
    for process in processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    yield title(process), connection.laddr.ip, connection.laddr.port


def is_loopback(address: str) -> bool:
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def save(samples: list[Sample], folder: Path, name: str) -> None:
    """The samples as NAME.csv, and their curves as NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(samples[0]))
        writer.writeheader()
        writer.writerows(samples)
    figure, axes = plt.subplots(2, 2, figsize=(12, 8))
    for ax, kind in zip(axes.flat, ("MiB", "descriptors", "threads", ""), strict=True):
        for column in samples[0]:
            first, _, rest = column.partition(" ")
            if (first == kind) if kind else first not in ("MiB", "descriptors", "threads", "step"):
                ax.plot([each["step"] for each in samples], [each[column] for each in samples], label=rest or first)
        ax.set(xlabel="step", ylabel=kind or "number")
        ax.set_ylim(bottom=0)
        ax.legend()
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=100)
    plt.close(figure)
