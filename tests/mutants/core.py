"""Faults of the core: admission, the loop, steps, the index of sequences."""

from __future__ import annotations

from mutants.mutant import Mutant

_ADMIT, _STEP = "csrc/core/admit.c", "csrc/core/launch.c"
_CASTS, _INDEX = "csrc/core/casts.c", "csrc/core/pair_index.c"
_SOURCES, _TYPE = "csrc/core/sources.c", "csrc/ring/server_type.c"
_CORE = ("scheduler/test_core.py",)
_CORE_REGIONS = ("scheduler/test_core_regions.py",)
_REGIONS = ("ring/test_regions.py",)
_STEPS = ("scheduler/test_core_steps.py",)
_ORDER = ("scheduler/test_order.py", "scheduler/test_order_random.py")
_WAITING = ("scheduler/test_waiting.py",)

MUTANTS = (
    Mutant(
        "an append cuts a layer without being told to",
        _ADMIT,
        "start < length && !rollback && !request->revisions[row]",
        "start < length && !rollback && !request->revisions[row] && length < 0",
        ("cache/test_cache.py",),
    ),
    Mutant("a gap is taken", _ADMIT, "        if (start > length)\n", "        if (start > length + 1)\n", _CORE),
    Mutant(
        "a lower revision is taken", _ADMIT, "if (revision && revision < known)", "if (revision > known + 1)", _CORE
    ),
    Mutant(
        "an equal revision is taken whatever its length",
        _ADMIT,
        "!of_pool(request) && end != length)",
        "!of_pool(request) && end > length)",
        (
            "frontend/grpc/test_bad_input.py::test_bad_input_is_refused_and_changes_nothing"
            "[single-another append at the revision, shorter]",
        ),
    ),
    Mutant(
        "keys that are not there are read", _ADMIT, "        if (end <= length) continue;", "        continue;", _CORE
    ),
    Mutant("another epoch is served", _ADMIT, "if (!request->slot.epoch || ", "if (true || ", _CORE),
    Mutant(
        "what is held back is overtaken",
        _ADMIT,
        "if (request->state != IS_WAITING && is_held_back(core, request)) return HELD_BACK;",
        "",
        (*_CORE, *_ORDER),
    ),
    Mutant(
        "a page that others hold is written",
        _ADMIT,
        "if (holders[cells[table + (size_t)block]] > 1) return false;",
        "",
        (*_CORE, *_ORDER),
    ),
    Mutant(
        "a layer is appended to twice in a step",
        _ADMIT,
        "if (core->appended_in[cell] != core->serial && ",
        "if (",
        (*_STEPS, *_ORDER),
    ),
    Mutant(
        "two ask for one head of a shared row",
        _ADMIT,
        "            group->heads & heads)",
        "            false)",
        _WAITING,
    ),
    Mutant("heads of others are not told apart", _ADMIT, " << request->slot.first_head;", ";", (*_STEPS, *_WAITING)),
    Mutant(
        "scores are not waited for",
        _STEP,
        "if (scores[place] == UNWRITTEN_SCORE) return false;",
        "(void)scores[place];",
        _STEPS,
    ),
    Mutant("block ids are not waited for", _STEP, "    if (step->seen_ids < step->ids) return false;\n", "", _STEPS),
    # --- Regions ---
    Mutant(
        "a tensor reaches beyond its region",
        _SOURCES,
        "if (bytes > region->bytes || offset > region->bytes - bytes)",
        "if (bytes > region->bytes)",
        _REGIONS,
    ),
    Mutant("offsets in a region are not aligned", _SOURCES, "if (offset % 64)", "if (offset % 32)", _REGIONS),
    Mutant(
        "a region that was given back is named",
        _SOURCES,
        "if (!region || region->given_back)",
        "if (!region)",
        _REGIONS,
    ),
    Mutant(
        "an offset without a region is taken", _SOURCES, "return !offset || REFUSE(", "return true || REFUSE(", _REGIONS
    ),
    Mutant(
        "nobody hears of the last request of a region",
        _SOURCES,
        "if (region && !--region->requests && region->given_back)",
        "if (region && !--region->requests && false)",
        _REGIONS,
    ),
    Mutant(
        "a request does not keep its regions", _SOURCES, "request->regions[number]->requests++", "(void)0", _REGIONS
    ),
    Mutant("a region is taken from its requests", _TYPE, "if (region->requests) Py_RETURN_FALSE;", "", _CORE_REGIONS),
    Mutant(
        "a region is found under a number of before",
        "csrc/ring/regions.c",
        "region->in_use && region->id == id",
        "region->in_use",
        _CORE_REGIONS,
    ),
    Mutant(
        "a tensor has two sources",
        "csrc/core/request.c",
        "if (has_regions && at.bytes < bytes)",
        "if (has_regions && at.bytes < bytes) return true; else if (false)",
        _REGIONS,
    ),
    Mutant(
        "keys of a device are given back before it has read them",
        _STEP,
        "if (request->slot.queries_dtype || core_is_on_device(request, KEYS)) continue;",
        "if (request->slot.queries_dtype) continue;",
        _CORE_REGIONS,
    ),
    Mutant(
        "scores are left out on a device",
        _ADMIT,
        "return scores || (ids && !plain);",
        "return ids && !plain;",
        _CORE_REGIONS,
    ),
    Mutant(
        "an order is left out on a device", _ADMIT, "return scores || (ids && !plain);", "return scores;", _CORE_REGIONS
    ),
    Mutant(
        "ranks read the first one's queries",
        _STEP,
        "addresses[(size_t)token * all + first_row + row] = address | dtype;",
        "addresses[(size_t)token * all + row] = address | dtype;",
        _CORE_REGIONS,
    ),
    Mutant(
        "an answer of another size is written to a region",
        "csrc/core/handover.c",
        "(uint64_t)part->len != ids_bytes(core, request)",
        "false",
        _CORE_REGIONS,
    ),
    Mutant("numbers are cut off", _CASTS, "bits + 0x7fff + (bits >> 16 & 1)", "bits", _CORE),
    Mutant("rounding to odd is forgotten", _CASTS, "(nan ? QUIET : (bits & 0xffff) != 0)", "(nan ? QUIET : 0)", _CORE),
    Mutant(
        "an id is found under another one", _INDEX, "slot->owner == owner && slot->id == id", "slot->id == id", _CORE
    ),
    Mutant(
        "a tenant's turn never ends",
        _ADMIT,
        "turn->num_queues && turn->left > 0 && ",
        "turn->num_queues && ",
        ("scheduler/test_core_turns.py",),
    ),
    Mutant(
        "a tenant has any part of a step",
        _ADMIT,
        "return turn->step == core->serial && turn->taken >= most_of(core, tenant, now);",
        "return turn->step == core->serial && turn->taken >= 1e9 * most_of(core, tenant, now);",
        ("scheduler/test_core_turns.py",),
    ),
    # --- Clients on this host ---
    Mutant(
        "clients are served though the server ends",
        "csrc/core/request.c",
        "if (core->no_more && !own) {",
        "if (false) {",
        ("ring/test_connection.py::test_clients_are_refused_once_the_server_ends_and_frontends_are_not",),
    ),
    Mutant(
        "calls of frontends are counted twice",
        "csrc/core/calls.c",
        "    if (!link->tenant_bytes) return;\n",
        "",
        ("ring/test_connection.py::test_calls_of_clients_are_counted_and_timed_and_those_of_frontends_are_not",),
    ),
)
