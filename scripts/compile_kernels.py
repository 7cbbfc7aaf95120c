"""Compile every kernel to the machine code of GPUs of a compute capability, on a machine with or without one.

    python scripts/compile_kernels.py 90

Triton brings the compiler and the assembler along. Each kernel is compiled for maps of float32, float16 and bfloat16,
with offsets of 32 and of 64 bits; prints how many were, and fails with what the compiler says. Must not run with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from rtdetr_act.kernels import backend

# The package loads Triton only where it has something to run on.
backend.triton, backend.tl, backend.constexpr = triton, tl, tl.constexpr
from rtdetr_act.activations import acon, arelu, dyrelu, frelu, prelu  # noqa: E402
from rtdetr_act.kernels.tiles import TILE, WARPS  # noqa: E402

FLOAT = "*fp32"
# Arguments that are maps have the type of the maps; those of the coefficients and sums float32; all others count.
MAPS = ("x", "y", "grad", "grad_x", "grad_funnel", "attention")
FLOATS = ("alpha", "beta", "sums", "grad_alpha", "grad_beta", "coefficients", "attended", "weight")
Kernel = tuple[Any, dict[str, Any]]


def kernels() -> Iterator[Kernel]:
    """Yield every kernel with its compile-time arguments."""
    limits = {"LOWEST": arelu.ALPHA_MIN, "HIGHEST": arelu.ALPHA_MAX, "BLOCK": arelu.BLOCK}
    yield arelu._forward_kernel, limits
    yield arelu._backward_kernel, limits
    yield arelu._finish_kernel, {**limits, "BLOCK": 1024}
    yield frelu._backward_kernel, {"BLOCK": frelu.BLOCK}
    for wide in (False, True):
        for tile in ({"BLOCK_C": 1, "BLOCK_S": TILE}, {"BLOCK_C": 128, "BLOCK_S": TILE // 128}):
            constants = {**tile, "WIDE": wide}
            yield prelu._backward_kernel, constants
            yield acon._forward_kernel, constants
            yield acon._backward_kernel, constants
            for attends in (False, True):
                yield dyrelu._forward_kernel, {**constants, "K": 2, "ATTENDS": attends}
                yield dyrelu._backward_kernel, {**constants, "K": 2, "ATTENDS": attends}


def compile_all(capability: int) -> int:
    """Compile all kernels for a compute capability, and return how many there were."""
    count = 0
    for kernel, constants in kernels():
        for maps in ("*fp32", "*fp16", "*bf16"):
            kinds = {
                **dict.fromkeys(MAPS, maps),
                **dict.fromkeys(FLOATS, FLOAT),
                **dict.fromkeys(constants, "constexpr"),
            }
            signature = {name: kinds.get(name, "i64" if name == "count" else "i32") for name in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
            if not built.asm["cubin"]:
                raise RuntimeError(f"{kernel.__name__} of {kernel.__module__} became no machine code")
            count += 1
    return count


if __name__ == "__main__":
    print(f"{compile_all(int(sys.argv[1]))} kernels")
