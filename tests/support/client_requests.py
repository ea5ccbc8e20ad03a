"""What a client of the ring asks, with every field that a slot has, and what it reads in the answers."""

from __future__ import annotations

import numpy as np

from benchmarks.ring_messages import Answer, Request
from blockdex.contract.errors import BlockdexError
from support.naive_engine import NaiveEngine
from support.running_engine import SPEC, close, fork, get, open_sequence, tokens, truncate, values

TENANT = "a client's own"


def client_requests(random: np.random.Generator) -> list[Request]:
    """Of every kind, and with every field that a slot has; some are refused."""
    keys, queries = values(random, 9, SPEC.head_dim), values(random, 9, 4, SPEC.head_dim)
    rows = [(1, 0, 4), (2, 0, 5)]
    return [
        open_sequence(1, tenant=TENANT),
        open_sequence(2, tenant=TENANT, lease=7),
        tokens(1, rows, keys=keys, tenant=TENANT),
        tokens(1, rows, queries=queries, scores=True, tenant=TENANT),
        tokens(1, rows, queries=queries, order="score", scores=True, raw=True, dtype="fp32", tenant=TENANT),
        tokens(1, rows, queries=queries[:, 2:3], first_head=2, tenant=TENANT),
        tokens(1, [(1, 4, 1, 3)], keys=keys[:1], queries=queries[:1], dtype="fp16", tenant=TENANT),
        tokens(1, [(1, 4, 1, 3)], queries=queries[:1], wait=True, tenant=TENANT),
        tokens(1, [(1, 2, 1)], keys=keys[:1], rollback=False, tenant=TENANT),
        tokens(1, [(1, 2, 1)], keys=keys[:1], tenant=TENANT),
        tokens(1, [(1, 99, 1)], keys=keys[:1], tenant=TENANT),
        fork(1, 3, 2, tenant=TENANT),
        get(3, tenant=TENANT),
        truncate(1, 1, tenant=TENANT),
        get(1, tenant=TENANT),
        close(2, tenant=TENANT),
        get(2, tenant=TENANT),
        get(1, tenant=TENANT, epoch=5),
    ]


def naive_answers(requests: list[Request], epoch: int) -> list[Answer | BlockdexError]:
    """What they are answered one after another; none of them waits."""
    naive = NaiveEngine(SPEC, epoch)
    answers = [naive.answer(request) for request in requests]
    return [answer for answer in answers if answer is not None]
