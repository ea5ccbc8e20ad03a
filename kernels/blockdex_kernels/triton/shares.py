"""Equal shares of the work of runs of many queries, which programs find from the spans on the device.

The rows of a run (query, head) are cut into tiles. Laid end to end, the tiles of all runs are a line of units of work:
a few for each tile, whose queries are to be fetched, and one for each of its blocks. A program's share is a piece of
that line. Every function here is one of a Gluon kernel, of numbers alone.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TILE = gl.constexpr(256)
"""Rows of a tile."""
_TILE_UNITS = gl.constexpr(2)
"""Blocks that would take as long as it takes to begin with a tile."""


@gluon.jit
def needed_blocks(tile, start, rows, heads, BLOCK: gl.constexpr, PLACES: gl.constexpr, FORCED: gl.constexpr):
    """Blocks that some row of a tile ranks by its score; none where all find a place.

    The tile is given by its number in a run, the run by the position of its first token, its rows and the rows of a
    token; the indexer by the tokens of a block, how many blocks are selected by score (0 where all are to be scored)
    and how many without.
    """
    last_row = gl.minimum((tile + 1) * TILE, rows) - 1
    needed = (start + last_row // heads) // BLOCK + 1 - FORCED
    return gl.where(needed > PLACES, needed, 0)


@gluon.jit
def work_of(start, rows, heads, BLOCK: gl.constexpr, PLACES: gl.constexpr, FORCED: gl.constexpr):
    """Units of a run, its tiles, how many of them need no block, and what the first and the last of the others need.

    Between those two the blocks grow about evenly, and are counted as if they did so exactly.
    """
    tiles = (rows + TILE - 1) // TILE
    unranked = (PLACES + FORCED) * BLOCK - start  # tokens
    free = gl.minimum(gl.maximum(unranked * heads // TILE, 0), tiles)
    fewest = needed_blocks(free, start, rows, heads, BLOCK, PLACES, FORCED)
    most = needed_blocks(tiles - 1, start, rows, heads, BLOCK, PLACES, FORCED)
    units = tiles * _TILE_UNITS + (tiles - free) * (fewest + most) // 2
    return gl.where(rows > 0, units, 0), tiles, free, fewest, most


@gluon.jit
def place_of(
    unit,
    start,
    rows,
    heads,
    units,
    tiles,
    free,
    fewest,
    most,
    BLOCK: gl.constexpr,
    PLACES: gl.constexpr,
    FORCED: gl.constexpr,
):
    """The tile and the block of it, from the first that is scored on, at which a unit of a run lies.

    One program stops there and the next one begins, and both ask with the same unit. So every block is scored once,
    however even the growth is; and were it off, shares would differ in length and no more. `units` and what follows it
    is what `work_of` returns for the run.
    """
    slope = (most - fewest).to(gl.float32) / gl.maximum(tiles - free - 1, 1).to(gl.float32)
    level = (fewest + _TILE_UNITS).to(gl.float32) - 0.5 * slope
    beyond = gl.maximum(unit - free * _TILE_UNITS, 0).to(gl.float32)
    # Tiles that so many units fill: level * nth + slope / 2 * nth ** 2 of them, solved for nth. Spelled out, since each
    # place that this is compiled in must round alike.
    nth = 2.0 * beyond / (level + gl.sqrt(gl.fma(2.0 * slope, beyond, level * level)))
    whole = nth.to(gl.int32)
    tile = free + whole
    needed = needed_blocks(tile, start, rows, heads, BLOCK, PLACES, FORCED)
    block = ((nth - whole.to(gl.float32)) * needed.to(gl.float32)).to(gl.int32)
    is_free = unit <= free * _TILE_UNITS
    tile = gl.where(is_free, (unit + _TILE_UNITS - 1) // _TILE_UNITS, tile)
    block = gl.where(is_free, 0, block)
    ends = (unit >= units) | (tile >= tiles)
    return gl.where(ends, tiles, tile), gl.where(ends, 0, block)


@gluon.jit
def piece_of(run, unit, left, starts, lengths, heads, BLOCK: gl.constexpr, PLACES: gl.constexpr, FORCED: gl.constexpr):
    """What of a share of `left` units from a unit of a run on lies in that run.

    The run's start and rows, the first tile and the block of it with which the piece begins, the last tile and where
    its blocks end, and the units that are left for the runs behind.
    """
    start = gl.load(starts + run, mask=left > 0, other=0)
    rows = gl.load(lengths + run, mask=left > 0, other=0) * heads
    units, tiles, free, fewest, most = work_of(start, rows, heads, BLOCK, PLACES, FORCED)
    # Nothing of a run is loaded for a share of nothing, which has no units then: the share ends where it begins.
    stop = gl.where(left > 0, gl.minimum(unit + left, units), unit)
    tile, block = place_of(unit, start, rows, heads, units, tiles, free, fewest, most, BLOCK, PLACES, FORCED)
    last, end = place_of(stop, start, rows, heads, units, tiles, free, fewest, most, BLOCK, PLACES, FORCED)
    return start, rows, tile, block, last, end, left - (stop - unit)


@gluon.jit
def _add(left, right):
    return left + right


@gluon.jit
def share_of_program(
    starts,
    lengths,
    num_runs,
    heads,
    RUNS: gl.constexpr,
    BLOCK: gl.constexpr,
    PLACES: gl.constexpr,
    FORCED: gl.constexpr,
):
    """Where the program's share begins, and how long it is: run, first row of that run, unit in it, units in all.

    Last, the rows of all runs.
    """
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    if RUNS == 1:
        all_rows = gl.load(lengths) * heads
        total, _, _, _, _ = work_of(gl.load(starts), all_rows, heads, BLOCK, PLACES, FORCED)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        nth = gl.arange(0, RUNS, layout=layout)
        rows = gl.load(lengths + nth, mask=nth < num_runs, other=0) * heads
        start = gl.load(starts + nth, mask=nth < num_runs, other=0)
        units, _, _, _, _ = work_of(start, rows, heads, BLOCK, PLACES, FORCED)
        total = gl.sum(units, 0)
        all_rows = gl.sum(rows, 0)
    share = total // num_programs
    longer = total - share * num_programs
    unit = program * share + gl.minimum(program, longer)
    share += (program < longer).to(gl.int32)
    if RUNS == 1:
        return 0, 0, unit, share, all_rows
    else:
        before = gl.associative_scan(units, 0, _add) <= unit
        # A share of nothing lies behind all runs.
        run = gl.minimum(gl.sum(before.to(gl.int32), 0), num_runs - 1)
        first_row = gl.sum(gl.where(before, rows, 0), 0)
        return run, first_row, unit - gl.sum(gl.where(before, units, 0), 0), share, all_rows
