"""Compiles every variant of the head's Triton kernels for an A100 and an H100/H200, without a GPU, and prints what each
takes of a multiprocessor, so that a bad block size shows.

A test runs it in a process of its own, because with TRITON_INTERPRET set @triton.jit makes functions that cannot be
compiled.
"""

import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from learner.head import triton_backend

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
REGISTERS = 65536  # of a multiprocessor
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10}
MIN_THREADS = 512  # of 2048: a quarter hides the memory's latency, as each thread has 16 loads in flight

STATISTICS = {
    "logits": "*fp32",
    "targets": "*i64",
    "inverse": "fp32",
    "statistics": "*fp32",
    "rows": "i32",
    "vocab": "i32",
}
WEIGHTS = dict.fromkeys(("logits", "highests", "log_others", "means"), "*fp32")
WEIGHTS |= {"targets": "*i64", "vocab": "i32", "inverse": "fp32", "softcap": "fp32"}


def compile_for(kernel, signature, constants, capability):
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": triton_backend.WARPS})


def resources(cubin: bytes) -> dict[str, int]:
    """REG, SHARED and STACK (bytes of spilled registers) of a kernel, as NVIDIA's cuobjdump reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED):(\d+)", output)}


def check(name: str, compiled, capability: int) -> None:
    """Assert that no register is spilled, and that enough threads fit on a multiprocessor to keep its memory busy."""
    used = resources(compiled.asm["cubin"])
    threads = 32 * triton_backend.WARPS
    registers = -(-used["REG"] // 8) * 8 * threads  # allocated in steps of 8 per thread
    resident = (
        min(2048 // threads, REGISTERS // registers, SHARED_BYTES[capability] // max(1, used["SHARED"])) * threads
    )
    print(f"sm_{capability} {name:40} {used['REG']:4} registers, {used['SHARED']:5} B shared, {resident:5} threads")
    assert used["STACK"] == 0, f"{name} spills {used['STACK']} bytes per thread on sm_{capability}"
    assert resident >= MIN_THREADS, f"{name}: {resident} threads fit on a multiprocessor of sm_{capability}"


for capability in (80, 90):
    for at_one in (False, True):
        constants = {"AT_ONE": at_one, "BLOCK": triton_backend.BLOCK}
        compiled = compile_for(triton_backend._statistics, STATISTICS, constants, capability)
        check(f"statistics at_one={at_one}", compiled, capability)
    for dtype, entropy, softcap in itertools.product(("bf16", "fp16", "fp32"), (False, True), (False, True)):
        constants = {"SCALE": triton_backend.SCALE, "BLOCK": triton_backend.BLOCK}
        constants |= {"ENTROPY": entropy, "SOFTCAP": softcap}
        compiled = compile_for(triton_backend._weights, WEIGHTS | {"out": f"*{dtype}"}, constants, capability)
        check(f"weights {dtype} entropy={entropy} softcap={softcap}", compiled, capability)
        if dtype == "bf16":
            assert "cvt.rn.bf16" in compiled.asm["ptx"], "weights are rounded to the nearest, not truncated"
print("compiled")
