"""Faults of the ring: its header, the engine's side, the client's arena and in-flight table."""

from __future__ import annotations

from mutants.mutant import Mutant

_HEADER, _CLIENT = "ring/include/blockdex_ring.h", "ring/include/blockdex_client.h"
_SERVER, _TYPE = "csrc/ring/server.c", "csrc/ring/server_type.c"
_ARENA, _INFLIGHT = "ring/include/blockdex_arena.h", "csrc/ring/inflight.c"
_MODEL = ("csrc/test_interleavings.py::test_nothing_is_lost_or_raced_for_and_nobody_sleeps_on",)
_NATIVE_SERVER = ("ring/test_native_server.py",)
_TABLES = ("csrc/test_programs.py::test_arena_and_in_flight_table_do_what_the_plainest_ones_do",)
_CORE_LINKS = ("scheduler/test_core_links.py",)

_FENCE = "    atomic_thread_fence(memory_order_seq_cst);\n"

MUTANTS = (
    # --- Memory order, sleeping and waking ---
    Mutant("no fence before the bell", _HEADER, _FENCE + "    if (", "    if (", _MODEL),
    Mutant("no fence before the second look", _HEADER, _FENCE + "    return", "    return", _MODEL),
    Mutant(
        "no second look",
        _HEADER,
        "return atomic_load_explicit(counter, memory_order_acquire) == seen",
        "return true",
        _MODEL,
    ),
    Mutant(
        "what is shown is not released",
        _HEADER,
        "(counter, number, memory_order_release)",
        "(counter, number, memory_order_relaxed)",
        _MODEL,
    ),
    Mutant(
        "nobody says that it sleeps",
        _HEADER,
        "    atomic_store_explicit(sleeps, 1, memory_order_relaxed);\n",
        "",
        _MODEL,
    ),
    Mutant(
        "nobody is woken",
        _HEADER,
        '        (void)!send(bell, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);',
        "        (void)bell;",
        _MODEL,
    ),
    Mutant(
        "who wakes does not look whether it is the only one",
        _HEADER,
        "atomic_exchange_explicit(sleeps, 0, memory_order_relaxed))",
        "(atomic_store_explicit(sleeps, 0, memory_order_relaxed), true))",
        _MODEL,
    ),
    Mutant(
        "room that was given back is not released",
        _CLIENT,
        "answer_bytes_freed, end, memory_order_release",
        "answer_bytes_freed, end, memory_order_relaxed",
        _MODEL,
    ),
    Mutant(
        "a slot is claimed before it is seen to be free",
        _CLIENT,
        "client->written - atomic_load_explicit(&header->requests_read, memory_order_acquire)",
        "client->written - atomic_load_explicit(&header->requests_read, memory_order_relaxed)",
        _MODEL,
    ),
    Mutant(
        "a slot is claimed though it is full",
        _CLIENT,
        "unread >= client->segment.num_request_slots || ",
        "(unread, false) || ",
        _MODEL,
    ),
    Mutant(
        "the answers' room is not given back",
        _CLIENT,
        "        if (end) atomic_store_explicit(&header->answer_bytes_freed",
        "        if (!end) atomic_store_explicit(&header->answer_bytes_freed",
        _MODEL,
    ),
    Mutant(
        "requests are read before their number",
        _SERVER,
        "(&link->header->requests_written, memory_order_acquire)",
        "(&link->header->requests_written, memory_order_relaxed)",
        _MODEL,
    ),
    Mutant(
        "a slot is given back before it was read",
        _SERVER,
        "++link->read, memory_order_release",
        "++link->read, memory_order_relaxed",
        _MODEL,
    ),
    Mutant(
        "room is used before it is seen to be free",
        _SERVER,
        "(&link->header->answer_bytes_freed, memory_order_acquire)",
        "(&link->header->answer_bytes_freed, memory_order_relaxed)",
        _MODEL,
    ),
    Mutant(
        "an answer's slot is used before it is seen to be free",
        _SERVER,
        "(&link->header->answers_read, memory_order_acquire)",
        "(&link->header->answers_read, memory_order_relaxed)",
        _MODEL,
    ),
    Mutant(
        "no second look for room",
        _SERVER,
        "            write_unwritten(link); /* room may have come just before that was said */\n",
        "",
        _MODEL,
    ),
    Mutant(
        "no fence before the second look for room",
        _SERVER,
        "engine_waits_for_room, 1, memory_order_relaxed);\n" + _FENCE,
        "engine_waits_for_room, 1, memory_order_relaxed);\n",
        _MODEL,
    ),
    Mutant(
        "the engine does not say that it waits for room",
        _SERVER,
        "    atomic_store_explicit(&link->header->engine_waits_for_room, 1, memory_order_relaxed);\n",
        "",
        _MODEL,
    ),
    Mutant(
        "an answer lies where another one is read",
        _SERVER,
        "    if (begin + wanted - freed > size) return false;\n",
        "",
        _MODEL,
    ),
    Mutant(
        "an answer overtakes one that waits",
        _SERVER,
        "if (!link->first_unwritten && write_answer",
        "if (write_answer",
        ("scheduler/test_core_links.py", "ring/test_foreign_frontends.py", *_MODEL),
    ),
    Mutant("what was written is not shown", _SERVER, "    if (!link->changed) return;\n", "    return;\n", _MODEL),
    Mutant("the engine's send waits", _HEADER, "MSG_DONTWAIT | MSG_NOSIGNAL);\n}", "MSG_NOSIGNAL);\n}", _CORE_LINKS),
    Mutant(
        "taking wake-ups waits for one more",
        _HEADER,
        "recv(bell, &rung, 1, MSG_DONTWAIT)",
        "recv(bell, &rung, 1, 0)",
        ("scheduler/test_core_links.py::test_a_sleeper_is_woken",),
    ),
    # --- Bounds ---
    Mutant(
        "more requests than slots are believed",
        _SERVER,
        "filled <= link->request_slots ? (int64_t)filled : -1",
        "(int64_t)filled",
        ("ring/test_foreign_frontends.py::test_a_counter_that_runs_away_ends_the_link", *_NATIVE_SERVER),
    ),
    Mutant(
        "a size that wraps is taken for a small one",
        _SERVER,
        "    if (bytes > size) return false;\n",
        "",
        _NATIVE_SERVER,
    ),
    Mutant(
        "room that was never taken is given back",
        _SERVER,
        "    if (begin - freed > size) return false;",
        "    if (!size) return false;",
        _NATIVE_SERVER,
    ),
    Mutant(
        "an answer without a slot",
        _SERVER,
        "    if (taken >= link->answer_slots) return false;\n",
        "    (void)taken;\n",
        _NATIVE_SERVER,
    ),
    Mutant(
        "a payload goes across the arena's end",
        _SERVER,
        "if (wanted > to_the_edge || unused)",
        "if (unused)",
        _NATIVE_SERVER,
    ),
    Mutant(
        "room that nobody uses is not taken from the front",
        _SERVER,
        "if (wanted > to_the_edge || unused)",
        "if (wanted > to_the_edge)",
        _NATIVE_SERVER,
    ),
    Mutant(
        "a slot for an answer is the one before",
        _SERVER,
        "link->written++ % link->answer_slots",
        "++link->written % link->answer_slots",
        _NATIVE_SERVER,
    ),
    Mutant(
        "parts of a segment outside it",
        _HEADER,
        "offset <= segment_bytes &&\n           bytes <= segment_bytes - offset",
        "offset <= segment_bytes",
        _NATIVE_SERVER,
    ),
    Mutant(
        "slots whose number is no power of two", _HEADER, "slots && !(slots & (slots - 1))", "slots", _NATIVE_SERVER
    ),
    Mutant(
        "an arena of no whole cache lines",
        _SERVER,
        "layout->answer_arena_bytes % 64",
        "!layout->answer_arena_bytes",
        _NATIVE_SERVER,
    ),
    # --- What Python calls ---
    Mutant(
        "any object is a link",
        _TYPE,
        "    if (PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)server_link_dealloc)\n",
        "    if (object)\n",
        ("csrc/test_native_calls.py",),
    ),
    Mutant(
        "a slot is given back though none was taken",
        _TYPE,
        "if (server_link_filled(link) < 1)",
        "if (server_link_filled(link) < -1)",
        _NATIVE_SERVER,
    ),
    Mutant(
        "a tenant runs over its room",
        _TYPE,
        "if (tenant_bytes > (Py_ssize_t)BLOCKDEX_MAX_TENANT_BYTES)",
        "if (tenant_bytes < 0)",
        _NATIVE_SERVER,
    ),
    Mutant(
        "a link keeps its segment for ever",
        _TYPE,
        "    if (self->memory.obj) PyBuffer_Release(&self->memory);\n",
        "",
        _NATIVE_SERVER,
    ),
    # --- The client's arena and in-flight table ---
    Mutant(
        "not the lowest hole",
        _ARENA,
        "        if (hole->bytes < wanted) continue;\n",
        "        if (hole->bytes <= wanted && at + 1 < arena->num_holes) continue;\n",
        _TABLES,
    ),
    Mutant(
        "a hole that is too small",
        _ARENA,
        "        if (hole->bytes < wanted) continue;\n",
        "        if (hole->bytes + 64 < wanted) continue;\n",
        _TABLES,
    ),
    Mutant(
        "holes that touch stay two", _ARENA, "taken.offset + taken.bytes == arena->holes[at].offset", "false", _TABLES
    ),
    Mutant("a size that wraps in the arena", _ARENA, "    if (bytes > UINT64_MAX - 63) return false;\n", "", _TABLES),
    Mutant(
        "a ticket is used again",
        _INFLIGHT,
        "++table->serial * table->capacity + at",
        "table->capacity + at",
        _TABLES,
    ),
    Mutant(
        "another's ticket is taken",
        _INFLIGHT,
        "ticket && pending->ticket == ticket ? pending : NULL",
        "ticket ? pending : NULL",
        _TABLES,
    ),
    Mutant(
        "another's request is found",
        _INFLIGHT,
        "pending->owner == owner && pending->number == number",
        "pending->number == number",
        _TABLES,
    ),
    Mutant("a request that was given up is still counted", _INFLIGHT, "    table->waiting--;\n", "", _TABLES),
)
