"""One call of a device channel: checked, then rung and awaited by two kernels on the current stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from blockdex.contract.messages import Order
from blockdex.device_channel import kernels
from blockdex.device_channel.memory import ChannelMemory
from blockdex.ring.channel_layout import REQUEST_SLOTS
from blockdex.ring.layout import DTYPES, ORDERS, RAW_SCORES, RETURN_SCORES, ROLLBACK, TOKENS, WAIT_FOR_KEYS
from blockdex_kernels import IndexSpec
from blockdex_kernels.triton.launch import pdl_launch

_NUMBERS = {
    torch.bfloat16: DTYPES.index("bf16") + 1,
    torch.float16: DTYPES.index("fp16") + 1,
    torch.float32: DTYPES.index("fp32") + 1,
    torch.float8_e4m3fn: DTYPES.index("fp8_e4m3") + 1,
}
"""Of the dtypes of keys and queries, as slots have them."""
_DTYPES = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NUMBERS)
_INTEGERS = (torch.int32, torch.int64, torch.uint64)
_TILE_TOKENS = 16
"""Of a program at a time: what it has loads on their way for."""
_MOST_PROGRAMS = 64
_RING_WARPS, _WAIT_WARPS = 4, 4


@dataclass(frozen=True, slots=True)
class Heads:
    """Which heads the queries of a channel have.

    Attributes:
        first: the first one.
        count: how many.
    """

    first: int
    count: int


@dataclass(slots=True)
class Call:
    """Rows of up to `row_tokens` tokens each; a row of length 0 is padding.

    Attributes:
        layer: of the indexer.
        ids, starts, lengths: integers `[rows]` on the device, read when the kernels run: sequence ids, first positions
            and numbers of tokens.
        keys: `[rows, row_tokens, D]`, bfloat16, float16, float32 or float8_e4m3fn, or None.
        queries: `[rows, row_tokens, H, D]`, of any of these, or None.
        revisions: integers `[rows]`, or None.
        replays: an integer `[1]` that is added to each revision, or None.
        order: of block ids.
        scores: float32 `[rows, row_tokens, H, topk]` to be filled with those of the block ids, or None.
        raw_scores: whether these are as they rank.
        rollback, wait_for_keys: flags of the request.
        pool: whose rows `ids` are numbers of; 0: they are sequences'.
    """

    layer: int
    ids: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    keys: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    revisions: torch.Tensor | None = None
    replays: torch.Tensor | None = None
    order: Order = "ascending"
    scores: torch.Tensor | None = None
    raw_scores: bool = False
    rollback: bool = False
    wait_for_keys: bool = False
    pool: int = 0

    @property
    def rows(self) -> int:
        """How many there are, padding included."""
        return len(self.ids)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row at most."""
        tensor = self.keys if self.queries is None else self.queries
        assert tensor is not None
        return tensor.shape[1]


def check(call: Call, device: torch.device, spec: IndexSpec, heads: Heads, max_tokens: int, max_rows: int) -> None:
    """What can be told without reading the tensors.

    Raises:
        ValueError: a shape, dtype, device or layout is not what the channel was opened for.
    """
    if not 0 <= call.layer < spec.num_layers:
        raise ValueError(f"layer must be below {spec.num_layers}, got {call.layer}")
    if not 1 <= call.rows <= max_rows:
        raise ValueError(f"sequences: the channel was opened for 1 to {max_rows} rows, got {call.rows}")
    _check_numbers(call, device)
    _check_tensors(call, device, spec, heads)
    if not 0 <= call.pool < 1 << 63:
        raise ValueError(f"pool must be 0 to {(1 << 63) - 1}, got {call.pool}")
    if call.order not in ORDERS:
        raise ValueError(f"order: must be one of {', '.join(ORDERS)}, got {call.order!r}")
    if call.raw_scores and call.scores is None:
        raise ValueError("scores: must be given where they are to be raw")
    if not 1 <= call.rows * call.row_tokens <= max_tokens:
        tokens = f"{call.rows} x {call.row_tokens}"
        raise ValueError(f"tokens: the channel was opened for 1 to {max_tokens}, got {tokens}")


def _check_numbers(call: Call, device: torch.device) -> None:
    for name in ("ids", "starts", "lengths", "revisions", "replays"):
        numbers = getattr(call, name)
        if numbers is None:
            continue
        expected = (1,) if name == "replays" else (call.rows,)
        if tuple(numbers.shape) != expected or numbers.dtype not in _INTEGERS:
            raise ValueError(f"{name}: must be int32 or int64 {list(expected)}, got {_described(numbers)}")
        _check_place(name, numbers, device)


def _check_tensors(call: Call, device: torch.device, spec: IndexSpec, heads: Heads) -> None:
    for name, tensor, tail in (
        ("keys", call.keys, (spec.head_dim,)),
        ("queries", call.queries, (heads.count, spec.head_dim)),
    ):
        if tensor is None:
            continue
        if tensor.ndim != 2 + len(tail) or tensor.shape[0] != call.rows or tuple(tensor.shape[2:]) != tail:
            shape = ", ".join(map(str, (call.rows, "tokens", *tail)))
            raise ValueError(f"{name}: must be [{shape}], got {_described(tensor)}")
        if tensor.dtype not in _NUMBERS:
            raise ValueError(f"{name}: must be one of {_DTYPES}, got {_described(tensor)}")
        _check_place(name, tensor, device)
    if call.keys is not None and call.queries is not None and call.keys.shape[1] != call.queries.shape[1]:
        raise ValueError(f"keys and queries: tokens of a row differ, {call.keys.shape[1]} and {call.queries.shape[1]}")


def _check_place(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: must be on {device}, is on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: must be contiguous")


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


class Words(NamedTuple):
    """What the kernels write of a call as it is.

    Attributes:
        kind: bytes 8 to 15 of the slot.
        heads: bytes 48 to 55.
        key_bytes, query_bytes: of a token; 0 for none.
        own_keys, own_queries: their offset in the channel's memory where they lie there, or -1.
    """

    kind: int
    heads: int
    key_bytes: int
    query_bytes: int
    own_keys: int
    own_queries: int


def words_of(memory: ChannelMemory, spec: IndexSpec, heads: Heads, call: Call) -> Words:
    """Those of a call that was checked."""
    keys, queries = (None if each is None else each.dtype for each in (call.keys, call.queries))
    dtypes = (_NUMBERS[keys] if keys else 0) << 16 | (_NUMBERS[queries] if queries else 0) << 24
    wants = 0 if call.scores is None else RAW_SCORES if call.raw_scores else RETURN_SCORES
    flags = wants | ROLLBACK * call.rollback | WAIT_FOR_KEYS * call.wait_for_keys
    order = ORDERS.index(call.order) + 1
    return Words(
        TOKENS | dtypes | order << 32 | flags << 40,
        heads.first | heads.count << 32 if queries else 0,
        keys.itemsize * spec.head_dim if keys else 0,
        queries.itemsize * spec.head_dim * heads.count if queries else 0,
        *(-1 if tensor is None else memory.offset_of(tensor) for tensor in (call.keys, call.queries)),
    )


def launch(
    memory: ChannelMemory,
    spec: IndexSpec,
    heads: Heads,
    call: Call,
    block_ids: torch.Tensor | None,
    bound_seconds: float,
) -> None:
    """Rings, and waits, on the current stream.

    Args:
        memory: the channel's.
        spec: of the indexer.
        heads: of the queries.
        call: checked.
        block_ids: int32 `[rows, row_tokens, H, topk]`; None for a call without queries.
        bound_seconds: after which the channel is dead.
    """
    words = words_of(memory, spec, heads, call)
    tokens = call.rows * call.row_tokens
    tile = min(_power_of_two(tokens), _TILE_TOKENS)
    programs = min(-(-tokens // tile), _MOST_PROGRAMS)
    pdl = memory.device.type == "cuda" and torch.cuda.get_device_capability(memory.device) >= (9, 0)
    places = memory.places
    kernels.ring[(programs,)](
        memory.address,
        memory.words,
        memory.segment_address,
        _in_words(call.keys),
        _in_words(call.queries),
        call.ids,
        call.starts,
        call.lengths,
        call.revisions,
        call.replays,
        call.rows,
        call.row_tokens,
        words.kind,
        call.layer,
        words.heads,
        call.pool,
        memory.segment.request_arena_offset,
        words.own_keys,
        words.own_queries,
        TOKEN_PLACES=places.token_places,
        KEYS=places.keys,
        QUERIES=places.queries,
        BLOCK_IDS=places.block_ids,
        SCORES=0 if call.scores is None else places.scores,
        KEY_BYTES=words.key_bytes,
        QUERY_BYTES=words.query_bytes,
        KEY_COLUMNS=_power_of_two(words.key_bytes // 4),
        QUERY_COLUMNS=_power_of_two(words.query_bytes // 4),
        HAS_REVISIONS=call.revisions is not None,
        HAS_REPLAYS=call.replays is not None,
        HAS_OWN=max(words.own_keys, words.own_queries) >= 0,
        ROWS=_power_of_two(call.rows),
        TOKENS=tile,
        SLOTS=REQUEST_SLOTS,
        PROGRAMS=programs,
        PDL=pdl,
        num_warps=_RING_WARPS,
        **pdl_launch(pdl),
    )
    width = 0 if block_ids is None else heads.count * spec.topk
    warps = 1 if tokens <= _TILE_TOKENS else _WAIT_WARPS
    kernels.wait[(1,)](
        memory.address,
        memory.words,
        memory.segment_address,
        block_ids,
        _in_words(call.scores),
        tokens if width else 0,
        int(1e9 * bound_seconds),
        TOKEN_PLACES=places.token_places,
        BLOCK_IDS=places.block_ids,
        SCORES=0 if call.scores is None else places.scores,
        WIDTH=width,
        COLUMNS=_power_of_two(width),
        TOKENS=tile,
        WARPS=warps,
        PDL=pdl,
        num_warps=warps,
        **pdl_launch(pdl),
    )


def _in_words(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same as int32, so that the kernels are the same for every dtype."""
    return None if tensor is None else tensor.view(torch.int32)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
