/* The cache's columns against each other: how many hold each page, how many pages are free, how far each table
 * reaches. A little at a time, while nothing else is to be done; from the beginning again after every change. */
#include "core/core.h"

#include <assert.h>
#include <stdlib.h>

enum { CELLS_AT_ONCE = 8192 };

static void fault(struct core *core) { core_add(&core->integrity_faults, 1); }

/* Checks that the cells of a pool's row name pages of that pool; how many there are. */
static size_t check_row(struct core *core, size_t entry, size_t first) {
    const struct sequence_columns *columns = &core->sequences;
    const uint32_t pool = core_owner(core, (uint32_t)entry);
    if (pool == entry) return 0;
    const int32_t *cells = columns->cells.buf, *numbers = columns->page_numbers.buf;
    const int32_t room = ((const int32_t *)columns->max_blocks.buf)[pool];
    const size_t pages = (size_t)((const int32_t *)columns->first_rows.buf)[pool] * TABLE_ROW;
    const int64_t num_pages = columns->holders.len / 4, held = ((const int64_t *)columns->held.buf)[pool];
    for (size_t at = first; at < first + (size_t)room; at++) {
        if (cells[at] == -1) continue;
        const int32_t number = cells[at] >= 0 && cells[at] < num_pages ? numbers[cells[at]] : -1;
        if (number < 0 || number >= held || cells[pages + (size_t)number] != cells[at]) fault(core);
    }
    return (size_t)room;
}

/* Counts the pages of one sequence, and checks how many there are; how many cells it looked at. */
static size_t check_entry(struct core *core, size_t entry) {
    const struct sequence_columns *columns = &core->sequences;
    const int64_t *lengths = columns->lengths.buf, held = ((const int64_t *)columns->held.buf)[entry];
    const size_t num_pages = (size_t)columns->holders.len / 4, num_cells = (size_t)columns->cells.len / 4;
    const size_t first = (size_t)((const int32_t *)columns->first_rows.buf)[entry] * TABLE_ROW;
    int64_t longest = 0;
    for (size_t layer = 0; layer < core->layers; layer++) {
        int64_t length = lengths[layer * columns->count + entry];
        longest = length > longest ? length : longest;
    }
    const bool is_pool = ((const int32_t *)columns->num_rows.buf)[entry];
    const int64_t reached = is_pool ? held : (longest + core->block_size - 1) / core->block_size;
    if (held != reached || held < 0 || first + (size_t)held > num_cells) {
        fault(core);
        return core->layers;
    }
    for (size_t block = 0; block < (size_t)held; block++) {
        const int32_t page = ((const int32_t *)columns->cells.buf)[first + block];
        if (page < 0 || (size_t)page >= num_pages)
            fault(core);
        else
            core->recounted[page]++;
    }
    return core->layers + (size_t)held + check_row(core, entry, first);
}

static size_t check_pages(struct core *core, size_t num_pages, size_t count) {
    const int32_t *holders = core->sequences.holders.buf;
    size_t checked = 0;
    for (; checked < count && core->checked_pages < num_pages; checked++, core->checked_pages++)
        if (core->recounted[core->checked_pages] != holders[core->checked_pages]) fault(core);
    return checked;
}

static void check_free(struct core *core, size_t num_pages) {
    int64_t unheld = 0;
    for (size_t page = 0; page < num_pages; page++) unheld += core->recounted[page] == 0;
    if (unheld != *(const int64_t *)core->sequences.free_pages.buf) fault(core);
}

static void begin_anew(struct core *core, size_t num_pages) {
    core->unchecked = false;
    core->checked_entries = core->checked_pages = 0;
    memset(core->recounted, 0, num_pages * sizeof *core->recounted);
}

bool core_check_integrity(struct core *core) {
    const size_t num_pages = (size_t)core->sequences.holders.len / 4, count = core->sequences.count;
    if (!core->recounted) return false;
    if (core->unchecked) begin_anew(core, num_pages);
    if (core->checked_entries == count && core->checked_pages == num_pages) return false;
    size_t cells = 0;
    while (cells < CELLS_AT_ONCE && core->checked_entries < count) cells += check_entry(core, core->checked_entries++);
    if (cells < CELLS_AT_ONCE) check_pages(core, num_pages, CELLS_AT_ONCE - cells);
    if (core->checked_entries < count || core->checked_pages < num_pages) return true;
    check_free(core, num_pages);
    core_add(&core->integrity_checks, 1);
    return false;
}
