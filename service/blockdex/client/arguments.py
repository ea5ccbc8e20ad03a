"""Arguments of the data calls: by name, for signatures whose answer depends on `return_scores`, and made of others."""

from __future__ import annotations

from typing import Any, Required, TypedDict

import numpy as np

from blockdex.client.requests import Arguments, Ids, Integers
from blockdex.contract.messages import Order


class AppendAndSelectArguments(TypedDict, total=False):
    """As `Client.append_and_select` describes them."""

    sequences: Required[Integers]
    lengths: Integers | None
    keys: Required[Any]
    starts: Integers | None
    order: Order
    revisions: Integers | None
    first_head: int
    num_heads: int
    rollback: bool
    out: Any
    epoch: int | None
    timeout: float | None


class SelectArguments(TypedDict, total=False):
    """As `Client.select_blocks` describes them."""

    sequences: Required[Integers]
    lengths: Integers | None
    starts: Integers | None
    order: Order
    revisions: Integers | None
    first_head: int
    num_heads: int
    wait_for_keys: bool
    out: Any
    epoch: int | None
    timeout: float | None


class PoolSelectArguments(TypedDict, total=False):
    """As `Pool.select_blocks` describes them."""

    rows: Required[Integers]
    starts: Required[Integers]
    lengths: Integers | None
    order: Order
    ids: Ids
    revision: int
    first_head: int
    num_heads: int
    out: Any
    epoch: int | None
    timeout: float | None


class PoolAppendAndSelectArguments(PoolSelectArguments, total=False):
    """As `Pool.append_and_select` describes them."""

    keys: Required[Any]


def spans_of(
    layer: int, rows: Integers, lengths: Integers | None, starts: Integers, revision: int, epoch: int | None
) -> Arguments:
    """The first of the arguments of a call on a pool, whose one revision each row names; None for 0."""
    revisions = [revision] * int(np.size(rows)) if revision else None
    return layer, rows, lengths, starts, revisions, epoch
