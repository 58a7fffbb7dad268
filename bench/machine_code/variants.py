"""The kernels that compiled.py compiles: their variants, targets and dtypes, and what is read of each."""

import os
from dataclasses import dataclass, replace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import triton
import triton.language as tl
from machine_code.costs import LOAD_CYCLES, Figures, clocks, resident_warps, warp_cycles
from machine_code.read import read
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastwkv.kernels import (
    linear_scan,
    linear_scan_bwd,
    linear_scan_step,
    packing,
    row_sums,
    rwkv4_step,
    wkv,
    wkv_bwd,
    wkv_carry,
    wkv_entry,
    wkv_step,
)
from fastwkv.kernels.config import (
    BACKWARD_REGISTERS,
    CARRY_GROUP,
    FORWARD_REGISTERS,
    FP_FUSION,
    SCAN_ROWS,
    Launch,
    checkpoint_rows,
    scan_launch,
    scan_rows,
    wkv_launch,
)
from fastwkv.kernels.linear_scan_carry import _linear_scan_carry_kernel

TRITON = ".".join(triton.__version__.split(".")[:2])
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
    "bfloat16x2": "bf16",
}
# And what they are made of; bfloat16x2 are pairs, beside an a of complex64.
COMPLEX = {"complex64": "float32", "complex128": "float64", "bfloat16x2": "bfloat16"}
STREAMS = {"k_ptr", "v_ptr", "y_ptr", "gy_ptr", "gk_ptr", "gv_ptr"}  # stored in the dtype of the model
STREAMS |= {"a_ptr", "x_ptr", "h_ptr", "gh_ptr", "ga_ptr", "gx_ptr"}
STREAMS |= {"r_ptr", "weight_ptr", "bias_ptr", "before_ptr", "mix0_ptr", "mix1_ptr", "mix2_ptr", "mixed_ptr"}
OPTIONAL = {
    "r_ptr",
    "initial_ptr",
    "carry_ptr",
    "edge_ptr",
    "checkpoint_ptr",
    "gfinal_ptr",
    "ginitial_ptr",
    "summary_ptr",
    "entry_ptr",
    "cu_seqlens_ptr",
    "source_ptr",
}
STATES = {"initial_ptr", "gfinal_ptr", "ginitial_ptr", "entry_ptr"}
CARRIED = {"summary_ptr", "carry_ptr", "edge_ptr", *STATES}  # of the kernels between chunks
BLOCKS = {  # of kernels that do not walk along time, of four warps
    wkv_step._wkv_step_kernel: wkv_step.BLOCK,
    linear_scan_step._linear_scan_step_kernel: linear_scan_step.BLOCK,
    rwkv4_step._norm_mix_kernel: 1024,
    rwkv4_step._relu_squared_kernel: rwkv4_step.BLOCK,
    rwkv4_step._add_gated_kernel: rwkv4_step.BLOCK,
    packing._packed_edges_kernel: packing.BLOCK,
    packing._idle_rows_kernel: packing.ROW_BLOCK,
    wkv_entry._wkv_entry_kernel: wkv_entry.BLOCK,
    row_sums._row_sums_kernel: row_sums.BLOCK_C,
}


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
        variant(f"scan {name}, packed", kernel, rows, {"edge_ptr", "carry_ptr", *states}, C=771, STEP=-771, **gate),
        variant(f"scan {name}, summary", kernel, rows, {"summary_ptr"}, outputs, STEP=768, **gate),
    ]


TILE = checkpoint_rows(4)  # of WKV, less in float64
REGISTERS = {wkv._wkv_fwd_kernel: FORWARD_REGISTERS, wkv_bwd._wkv_bwd_kernel: BACKWARD_REGISTERS}
VARIANTS = [
    variant("wkv forward", wkv._wkv_fwd_kernel, TILE, {"checkpoint_ptr"}),
    variant("wkv forward, odd C", wkv._wkv_fwd_kernel, TILE, {"checkpoint_ptr"}, C=771),
    variant("wkv forward, packed", wkv._wkv_fwd_kernel, TILE, {"checkpoint_ptr", "edge_ptr", *STATES}, C=771),
    variant("wkv forward, summary", wkv._wkv_fwd_kernel, TILE, {"summary_ptr"}, {"y_ptr", "final_ptr"}),
    variant("wkv forward, carry", wkv_carry._wkv_carry_kernel, CARRY_GROUP, CARRIED),
    variant("wkv backward", wkv_bwd._wkv_bwd_kernel, TILE, {"checkpoint_ptr"}),
    variant("wkv backward, odd C", wkv_bwd._wkv_bwd_kernel, TILE, {"checkpoint_ptr"}, C=771),
    variant("wkv backward, packed", wkv_bwd._wkv_bwd_kernel, TILE, {"checkpoint_ptr", "edge_ptr", *STATES}, C=771),
    variant(
        "wkv backward, summary",
        wkv_bwd._wkv_bwd_kernel,
        TILE,
        {"checkpoint_ptr", "summary_ptr"},
        {"gk_ptr", "gv_ptr", "gwu_ptr"},
    ),
    variant("wkv backward, carry", wkv_carry._wkv_bwd_carry_kernel, CARRY_GROUP, CARRIED),
    variant("wkv entry", wkv_entry._wkv_entry_kernel, 1, {"cu_seqlens_ptr", *STATES}),
    variant("wkv step", wkv_step._wkv_step_kernel, 1, set()),
    variant("wkv step, gated", wkv_step._wkv_step_kernel, 1, {"r_ptr"}),
    variant("rwkv4 step, norm and mix", rwkv4_step._norm_mix_kernel, 1, set(), EPS=1e-5),
    variant("rwkv4 step, squared relu", rwkv4_step._relu_squared_kernel, 1, set()),
    variant("rwkv4 step, gate and add", rwkv4_step._add_gated_kernel, 1, {"r_ptr"}),
    *scan_variants("forward", linear_scan._linear_scan_fwd_kernel, SCAN_ROWS, {"initial_ptr"}, {"h_ptr", "final_ptr"}),
    *scan_variants(
        "backward",
        linear_scan_bwd._linear_scan_bwd_kernel,
        SCAN_ROWS,
        STATES,
        {"ga_ptr", "gx_ptr", "h_ptr"},
    ),
    variant("scan carry", _linear_scan_carry_kernel, CARRY_GROUP, CARRIED, BACKWARD=True),
    variant("packed edges", packing._packed_edges_kernel, 1, {"cu_seqlens_ptr", "edge_ptr"}, REVERSE=False),
    variant(
        "idle rows",
        packing._idle_rows_kernel,
        1,
        {"cu_seqlens_ptr", "edge_ptr", "source_ptr"},
        FIELDS=3,
        STATE=True,
        REVERSE=False,
    ),
    variant("sums of rows", row_sums._row_sums_kernel, row_sums.ROWS, set()),
    variant("scan step", linear_scan_step._linear_scan_step_kernel, 1, set(), FIXED=False, LOG=False),
]


FORWARD, BACKWARD = linear_scan._linear_scan_fwd_kernel, linear_scan_bwd._linear_scan_bwd_kernel
GATE = {"STEP": 768, "FIXED": True, "LOG": False}
# Of gpu_model.py, which also asks for a forward pass that keeps nothing, and for summaries with a fixed a.
MODELLED = [
    *VARIANTS,
    variant("wkv forward, nothing kept", wkv._wkv_fwd_kernel, TILE, set()),
    variant("scan forward, summary, fixed a", FORWARD, SCAN_ROWS, {"summary_ptr"}, {"h_ptr", "final_ptr"}, **GATE),
    variant(
        "scan backward, summary, fixed a", BACKWARD, SCAN_ROWS, {"summary_ptr"}, {"ga_ptr", "gx_ptr", "h_ptr"}, **GATE
    ),
]


def compile_variant(job: tuple[int, str, str]) -> Figures:
    """Compile the variant of this index for one dtype and target, and read the result."""
    index, dtype, target = job
    return figures(VARIANTS[index], dtype, target)


def figures(variant: Variant, dtype: str, target: str, launch: Launch | None = None) -> Figures:
    """Compile a variant for one dtype and target, and read the result; ``launch`` has another shape than the usual."""
    element = COMPLEX.get(dtype, dtype)
    acc = "fp64" if element == "float64" else "fp32"
    exact = element not in ("bfloat16", "float16")
    size = {"float64": 8, "float32": 4}.get(element, 2) * (2 if dtype in COMPLEX else 1)
    usual = scan_launch if variant.scan else wkv_launch
    backward = not {"ga_ptr", "gk_ptr"}.isdisjoint(variant.kernel.arg_names)
    launch = launch or usual(1, 1, 1, 1, size, backward)
    rows = variant.rows
    if variant.scan and rows == SCAN_ROWS:
        packed = "edge_ptr" not in variant.absent
        backward = variant.kernel is BACKWARD
        rows = scan_rows(8 if acc == "fp64" else 4, 2 if dtype in COMPLEX else 1, exact, packed, backward)
    if not variant.scan and rows == TILE and acc == "fp64":
        rows = checkpoint_rows(8)
    block = BLOCKS.get(variant.kernel, launch.block_c)
    constants = {
        "ROWS": rows,
        "STAGES": launch.stages,
        "GROUP": CARRY_GROUP,
        "BLOCK_C": block,
        "BLOCK": block,
        "PARTS": 2 if dtype in COMPLEX else 1,
        "EXACT": exact,
        "ACC": tl.float64 if acc == "fp64" else tl.float32,
        **variant.constants,
    }
    warps = 4 if variant.kernel in BLOCKS else launch.num_warps
    options = {"num_warps": warps, "enable_fp_fusion": FP_FUSION}
    if variant.kernel in REGISTERS and TARGETS[target].backend == "cuda":
        options["maxnreg"] = REGISTERS[variant.kernel]
    compiled = triton.compile(_source(variant, constants, dtype, acc), target=TARGETS[target], options=options)
    code = read(compiled, TARGETS[target].backend)
    shared = compiled.metadata.shared
    lanes = warps * TARGETS[target].warp_size
    elements = max(1, rows * block // lanes) if variant.kernel in BLOCKS else rows * max(1, block // lanes)  # a lane
    loads, stores = (dict(sorted(code.widths(way).items())) for way in ("load", "store"))
    found = Figures(
        variant.name,
        dtype if variant.streams or dtype in COMPLEX else acc.replace("fp", "float"),
        target,
        warps,
        block,
        code.registers,
        code.spilled_bytes,
        shared,
        code.instructions / elements,
        code.special / elements,
        loads,
        stores,
        sum(width * count for width, count in loads.items()) * lanes / (rows * block),
        sum(width * count for width, count in stores.items()) * lanes / (rows * block),
    )
    if TARGETS[target].backend == "hip":
        return found
    needed, unit = clocks(code.loop, elements, target)
    return replace(
        found,
        warps=resident_warps(code.registers, shared, warps, target),
        clocks=needed,
        unit=unit,
        cycles=warp_cycles(code.loop, target) / rows,
        waiting=warp_cycles(code.loop, target, LOAD_CYCLES) / rows,
    )


def _source(variant: Variant, constants: dict[str, Any], dtype: str, acc: str) -> ASTSource:
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    names = variant.kernel.arg_names
    for name in names:
        if name in constants or name in variant.absent:
            signature[name], values[name] = "constexpr", constants.get(name)
        elif name in ("edge_ptr", "cu_seqlens_ptr"):
            signature[name] = "*i32" if name == "edge_ptr" else "*i64"
        elif name.endswith("_ptr"):
            summed = name == "ga_ptr" and variant.constants["FIXED"]
            wide = summed or (name in ("a_ptr", "ga_ptr") and dtype == "bfloat16x2")
            signature[name] = "*" + (DTYPES[dtype] if name in STREAMS and not wide else acc)
        else:
            signature[name] = "fp32" if name == "factor" else "i32"
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    return ASTSource(variant.kernel, signature, values, aligned)
