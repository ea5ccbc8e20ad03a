"""The kernels of a device channel in Triton: one rings, one waits. `blockdex_device.cuh` has the same in CUDA.

Numbers that other processors write are read and written with PTX, since Triton has no plain load or store of a scope.
Scalars of such a load may differ from warp to warp; where there are several, what is decided by them goes through an
atomic of one thread first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockdex.ring.channel_layout import CONTROL_AT, INVALID_LENGTHS, REFUSED, TIMED_OUT, UNANSWERED
from blockdex.ring.layout import AT, HEADER_BYTES, SLOT_BYTES
from blockdex_kernels.triton.launch import wait_for_previous

LOOK_NANOSECONDS = tl.constexpr(20_000)
"""How often a wait looks into the host's memory, where refusals are."""

_ANSWERED, _WRITTEN = tl.constexpr(CONTROL_AT["answered"]), tl.constexpr(CONTROL_AT["written"])
_ERROR, _ARRIVED = tl.constexpr(CONTROL_AT["error"]), tl.constexpr(CONTROL_AT["arrived"])
_REGION = tl.constexpr(CONTROL_AT["region"])
_REQUESTS_WRITTEN, _CHANNEL_ERROR = tl.constexpr(AT["requests_written"]), tl.constexpr(AT["channel_error"])
_ANSWERS_WRITTEN, _ANSWERS_READ = tl.constexpr(AT["answers_written"]), tl.constexpr(AT["answers_read"])
_SLOTS, _SLOT_BYTES = tl.constexpr(HEADER_BYTES), tl.constexpr(SLOT_BYTES)
_TIMED_OUT, _REFUSED = tl.constexpr(TIMED_OUT), tl.constexpr(REFUSED)
_MINUS_INFINITY = tl.constexpr(-0x800000)
"""Of float32, as int32."""
_UNANSWERED, _INVALID_LENGTHS = tl.constexpr(UNANSWERED), tl.constexpr(INVALID_LENGTHS)


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
def _load_words(source, row, inside, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of WIDTH words."""
    column = tl.arange(0, COLUMNS)[None, :]
    there = source.to(tl.pointer_type(tl.int32)) + row[:, None].to(tl.int64) * WIDTH + column
    return tl.load(there, mask=inside[:, None] & (column < WIDTH), other=0)


@triton.jit
def _store_words(target, loaded, row, inside, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of WIDTH words."""
    column = tl.arange(0, COLUMNS)[None, :]
    there = target + row[:, None].to(tl.int64) * WIDTH + column
    tl.store(there, loaded, mask=inside[:, None] & (column < WIDTH))


@triton.jit
def _write_request(
    segment,
    number,
    row_id,
    start,
    length,
    revision,
    region,
    kind,
    layer,
    heads,
    pool,
    columns_at,
    keys_offset,
    queries_offset,
    ids_offset,
    SCORES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    QUERY_BYTES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Columns of the rows that are there, and the slot before them."""
    live = length > 0
    place = tl.cumsum(live.to(tl.int32), 0) - 1
    count = tl.sum(live.to(tl.int32), 0).to(tl.int64)
    tokens = tl.sum(length, 0)
    column = _at(segment + columns_at, tl.int64) + place
    tl.store(column, row_id, mask=live)
    tl.store(column + count, start, mask=live)
    tl.store(column + 2 * count, length, mask=live)
    tl.store(column + 3 * count, revision, mask=live)
    # A word of a slot each, as docs/ring.md has them.
    word = tl.arange(0, 32)
    value = tl.where(word == 0, number, 0)
    value = tl.where(word == 1, kind, value)
    value = tl.where(word == 5, layer | (count << 32), value)
    value = tl.where(word == 6, heads, value)
    value = tl.where(word == 7, pool, value)
    value = tl.where(word == 11, (32 * count + 63) // 64 * 64, value)
    value = tl.where(word == 12, KEY_BYTES * tokens, value)
    value = tl.where(word == 13, QUERY_BYTES * tokens, value)
    value = tl.where(word == 14, (region if KEY_BYTES else 0) | ((region << 32) if QUERY_BYTES else 0), value)
    value = tl.where(word == 15, (region if QUERY_BYTES else 0) | ((region << 32) if SCORES else 0), value)
    value = tl.where(word == 16, keys_offset if KEY_BYTES else 0, value)
    value = tl.where(word == 17, queries_offset if QUERY_BYTES else 0, value)
    value = tl.where(word == 18, ids_offset if QUERY_BYTES else 0, value)
    value = tl.where(word == 19, SCORES, value)
    slot = segment + _SLOTS + ((number - 1) % SLOTS) * _SLOT_BYTES
    tl.store(_at(slot, tl.int64) + word, value)


@triton.jit(
    do_not_specialize=[
        *("memory", "segment", "rows", "row_tokens", "kind", "layer", "heads", "pool"),
        *("columns_at", "own_keys", "own_queries"),
    ]
)
def ring(
    memory,
    words,
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
    pool,
    columns_at,
    own_keys,
    own_queries,
    TOKEN_PLACES: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
    SCORES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    QUERY_BYTES: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    HAS_REVISIONS: tl.constexpr,
    HAS_REPLAYS: tl.constexpr,
    HAS_OWN: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Copies keys and queries into the channel's memory, packed, writes the request, and shows it to the core.

    All that a program reads for its first TOKENS tokens, and for the request, is on its way at once. Nothing is written
    before the channel is known to be alive, and its last request to be answered: the core may be reading.

    Args:
        memory, segment: addresses of the channel's memory, and of its segment as this GPU finds it.
        words: the memory again, int32.
        keys, queries: `[rows, row_tokens, D]` and `[rows, row_tokens, H, D]`, as int32.
        ids, starts, lengths, revisions: `[rows]`; a row of length 0 is padding.
        replays: `[1]`, added to each revision.
        kind: bytes 8 to 15 of the slot; `layer`, `heads`, `pool`: those from 40, 48 and 56 on.
        columns_at: offset of the requests' arena.
        own_keys, own_queries: their offset in the channel's memory where they lie there, or -1.
    """
    wait_for_previous(PDL)
    KEY_WORDS: tl.constexpr = KEY_BYTES // 4
    QUERY_WORDS: tl.constexpr = QUERY_BYTES // 4
    written_at = _at(memory + _WRITTEN, tl.int64)
    written = tl.load(written_at)
    answered = load_acquire(memory + _ANSWERED)
    dead = tl.load(_at(memory + _ERROR, tl.int32))
    region = tl.load(_at(memory + _REGION, tl.int32)).to(tl.int64)
    row = tl.arange(0, ROWS)
    inside = row < rows
    length = tl.load(lengths + row, mask=inside, other=0).to(tl.int64)
    row_id = tl.load(ids + row, mask=inside, other=0).to(tl.int64)
    start = tl.load(starts + row, mask=inside, other=0).to(tl.int64)
    revision = tl.zeros([ROWS], tl.int64)
    if HAS_REVISIONS:
        revision += tl.load(revisions + row, mask=inside, other=0).to(tl.int64)
    if HAS_REPLAYS:
        revision += tl.load(replays).to(tl.int64)
    total = rows * row_tokens
    begin = tl.program_id(0) * TOKENS
    token = begin + tl.arange(0, TOKENS)
    own_length = tl.load(lengths + token // row_tokens, mask=token < total, other=0).to(tl.int64)
    if KEY_BYTES:
        key = _load_words(keys, token, token < total, KEY_WORDS, KEY_COLUMNS)
    if QUERY_BYTES:
        query = _load_words(queries, token, token < total, QUERY_WORDS, QUERY_COLUMNS)
    invalid = tl.sum(((length < 0) | (length > row_tokens)).to(tl.int32), 0)
    if dead == 0:
        if answered != written:
            _die(memory, segment, _UNANSWERED)
        elif invalid > 0:
            _die(memory, segment, _INVALID_LENGTHS)
        else:
            copies_keys = True
            copies_queries = True
            if HAS_OWN:
                # What lies in the channel's memory already, row behind row, is not copied.
                first = tl.cumsum(length, 0) - length
                is_packed = tl.sum(((length > 0) & (first != row * row_tokens)).to(tl.int32), 0) == 0
                copies_keys = (is_packed & (own_keys >= 0)) == 0
                copies_queries = (is_packed & (own_queries >= 0)) == 0
            for tile_begin in range(begin, total, PROGRAMS * TOKENS):
                if tile_begin != begin:
                    token = tile_begin + tl.arange(0, TOKENS)
                    own_length = tl.load(lengths + token // row_tokens, mask=token < total, other=0).to(tl.int64)
                    if KEY_BYTES:
                        key = _load_words(keys, token, token < total, KEY_WORDS, KEY_COLUMNS)
                    if QUERY_BYTES:
                        query = _load_words(queries, token, token < total, QUERY_WORDS, QUERY_COLUMNS)
                live = token % row_tokens < own_length
                before = tl.sum(tl.minimum(tl.maximum(tile_begin - row * row_tokens, 0).to(tl.int64), length), 0)
                place = before.to(tl.int32) + tl.cumsum(live.to(tl.int32), 0) - 1
                tl.store(_at(memory + TOKEN_PLACES, tl.int32) + token, tl.where(live, place, -1), mask=token < total)
                if KEY_BYTES:
                    if copies_keys:
                        _store_words(words + KEYS // 4, key, place, live, KEY_WORDS, KEY_COLUMNS)
                if QUERY_BYTES:
                    if copies_queries:
                        _store_words(words + QUERIES // 4, query, place, live, QUERY_WORDS, QUERY_COLUMNS)
            arrived = 0
            if PROGRAMS > 1:
                tl.debug_barrier()
                arrived = tl.atomic_add(_at(memory + _ARRIVED, tl.int32), 1, sem="acq_rel", scope="gpu")
            if arrived == PROGRAMS - 1:
                if PROGRAMS > 1:
                    tl.store(_at(memory + _ARRIVED, tl.int32), 0)
                # Without any row there is nothing to ask.
                if tl.sum(length, 0) > 0:
                    _write_request(
                        segment,
                        written + 1,
                        row_id,
                        start,
                        length,
                        revision,
                        region,
                        kind.to(tl.int64),
                        layer.to(tl.int64),
                        heads.to(tl.int64),
                        pool.to(tl.int64),
                        columns_at,
                        tl.where(copies_keys, KEYS, own_keys),
                        tl.where(copies_queries, QUERIES, own_queries),
                        BLOCK_IDS,
                        SCORES,
                        KEY_BYTES,
                        QUERY_BYTES,
                        SLOTS,
                    )
                    tl.store(written_at, written + 1)
                    store_release(segment + _REQUESTS_WRITTEN, written + 1)


@triton.jit
def _copy_rows(source, target, token, place, inside, missing, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of WIDTH words from their places, `missing` where there is none."""
    column = tl.arange(0, COLUMNS)[None, :]
    mask = inside[:, None] & (column < WIDTH)
    there = source + place[:, None].to(tl.int64) * WIDTH + column
    found = tl.load(there, mask=mask & (place >= 0)[:, None], other=0)
    tl.store(
        target + token[:, None].to(tl.int64) * WIDTH + column, tl.where((place >= 0)[:, None], found, missing), mask
    )


@triton.jit
def _copy_answer(
    words,
    block_ids,
    scores,
    token,
    place,
    inside,
    BLOCK_IDS: tl.constexpr,
    SCORES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Block ids, -1 where there is none, and scores, -inf there."""
    _copy_rows(words + BLOCK_IDS // 4, block_ids, token, place, inside, -1, WIDTH, COLUMNS)
    if SCORES:
        _copy_rows(words + SCORES // 4, scores, token, place, inside, _MINUS_INFINITY, WIDTH, COLUMNS)


@triton.jit(do_not_specialize=["memory", "segment", "tokens", "bound"])
def wait(
    memory,
    words,
    segment,
    block_ids,
    scores,
    tokens,
    bound,
    TOKEN_PLACES: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
    SCORES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Waits until the last request is answered, and copies its answer out: without one for padding, and after an error.

    Args:
        memory, words, segment: as `ring` has them.
        block_ids: int32 `[tokens, WIDTH]`.
        scores: float32, likewise, as int32; where SCORES is not 0.
        bound: nanoseconds after which the channel is dead.
    """
    wait_for_previous(PDL)
    error_at = _at(memory + _ERROR, tl.int32)
    number = tl.load(_at(memory + _WRITTEN, tl.int64))
    dead = tl.load(error_at)
    token = tl.arange(0, TOKENS)
    place = tl.load(_at(memory + TOKEN_PLACES, tl.int32) + token, mask=token < tokens, other=-1)
    error = dead
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
    if WARPS > 1:
        # What the first thread has found holds for all of them.
        tl.atomic_max(error_at, error, sem="relaxed", scope="gpu")
        error = tl.atomic_or(error_at, 0, sem="relaxed", scope="gpu")
    if error != dead:
        _die(memory, segment, error)
    if WIDTH:
        for begin_token in range(0, tokens, TOKENS):
            if begin_token != 0:
                token = begin_token + tl.arange(0, TOKENS)
                place = tl.load(_at(memory + TOKEN_PLACES, tl.int32) + token, mask=token < tokens, other=-1)
            place = tl.where(error == 0, place, -1)
            _copy_answer(words, block_ids, scores, token, place, token < tokens, BLOCK_IDS, SCORES, WIDTH, COLUMNS)
