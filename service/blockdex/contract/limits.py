"""Checks that come before the ring: of what no slot can carry, and of what a frontend knows itself."""

from __future__ import annotations

from collections.abc import Sequence

from blockdex.contract.errors import FailedPreconditionError, InvalidArgumentError, Reason

TENANT_KEY = "blockdex-tenant"
"""Metadata entry that names the tenant."""

DEFAULT_TENANT = "default"
"""Whose sequences they are where nobody names a tenant."""

_MAX_TENANT_CHARACTERS = 256


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


def check_num_rows(max_spans: int, count: int, name: str = "sequences") -> None:
    """Refuses to open or close no sequences, or to set runs of no cells, or of either more than a slot can carry."""
    if not 1 <= count <= max_spans:
        raise InvalidArgumentError(
            f"{name}: must be 1 to {max_spans}, got {count}",
            Reason.INVALID_SPANS,
            count=count,
            max_spans=max_spans,
        )


def check_even_columns(**columns: Sequence[int]) -> None:
    """Refuses columns of page tables that are not equally long."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{length} {name}" for name, length in lengths.items())
        words = f"page tables: columns must be equally long, got {got}"
        raise InvalidArgumentError(words, Reason.INVALID_POOL, **lengths)
