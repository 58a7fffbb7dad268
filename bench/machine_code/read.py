"""Reading compiled kernels: registers, spills, the main loop and what it loads and stores."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from machine_code.costs import Instruction

SPECIAL = re.compile(r"\bMUFU\.(?:EX2|RCP|RCP64H|RSQ|LG2)|\bv_(?:exp|rcp|rsq|log)_f(?:32|64)")
CUDA_ACCESS = re.compile(r"\b(LDG|LDGSTS|STG)((?:\.\w+)*)\s")
HIP_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_\w*?(byte|short|dword|b(?=\d))(?:x?(\d+))?")


@dataclass(frozen=True)
class Code:
    """A compiled kernel, as far as it is read."""

    registers: int
    spilled_bytes: int
    loop: list[Instruction]
    """The main loop; all of a kernel that has none."""

    @property
    def instructions(self) -> int:
        """How many there are in the loop."""
        return _instructions(self.loop)

    @property
    def special(self) -> int:
        """Exponentials, reciprocals and roots in the loop."""
        return _special(self.loop)

    def widths(self, way: str) -> "Counter[int]":
        """Return the bytes a lane of the loads, or with ``way`` "store" the stores, of the loop and their numbers."""
        found = (_access(one.text) for one in self.loop)
        return Counter(width for one in found if one for kind, width in [one] if kind == way)


def _access(text: str) -> tuple[str, int] | None:
    """Return whether an instruction loads or stores, and the bytes a lane."""
    if match := CUDA_ACCESS.search(text):
        bits = re.search(r"\.[US]?(8|16|64|128)\b", match[2])
        return "store" if match[1] == "STG" else "load", int(bits[1]) // 8 if bits else 4
    if match := HIP_ACCESS.search(text):
        unit = {"byte": 1, "short": 2, "dword": 4, "b": 1 / 8}[match[2]]
        return match[1], int(unit * int(match[3] or 1))
    return None


def read(compiled: Any, backend: str) -> Code:
    """Read a compiled kernel."""
    return _read_hip(compiled.asm["amdgcn"]) if backend == "hip" else _read_cuda(compiled.asm["cubin"])


def _read_cuda(cubin: bytes) -> Code:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Code(registers, stack + local, cuda_loop(text))


def cuda_loop(code: str) -> list[Instruction]:
    """Return the main loop of what cuobjdump prints: address and text, and 128 bits as two comments, the low first."""
    word = r"\s+/\* 0x([0-9a-f]{16}) \*/"
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);" + word + word, code)
    lines = [Instruction(text, int(high, 16) >> 41 & 0x1FFFF) for _, text, _, high in found]
    addresses = {int(one[0], 16): index for index, one in enumerate(found)}
    loops = []
    for index, line in enumerate(lines):
        jump = re.search(r"BRA\S* (?:\S+, )*`?\(?(?:\.L_x_\d+|0x([0-9a-f]+))", line.text)
        if jump and jump[1] and addresses.get(int(jump[1], 16), index) < index:
            loops.append(lines[addresses[int(jump[1], 16)] : index + 1])
    return _main_loop(lines, loops)


def _read_hip(code: str) -> Code:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
    spilled = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1])
    return Code(registers, spilled, hip_loop(code))


def hip_loop(code: str) -> list[Instruction]:
    """Return the main loop of LLVM's assembly, by the comments at its blocks: a jump backwards may just be one home.

    The loops inside a loop are not part of it.
    """
    loops: dict[str, list[Instruction]] = {}
    lines: list[Instruction] = []
    label = loop = ""
    for line in code.splitlines():
        if block := re.match(r"\.L(BB\w+):|; %bb\.\d+:", line):
            label, loop = block[1] or "", ""
        if member := re.search(r"in Loop: Header=(BB\w+)", line):
            loop = member[1]
        elif re.search(r"=>\s*This (?:Inner )?Loop Header", line):
            loop = label
        lines.append(Instruction(line.partition(";")[0]))
        if loop:
            loops.setdefault(loop, []).append(lines[-1])
    return _main_loop(lines, list(loops.values()))


def _main_loop(lines: list[Instruction], loops: Sequence[list[Instruction]]) -> list[Instruction]:
    """Return the loop with the most special functions an instruction; all of a kernel that has no loop.

    A copy of it that knows of masks has more instructions, and so has a loop around it. Of several without special
    functions it is the one with the most loads and stores, of as many the shortest.
    """

    def weight(loop: list[Instruction]) -> tuple[float, int, int]:
        instructions = _instructions(loop)
        return _special(loop) / instructions, sum(bool(_access(one.text)) for one in loop), -instructions

    return max(loops, key=weight, default=lines)


def _instructions(lines: Sequence[Instruction]) -> int:
    return sum(bool(re.match(r"\s*[@A-Za-z]", one.text)) for one in lines)


def _special(lines: Sequence[Instruction]) -> int:
    return sum(bool(SPECIAL.search(one.text)) for one in lines)
