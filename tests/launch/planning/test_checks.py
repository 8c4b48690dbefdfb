"""What a GPU machine may lack: each trap, and the line that its user sees."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.planning import checks
from launch.planning.checks import GIB, Gpu, Machine, Torch

ROOT = Path(__file__).resolve().parents[3]
A100 = Gpu(
    index=0,
    uuid="GPU-6f1c",
    name="NVIDIA A100-SXM4-40GB",
    driver="580.65.06",
    capability=8.0,
    used_bytes=0,
    total_bytes=40 * GIB,
)
SOUND = Machine(gpus=(A100,), has_compiler=True, has_python_header=True, shared_bytes=8 * GIB)
TORCH = Torch(version="2.13.0+cu130", cuda="13.0", num_gpus=1)


def with_gpu(**changes) -> Machine:
    return replace(SOUND, gpus=(replace(A100, **changes),))


TRAPS = {
    "driver too old": (
        with_gpu(driver="550.54.14"),
        replace(TORCH, num_gpus=0),
        "driver 550.54.14 of NVIDIA A100-SXM4-40GB is too old for CUDA 13; update it to 580",
    ),
    "driver too old, before torch is there": (with_gpu(driver="550.54.14"), None, "is too old for CUDA 13"),
    "a CPU build of torch": (SOUND, Torch(version="2.13.0+cpu", cuda=None, num_gpus=0), "is built for CPUs alone"),
    "torch cannot use it": (SOUND, replace(TORCH, num_gpus=0), "torch 2.13.0+cu130 cannot use it"),
    "an old GPU": (with_gpu(capability=7.5, name="T4"), TORCH, "GPU 0, T4, is sm_75; sm_80 or later is needed"),
    "memory in use": (
        with_gpu(used_bytes=13 * GIB),
        TORCH,
        "13.0 of its 40.0 GiB in use by other processes (nvidia-smi names them); end them, choose another with "
        "CUDA_VISIBLE_DEVICES, or plan with --run.gpu_memory_gib 27",
    ),
    "no compiler": (replace(SOUND, has_compiler=False), TORCH, "no C compiler (cc, gcc or clang)"),
    "no header": (replace(SOUND, has_python_header=False), None, "Python.h of Python 3."),
    "little shared memory": (replace(SOUND, shared_bytes=64 << 20), TORCH, "/dev/shm has 64 MiB free"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_one_line(trap: str) -> None:
    machine, torch, words = TRAPS[trap]
    [line] = checks.problems(machine, torch)
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize("torch", [TORCH, None])
def test_a_sound_machine_has_no_problem(torch) -> None:
    assert not list(checks.problems(SOUND, torch))


def test_without_a_gpu_only_the_set_up_needs_a_compiler() -> None:
    bare = Machine(gpus=(), has_compiler=False, has_python_header=False, shared_bytes=0)
    assert not list(checks.problems(bare, Torch(version="2.13.0+cpu", cuda=None, num_gpus=0)))
    compiler, header = checks.problems(bare, None)
    assert "pycosat" in compiler and "Python.h" in header


def test_memory_is_held_against_what_is_planned() -> None:
    shared = with_gpu(used_bytes=13 * GIB)
    assert not list(checks.problems(shared, TORCH, 27 * GIB))
    assert not list(checks.problems(shared, TORCH, 28 * GIB)), "a gibibyte less than planned: the plan has it to spare"
    assert list(checks.problems(shared, TORCH, 29 * GIB))
    assert not list(checks.problems(with_gpu(used_bytes=GIB), TORCH)), "what a desktop takes"
    [line] = checks.problems(SOUND, TORCH, 41 * GIB)
    assert line.startswith("run.gpu_memory_gib=41 exceeds the 40.0 GiB of GPU 0, NVIDIA A100-SXM4-40GB; lower it")


SMI = """#!/bin/sh
case "$1" in
*compute_cap*) echo '0, {capability}'; echo '1, 9.0' ;;
*) echo '0, GPU-6f1c, NVIDIA T4, 550.54.14, 312, 15360'; echo '1, GPU-77ab, NVIDIA H100, 550.54.14, [N/A], [N/A]' ;;
esac
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A driver's tool that reports two GPUs."""
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir()
    path.write_text(SMI.replace("{capability}", "7.5"))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_drivers_report_is_read(smi, monkeypatch) -> None:
    first, second = checks.here().gpus
    assert (first.name, first.driver, first.capability) == ("NVIDIA T4", "550.54.14", 7.5)
    assert (first.used_bytes, first.total_bytes) == (312 << 20, 15360 << 20)
    assert (second.capability, second.total_bytes) == (9.0, 0)
    for visible, expected in (("1", [second]), ("GPU-6f", [first]), ("1,0", [second, first]), ("", []), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert list(checks.here().gpus) == expected


def test_a_run_is_refused_with_status_2_and_one_line(smi, tmp_path) -> None:
    """As `make run` begins: a machine whose GPU this environment's torch cannot use."""
    command = [sys.executable, "launch/run.py", "--dry-run", "--run.dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("nvidia-smi reports NVIDIA T4, but torch")


def test_set_up_is_refused_by_any_python(smi) -> None:
    """-I -S: nothing but the standard library."""
    done = subprocess.run([sys.executable, "-I", "-S", "launch/planning/checks.py"], cwd=ROOT, capture_output=True)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert lines[0].startswith("driver 550.54.14 of NVIDIA T4 is too old for CUDA 13")
    assert any("sm_75" in line for line in lines)
