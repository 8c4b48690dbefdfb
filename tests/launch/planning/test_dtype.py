"""model.dtype = auto: bfloat16 where the device computes in it, float32 elsewhere."""

import pytest

from common.config import Config, with_values
from launch.planning import memory_fit
from launch.planning.devices import Gpu
from launch.run import main

AVX2 = "processor\t: 0\nflags\t\t: fpu sse2 avx2 fma\nbugs\t\t: spectre_v1\n\nprocessor\t: 1\nflags\t\t: avx512_bf16\n"
CPUS = [
    (AVX2, "float32", "none of amx_bf16, avx512_bf16, bf16"),
    ("processor\t: 0\nflags\t\t: avx2 avx512f avx512_bf16\n", "bfloat16", "has avx512_bf16"),
    ("processor\t: 0\nflags\t\t: avx512f amx_bf16 amx_tile\n", "bfloat16", "has amx_bf16"),
    ("processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd bf16\n", "bfloat16", "has bf16"),
    ("processor\t: 0\nFeatures\t: fp asimd\n", "float32", "none of"),
]


@pytest.mark.parametrize(("cpuinfo", "expected", "words"), CPUS)
def test_a_processor_gets_what_it_computes_in(cpuinfo, expected, words, tmp_path, monkeypatch) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    flags = memory_fit.cpu_flags(path)
    monkeypatch.setattr(memory_fit, "cpu_flags", lambda: flags)
    chosen, reason = memory_fit.dtype(Config())
    assert chosen == expected
    assert words in reason


def test_a_system_without_cpuinfo_gets_float32(tmp_path) -> None:
    assert memory_fit.cpu_flags(tmp_path / "absent") == set()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_gpu_gets_bfloat16_from_sm_80_on(capability, expected) -> None:
    """The weakest of the GPUs decides."""
    newer, this = (Gpu(name="a GPU", capability=each, total_bytes=1) for each in ((12, 0), capability))
    chosen, reason = memory_fit.dtype(Config(), [newer, this])
    assert chosen == expected
    assert reason.startswith(f"a GPU is sm_{capability[0]}{capability[1]}")


@pytest.mark.parametrize("flags", [set(), {"avx512_bf16"}])
def test_what_is_set_stays(flags, monkeypatch) -> None:
    monkeypatch.setattr(memory_fit, "cpu_flags", lambda: flags)
    for name in ("bfloat16", "float32"):
        config = with_values(Config(), {"model.dtype": name})
        assert memory_fit.dtype(config) == (name, "as set")


def test_a_dry_run_prints_the_dtype_and_why(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(memory_fit, "cpu_flags", lambda: {"avx2"})
    assert main(["--run.dir", str(tmp_path / "run"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert 'dtype = "float32"' in printed
    assert "# model.dtype=float32: the processor has none of" in printed
