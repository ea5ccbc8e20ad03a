"""Faults of the client's side of a link: what it sends, what it is answered, what it gives up."""

from __future__ import annotations

from mutants.mutant import Mutant

_ANSWERS, _REQUESTS = "csrc/ring/client_answers.c", "csrc/ring/client_requests.c"
_OUTBOX, _POLL = "csrc/ring/client_outbox.c", "csrc/ring/client_poll.c"
_LINK = ("ring/test_link.py",)
_REFERENCES = ("ring/test_link.py::test_no_reference_is_lost_or_kept",)

MUTANTS = (
    # --- References ---
    Mutant("a reference an answer", _ANSWERS, "    Py_XDECREF(item);\n", "", _REFERENCES),
    Mutant(
        "a reference a request",
        _ANSWERS,
        "Py_DECREF((PyObject *)inflight_disown(&self->inflight, pending));",
        "inflight_disown(&self->inflight, pending);",
        _REFERENCES,
    ),
    Mutant(
        "a reference of who was told",
        _ANSWERS,
        "    Py_DECREF(owner);\n    return told;",
        "    return told;",
        _REFERENCES,
    ),
    Mutant(
        "an owner without a reference of its own",
        _REQUESTS,
        "inflight_begin(&self->inflight, Py_NewRef(sender->owner),",
        "inflight_begin(&self->inflight, sender->owner,",
        _REFERENCES,
    ),
    Mutant("a message that was kept", _OUTBOX, "    Py_DECREF(message);\n", "", _REFERENCES),
    Mutant("a tenant that was kept", _OUTBOX, "    Py_DECREF(tenant);\n", "", _REFERENCES),
    # --- Room, order and bounds ---
    Mutant("an answer's room is kept", _ANSWERS, "    arena_give_back(&self->arena, pending->extent);\n", "", _LINK),
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
        "    if (count > self->num_answer_slots) {\n",
        "    if (0) {\n",
        _LINK,
    ),
    Mutant(
        "a full ring is written to",
        _REQUESTS,
        "self->closed || taken >= self->num_request_slots",
        "self->closed",
        _LINK,
    ),
    Mutant(
        "a number in flight is taken again",
        _REQUESTS,
        "if (inflight_of(table, sender->owner, sender->number))",
        "if (0)",
        _LINK,
    ),
    Mutant("more wait than may", _REQUESTS, "if (table->waiting >= self->max_waiting)", "if (0)", _LINK),
    Mutant(
        "a cancellation that found no slot is forgotten", _REQUESTS, "        pending->cancel_due = true;\n", "", _LINK
    ),
    Mutant("a request overtakes its owner's", _OUTBOX, " || is_behind_another(self, outgoing)", "", _LINK),
    Mutant(
        "a request is sent half written",
        _OUTBOX,
        "!outgoing->placed || !is_written(outgoing) ||",
        "!outgoing->placed ||",
        _LINK,
    ),
    Mutant(
        "what was given up keeps its room",
        _OUTBOX,
        "    if (outgoing->placed)\n        arena_give_back",
        "    if (!outgoing->placed)\n        arena_give_back",
        _LINK,
    ),
)
