"""Faults of the C client: its link, its requests and answers, and its Python type."""

from __future__ import annotations

from mutants.mutant import Mutant

_LINK, _CLIENT = "ring/include/blockdex_link.h", "ring/include/blockdex_client.h"
_TYPE = "csrc/ring/connection.c"
_CONNECT = ("csrc/test_programs.py::test_a_connection_that_fails_leaves_nothing_and_is_not_waited_for",)
_TOO_MANY = ("csrc/test_programs.py::test_a_file_too_many_is_refused",)
_STRESS = ("csrc/test_programs.py::test_nobody_sleeps_on_and_nothing_is_lost",)
_CALLS = ("csrc/test_client_calls.py",)
_CONNECTION = ("ring/test_connection.py",)
_SHARED = (
    "client/test_shared_regions.py::test_what_lies_in_a_region_is_named_and_not_copied",
    "client/test_shared_regions.py::test_memory_of_a_device_is_never_copied",
)

MUTANTS = (
    # --- Connecting ---
    Mutant(
        "a refused connection keeps its files",
        _LINK,
        "        blockdex_disconnect(client);\n        return false;\n",
        "        return false;\n",
        _CONNECT,
    ),
    Mutant(
        "a segment stays mapped",
        _LINK,
        "    if (client->segment.header) munmap((void *)client->segment.header, (size_t)client->segment_bytes);\n",
        "",
        _CONNECT,
    ),
    Mutant("a connection keeps the segment's file", _LINK, "    if (fds[0] >= 0) close(fds[0]);\n", "", _CONNECT),
    Mutant("four files are taken for three", _LINK, "CMSG_LEN(3 * sizeof(int));", "sizeof control.bytes;", _TOO_MANY),
    Mutant(
        "a greeting of another version is taken", _LINK, "greeting.version != BLOCKDEX_VERSION)", "false)", _CONNECT
    ),
    # --- Beside the ring ---
    Mutant(
        "a late reply is taken for another's",
        _LINK,
        "client->replies_due && !--client->replies_due && client->reply",
        "client->reply",
        _CONNECTION,
    ),
    Mutant(
        "what was said in pieces is lost",
        _LINK,
        "    memmove(client->heard, at, client->heard_bytes);\n",
        "    client->heard_bytes = 0;\n",
        _CONNECTION,
    ),
    Mutant("any length is believed", _LINK, "if (length > BLOCKDEX_LONGEST_TOLD - 4)", "if (false)", _CONNECTION),
    # --- Memory that is lent ---
    Mutant("a tensor ends beyond what is lent", _TYPE, " || bytes > lent->bytes - begin", "", _SHARED),
    Mutant("a tensor begins anywhere", _TYPE, " || begin % 64) continue;", ") continue;", _SHARED),
    Mutant("memory of a device is copied", _TYPE, "&&\n            tensors[at].must)", "&& false)", _SHARED),
    Mutant("what lies in a region is copied", _TYPE, "    if (slot.keys_region) keys.bytes = 0;\n", "", _SHARED),
    Mutant(
        "a region is named on after its end", _TYPE, "if (self->lent[at].region == number) ", "if (false) ", _SHARED
    ),
    # --- Answers ---
    Mutant(
        "a payload beyond the arena is followed",
        _CLIENT,
        "bytes > room || answer->payload_offset > room - bytes || answer->payload_offset % 64",
        "false",
        _CONNECTION,
    ),
    Mutant(
        "a request is answered twice", _CLIENT, "if (!pending || pending->answered)\n", "if (!pending)\n", _CONNECTION
    ),
    Mutant(
        "any number of answers is believed",
        _CLIENT,
        "if (count > client->segment.num_answer_slots)",
        "if (false)",
        _CONNECTION,
    ),
    Mutant("block ids beyond the payload", _CLIENT, "if (first_bytes > room || ", "if (", _CONNECTION),
    Mutant(
        "scores beyond the payload",
        _CLIENT,
        "(second_at > room || second_bytes > room - second_at)",
        "false",
        _CONNECTION,
    ),
    Mutant("a reason beyond its payload", _CLIENT, "    if (reason > bytes) reason = bytes;\n", "", _CONNECTION),
    Mutant(
        "room that lies behind another's is lost",
        _CLIENT,
        "        if (end) client->pending[before].payload_end = end;\n",
        "",
        _CONNECTION,
    ),
    Mutant(
        "room is given back out of order",
        _CLIENT,
        "    if (before != BLOCKDEX_NONE) {\n        client->pending[before].after = after;\n",
        "    if (before != BLOCKDEX_NONE && end) {\n"
        "        client->pending[before].after = after;\n"
        "        atomic_store_explicit(&header->answer_bytes_freed, end, memory_order_release);\n",
        _CONNECTION,
    ),
    Mutant(
        "the engine is not told of room",
        _CLIENT,
        "        if (end) blockdex_ring_bell(&header->engine_waits_for_room, client->engine_bell);\n",
        "",
        (*_STRESS, "csrc/test_interleavings.py::test_nothing_is_lost_or_raced_for_and_nobody_sleeps_on"),
    ),
    Mutant(
        "a request's room is never free again",
        _CLIENT,
        "    blockdex_arena_give_back(&client->arena, pending->extent);\n",
        "",
        _STRESS,
    ),
    Mutant(
        "nobody notices that the server is gone",
        _CLIENT,
        "        if (!taken && files[1].revents) blockdex_hear(client);\n",
        "",
        _CONNECTION,
    ),
    Mutant("block ids in a region are looked for", _CLIENT, "pending->ids_apart ? 0 : bytes", "bytes", _CALLS),
    # --- Requests ---
    Mutant(
        "what was given up is answered",
        _CLIENT,
        "    if (pending->given_up) blockdex_leave(client, pending);\n",
        "",
        _CONNECTION,
    ),
    Mutant("a request waits for room for ever", _CLIENT, "        if (now >= until) break;\n", "", _CONNECTION),
    Mutant("revisions are not sent", _CLIENT, "if (tokens->revisions && column)", "if (false)", _CALLS),
    Mutant("keys are selected with", _CLIENT, "    queries.keys_dtype = 0;\n", "", _CALLS),
    # --- The Python type ---
    Mutant("a child uses its parent's", _TYPE, "if (self->pid != getpid())\n", "if (false)\n", _CONNECTION),
    Mutant("two threads use it at once", _TYPE, "else if (self->busy)\n", "else if (false)\n", _CONNECTION),
    Mutant(
        "a signal does not end a wait", _TYPE, "        if (PyErr_CheckSignals() < 0) return NULL;\n", "", _CONNECTION
    ),
    Mutant("an answer stays in the arena", _TYPE, "    blockdex_release(&self->client, ticket);\n", "", _CONNECTION),
    Mutant("its loop is not told of answers", _TYPE, "!blockdex_may_wait(&self->client)", "false", _CONNECTION),
)
