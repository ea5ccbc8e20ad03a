"""The kernels of a device channel in Triton: one rings, one waits. `blockdex_device.cuh` has the same in CUDA.

Numbers that other processors write are read and written with PTX, since Triton has no plain load or store of a scope.
Scalars of such a load may differ from warp to warp; what is decided by them goes through an atomic of one thread first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockdex.ring.channel_layout import CONTROL_AT, INVALID_LENGTHS, REFUSED, TIMED_OUT, UNANSWERED
from blockdex.ring.layout import AT, HEADER_BYTES, SLOT_BYTES

LOOK_NANOSECONDS = tl.constexpr(20_000)
"""How often a wait looks into the host's memory, where refusals are."""

_ANSWERED, _WRITTEN = tl.constexpr(CONTROL_AT["answered"]), tl.constexpr(CONTROL_AT["written"])
_ERROR, _ARRIVED = tl.constexpr(CONTROL_AT["error"]), tl.constexpr(CONTROL_AT["arrived"])
_REGION = tl.constexpr(CONTROL_AT["region"])
_REQUESTS_WRITTEN, _CHANNEL_ERROR = tl.constexpr(AT["requests_written"]), tl.constexpr(AT["channel_error"])
_ANSWERS_WRITTEN, _ANSWERS_READ = tl.constexpr(AT["answers_written"]), tl.constexpr(AT["answers_read"])
_SLOTS, _SLOT_BYTES = tl.constexpr(HEADER_BYTES), tl.constexpr(SLOT_BYTES)
_TIMED_OUT, _REFUSED = tl.constexpr(TIMED_OUT), tl.constexpr(REFUSED)
_UNANSWERED, _INVALID_LENGTHS = tl.constexpr(UNANSWERED), tl.constexpr(INVALID_LENGTHS)
_TILE_TOKENS = tl.constexpr(16)


@triton.jit
def now():
    """Nanoseconds of the GPU's clock."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], tl.int64, is_pure=False, pack=1)


@triton.jit
def load_acquire(address):
    """An int64 that any processor of the system may write."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.u64 $0, [$1];", "=l,l", [address], tl.int64, is_pure=False, pack=1
    )


@triton.jit
def store_release(address, number):
    """Shows an int64 to every processor of the system, and all that the program wrote before."""
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first st.release.sys.global.u64 [$1], $2;
        mov.u32 $0, thread;
        }""",
        "=r,l,l",
        [address, number],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _at(address, TYPE: tl.constexpr):
    return address.to(tl.pointer_type(TYPE))


@triton.jit
def _die(memory, segment, error):
    """Every later kernel of the channel finds this."""
    tl.store(_at(memory + _ERROR, tl.int32), error)
    tl.store(_at(segment + _CHANNEL_ERROR, tl.int32), error)


@triton.jit
def _copy_rows(source, target, from_row, to_row, live, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of WIDTH words."""
    column = tl.arange(0, COLUMNS)[None, :]
    mask = live[:, None] & (column < WIDTH)
    words = tl.load(source.to(tl.pointer_type(tl.int32)) + from_row[:, None] * WIDTH + column, mask=mask, other=0)
    tl.store(_at(target, tl.int32) + to_row[:, None] * WIDTH + column, words, mask=mask)


@triton.jit
def _write_request(
    memory,
    segment,
    number,
    ids,
    starts,
    lengths,
    revisions,
    replays,
    rows,
    kind,
    layer,
    heads,
    columns_at,
    keys_offset,
    queries_offset,
    ids_offset,
    KEY_BYTES: tl.constexpr,
    QUERY_BYTES: tl.constexpr,
    HAS_REVISIONS: tl.constexpr,
    HAS_REPLAYS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Columns of the rows that are there, and the slot before them."""
    row = tl.arange(0, ROWS)
    inside = row < rows
    length = tl.load(lengths + row, mask=inside, other=0).to(tl.int64)
    live = length > 0
    place = tl.cumsum(live.to(tl.int32), 0) - 1
    count = tl.sum(live.to(tl.int32), 0).to(tl.int64)
    tokens = tl.sum(length, 0)
    column = _at(segment + columns_at, tl.int64) + place
    revision = tl.zeros([ROWS], tl.int64)
    if HAS_REVISIONS:
        revision += tl.load(revisions + row, mask=live, other=0).to(tl.int64)
    if HAS_REPLAYS:
        revision += tl.load(replays).to(tl.int64)
    tl.store(column, tl.load(ids + row, mask=live, other=0).to(tl.int64), mask=live)
    tl.store(column + count, tl.load(starts + row, mask=live, other=0).to(tl.int64), mask=live)
    tl.store(column + 2 * count, length, mask=live)
    tl.store(column + 3 * count, revision, mask=live)
    region = tl.load(_at(memory + _REGION, tl.int32)).to(tl.int64)
    # A word of a slot each, as docs/ring.md has them.
    word = tl.arange(0, 32)
    value = tl.where(word == 0, number, 0)
    value = tl.where(word == 1, kind, value)
    value = tl.where(word == 5, layer | (count << 32), value)
    value = tl.where(word == 6, heads, value)
    value = tl.where(word == 11, (32 * count + 63) // 64 * 64, value)
    value = tl.where(word == 12, KEY_BYTES * tokens, value)
    value = tl.where(word == 13, QUERY_BYTES * tokens, value)
    value = tl.where(word == 14, (region if KEY_BYTES else 0) | ((region << 32) if QUERY_BYTES else 0), value)
    value = tl.where(word == 15, region if QUERY_BYTES else 0, value)
    value = tl.where(word == 16, keys_offset if KEY_BYTES else 0, value)
    value = tl.where(word == 17, queries_offset if QUERY_BYTES else 0, value)
    value = tl.where(word == 18, ids_offset if QUERY_BYTES else 0, value)
    slot = segment + _SLOTS + ((number - 1) % SLOTS) * _SLOT_BYTES
    tl.store(_at(slot, tl.int64) + word, value)


@triton.jit(
    do_not_specialize=[
        *("memory", "segment", "rows", "row_tokens", "kind", "layer", "heads"),
        *("columns_at", "own_keys", "own_queries"),
    ]
)
def ring(
    memory,
    segment,
    keys,
    queries,
    ids,
    starts,
    lengths,
    revisions,
    replays,
    rows,
    row_tokens,
    kind,
    layer,
    heads,
    columns_at,
    own_keys,
    own_queries,
    TOKEN_PLACES: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    QUERY_BYTES: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    HAS_REVISIONS: tl.constexpr,
    HAS_REPLAYS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Copies keys and queries into the channel's memory, packed, writes the request, and shows it to the core.

    Args:
        memory, segment: addresses of the channel's memory, and of its segment as this GPU finds it.
        keys, queries: bfloat16 `[rows, row_tokens, D]` and `[rows, row_tokens, H, D]`.
        ids, starts, lengths, revisions: `[rows]`; a row of length 0 is padding.
        replays: `[1]`, added to each revision.
        kind: words 8 to 15 of the slot; `layer` and `heads`: those of 40 and of 48.
        columns_at: offset of the requests' arena.
        own_keys, own_queries: their offset in the channel's memory where they lie there, or -1.
    """
    written_at = _at(memory + _WRITTEN, tl.int64)
    written = tl.load(written_at)
    answered = load_acquire(memory + _ANSWERED)
    row = tl.arange(0, ROWS)
    length = tl.load(lengths + row, mask=row < rows, other=0).to(tl.int64)
    first = tl.cumsum(length, 0) - length
    dead = tl.load(_at(memory + _ERROR, tl.int32))
    invalid = tl.sum(((length < 0) | (length > row_tokens)).to(tl.int32), 0)
    if dead == 0:
        if answered != written:
            _die(memory, segment, _UNANSWERED)
        elif invalid > 0:
            _die(memory, segment, _INVALID_LENGTHS)
        else:
            # What lies in the channel's memory already, row behind row, is not copied.
            is_packed = tl.sum(((length > 0) & (first != row * row_tokens)).to(tl.int32), 0) == 0
            tiles = (row_tokens + _TILE_TOKENS - 1) // _TILE_TOKENS
            for tile in range(tl.program_id(0), rows * tiles, PROGRAMS):
                own = tile // tiles
                token = (tile % tiles) * _TILE_TOKENS + tl.arange(0, _TILE_TOKENS)
                live = token < tl.sum(tl.where(row == own, length, 0), 0)
                to_row = tl.sum(tl.where(row < own, length, 0), 0) + token
                from_row = (own * row_tokens + token).to(tl.int64)
                place = tl.where(live, to_row, -1).to(tl.int32)
                tl.store(_at(memory + TOKEN_PLACES, tl.int32) + from_row, place, mask=token < row_tokens)
                if KEY_BYTES:
                    if not (is_packed & (own_keys >= 0)):
                        _copy_rows(keys, memory + KEYS, from_row, to_row, live, KEY_BYTES // 4, KEY_COLUMNS)
                if QUERY_BYTES:
                    if not (is_packed & (own_queries >= 0)):
                        _copy_rows(queries, memory + QUERIES, from_row, to_row, live, QUERY_BYTES // 4, QUERY_COLUMNS)
            arrived = 0
            if PROGRAMS > 1:
                tl.debug_barrier()
                arrived = tl.atomic_add(_at(memory + _ARRIVED, tl.int32), 1, sem="acq_rel", scope="gpu")
            if arrived == PROGRAMS - 1:
                tl.store(_at(memory + _ARRIVED, tl.int32), 0)
                # Without any row there is nothing to ask.
                if tl.sum(length, 0) > 0:
                    _write_request(
                        memory,
                        segment,
                        written + 1,
                        ids,
                        starts,
                        lengths,
                        revisions,
                        replays,
                        rows,
                        kind.to(tl.int64),
                        layer.to(tl.int64),
                        heads.to(tl.int64),
                        columns_at,
                        tl.where(is_packed & (own_keys >= 0), own_keys, KEYS),
                        tl.where(is_packed & (own_queries >= 0), own_queries, QUERIES),
                        BLOCK_IDS,
                        KEY_BYTES,
                        QUERY_BYTES,
                        HAS_REVISIONS,
                        HAS_REPLAYS,
                        ROWS,
                        SLOTS,
                    )
                    tl.store(written_at, written + 1)
                    store_release(segment + _REQUESTS_WRITTEN, written + 1)


@triton.jit(do_not_specialize=["memory", "segment", "tokens", "bound"])
def wait(
    memory,
    segment,
    block_ids,
    tokens,
    bound,
    TOKEN_PLACES: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Waits until the last request is answered, and copies its block ids out: -1 for padding, and after an error.

    Args:
        memory, segment: as `ring` has them.
        block_ids: int32 `[tokens, WIDTH]`.
        bound: nanoseconds after which the channel is dead.
    """
    error_at = _at(memory + _ERROR, tl.int32)
    number = tl.load(_at(memory + _WRITTEN, tl.int64))
    before = tl.load(error_at)
    error = before
    begin = now()
    looked = begin
    while (load_acquire(memory + _ANSWERED) != number) & (error == 0):
        time = now()
        if time - looked > LOOK_NANOSECONDS:
            looked = time
            refusals = load_acquire(segment + _ANSWERS_WRITTEN) - load_acquire(segment + _ANSWERS_READ)
            error = load_acquire(segment + _CHANNEL_ERROR).to(tl.int32)
            if (error == 0) & (refusals != 0):
                error = _REFUSED
            if (error == 0) & (time - begin > bound):
                error = _TIMED_OUT
    # What the first thread has found holds for all of them.
    tl.atomic_max(error_at, error, sem="acq_rel", scope="sys")
    error = tl.atomic_or(error_at, 0, sem="acq_rel", scope="sys")
    if error != before:
        tl.store(_at(segment + _CHANNEL_ERROR, tl.int32), error)
    if WIDTH:
        column = tl.arange(0, COLUMNS)[None, :]
        for begin_token in range(0, tokens, _TILE_TOKENS):
            token = begin_token + tl.arange(0, _TILE_TOKENS)
            inside = token < tokens
            place = tl.load(_at(memory + TOKEN_PLACES, tl.int32) + token, mask=inside, other=-1)
            place = tl.where(error == 0, place, -1)
            mask = inside[:, None] & (column < WIDTH)
            source = _at(memory + BLOCK_IDS, tl.int32) + place[:, None].to(tl.int64) * WIDTH + column
            row = tl.load(source, mask=mask & (place >= 0)[:, None], other=-1)
            tl.store(block_ids + token[:, None].to(tl.int64) * WIDTH + column, row, mask=mask)
