"""Compiles every form of the head's Triton kernels for an A100 and an H100/H200, which needs no GPU; run by a test.

A process of its own: where TRITON_INTERPRET is set, @triton.jit makes functions that cannot be compiled.
"""

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from learner.head import triton_backend

STATISTICS = {
    "logits": "*fp32",
    "targets": "*i64",
    "inverses": "*fp32",
    "statistics": "*fp32",
    "rows": "i32",
    "vocab": "i32",
}
WEIGHTS = dict.fromkeys(("logits", "inverses", "highests", "log_others", "means"), "*fp32")
WEIGHTS |= {"targets": "*i64", "vocab": "i32", "softcap": "fp32"}


def compile_for(kernel, signature, constants, capability):
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": triton_backend.WARPS})


for capability in (80, 90):
    for at_one in (False, True):
        constants = {"AT_ONE": at_one, "BLOCK": triton_backend.BLOCK}
        assert "cubin" in compile_for(triton_backend._statistics, STATISTICS, constants, capability).asm
    for dtype, entropy, softcap in itertools.product(("bf16", "fp16", "fp32"), (False, True), (False, True)):
        constants = {
            "SCALE": triton_backend.SCALE,
            "ENTROPY": entropy,
            "SOFTCAP": softcap,
            "BLOCK": triton_backend.BLOCK,
        }
        compiled = compile_for(triton_backend._weights, WEIGHTS | {"out": f"*{dtype}"}, constants, capability)
        assert "cubin" in compiled.asm
        if dtype == "bf16":
            assert "cvt.rn.bf16" in compiled.asm["ptx"], "weights are rounded to the nearest, not truncated"
print("compiled")
