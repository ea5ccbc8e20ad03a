"""Faults of pools: rows, cells, pages, revisions, and the order round them."""

from __future__ import annotations

from mutants.mutant import Mutant

_ADMIT, _POOLS, _REQUEST = "csrc/core/admit.c", "csrc/core/pools.c", "csrc/core/request.c"
_TESTS = ("scheduler/test_pools.py",)
_CLIENT = ("csrc/test_client_calls.py",)

MUTANTS = (
    Mutant("a row beyond the pool's", _POOLS, "if (request->ids[row] >= num_rows)", "if (!num_rows)", _TESTS),
    Mutant("a row longer than it is", _POOLS, "if (end <= room) continue;", "if (end) continue;", _TESTS),
    Mutant(
        "a cell beyond its row", _POOLS, "if (first <= room && count <= room - first) continue;", "continue;", _TESTS
    ),
    Mutant("a page beyond the pool's", _POOLS, "if (request->page_ids[at] >= num_pages)", "if (!num_pages)", _TESTS),
    Mutant("a block without a page", _POOLS, "        if (block >= stop) continue;", "        continue;", _TESTS),
    Mutant(
        "only the first block's page is looked at",
        _POOLS,
        "while (block < stop && cells[block] != NO_PAGE) block++;",
        "if (block < stop && cells[block] != NO_PAGE) block = stop;",
        _TESTS,
    ),
    Mutant(
        "a selection needs the pages of its own blocks alone",
        _POOLS,
        "request->slot.queries_dtype ? 0 : request->starts[row] / size",
        "request->starts[row] / size",
        _TESTS,
    ),
    Mutant("cells name pages of the cache", _POOLS, "pages[*page_id++]", "(int32_t)*page_id++", _TESTS),
    Mutant(
        "cells are never told to the device",
        _POOLS,
        "[core->num_set_cells++] = begin + block",
        "[0] = begin + block",
        _TESTS,
    ),
    Mutant(
        "more cells count as set than are", _POOLS, "cells[*filled] != NO_PAGE) ++*filled;", "true) ++*filled;", _TESTS
    ),
    Mutant("page numbers are pages of the cache", _POOLS, "numbers[cells[*ids]]", "cells[*ids]", _TESTS),
    Mutant(
        "tables change while page numbers are asked of them",
        _POOLS,
        "        reading[request->entries[row]] += more;\n",
        "",
        _TESTS,
    ),
    Mutant(
        "cells are read before the device knows of them",
        _ADMIT,
        "if (core->tables_set_in[request->entries[row]] == core->serial) return true;",
        "",
        _TESTS,
    ),
    Mutant(
        "cells change while a prefill reads them",
        _ADMIT,
        "        if (is_in_use(core, request->entries[row])) return HELD_BACK;\n",
        "",
        _TESTS,
    ),
    Mutant(
        "cells change under the step that is gathered",
        _ADMIT,
        "    if (core->used_in[entry] != core->serial) return false;\n    core->changed = true;\n    return true;",
        "    return false;",
        _TESTS,
    ),
    Mutant(
        "a pool is closed while it is read",
        _ADMIT,
        "return is_in_use(core, core_find_pool(core, request)) ? HELD_BACK : NEEDS_PYTHON;",
        "return NEEDS_PYTHON;",
        _TESTS,
    ),
    Mutant(
        "a retry of a pool's append is written again",
        _ADMIT,
        "request->applies[row] = !revision || revision != revisions_of(core)[cell];",
        "request->applies[row] = !revision || revision != revisions_of(core)[cell] || of_pool(request);",
        _TESTS,
    ),
    Mutant(
        "a pool's revision is waited for when asked to alone",
        _ADMIT,
        "may_wait = of_pool(request) || ",
        "may_wait = ",
        _TESTS,
    ),
    Mutant(
        "a pool's revision must be the one that is named",
        _ADMIT,
        "if (!of_pool(request) && !check_not_stale",
        "if (!check_not_stale",
        _TESTS,
    ),
    Mutant(
        "rows of a pool are kept apart like sequences",
        _ADMIT,
        "const uint32_t owner = core_owner(core, request->entries[row]);",
        "const uint32_t owner = request->entries[row];",
        _TESTS,
    ),
    Mutant(
        "a pool's revisions may differ",
        _REQUEST,
        "if (request->revisions[row] != request->revisions[0])",
        "if (0)",
        _TESTS,
    ),
    Mutant(
        "a channel is answered with pages",
        _REQUEST,
        "return !link->channel.bound ||",
        "return true ||",
        ("scheduler/test_core_channels.py",),
    ),
    Mutant(
        "pages of a sequence are told",
        _REQUEST,
        "if (!(slot->flags & BLOCKDEX_PAGES)) return true;\n    if (!slot->sequence_id)",
        "if (!(slot->flags & BLOCKDEX_PAGES)) return true;\n    if (0)",
        _TESTS,
    ),
    Mutant("another number of page numbers", _REQUEST, "return sum == cells || ", "return true || ", _TESTS),
    Mutant(
        "the C client sends first blocks as counts",
        "ring/include/blockdex_client.h",
        "payload[2 * runs + run] = tables->counts[run];",
        "payload[2 * runs + run] = tables->first_blocks[run];",
        _CLIENT,
    ),
    Mutant(
        "the C client sends no pool",
        "ring/include/blockdex_client.h",
        "request->sequence_id = tokens->pool_id;",
        "request->sequence_id = 0;",
        _CLIENT,
    ),
)
