"""Checks of a request that need no cache: shapes, sizes, bounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import add

from blockdex.contract.errors import FailedPreconditionError, InvalidArgumentError, Reason, ResourceExhaustedError
from blockdex_kernels import IndexSpec

TENANT_KEY = "blockdex-tenant"
"""Metadata entry that names the tenant."""

DEFAULT_TENANT = "default"
"""Whose sequences they are where nobody names a tenant."""

_MAX_TENANT_CHARACTERS = 256
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8_e4m3": 1}


def check_tenant(tenant: str) -> None:
    """Refuses a tenant that is empty, too long, or not printable ASCII, which metadata cannot carry."""
    if not 1 <= len(tenant) <= _MAX_TENANT_CHARACTERS:
        raise InvalidArgumentError(
            f"{TENANT_KEY}: must have 1 to {_MAX_TENANT_CHARACTERS} characters, got {len(tenant)}",
            Reason.INVALID_TENANT,
        )
    if not (tenant.isascii() and tenant.isprintable()):
        raise InvalidArgumentError(f"{TENANT_KEY}: must be printable ASCII, got {tenant!r}", Reason.INVALID_TENANT)


def check_epoch(epoch: int, cache_epoch: int) -> None:
    """Refuses a request of another epoch than the cache's; 0 stands for any."""
    if epoch not in {0, cache_epoch}:
        raise FailedPreconditionError(
            f"epoch: request names {epoch}, the cache's is {cache_epoch}",
            Reason.EPOCH_MISMATCH,
            epoch=epoch,
            cache_epoch=cache_epoch,
        )


def check_layer(spec: IndexSpec, layer: int) -> None:
    """Refuses a layer that the spec does not have."""
    if not 0 <= layer < spec.num_layers:
        raise InvalidArgumentError(
            f"layer must be below {spec.num_layers}, got {layer}",
            Reason.INVALID_LAYER,
            layer=layer,
            num_layers=spec.num_layers,
        )


def check_heads(spec: IndexSpec, first_head: int, num_heads: int) -> int:
    """The number of heads that a head range names (0 = all from `first_head`); refuses one beyond the spec's."""
    if not 0 <= first_head < spec.num_index_heads:
        raise InvalidArgumentError(
            f"first_head must be below {spec.num_index_heads}, got {first_head}",
            Reason.INVALID_HEADS,
            first_head=first_head,
            num_index_heads=spec.num_index_heads,
        )
    heads = num_heads or spec.num_index_heads - first_head
    if heads < 0 or first_head + heads > spec.num_index_heads:
        raise InvalidArgumentError(
            f"first_head + num_heads must be at most {spec.num_index_heads}, got {first_head} + {num_heads}",
            Reason.INVALID_HEADS,
            first_head=first_head,
            num_heads=num_heads,
            num_index_heads=spec.num_index_heads,
        )
    return heads


def check_columns(
    spec: IndexSpec, max_spans: int, ids: list[int], starts: list[int], lengths: list[int], revisions: list[int]
) -> None:
    """Refuses uneven or empty columns (revisions may be left out), duplicates, and positions out of bounds."""
    # Lists, since requests are mostly a few spans, where each numpy operation costs more than a pass over them.
    num_spans = len(ids)
    num_revisions = len(revisions) or num_spans
    if not num_spans == len(starts) == len(lengths) == num_revisions:
        raise InvalidArgumentError(
            "spans: columns must be equally long, got "
            f"{num_spans} sequence_ids, {len(starts)} starts, {len(lengths)} lengths, {num_revisions} revisions",
            Reason.INVALID_SPANS,
            sequence_ids=num_spans,
            starts=len(starts),
            lengths=len(lengths),
            revisions=num_revisions,
        )
    check_num_spans(max_spans, num_spans)
    if min(lengths) < 1 or min(starts) < 0 or max(map(add, starts, lengths)) > spec.max_sequence_tokens:
        raise _misplaced(spec, zip(ids, starts, lengths, strict=True))
    _check_different("spans", ids)


def check_sequences(max_spans: int, ids: Sequence[int]) -> None:
    """Refuses to open or close no sequences, too many, or one twice."""
    check_num_spans(max_spans, len(ids), "sequences")
    _check_different("sequences", ids)


def check_num_spans(max_spans: int, num_spans: int, name: str = "spans") -> None:
    """Refuses a request of no spans, and one of too many."""
    if not 1 <= num_spans <= max_spans:
        raise InvalidArgumentError(
            f"{name}: must be 1 to {max_spans}, got {num_spans}",
            Reason.INVALID_SPANS,
            count=num_spans,
            max_spans=max_spans,
        )


def _check_different(name: str, ids: Sequence[int]) -> None:
    if len(set(ids)) != len(ids):
        sequence, times = Counter(ids).most_common(1)[0]
        raise InvalidArgumentError(
            f"{name}: sequence {sequence} is named {times} times, at most 1 is allowed",
            Reason.DUPLICATE_SEQUENCE,
            sequence_id=sequence,
            count=times,
        )


def _misplaced(spec: IndexSpec, spans: Iterable[tuple[int, int, int]]) -> InvalidArgumentError:
    limit = spec.max_sequence_tokens
    sequence, start, length = next(span for span in spans if span[2] < 1 or span[1] < 0 or span[1] + span[2] > limit)
    if length < 1:
        words = f"length must be at least 1, got {length}"
    elif start < 0:
        words = f"start must be at least 0, got {start}"
    else:
        words = f"start + length must be at most {limit}, got {start} + {length}"
    return InvalidArgumentError(
        f"sequence {sequence}: {words}", Reason.INVALID_SPANS, sequence_id=sequence, start=start, length=length
    )


def check_tensor_bytes(name: str, dtype: str, num_bytes: int, shape: tuple[int, ...]) -> None:
    """Refuses a tensor whose byte count is not what its shape and dtype give."""
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if num_bytes != expected:
        raise InvalidArgumentError(
            f"{name}: {_dims(shape)} of {dtype} takes {expected} bytes, got {num_bytes}",
            Reason.INVALID_TENSOR,
            expected_bytes=expected,
            bytes=num_bytes,
        )


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuses a tensor that has the right size in another shape, which only a client can see."""
    if shape != expected:
        raise InvalidArgumentError(
            f"{name}: shape must be {_dims(expected)}, got {_dims(shape)}", Reason.INVALID_TENSOR
        )


def _dims(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def check_message_bytes(num_bytes: int, max_message_bytes: int) -> None:
    """Refuses tensors that together are larger than a message may be."""
    if num_bytes > max_message_bytes:
        raise ResourceExhaustedError(
            f"keys and queries together must be at most {max_message_bytes} bytes, got {num_bytes}",
            Reason.MESSAGE_TOO_LARGE,
            bytes=num_bytes,
            max_message_bytes=max_message_bytes,
        )


def check_length(spec: IndexSpec, sequence_id: int, length: int) -> None:
    """Refuses a length, of a fork or a truncation, that no sequence can have."""
    if not 0 <= length <= spec.max_sequence_tokens:
        raise InvalidArgumentError(
            f"sequence {sequence_id}: length must be 0 to {spec.max_sequence_tokens}, got {length}",
            Reason.INVALID_LENGTH,
            sequence_id=sequence_id,
            length=length,
            max_sequence_tokens=spec.max_sequence_tokens,
        )
