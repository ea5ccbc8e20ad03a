"""Faults of the ring: its header, the engine's side, the client's arena and in-flight table."""

from __future__ import annotations

from mutants.mutant import Mutant

_HEADER = "ring/include/blockdex_ring.h"
_SERVER, _TYPE = "csrc/ring/server.c", "csrc/ring/server_type.c"
_ARENA, _INFLIGHT = "csrc/ring/arena.c", "csrc/ring/inflight.c"
_MODEL = ("csrc/test_interleavings.py::test_nothing_is_lost_or_raced_for_and_nobody_sleeps_on",)
_NATIVE_SERVER = ("ring/test_native_server.py",)
_CONNECT = ("csrc/test_programs.py",)
_TABLES = ("csrc/test_programs.py::test_arena_and_in_flight_table_do_what_the_plainest_ones_do",)
_CORE_LINKS = ("scheduler/test_core_links.py",)

_ANSWERS, _REQUESTS, _OUTBOX = "csrc/ring/client_answers.c", "csrc/ring/client_requests.c", "csrc/ring/client_outbox.c"
_LINK = ("ring/test_link.py",)
_REFERENCES = ("ring/test_link.py::test_no_reference_is_lost_or_kept",)

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
        "the second look acquires nothing",
        _HEADER,
        "(counter, memory_order_acquire) ==",
        "(counter, memory_order_relaxed) ==",
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
        _HEADER,
        "answer->payload_end, memory_order_release",
        "answer->payload_end, memory_order_relaxed",
        _MODEL,
    ),
    Mutant(
        "a slot is claimed before it is seen to be free",
        _HEADER,
        "(&header->requests_read, memory_order_acquire)",
        "(&header->requests_read, memory_order_relaxed)",
        _MODEL,
    ),
    Mutant(
        "a slot is claimed though it is full",
        _HEADER,
        "    if (taken >= header->request_slots) return NULL;\n",
        "    (void)taken;\n",
        _MODEL,
    ),
    Mutant(
        "the answers' room is not given back",
        _HEADER,
        "    if (answer->payload_bytes)\n",
        "    if (!answer->payload_bytes)\n",
        _MODEL,
    ),
    Mutant(
        "requests are read before their number",
        _SERVER,
        "(&line->header->requests_written, memory_order_acquire)",
        "(&line->header->requests_written, memory_order_relaxed)",
        _MODEL,
    ),
    Mutant(
        "a slot is given back before it was read",
        _SERVER,
        "++line->read, memory_order_release",
        "++line->read, memory_order_relaxed",
        _MODEL,
    ),
    Mutant(
        "room is used before it is seen to be free",
        _SERVER,
        "(&line->header->answer_bytes_freed, memory_order_acquire)",
        "(&line->header->answer_bytes_freed, memory_order_relaxed)",
        _MODEL,
    ),
    Mutant(
        "an answer's slot is used before it is seen to be free",
        _SERVER,
        "(&line->header->answers_read, memory_order_acquire)",
        "(&line->header->answers_read, memory_order_relaxed)",
        _MODEL,
    ),
    Mutant(
        "no second look for room",
        _SERVER,
        "            write_unwritten(line); /* room may have come just before that was said */\n",
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
        "    atomic_store_explicit(&line->header->engine_waits_for_room, 1, memory_order_relaxed);\n",
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
        "if (!line->first_unwritten && write_answer",
        "if (write_answer",
        ("scheduler/test_core_links.py", "ring/test_foreign_frontends.py", *_MODEL),
    ),
    Mutant("what was written is not shown", _SERVER, "    if (!line->changed) return;\n", "    return;\n", _MODEL),
    Mutant("the engine's send waits", _HEADER, "MSG_DONTWAIT | MSG_NOSIGNAL);\n}", "MSG_NOSIGNAL);\n}", _CORE_LINKS),
    Mutant(
        "taking wake-ups waits for one more",
        _HEADER,
        "recv(bell, &rung, 1, MSG_DONTWAIT)",
        "recv(bell, &rung, 1, 0)",
        _CORE_LINKS,
    ),
    # --- Bounds ---
    Mutant(
        "more requests than slots are believed",
        _SERVER,
        "filled <= line->request_slots ? (int64_t)filled : -1",
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
        "    if (taken >= line->answer_slots) return false;\n",
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
        "line->written++ % line->answer_slots",
        "++line->written % line->answer_slots",
        _NATIVE_SERVER,
    ),
    Mutant(
        "parts of a segment outside it",
        _SERVER,
        "offset <= size && bytes <= size - offset",
        "offset <= size",
        _NATIVE_SERVER,
    ),
    Mutant(
        "slots whose number is no power of two", _SERVER, "slots && !(slots & (slots - 1))", "slots", _NATIVE_SERVER
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
        "    if (PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)line_dealloc)\n",
        "    if (object)\n",
        ("csrc/test_native_calls.py",),
    ),
    Mutant(
        "a slot is given back though none was taken",
        _TYPE,
        '    if (line_filled(line) < 1) return PyErr_Format(PyExc_ValueError, "release: no request is there");\n',
        "",
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
    # --- Connecting ---
    Mutant(
        "a refused connection keeps its files",
        _HEADER,
        "    if (!mapped) blockdex_disconnect(ring);\n    return ring->link;",
        "    return mapped ? ring->link : -1;",
        _CONNECT,
    ),
    Mutant(
        "a segment stays mapped",
        _HEADER,
        "    if (ring->header) munmap(ring->header, (size_t)ring->segment_bytes);\n",
        "",
        _CONNECT,
    ),
    Mutant("a connection keeps the segment's file", _HEADER, "    if (fds[0] >= 0) close(fds[0]);\n", "", _CONNECT),
    Mutant("four files are taken for three", _HEADER, "CMSG_LEN(3 * sizeof(int))}", "sizeof control.bytes}", _CONNECT),
    Mutant(
        "a greeting of another version is taken",
        _HEADER,
        " &&\n           greeting.version == BLOCKDEX_VERSION;",
        ";",
        _CONNECT,
    ),
    Mutant(
        "a wait begins anew at each wake-up",
        _HEADER,
        "blockdex_poll(bells, 2, until)",
        "blockdex_poll(bells, 2, blockdex_milliseconds() + milliseconds)",
        _CONNECT,
    ),
    Mutant(
        "a short segment is mapped", _HEADER, " || (size_t)file.st_size < sizeof(struct blockdex_header)", "", _CONNECT
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
    # --- The client's link ---
    Mutant(
        "an answer keeps a reference to its owner",
        _ANSWERS,
        "        Py_DECREF((PyObject *)inflight_disown(&self->inflight, pending));\n",
        "        inflight_disown(&self->inflight, pending);\n",
        _REFERENCES,
    ),
    Mutant("an answer keeps its item", _ANSWERS, "    Py_XDECREF(item);\n", "", _REFERENCES),
    Mutant(
        "a request keeps a reference to its owner",
        _REQUESTS,
        "inflight_begin(&self->inflight, Py_NewRef(sender->owner),",
        "inflight_begin(&self->inflight, Py_NewRef(Py_NewRef(sender->owner)),",
        _REFERENCES,
    ),
    Mutant("a message that waited is kept", _OUTBOX, "    Py_DECREF(message);\n", "", _REFERENCES),
    Mutant("a tenant that waited is kept", _OUTBOX, "    Py_DECREF(tenant);\n", "", _REFERENCES),
    Mutant(
        "who gave up while an answer was made is told of it",
        _ANSWERS,
        "    bool waits = pending->owner == owner;\n",
        "    bool waits = true;\n",
        ("ring/test_native_client.py",),
    ),
    Mutant(
        "who is run by the collector takes answers in between",
        _ANSWERS,
        "    if (!list || self->taking || self->closed) return list;\n",
        "    if (!list || self->closed) return list;\n",
        ("ring/test_native_client.py",),
    ),
    Mutant(
        "a closed link still writes",
        _REQUESTS,
        "    if (self->closed || taken >= self->num_request_slots) return false;\n",
        "    if (taken >= self->num_request_slots) return false;\n",
        ("ring/test_native_client.py",),
    ),
    Mutant(
        "a short request overtakes a long one of its stream",
        _OUTBOX,
        "self->outbox.no_slot || is_behind_another(self, outgoing))",
        "self->outbox.no_slot)",
        _LINK,
    ),
    Mutant(
        "who comes later takes the slot that others wait for",
        _OUTBOX,
        "self->outbox.no_slot || is_behind",
        "is_behind",
        _LINK,
    ),
    Mutant(
        "who comes later takes the room that others wait for",
        _OUTBOX,
        "!self->outbox.unplaced && place(",
        "place(",
        ("ring/test_client.py::test_nothing_overtakes_what_waits_for_room", *_LINK),
    ),
    Mutant(
        "long requests are copied at once",
        _OUTBOX,
        "enum { SLICE_BYTES = 1 << 19 };",
        "enum { SLICE_BYTES = 1 << 30 };",
        _LINK,
    ),
    Mutant(
        "a cancellation that finds no slot is forgotten",
        _REQUESTS,
        "        self->inflight.cancels_due++;\n",
        "",
        _LINK,
    ),
    Mutant(
        "an unsent request that is given up keeps its room",
        _OUTBOX,
        "        arena_give_back(&self->arena, outgoing->pending->extent);\n",
        "        (void)0;\n",
        _LINK,
    ),
    Mutant(
        "a number in flight twice is taken",
        _REQUESTS,
        "    if (inflight_of(table, sender->owner, sender->number))\n",
        "    if (!table)\n",
        _LINK,
    ),
)
