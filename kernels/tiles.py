"""How Triton programs are laid over chunks, channels and tiles, and how the rows of a tile come to the lanes."""

import triton
import triton.language as tl


@triton.jit
def chunk_span(T, chunk):
    """Return the number of this program's chunk among B * chunks, its batch row, and its tokens: begin and end."""
    chunks = tl.cdiv(T, chunk)
    chunk_id = tl.program_id(0).to(tl.int64)
    batch = chunk_id // chunks
    begin = (chunk_id % chunks).to(tl.int32) * chunk
    return chunk_id, batch, begin, tl.minimum(begin + chunk, T)


@triton.jit
def block_channels(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the channels of this program's block, and which of them exist."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C) if C % BLOCK_C else tl.full([BLOCK_C], True, tl.int1)
    return c, in_c


@triton.jit
def rows_of(tile, ROWS: tl.constexpr):
    """Return the 4, 8 or 16 rows of a tile [rows, channels], every lane holding a channel of each.

    Read one by one, rows of 32 channels would make loads of 2 or 4 bytes a lane. A tile is read 16 bytes a lane, ahead
    of time where the loop says so (num_stages), and handed over through shared memory.
    """
    C: tl.constexpr = tile.shape[1]
    pieces = (tile,)
    for level in tl.static_range(4):  # no recursion: Triton below 3.5 knows none
        if 2**level < ROWS:
            halves = ()
            for i in tl.static_range(len(pieces)):
                both = tl.reshape(pieces[i], [2, ROWS // 2 ** (level + 1), C])
                upper, lower = tl.split(tl.permute(both, (1, 2, 0)))
                halves = halves + (upper, lower)
            pieces = halves
    rows = ()
    for i in tl.static_range(ROWS):
        rows = rows + (tl.reshape(pieces[i], [C]),)
    return rows


@triton.jit
def tile_of(rows, ptr, ROWS: tl.constexpr):
    """Return the tile of these rows, in the dtype that ``ptr`` points to; the inverse of :func:`rows_of`."""
    C: tl.constexpr = rows[0].shape[0]
    pieces = (tl.reshape(rows[0].to(ptr.dtype.element_ty), [1, C]),)
    for i in tl.static_range(1, ROWS):
        pieces = pieces + (tl.reshape(rows[i].to(ptr.dtype.element_ty), [1, C]),)
    for level in tl.static_range(4):
        if 2**level < ROWS:
            joined = ()
            for i in tl.static_range(len(pieces) // 2):
                both = tl.permute(tl.join(pieces[2 * i], pieces[2 * i + 1]), (2, 0, 1))
                joined = joined + (tl.reshape(both, [2 ** (level + 1), C]),)
            pieces = joined
    return pieces[0]


@triton.jit
def tile_offsets(rows, block, BLOCK_C: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr):
    """Return how far the parts of a block's numbers of these rows are from number 0 of row 0, and which exist."""
    columns = block * (BLOCK_C * PARTS) + tl.arange(0, BLOCK_C * PARTS)
    inside = (columns < C * PARTS) if C % BLOCK_C else tl.full([BLOCK_C * PARTS], True, tl.int1)
    offsets = rows[:, None] * (STEP * PARTS) + columns[None, :]
    inside = inside[None, :]
    return offsets, inside


@triton.jit
def numbers_of(tile, ROWS: tl.constexpr, like):
    """Return the rows of a tile of numbers [rows, channels * parts], each in the form and dtype of ``like``."""
    PARTS: tl.constexpr = len(like)
    if PARTS == 2:
        re, im = tl.split(tl.reshape(tile, [ROWS, tile.shape[1] // 2, 2]))
        parts = (rows_of(re, ROWS), rows_of(im, ROWS))
    else:
        parts = (rows_of(tile, ROWS),)
    rows = ()
    for i in tl.static_range(ROWS):
        row = ()
        for part in tl.static_range(PARTS):
            row = row + (parts[part][i].to(like[0].dtype),)
        rows = rows + (row,)
    return rows


@triton.jit
def _part_of(rows, part: tl.constexpr, ROWS: tl.constexpr):
    column = ()
    for i in tl.static_range(ROWS):
        column = column + (rows[i][part],)
    return column


@triton.jit
def tile_of_numbers(rows, ptr, ROWS: tl.constexpr):
    """Return the tile of these rows of numbers, in the dtype that ``ptr`` points to."""
    re = tile_of(_part_of(rows, 0, ROWS), ptr, ROWS)
    if len(rows[0]) == 2:
        im = tile_of(_part_of(rows, 1, ROWS), ptr, ROWS)
        return tl.reshape(tl.join(re, im), [ROWS, 2 * re.shape[1]])
    else:
        return re
