"""Arguments of the data calls by name, for the signatures whose answer depends on `return_scores`."""

from __future__ import annotations

from typing import Any, Required, TypedDict

from blockdex.client.requests import Integers
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
