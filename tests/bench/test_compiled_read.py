"""Which part of a kernel's machine code is taken for its main loop."""

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

from machine_code.read import cuda_loop, hip_loop


def sass(*instructions):
    """Return what cuobjdump prints of these, 16 bytes each."""
    zero = "/* 0x0000000000000000 */"
    return "\n".join(f"  /*{16 * n:04x}*/  {text} ;  {zero}\n  {zero}" for n, text in enumerate(instructions))


def texts(loop):
    found = (one.text.strip() for one in loop)
    return [text for text in found if text and not text.endswith(":")]


ADD, EXP, LOAD = "FADD R1, R1, R2", "MUFU.EX2 R1, R1", "LDG.E R1, [R2.64]"


def test_of_two_copies_the_one_without_masks_is_the_main_loop():
    masked = [EXP, EXP, ADD, ADD, ADD, "@P0 BRA 0x0"]
    plain = [EXP, EXP, ADD, "@P0 BRA 0x60"]
    assert texts(cuda_loop(sass(*masked, *plain))) == plain


def test_of_a_loop_in_another_the_denser_is_the_main_loop():
    outer = [ADD, ADD, EXP, "@P0 BRA 0x20", "@P1 BRA 0x0"]
    assert texts(cuda_loop(sass(*outer))) == outer[2:4]
    outer = [EXP, EXP, ADD, "@P0 BRA 0x20", "@P1 BRA 0x0"]  # the inner one only looks for something
    assert texts(cuda_loop(sass(*outer))) == outer


def test_without_special_functions_the_work_is_where_memory_is():
    search = [LOAD, "@P0 BRA 0x0"]
    masked = [LOAD, LOAD, ADD, ADD, ADD, "@P0 BRA 0x20"]
    plain = [LOAD, LOAD, ADD, ADD, "@P0 BRA 0x80"]
    assert texts(cuda_loop(sass(*search, *masked, *plain))) == plain


def test_kernel_without_a_loop_is_read_whole():
    code = [LOAD, EXP, "@P0 BRA 0x30", "EXIT", "BRA 0x40"]  # the last goes nowhere, as at the end of every kernel
    assert texts(cuda_loop(sass(*code))) == code


NESTED = """
_kernel:
; %bb.0:
  s_load_dword s0, s[4:5], 0x0
.LBB0_1:                                ; %.outer
                                        ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_3 Depth 2
  v_exp_f32_e32 v1, v1
; %bb.2:                                ;   in Loop: Header=BB0_1 Depth=1
  v_add_f32_e32 v1, v1, v2              ; a remark
.LBB0_3:                                ;   Parent Loop BB0_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
  global_load_dword v3, v[4:5], off
  s_cbranch_vccnz .LBB0_3
; %bb.4:                                ;   in Loop: Header=BB0_1 Depth=1
  s_cbranch_scc1 .LBB0_1
.LBB0_5:                                ; %.end
  global_store_dword v[4:5], v1, off
  s_cbranch_execz .LBB0_5
"""


def test_loops_of_llvm_are_those_that_it_names_without_the_ones_inside():
    outer = ["v_exp_f32_e32 v1, v1", "v_add_f32_e32 v1, v1, v2", "s_cbranch_scc1 .LBB0_1"]
    assert texts(hip_loop(NESTED)) == outer
    inner = ["global_load_dword v3, v[4:5], off", "s_cbranch_vccnz .LBB0_3"]
    assert texts(hip_loop(NESTED.replace("v_exp_f32_e32", "v_mov_b32"))) == inner


def test_jump_backwards_alone_makes_no_loop_of_llvm():
    without = "\n".join(line for line in NESTED.splitlines() if "Loop" not in line or line.startswith((".", ";")))
    without = without.replace("in Loop", "").replace("Parent Loop", "")
    assert len(texts(hip_loop(without))) == 8
