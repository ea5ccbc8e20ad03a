"""Faults of the client's side of a link: what it sends, what it is answered, what it gives up."""

from __future__ import annotations

from mutants.mutant import Mutant

_ANSWERS, _REQUESTS = "csrc/ring/client_answers.c", "csrc/ring/client_requests.c"
_OUTBOX = "csrc/ring/client_outbox.c"
_ARGUMENTS, _LENGTHS, _MADE = (f"csrc/client/{name}.c" for name in ("arguments", "lengths", "token_request"))
_CALLS = ("client/test_token_requests.py",)
_LINK = tuple(f"ring/test_link_{what}.py" for what in ("answers", "room", "requests"))
_REFERENCES = ("ring/test_link_answers.py::test_no_reference_is_lost_or_kept",)

MUTANTS = (
    # --- References ---
    Mutant(
        "a reference of who was told",
        _ANSWERS,
        "    Py_DECREF(owner);\n    return told;",
        "    return told;",
        _REFERENCES,
    ),
    # --- Room, order and bounds ---
    Mutant(
        "an answer's room is kept",
        _ANSWERS,
        "    blockdex_arena_give_back(&self->arena, pending->extent);\n",
        "",
        _LINK,
    ),
    Mutant(
        "a payload outside the arena is read",
        _ANSWERS,
        "slot->payload_bytes > room || slot->payload_offset > room - slot->payload_bytes",
        "slot->payload_bytes > room",
        _LINK,
    ),
    Mutant("an answer to what was not sent", _ANSWERS, "!pending || pending->unsent", "!pending", _LINK),
    Mutant(
        "more answers than slots are believed",
        _ANSWERS,
        "    if (count > self->segment.num_answer_slots) {\n",
        "    if (0) {\n",
        _LINK,
    ),
    Mutant(
        "a full ring is written to",
        _REQUESTS,
        "self->closed || taken >= self->segment.num_request_slots",
        "self->closed",
        _LINK,
    ),
    Mutant("more wait than may", _REQUESTS, "if (table->waiting >= self->max_waiting)", "if (0)", _LINK),
    Mutant(
        "a request is sent half written",
        _OUTBOX,
        "!outgoing->placed || !is_written(outgoing) ||",
        "!outgoing->placed ||",
        _LINK,
    ),
    # --- Who waits, who comes later, who is run in between ---
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
        "    if (self->closed || taken >= self->segment.num_request_slots) return false;\n",
        "    if (taken >= self->segment.num_request_slots) return false;\n",
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
        "!share_of(self, outgoing)->unplaced && place(",
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
        "        blockdex_arena_give_back(&self->arena, outgoing->pending->extent);\n",
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
    # --- Data calls of the Python client ---
    Mutant(
        "a request keeps its keys",
        _MADE,
        "    if (self->keys.obj) PyBuffer_Release(&self->keys);\n",
        "",
        _CALLS,
    ),
    Mutant("a request that is given up keeps its lengths", _MADE, "    release_writes(self);\n", "", _CALLS),
    Mutant("a refusal keeps its message", _MADE, "    Py_XDECREF(message);\n", "", _CALLS),
    Mutant(
        "a tensor of another shape is taken", _MADE, "good = view->shape[at] == expected[at];", "good = true;", _CALLS
    ),
    Mutant("an integer beyond the wire's is taken", _ARGUMENTS, " && *number <= width->largest;", ";", _CALLS),
    Mutant(
        "a request that has begun begins again",
        _LENGTHS,
        "    if (good && request->writes) {\n",
        "    if (0) {\n",
        _CALLS,
    ),
    Mutant(
        "a layer behind the last one is written", _LENGTHS, "return layer < count ?", "return layer <= count ?", _CALLS
    ),
    Mutant(
        "appends that overlap are always in a row",
        _LENGTHS,
        "start == numbers->length && (alone || numbers->in_a_row);",
        "true;",
        ("client/test_ledger.py",),
    ),
    Mutant(
        "a refusal undoes what others did since",
        _LENGTHS,
        "if (changed_nothing && numbers->writes == write->number) {",
        "if (changed_nothing) {",
        ("client/test_ledger.py",),
    ),
    Mutant(
        "a rollback is not insisted on",
        "csrc/wire/messages.c",
        "    if (request->rollback) features[count++] = ROLLBACKS;\n",
        "",
        ("client/test_requests.py",),
    ),
    Mutant(
        "an answer of another dtype is taken",
        "csrc/client/answer.c",
        "    return !tensor->present || tensor->dtype == dtype;\n",
        "    return tensor->present || dtype;\n",
        ("client/test_tensors.py::test_an_answer_of_another_shape_is_not_believed",),
    ),
    Mutant(
        "a tenant may have all that there is",
        "csrc/tenants.h",
        "return has < TENANTS_SHARE * weight * left;",
        "return left > 0 || has < TENANTS_SHARE * weight * left;",
        ("ring/test_link_room.py", "scheduler/test_core_turns.py"),
    ),
    Mutant(
        "what waits for room holds up other tenants",
        "csrc/ring/client_outbox.c",
        "            at = &outgoing->next;\n            continue;\n        }\n        write_some",
        "            break;\n        }\n        write_some",
        ("ring/test_link_room.py",),
    ),
)
