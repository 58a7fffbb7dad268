"""The costs of instructions: the warps that fit, the units they take, the clocks that a warp needs for them."""

import subprocess
import sys

import pytest
from bench_scripts import environment
from machine_code.costs import Instruction, clocks, resident_warps, warp_cycles


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "warps"),
    [
        (32, 0, 4, 64),  # as many as there can be
        (32, 0, 1, 32),  # as many as there can be programs
        (64, 0, 1, 32),
        (73, 0, 4, 24),  # registers come in units of 256 a warp
        (255, 0, 1, 8),
        (32, 100 << 10, 1, 2),
        (255, 0, 16, 0),
    ],
)
def test_warps_that_fit(registers, shared, num_warps, warps):
    assert resident_warps(registers, shared, num_warps, "sm_90") == warps


def test_units_of_known_instructions():
    def taken(text):
        return {unit: lanes for unit, lanes in Instruction(text).units.items() if unit != "issue"}

    assert taken("@!P0 FFMA R1, R2, R3, R4 ") == {"fma": 1}
    assert taken(" FMUL.FTZ R1, R2, R3 ") == {"fma": 1}
    assert taken("IMAD.MOV.U32 R1, RZ, RZ, R2 ") == {"fma": 1, "heavy": 1}
    assert taken("FSEL R1, R2, R3, P0 ") == taken("@UP1 PRMT R1, R2, R3, R4") == taken("LOP3.LUT R1, R2") == {"alu": 1}
    assert taken("MUFU.EX2 R1, R2") == taken("F2F.BF16.F32 R1, R2") == {"special": 1}
    assert taken("F2FP.BF16.F32.PACK_AB R1, R2, R3") == {"alu": 2}
    assert taken("LDG.E.CONSTANT R2, desc[UR4][R2.64]") == taken("STG.E.U16 [UR4+R2], R3") == {"memory": 1}
    assert taken("LDG.E.64 R2, [UR4+R2]") == taken("LDSM.16.M88.2 R2, [R3]") == {"memory": 2}
    assert taken("LDGSTS.E.BYPASS.128 [R6], desc[UR8][R20]") == taken("STS.128 [R3], R4") == {"memory": 4}
    assert taken("UIADD3 UR4, UR4, 0x1, URZ") == taken("@P0 BRA 0x40") == taken("NOP") == {}


def test_clocks_are_those_of_the_busiest_unit():
    special, added = Instruction("MUFU.EX2 R1, R2"), Instruction("FADD R1, R2, R3")
    assert clocks([added] * 12, 2, "sm_90")[0] == 12 / 2 / 128
    assert clocks([added] * 12, 2, "sm_80") == (12 / 2 / 64, "fma")
    assert clocks([special, added, added], 1, "sm_90") == (1 / 16, "special")


def test_a_warp_waits_for_stalls_barriers_and_units():
    def control(stall, write=7, read=7, waits=0):
        return stall | write << 5 | read << 8 | waits << 11

    chain = [Instruction("FFMA R1, R1, R2, R3", control(4))] * 10
    assert warp_cycles(chain, "sm_90") == 40
    special = Instruction("MUFU.EX2 R1, R1", control(1, write=2))
    follows = Instruction("FADD R1, R1, R2", control(4, waits=1 << 2))
    assert warp_cycles([special, follows], "sm_90") == 20 + 4
    assert warp_cycles([Instruction("MUFU.EX2 R1, R2", control(1))] * 3, "sm_90") == 3 * 8  # four lanes a clock
    load = Instruction("LDG.E R1, [R2.64]", control(1, write=0))
    used = Instruction("FADD R1, R1, R2", control(4, waits=1))
    assert warp_cycles([load, load, used], "sm_90", 1000) == 1 + 1000 + 4
    assert warp_cycles([load, load, used], "sm_90") == 6


def test_a_warp_that_copies_ahead_waits_for_the_copies_before():
    copy = Instruction("LDGSTS.E.BYPASS.128 [R6], desc[UR8][R20.64]", 1 | 7 << 5 | 7 << 8)
    group = Instruction("LDGDEPBAR", 1 | 0 << 5 | 7 << 8)
    work = [Instruction("FFMA R1, R1, R2, R3", 4 | 7 << 5 | 7 << 8)] * 50
    for ahead, cycles in ((0, 1200), (1, 600), (9, 200)):
        wait = Instruction(f"DEPBAR.LE SB0, 0x{ahead:x}", 1 | 7 << 5 | 7 << 8)
        assert warp_cycles([copy, group, wait, *work], "sm_90", 1000) == pytest.approx(cycles, abs=5)


CHAIN = """
import sys
import triton
import triton.language as tl
from machine_code.costs import warp_cycles
from machine_code.read import read
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def chain(x_ptr, n):
    i = tl.arange(0, 32)
    x = tl.load(x_ptr + i)
    for _ in range(n):
        for _ in tl.static_range(32):
            x = tl.fma(x, 1.5, 0.25)
    tl.store(x_ptr + i, x)


for target in (80, 90, 100):
    source = ASTSource(chain, {"x_ptr": "*fp32", "n": "i32"}, {})
    code = read(triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": 1}), "cuda")
    adds = sum(one.opcode == "FFMA" for one in code.loop)
    print(adds % 32, warp_cycles(code.loop, f"sm_{target}") / adds)
"""


def test_a_chain_of_multiply_adds_takes_four_clocks_each(tmp_path):
    pytest.importorskip("triton", reason="Triton exists on Linux only")
    script = tmp_path / "chain.py"
    script.write_text(CHAIN)
    done = subprocess.run([sys.executable, script], env=environment(), capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 3
    for line in done.stdout.splitlines():
        rest, cycles = line.split()
        assert rest == "0"
        assert 4 <= float(cycles) <= 4.5  # and the end of the loop
