/* Pools: pages that an engine numbers, under rows of cells that it sets itself.
 *
 * A pool and each of its rows have an entry of the cache's columns, as a sequence has, the rows' behind the pool's own.
 * The pool's page table says which page of the cache each of its numbers stands for; a row's is the one that kernels
 * read. Cells become pages of the cache as they are set, so what runs on the device knows of no pools. */
#include "core/core.h"

#include <assert.h>
#include <stdlib.h>

enum { INVALID_ARGUMENT = 3, NOT_FOUND = 5, RESOURCE_EXHAUSTED = 8, FAILED_PRECONDITION = 9 };
enum { NO_PAGE = -1, FEWEST_CHANGES = 1024 };

#define REFUSE(code, reason, ...) (core_refuse(core, request, code, reason, __VA_ARGS__), false)
#define POOL META "pool_id=%1$llu"

static int32_t *cells_of(const struct core *core, uint32_t entry) {
    const int32_t first = ((const int32_t *)core->sequences.first_rows.buf)[entry];
    return (int32_t *)core->sequences.cells.buf + (size_t)first * TABLE_ROW;
}

static int64_t *filled_of(const struct core *core, uint32_t entry) {
    return (int64_t *)core->sequences.filled.buf + entry;
}

static int64_t room_of(const struct core *core, uint32_t entry) {
    return ((const int32_t *)core->sequences.max_blocks.buf)[core_owner(core, entry)];
}

int64_t core_find_pool(const struct core *core, const struct request *request) {
    return sequence_index_find_pool(core->index, request->tenant, request->slot.sequence_id);
}

bool core_find_rows(struct core *core, struct request *request) {
    const unsigned long long pool_id = request->slot.sequence_id;
    const int64_t pool = core_find_pool(core, request);
    if (pool < 0)
        return REFUSE(NOT_FOUND, "UNKNOWN_POOL", "pool %1$llu: unknown (never created, or closed)" POOL, pool_id);
    const uint32_t num_rows = (uint32_t)((const int32_t *)core->sequences.num_rows.buf)[pool];
    for (uint32_t row = 0; row < request->num_rows; row++) {
        if (request->ids[row] >= num_rows)
            return REFUSE(INVALID_ARGUMENT, "INVALID_POOL",
                          "pool %1$llu: row must be below %2$u, got %3$llu" POOL META "row=%3$llu" META "num_rows=%2$u",
                          pool_id, num_rows, (unsigned long long)request->ids[row]);
        request->entries[row] = (uint32_t)pool + 1 + (uint32_t)request->ids[row];
    }
    return true;
}

bool core_check_room(struct core *core, struct request *request) {
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const long long room = room_of(core, request->entries[row]) * core->block_size;
        const long long end = request->starts[row] + request->lengths[row];
        if (end <= room) continue;
        const struct row_name name = core_name_row(&request->slot, request->ids[row]);
        return REFUSE(INVALID_ARGUMENT, "INVALID_POOL",
                      "%1$s: start + length must be at most %2$lld, got %3$lld%4$s" META "end=%3$lld" META
                      "room=%2$lld",
                      name.words, room, end, name.numbers);
    }
    return true;
}

bool core_check_pages(struct core *core, struct request *request) {
    const int64_t size = core->block_size;
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const uint32_t entry = request->entries[row];
        const int64_t end = request->starts[row] + request->lengths[row], stop = (end + size - 1) / size;
        const int64_t first = request->slot.queries_dtype ? 0 : request->starts[row] / size;
        const int32_t *cells = cells_of(core, entry);
        int64_t block = first > *filled_of(core, entry) ? first : *filled_of(core, entry);
        while (block < stop && cells[block] != NO_PAGE) block++;
        if (block >= stop) continue;
        const struct row_name name = core_name_row(&request->slot, request->ids[row]);
        return REFUSE(FAILED_PRECONDITION, "PAGE_NOT_SET",
                      "%1$s, layer %2$u: block %3$lld has no page, the span ends at %4$lld%5$s" META "layer=%2$u" META
                      "block=%3$lld" META "end=%4$lld",
                      name.words, request->slot.layer, (long long)block, (long long)end, name.numbers);
    }
    return true;
}

static bool check_cells(struct core *core, struct request *request) {
    const uint32_t pool = core_owner(core, request->entries[0]);
    const uint64_t num_pages = (uint64_t)((const int64_t *)core->sequences.held.buf)[pool];
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const uint64_t room = (uint64_t)room_of(core, request->entries[row]), first = (uint64_t)request->starts[row];
        const uint64_t count = (uint64_t)request->lengths[row];
        if (first <= room && count <= room - first) continue;
        const struct row_name name = core_name_row(&request->slot, request->ids[row]);
        return REFUSE(INVALID_ARGUMENT, "INVALID_POOL",
                      "%1$s: first_block + count must be at most %2$llu, got %3$llu + %4$llu%5$s" META
                      "first_block=%3$llu" META "count=%4$llu" META "max_blocks=%2$llu",
                      name.words, (unsigned long long)room, (unsigned long long)first, (unsigned long long)count,
                      name.numbers);
    }
    for (uint64_t at = 0; at < request->slot.number; at++)
        if (request->page_ids[at] >= num_pages)
            return REFUSE(INVALID_ARGUMENT, "INVALID_POOL",
                          "pool %1$llu: page_id must be below %2$llu, got %3$llu" POOL META "page_id=%3$llu" META
                          "num_pages=%2$llu",
                          (unsigned long long)request->slot.sequence_id, (unsigned long long)num_pages,
                          (unsigned long long)request->page_ids[at]);
    return true;
}

/* Room to note so many more cells that the device is to be told of. */
static bool reserve_changes(struct core *core, uint64_t more) {
    const size_t needed = core->num_set_cells + more;
    if (needed <= core->most_set_cells) return true;
    size_t most = core->most_set_cells ? core->most_set_cells : FEWEST_CHANGES;
    while (most < needed) most *= 2;
    int64_t *wider = realloc(core->set_cells, most * sizeof *wider);
    if (!wider) return false;
    core->set_cells = wider;
    core->most_set_cells = most;
    return true;
}

bool core_check_tables(struct core *core, struct request *request) {
    if (!check_cells(core, request)) return false;
    return reserve_changes(core, request->slot.number) ||
           REFUSE(RESOURCE_EXHAUSTED, "OVERLOADED", "engine: no memory left to set %llu cells",
                  (unsigned long long)request->slot.number);
}

void core_set_tables(struct core *core, const struct request *request) {
    const int32_t *pages = cells_of(core, core_owner(core, request->entries[0]));
    const uint64_t *page_id = request->page_ids;
    assert(core->num_set_cells + request->slot.number <= core->most_set_cells);
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const uint32_t entry = request->entries[row];
        int32_t *cells = cells_of(core, entry);
        const int64_t begin = cells - (int32_t *)core->sequences.cells.buf, room = room_of(core, entry);
        for (int64_t block = request->starts[row]; block < request->starts[row] + request->lengths[row]; block++) {
            cells[block] = pages[*page_id++];
            core->set_cells[core->num_set_cells++] = begin + block;
        }
        int64_t *filled = filled_of(core, entry);
        while (*filled < room && cells[*filled] != NO_PAGE) ++*filled;
        core->tables_set_in[entry] = core->serial;
    }
}

/* Its rows' tables stay as they are until it is answered: block ids are to become page numbers then. */
void core_keep_tables(const struct core *core, struct request *request, int more) {
    int32_t *reading = core->sequences.reading_sequence.buf;
    for (uint32_t row = 0; row < request->num_rows; row++) {
        reading[request->entries[row]] += more;
        reading[core_owner(core, request->entries[row])] += more;
    }
    request->keeps_tables = more > 0;
}

void core_name_pages(const struct core *core, const struct request *request, int32_t *ids) {
    const int32_t *numbers = core->sequences.page_numbers.buf;
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const int32_t *cells = cells_of(core, request->entries[row]);
        const size_t count = (size_t)request->lengths[row] * request->slot.num_heads * core->topk;
        for (const int32_t *end = ids + count; ids < end; ids++)
            if (*ids >= 0) *ids = numbers[cells[*ids]];
    }
}
