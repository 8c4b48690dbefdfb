"""What a GPU machine may lack, found before anything is downloaded or planned; each problem is one line with its fix.

    python launch/planning/checks.py     what `make setup` calls with the system's Python, before it downloads gigabytes

Imports the standard library alone, so that it runs before torch is installed. A run on a machine without a visible GPU
has no problem: it computes on the processor.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_CAPABILITY = 8.0  # sm_80: bfloat16 units and FlashAttention
MIN_DRIVER = {12: 525, 13: 580}  # by CUDA's major version (NVIDIA's table of CUDA Toolkit and minimum driver versions)
LOCKED_CUDA = 13  # of the torch in requirements-gpu.lock
MIN_SHARED_BYTES = 640 << 20  # Ray's object store (launch/runtime/cluster.py) and a reserve
SPARE_BYTES = 1 << 30  # that other processes may use of a GPU: from 20 GiB on, the plan leaves as much free
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, as the driver reports it."""

    index: int
    uuid: str
    name: str
    driver: str  # version
    capability: float  # 8.0 for sm_80
    used_bytes: int  # by all processes
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What `problems` checks of a machine."""

    gpus: tuple[Gpu, ...]  # visible to CUDA (CUDA_VISIBLE_DEVICES)
    has_compiler: bool
    has_python_header: bool
    shared_bytes: int  # free in /dev/shm


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """The installed torch."""

    version: str
    cuda: str | None  # version that it was built for; None: a CPU build
    num_gpus: int  # that it can use


def here() -> Machine:
    """This machine, as nvidia-smi reports it, which creates no CUDA context."""
    return Machine(
        gpus=tuple(_gpus()),
        has_compiler=any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))),
        has_python_header=Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        shared_bytes=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
    )


def _gpus() -> list[Gpu]:
    """The visible GPUs; none if nvidia-smi is absent or fails."""
    capabilities = dict(_ask("index,compute_cap"))  # a query of its own: drivers before 470 reject this field
    found = [
        Gpu(
            index=int(index),
            uuid=uuid,
            name=name,
            driver=driver,
            capability=_number(capabilities.get(index, ""), default=MIN_CAPABILITY),
            used_bytes=int(_number(used)) << 20,
            total_bytes=int(_number(total)) << 20,
        )
        for index, uuid, name, driver, used, total in _ask("index,uuid,name,driver_version,memory.used,memory.total")
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    chosen = [word.strip() for word in visible.split(",") if word.strip()]
    return [gpu for word in chosen for gpu in found if word == str(gpu.index) or gpu.uuid.startswith(word)]


def _ask(fields: str) -> list[list[str]]:
    """The fields of each GPU, as text."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = answer.stdout.splitlines() if answer.returncode == 0 else []
    return [[word.strip() for word in line.split(",")] for line in lines]


def _number(word: str, default: float = 0.0) -> float:
    """A number of nvidia-smi, which writes [N/A] for what it does not know, such as the memory of a MIG instance."""
    try:
        return float(word)
    except ValueError:
        return default


def _build_problems(machine: Machine) -> Iterator[str]:
    """reasoning-gym's pycosat is compiled when it is installed; Triton compiles a launcher at run time."""
    if not machine.has_compiler:
        yield "no C compiler (cc, gcc or clang), which pycosat is built with and Triton needs; install gcc"
    if not machine.has_python_header:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        yield f"Python.h of Python {version} is missing, which pycosat and Triton need; install python{version}-dev"


def problems(machine: Machine, torch: Torch | None, planned_bytes: int | None = None) -> Iterator[str]:
    """Why a set-up, or a run on the machine's GPUs, would fail: one line per problem.

    `torch` is None before it is installed. `planned_bytes` is what the run takes of each GPU; None: all of it.
    """
    if machine.gpus or torch is None:
        yield from _build_problems(machine)
    if not machine.gpus:
        return
    first = machine.gpus[0]
    hide = "or set CUDA_VISIBLE_DEVICES= to run on the processor"
    if torch is not None and torch.cuda is None:
        yield (
            f"nvidia-smi reports {first.name}, but torch {torch.version} is built for CPUs alone; "
            f"run `make clean setup`, {hide}"
        )
    cuda = LOCKED_CUDA if torch is None else int((torch.cuda or "0").split(".")[0])
    needed = MIN_DRIVER.get(cuda, 0)
    if int(first.driver.split(".")[0]) < needed:
        yield f"driver {first.driver} of {first.name} is too old for CUDA {cuda}; update it to {needed}, {hide}"
    elif torch is not None and torch.cuda is not None and not torch.num_gpus:
        yield (
            f"nvidia-smi reports {first.name} (driver {first.driver}), but torch {torch.version} cannot use it; see "
            f"`python -c 'import torch; torch.cuda.init()'`, {hide}"
        )
    for gpu in machine.gpus:
        if gpu.capability < MIN_CAPABILITY:
            yield (
                f"GPU {gpu.index}, {gpu.name}, is sm_{gpu.capability * 10:.0f}; sm_80 or later is needed (bfloat16, "
                f"FlashAttention): choose another with CUDA_VISIBLE_DEVICES, {hide}"
            )
        planned = gpu.total_bytes if planned_bytes is None else planned_bytes
        if planned > gpu.total_bytes > 0:
            yield (
                f"run.gpu_memory_gib={planned / GIB:g} exceeds the {gpu.total_bytes / GIB:.1f} GiB of GPU {gpu.index}, "
                f"{gpu.name}; lower it, or print such a plan with CUDA_VISIBLE_DEVICES= and --dry-run"
            )
        elif gpu.used_bytes + planned > gpu.total_bytes + SPARE_BYTES:
            used, total = gpu.used_bytes / GIB, gpu.total_bytes / GIB
            yield (
                f"GPU {gpu.index}, {gpu.name}, has {used:.1f} of its {total:.1f} GiB in use by other processes "
                "(nvidia-smi names them); end them, choose another with CUDA_VISIBLE_DEVICES, or plan with "
                f"--run.gpu_memory_gib {int(total - used)}"
            )
    if machine.shared_bytes < MIN_SHARED_BYTES:
        yield (
            f"/dev/shm has {machine.shared_bytes >> 20} MiB free, and Ray's object store takes "
            f"{MIN_SHARED_BYTES >> 20}; enlarge it (docker run --shm-size=1g)"
        )


if __name__ == "__main__":
    found = list(problems(here(), None))
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    sys.exit(2 if found else 0)
