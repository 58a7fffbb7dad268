"""The cost of machine code on an NVIDIA GPU: execution units, the time of one warp alone, warps a multiprocessor.

Results a clock and multiprocessor are those of the table "Throughput of Native Arithmetic Instructions" in the CUDA C++
Programming Guide (from version 13 on in the Best Practices Guide), resources those of "Compute Capabilities" there. On
10.0 some of the "alu" instructions have twice the rate that is counted here. Figures that the guides do not give are
assumed, and says so.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

WARP = 32
SCHEDULERS = 4
WARPS = 64
BLOCKS = 32
REGISTERS = 65536
REGISTER_UNIT = 256  # of a warp
SHARED_RESERVED = 1024  # bytes a block
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}

# Lanes a clock and multiprocessor. "heavy" is the half of the float32 units that multiplies integers too (on 8.0 all of
# them); "memory" are the load and store units.
_SM_90 = {"issue": 128, "fma": 128, "heavy": 64, "alu": 64, "half": 64, "special": 16, "double": 64, "memory": 32}
LANES = {"sm_80": {**_SM_90, "fma": 64, "double": 32}, "sm_90": _SM_90, "sm_100": _SM_90}
UNITS = (  # of opcodes, the first that fits; "issue" is taken by all
    (r"FFMA2|FADD2|FMUL2", {"fma": 2}),  # of two numbers, on 10.0
    (r"FFMA|FADD|FMUL", {"fma": 1}),
    (r"IMAD|IDP", {"fma": 1, "heavy": 1}),
    (r"HADD2|HMUL2|HFMA2", {"half": 1}),
    (r"DFMA|DADD|DMUL|DSETP|DMNMX", {"double": 1}),
    (r"MUFU|F2F|I2F|F2I|FRND|POPC|FLO|BREV", {"special": 1}),
    (r"F2FP", {"alu": 2}),  # two float32 to 16 bits; the rate is assumed
    (r"LDG|STG|LDGSTS|LD|ST|LDS|STS|LDSM|STSM|LDL|STL|SHFL|ATOM|ATOMG|ATOMS|RED", {"memory": 1}),  # 4 bytes a lane
    (r"BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|WARPSYNC|YIELD|NOP|BAR|LDC|S2R|MEMBAR|ERRBAR|CCTL|\w*DEPBAR", {}),
    (r"U[A-Z0-9]+|R2UR|S2UR|LDCU", {}),  # for all lanes at once
    (r"[A-Z0-9]+", {"alu": 1}),
)
GLOBAL_LOADS = ("LDG", "LD", "LDL", "ATOM", "ATOMG")
VARIABLE_CYCLES = 20  # assumed of special functions and of whatever else a barrier waits for, but for
SHARED_CYCLES = 30  # what goes through shared memory, assumed as well, and loads
READ_CYCLES = 10  # assumed until a store has read its registers
LOAD_CYCLES = 1400  # assumed of a load on a busy memory: 0.8 µs at 1.755 GHz


@dataclass(frozen=True)
class Figures:
    """The result of compiling a variant. An element is a token of one channel, a row a token of one warp."""

    kernel: str
    dtype: str
    target: str
    num_warps: int
    block_c: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: float
    """Of the main loop, an element."""
    special: float
    """Special functions among them."""
    loads: dict[int, int]
    """Bytes a lane of the loads in the main loop, and how many there are."""
    stores: dict[int, int]
    loaded: float
    """Bytes an element of the main loop, were every load to go to memory."""
    stored: float
    warps: int | None = None
    """Warps that a multiprocessor holds; this and what follows only where the target is one of NVIDIA's."""
    clocks: float | None = None
    """Clocks of a multiprocessor an element."""
    unit: str | None = None
    """The unit that takes so long."""
    cycles: float | None = None
    """Clocks of one warp alone a row, if loads answered at once."""
    waiting: float | None = None
    """The same if loads take LOAD_CYCLES."""

    @property
    def moved(self) -> float:
        """Bytes loaded and stored an element."""
        return self.loaded + self.stored


@dataclass(frozen=True)
class Instruction:
    """An instruction, and what it tells the scheduler: bits 105 to 121 of the 128 of sm_70 and later."""

    text: str
    control: int = 1

    @property
    def name(self) -> str:
        """Its name and modifiers, without predicate and operands."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text.strip()).split(" ")[0]

    @property
    def opcode(self) -> str:
        """Its name alone."""
        return self.name.split(".")[0]

    @property
    def units(self) -> dict[str, int]:
        """The units that it takes, and for how many lanes a lane."""
        taken = _units(self.opcode)
        wide = re.search(r"\.(?:64|128|M88\.[24])\b", self.name) if "memory" in taken else None
        return taken | {"memory": 2 if wide[0] in (".64", ".M88.2") else 4} if wide else taken

    @property
    def left(self) -> tuple[int, int] | None:
        """The barrier that it waits for until so many of those that shall release it are left; None for most."""
        match = re.match(r"(?:@!?U?P\w+\s+)?DEPBAR\.LE SB(\d), 0x([0-9a-f]+)", self.text.strip())
        return (int(match[1]), int(match[2], 16)) if match else None

    @property
    def stall(self) -> int:
        """Clocks until the next instruction of the warp."""
        return max(1, self.control & 15)

    @property
    def write_barrier(self) -> int | None:
        """The barrier that is released once the result is there."""
        return _barrier(self.control >> 5)

    @property
    def read_barrier(self) -> int | None:
        """The barrier that is released once the operands have been read."""
        return _barrier(self.control >> 8)

    @property
    def waits(self) -> list[int]:
        """The barriers that it waits for."""
        return [barrier for barrier in range(6) if self.control >> 11 >> barrier & 1]


def _barrier(bits: int) -> int | None:
    return bits & 7 if bits & 7 < 6 else None


@cache
def _units(opcode: str) -> dict[str, int]:
    return {"issue": 1, **next(taken for opcodes, taken in UNITS if re.fullmatch(opcodes, opcode))}


def clocks(loop: Sequence[Instruction], elements: int, target: str) -> tuple[float, str]:
    """Return the clocks that a multiprocessor needs for an element of the loop, and the unit that sets them."""
    lanes: Counter[str] = Counter()
    for instruction in loop:
        lanes.update(instruction.units)
    return max((count / elements / LANES[target][unit], unit) for unit, count in lanes.items())


def warp_cycles(loop: Sequence[Instruction], target: str, load_cycles: int = 0) -> float:
    """Return the clocks that one warp alone needs for the loop once more, all of its instructions in order.

    An instruction is issued when the one before lets it, the barriers that it waits for are released and its units are
    free again; each scheduler has a fourth of them, of those for memory all. Loads answer after ``load_cycles``.
    """
    clock = copied = 0.0
    free: Counter[str] = Counter()
    releases: list[list[float]] = [[] for _ in range(6)]  # of each barrier what is still to come
    ends = []
    decoded = [_decoded(one, target, load_cycles) for one in loop]
    for _ in range(8):  # the first times the barriers are not yet what they come to be
        for opcode, units, waits, left, barriers, stall in decoded:
            start = max([clock, *(free[unit] for unit in units), *(time for one in waits for time in releases[one])])
            if left:
                outstanding = sorted(time for time in releases[left[0]] if time > start)
                start = outstanding[-1 - left[1]] if len(outstanding) > left[1] else start
            for unit, busy in units.items():
                free[unit] = start + busy
            if opcode == "LDGSTS":  # from global to shared memory; LDGDEPBAR's barrier is released with those so far
                copied = start + load_cycles
            for barrier, latency in barriers:
                released = copied if opcode == "LDGDEPBAR" else start + latency
                releases[barrier] = [time for time in releases[barrier] if time > start] + [released]
            clock = start + stall
        ends.append(clock)
    return (ends[-1] - ends[3]) / 4


def _decoded(one: Instruction, target: str, load_cycles: int) -> tuple[Any, ...]:
    parts = {unit: 1 if unit == "memory" else SCHEDULERS for unit in one.units}
    busy = {unit: lanes * WARP * parts[unit] / LANES[target][unit] for unit, lanes in one.units.items()}
    read = READ_CYCLES if load_cycles else 0
    barriers = ((one.write_barrier, _latency(one.opcode, load_cycles)), (one.read_barrier, read))
    taken = tuple((barrier, latency) for barrier, latency in barriers if barrier is not None)
    del busy["issue"]  # a clock, and no instruction follows sooner
    return one.opcode, busy, one.waits, one.left, taken, one.stall


def _latency(opcode: str, load_cycles: int) -> int:
    if opcode in GLOBAL_LOADS:
        return load_cycles
    return SHARED_CYCLES if "memory" in _units(opcode) else VARIABLE_CYCLES


def resident_warps(registers: int, shared_bytes: int, num_warps: int, target: str) -> int:
    """Return the warps of programs of ``num_warps`` that a multiprocessor holds at once."""
    unit = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // SCHEDULERS // unit * SCHEDULERS  # a scheduler has a fourth of the registers
    by_shared = SHARED[target] // (shared_bytes + SHARED_RESERVED)
    return min(min(by_registers, WARPS) // num_warps, by_shared, BLOCKS) * num_warps
