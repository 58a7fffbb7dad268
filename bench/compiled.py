"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory, special functions.

Each kernel is compiled to machine code for the named targets, in every dtype and with the optional arguments that give
it its variants. Instructions, and the special functions among them (exponentials, reciprocals, roots), are counted in
the main loop, a lane for one token of one channel; in float64 special functions are made of ordinary arithmetic too.
A spill is an error: exit 1.
"""

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

try:
    import triton
    import triton.language as tl
    from command_line import Parser, names, positive
    from tqdm import tqdm
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:
    sys.exit(f"compiled.py: {error}; pip install -e '.[bench]' installs what it needs (Triton on Linux only)")

from fastwkv.kernels import linear_scan, linear_scan_bwd, linear_scan_step, wkv, wkv_bwd, wkv_step
from fastwkv.kernels.config import (
    BACKWARD_ROWS,
    CHECKPOINT_ROWS,
    FP_FUSION,
    SCAN_BACKWARD_ROWS,
    SCAN_ROWS,
    scan_launch,
    wkv_launch,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float64": "fp64",
    "complex64": "fp32",
    "complex128": "fp64",
}
COMPLEX = {"complex64": "float32", "complex128": "float64"}  # and what they are made of
SPECIAL = re.compile(r"\bMUFU\.(?:EX2|RCP|RCP64H|RSQ|LG2)|\bv_(?:exp|rcp|rsq|log)_f(?:32|64)")
STREAMS = {"k_ptr", "v_ptr", "y_ptr", "gy_ptr", "gk_ptr", "gv_ptr"}  # stored in the dtype of the model
STREAMS |= {"a_ptr", "x_ptr", "h_ptr", "gh_ptr", "ga_ptr", "gx_ptr"}
OPTIONAL = {"initial_ptr", "carry_ptr", "edge_ptr", "checkpoint_ptr", "gfinal_ptr", "ginitial_ptr", "entry_ptr"}
STATES = {"initial_ptr", "gfinal_ptr", "ginitial_ptr", "entry_ptr"}
BLOCKS = {wkv_step._wkv_step_kernel: wkv_step.BLOCK, linear_scan_step._linear_scan_step_kernel: linear_scan_step.BLOCK}


@dataclass(frozen=True)
class Variant:
    """A kernel, the optional arguments that it is given, and the constants that it is compiled for."""

    name: str
    kernel: Any
    rows: int  # tokens in the main loop
    absent: frozenset[str]
    constants: dict[str, Any]

    @property
    def streams(self) -> bool:
        """Whether the kernel reads or writes tensors in the dtype of the model."""
        return bool(STREAMS & set(self.kernel.arg_names))

    @property
    def scan(self) -> bool:
        """Whether it is one of the linear scan, for complex numbers too."""
        return "PARTS" in self.kernel.arg_names

    def takes(self, dtype: str) -> bool:
        """Whether there is such a variant for a dtype."""
        if dtype in COMPLEX:
            return self.scan and not self.constants.get("LOG")
        return True


def variant(
    name: str, kernel: Any, rows: int, given: set[str], without: set[str] = frozenset(), C: int = 768, **constants: Any
) -> Variant:
    """Describe the kernel with these of its optional arguments, and without some of the others."""
    return Variant(name, kernel, rows, frozenset((OPTIONAL - given) | without), {"C": C, **constants})


def scan_variants(name: str, kernel: Any, rows: int, states: set[str], outputs: set[str]) -> list[Variant]:
    """Describe what both kernels of the linear scan are compiled to. Odd C is none of a multiple of the block."""
    gate = {"FIXED": False, "LOG": False}
    return [
        variant(f"scan {name}", kernel, rows, set(), STEP=768, **gate),
        variant(f"scan {name}, fixed a", kernel, rows, set(), STEP=768, FIXED=True, LOG=False),
        variant(f"scan {name}, log a", kernel, rows, set(), STEP=-768, FIXED=False, LOG=True),
        variant(f"scan {name}, packed", kernel, rows, {"edge_ptr", "carry_ptr", *states}, C=770, STEP=-770, **gate),
        variant(f"scan {name}, summary", kernel, rows, {"ginitial_ptr"}, outputs, STEP=768, **gate),
    ]


VARIANTS = [
    variant("wkv forward", wkv._wkv_fwd_kernel, CHECKPOINT_ROWS, {"checkpoint_ptr"}),
    variant("wkv forward, odd C", wkv._wkv_fwd_kernel, CHECKPOINT_ROWS, {"checkpoint_ptr"}, C=770),
    variant(
        "wkv forward, packed", wkv._wkv_fwd_kernel, CHECKPOINT_ROWS, {"checkpoint_ptr", "edge_ptr", *STATES}, C=770
    ),
    variant("wkv forward, summary", wkv._wkv_fwd_kernel, CHECKPOINT_ROWS, set(), {"y_ptr"}),
    variant("wkv forward, carry", wkv._wkv_carry_kernel, 1, {"carry_ptr", "edge_ptr", *STATES}),
    variant("wkv backward", wkv_bwd._wkv_bwd_kernel, BACKWARD_ROWS, {"checkpoint_ptr"}),
    variant("wkv backward, odd C", wkv_bwd._wkv_bwd_kernel, BACKWARD_ROWS, {"checkpoint_ptr"}, C=770),
    variant(
        "wkv backward, packed", wkv_bwd._wkv_bwd_kernel, BACKWARD_ROWS, {"checkpoint_ptr", "edge_ptr", *STATES}, C=770
    ),
    variant("wkv backward, summary", wkv_bwd._wkv_bwd_kernel, BACKWARD_ROWS, {"checkpoint_ptr"}, {"gk_ptr", "gv_ptr"}),
    variant("wkv backward, carry", wkv_bwd._wkv_bwd_carry_kernel, 1, {"carry_ptr", *STATES}),
    variant("wkv step", wkv_step._wkv_step_kernel, 1, set()),
    *scan_variants("forward", linear_scan._linear_scan_fwd_kernel, SCAN_ROWS, {"initial_ptr"}, {"h_ptr"}),
    *scan_variants(
        "backward",
        linear_scan_bwd._linear_scan_bwd_kernel,
        SCAN_BACKWARD_ROWS,
        STATES,
        {"ga_ptr", "gx_ptr", "h_ptr"},
    ),
    variant("scan carry", linear_scan._linear_scan_carry_kernel, 1, {"carry_ptr", "edge_ptr", *STATES}, BACKWARD=True),
    variant("scan step", linear_scan_step._linear_scan_step_kernel, 1, set(), FIXED=False, LOG=False),
]


def compile_variant(job: tuple[int, str, str]) -> dict[str, Any]:
    """Compile one variant for one dtype and target, and read the result."""
    index, dtype, target = job
    variant = VARIANTS[index]
    element = COMPLEX.get(dtype, dtype)
    acc = "fp64" if element == "float64" else "fp32"
    size = {"float64": 8, "float32": 4}.get(element, 2) * (2 if dtype in COMPLEX else 1)
    launch = scan_launch(1, 1, 1, 1, size) if variant.scan else wkv_launch(1, 1, 1, 1, 8 if acc == "fp64" else 4)
    rows = SCAN_ROWS // 2 if variant.rows == SCAN_ROWS and dtype in COMPLEX else variant.rows
    block = BLOCKS.get(variant.kernel, launch.block_c)
    constants = {
        "ROWS": rows,
        "KEPT": CHECKPOINT_ROWS,
        "BLOCK_C": block,
        "BLOCK": block,
        "PARTS": 2 if dtype in COMPLEX else 1,
        "EXACT": size >= 4,
        "ACC": tl.float64 if acc == "fp64" else tl.float32,
        **variant.constants,
    }
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    names = variant.kernel.arg_names
    for name in names:
        if name in constants or name in variant.absent:
            signature[name], values[name] = "constexpr", constants.get(name)
        elif name == "edge_ptr":
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            summed = name == "ga_ptr" and variant.constants["FIXED"]
            signature[name] = "*" + (DTYPES[dtype] if name in STREAMS and not summed else acc)
        else:
            signature[name] = "i32"
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    warps = 4 if variant.kernel in BLOCKS else launch.num_warps
    source = ASTSource(variant.kernel, signature, values, aligned)
    compiled = triton.compile(
        source, target=TARGETS[target], options={"num_warps": warps, "enable_fp_fusion": FP_FUSION}
    )
    read = _read_hip if TARGETS[target].backend == "hip" else _read_cuda
    elements = rows * max(1, block // (warps * TARGETS[target].warp_size))  # of the main loop, a lane
    registers, spilled, loop = read(compiled)
    return {
        "kernel": variant.name,
        "dtype": dtype if variant.streams or dtype in COMPLEX else acc.replace("fp", "float"),
        "target": target,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "instructions": sum(bool(re.match(r"\s*[@A-Za-z]", line)) for line in loop) / elements,
        "special": sum(bool(SPECIAL.search(line)) for line in loop) / elements,
    }


def _read_cuda(compiled: Any) -> tuple[int, int, list[str]]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spilled = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", code)
    addresses = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    loops = []
    for index, (_, text) in enumerate(lines):
        jump = re.search(r"BRA\S* (?:\S+, )*`?\(?(?:\.L_x_\d+|0x([0-9a-f]+))", text)
        if jump and jump[1] and addresses.get(int(jump[1], 16), index) < index:
            loops.append((addresses[int(jump[1], 16)], index))
    return registers, spilled, _main_loop([text for _, text in lines], loops)


def _read_hip(compiled: Any) -> tuple[int, int, list[str]]:
    code = compiled.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
    spilled = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1])
    lines = code.splitlines()
    labels = {match[1]: index for index, line in enumerate(lines) if (match := re.match(r"(\.LBB\w+):", line))}
    loops = []
    for index, line in enumerate(lines):
        jump = re.search(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        if jump and labels.get(jump[1], index) < index:
            loops.append((labels[jump[1]], index))
    return registers, spilled, _main_loop([line.partition(";")[0] for line in lines], loops)


def _main_loop(lines: list[str], loops: list[tuple[int, int]]) -> list[str]:
    """Return the loop with the most special functions; all of a kernel that has no loop."""

    def special(loop: tuple[int, int]) -> int:
        return sum(bool(SPECIAL.search(line)) for line in lines[loop[0] : loop[1] + 1])

    first, last = max(loops, key=special, default=(0, len(lines) - 1))
    return lines[first : last + 1]


def main() -> None:
    parser = Parser(prog="compiled.py", description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    option("--targets", type=names("target", TARGETS), default=list(TARGETS), metavar="LIST", help=", ".join(TARGETS))
    option("--dtypes", type=names("dtype", DTYPES), default=list(DTYPES), metavar="LIST", help=", ".join(DTYPES))
    option("--jobs", type=positive, default=os.cpu_count(), metavar="N", help="compilers at a time (%(default)s)")
    args = parser.parse_args()
    jobs = [
        (index, dtype, target)
        for index, variant in enumerate(VARIANTS)
        for dtype in args.dtypes
        for target in args.targets
        if variant.takes(dtype)
        # What has no stream in the model's dtype is the same for all that sum in float32.
        and (variant.streams or dtype not in ("float16", "bfloat16"))
    ]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        rows = list(tqdm(pool.imap(compile_variant, jobs), total=len(jobs), unit=" kernels", disable=None))

    columns = "{:<22} {:<10} {:<7} {:>9} {:>8} {:>7} {:>13} {:>8}"
    print(columns.format("kernel", "dtype", "target", "registers", "spilled", "shared", "instructions", "special"))
    print(columns.format("", "", "", "", "bytes", "bytes", "a row", "a row"))
    for row in rows:
        counts = f"{row['instructions']:.1f}", f"{row['special']:.2f}"
        print(columns.format(*list(row.values())[:6], *counts))
    spilling = [row for row in rows if row["spilled_bytes"]]
    if spilling:
        sys.exit(f"compiled.py: {len(spilling)} of {len(rows)} kernels spill registers")


if __name__ == "__main__":
    main()
