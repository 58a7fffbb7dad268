"""The access patterns of the kernels without their arithmetic: what a shape of program reaches at best."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "chunk"])
def forward_pattern(
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    y_ptr,  # [B, T, C]; None: a summary is wanted
    final_ptr,  # [B * chunks, C]
    T,
    chunk,  # tokens a program, a multiple of ROWS
    C: tl.constexpr,  # a multiple of BLOCK_C
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Read two streams and write their sum; as a summary write the sum over each chunk alone."""
    chunks = T // chunk
    row = tl.program_id(0).to(tl.int64)  # of B * chunks
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.arange(0, ROWS)[:, None] * C + c[None, :]
    start = (row // chunks * T + row % chunks * chunk) * C
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for _ in tl.range(0, chunk, ROWS, num_stages=STAGES):
        both = tl.load(k_ptr + start + tile).to(tl.float32) + tl.load(v_ptr + start + tile).to(tl.float32)
        if y_ptr is None:
            total += both
        else:
            tl.store(y_ptr + start + tile, both.to(y_ptr.dtype.element_ty))
        start += ROWS * C
    if y_ptr is None:
        tl.store(final_ptr + row * C + c, tl.sum(total, 0))


@triton.jit(do_not_specialize=["T"])
def backward_pattern(
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    gy_ptr,  # [B, T, C]
    checkpoint_ptr,  # [B, 3 * T / ROWS, C]
    gk_ptr,  # [B, T, C]
    gv_ptr,  # [B, T, C]
    T,  # a multiple of ROWS
    C: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Read three streams from the last token to the first, and three numbers a tile; write two streams."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.arange(0, ROWS)[:, None] * C + c[None, :]
    start = (b + 1) * T * C
    checkpoint_ptr += (b + 1) * (T // ROWS) * 3 * C + c
    for _ in tl.range(0, T, ROWS, num_stages=STAGES):
        start -= ROWS * C
        checkpoint_ptr -= 3 * C
        state = tl.load(checkpoint_ptr) + tl.load(checkpoint_ptr + C) + tl.load(checkpoint_ptr + 2 * C)
        both = tl.load(k_ptr + start + tile).to(tl.float32) + tl.load(v_ptr + start + tile).to(tl.float32)
        gy = tl.load(gy_ptr + start + tile).to(tl.float32)
        tl.store(gk_ptr + start + tile, (both + state[None, :]).to(gk_ptr.dtype.element_ty))
        tl.store(gv_ptr + start + tile, (both * gy).to(gv_ptr.dtype.element_ty))
