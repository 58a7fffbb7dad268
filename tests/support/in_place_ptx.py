"""Compiles the kernels that write over what they have read, for a GPU that need not be there, and prints their PTX.

A program of its own: where Triton interprets kernels, as in the tests, it cannot compile them.
"""

import itertools
import json
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastwkv.kernels import rwkv4_step, wkv_step
from fastwkv.kernels.config import FP_FUSION

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {"fp32": tl.float32, "bf16": tl.float32, "fp64": tl.float64}  # of a model, and of its sums
POINTWISE: dict[str, Any] = {"BLOCK": wkv_step.BLOCK, "num_warps": 4}
FEW = (1, 5, 50, 64, 200, 768)  # channels: fewer than lanes; a block fewer, as many and more than what a lane reads
STATE = ("num_ptr", "den_ptr", "max_ptr")


def kernels() -> list[tuple[Any, dict[str, Any], dict[str, str]]]:
    """Return kernels, their constants and options, and what is written over by the argument that writes it."""
    step = {f"{field[:-4]}_out_ptr": field for field in STATE}
    found: list[tuple[Any, dict[str, Any], dict[str, str]]] = [
        (rwkv4_step._relu_squared_kernel, POINTWISE, {"x_ptr": "x_ptr"}),
        (rwkv4_step._add_gated_kernel, POINTWISE, {"x_ptr": "x_ptr"}),
        (wkv_step._wkv_step_kernel, POINTWISE | {"C": 50}, step),
    ]
    for C in FEW:
        block = triton.next_power_of_2(C)
        warps = rwkv4_step.norm_warps(block)
        options = {"C": C, "EPS": 1e-5, "BLOCK": block, "num_warps": warps}
        found.append((rwkv4_step._norm_mix_kernel, options, {"before_ptr": "before_ptr"}))
    return found


def compiled(kernel: Any, options: dict[str, Any], element: str, aligned: bool) -> str:
    """Return the PTX of a kernel for a model of this type, all of whose tensors are aligned to 16 bytes or none."""
    constants = {"ACC": TYPES[element], **options}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    sums = {*STATE, *(f"{field[:-4]}_out_ptr" for field in STATE)} if element != "fp64" else set()
    signature = {}
    for name in kernel.arg_names:
        pointer = "*" + ("fp32" if name in sums else element)
        other = "fp32" if name == "factor" else "i32"
        signature[name] = "constexpr" if name in constants else pointer if name.endswith("_ptr") else other
    of_16 = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(signature) if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, constants, of_16 if aligned else {})
    how = {"num_warps": options["num_warps"], "enable_fp_fusion": FP_FUSION}
    return str(triton.compile(source, target=TARGET, options=how).asm["ptx"])


def main() -> None:
    found = []
    for (kernel, options, written), element, aligned in itertools.product(kernels(), TYPES, (True, False)):
        given = [name for name in kernel.arg_names if name not in options and name != "ACC"]
        places = {store: (given.index(store), given.index(load)) for store, load in written.items()}
        channels = options.get("C", "any")
        name = f"{kernel.__name__} {element} C={channels} {'aligned' if aligned else 'unaligned'}"
        found.append({"name": name, "written": places, "ptx": compiled(kernel, options, element, aligned)})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
