/* Which requests may take effect now: the one place where a request is checked against the cache and entered in it, but
 * for what rows of pools have instead of lengths (pools.c).
 *
 * A step runs all its appends before all its selections, and what Python runs behind it comes later still. So a
 * request is held back where that would tell the order of execution from the order of arrival: an append to a layer
 * of a sequence that is appended to or read already, a fork, truncation or closing of a sequence that is appended to
 * already (a selection may have waited for that) or that something behind the step works on, and either where a
 * prefill is not done with reading. What is held back holds back every later request that names one of its
 * sequences; others overtake it. A selection that waits for keys holds nothing back.
 *
 * Rows of a pool may share pages, so that its layers take the place of its rows' own: they have the revisions, and what
 * one request appends and another reads of them is kept apart. What is held back holds back all of its pool. */
#include "core/core.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>

enum { CANCELLED = 1, DEADLINE_EXCEEDED = 4, NOT_FOUND = 5, FAILED_PRECONDITION = 9 };
enum { ABORTED = 10, OUT_OF_RANGE = 11 };

/* In blocks of keys to be read: what a tenant takes before it is another one's turn, what a request about sequences costs,
 * and what a tenant may have of any step. What a turn overdraws costs later ones, this many at most. */
enum { TURN_COST = 64, SEQUENCE_COST = 4, LEAST_COST = 256, MOST_TURNS = 8 };
enum { STEPS_A_QUEUE = 4 };
/* Of the device in one step, for one tenant while another one asks too: whoever waits for its next step waits for so long
 * at most, since a device that does not run requests side by side takes longer the more a step has of them. */
static const double STEP_SECONDS = 0.002;

/* What becomes of a request: it is entered, or answered; it is held back, waits for keys, or needs Python's
 * decision. */
enum verdict { TAKEN, ENDED, HELD_BACK, WAITS, NEEDS_PYTHON };

static int64_t *lengths_of(const struct core *core) { return core->sequences.lengths.buf; }
static uint64_t *revisions_of(const struct core *core) { return core->sequences.revisions.buf; }
static int32_t *reading_of(const struct core *core) { return core->sequences.reading.buf; }

/* Of a row's layer, or of its pool's. */
static size_t cell_of(const struct core *core, const struct request *request, uint32_t row) {
    const uint32_t owner = core_owner(core, request->entries[row]);
    assert(owner < core->sequences.count);
    return (size_t)request->slot.layer * core->sequences.count + owner;
}

static bool appends(const struct request *request) { return request->slot.keys_dtype != 0; }
static bool selects(const struct request *request) { return request->slot.queries_dtype != 0; }
static bool has_tokens(const struct request *request) { return request->slot.kind == BLOCKDEX_TOKENS; }
static bool of_pool(const struct request *request) { return core_is_of_pool(&request->slot); }

/* What a request names, by number: its pool, its rows' sequences, or those of its slot. */
static uint32_t num_named(const struct request *request) {
    if (of_pool(request)) return 1;
    if (request->num_rows) return request->num_rows;
    return request->slot.kind == BLOCKDEX_FORK ? 2 : 1;
}

static uint64_t named(const struct request *request, uint32_t row) {
    if (request->num_rows && !of_pool(request)) return request->ids[row];
    return row ? request->slot.child_id : request->slot.sequence_id;
}

/* Whose that is: pools and sequences of a tenant have ids of their own. */
static uint64_t namer(const struct request *request) { return (uint64_t)of_pool(request) << 32 | request->tenant; }

static bool is_held_back(const struct core *core, const struct request *request) {
    if (!core->held_back.used) return false;
    for (uint32_t row = 0; row < num_named(request); row++)
        if (pair_index_find(&core->held_back, namer(request), named(request, row))) return true;
    return false;
}

/* Later requests must not overtake this one. Without memory for that they cannot be told: everything stops, as it does
 * where there is none for an answer. */
static bool hold_back_others(struct core *core, struct request *request) {
    request->holds_back = true;
    for (uint32_t row = 0; row < num_named(request); row++)
        if (!pair_index_set(&core->held_back, namer(request), named(request, row), 0)) return false;
    return true;
}

#define REFUSE(code, reason, ...) (core_refuse(core, request, code, reason, __VA_ARGS__), false)
#define NAME(row) core_name_row(&request->slot, request->ids[row])
#define START(row) ((long long)request->starts[row])
#define LENGTH(row) ((long long)request->lengths[row])
/* What errors say beside their message, of its numbers. */
#define REVISIONS "%6$s" META "layer=%2$u" META "revision=%4$llu" META "layer_revision=%5$llu"
#define NUMBERS "%7$s" META "layer=%2$u" META "start=%4$lld" META "length=%5$lld" META "layer_length=%6$lld"

static bool check_epoch(struct core *core, struct request *request) {
    if (!request->slot.epoch || request->slot.epoch == core->epoch) return true;
    return REFUSE(FAILED_PRECONDITION, "EPOCH_MISMATCH",
                  "epoch: request names %1$llu, the cache's is %2$llu" META "epoch=%1$llu" META "cache_epoch=%2$llu",
                  (unsigned long long)request->slot.epoch, (unsigned long long)core->epoch);
}

static bool find_entries(struct core *core, struct request *request) {
    if (of_pool(request)) return core_find_rows(core, request) && core_check_room(core, request);
    for (uint32_t row = 0; row < request->num_rows; row++) {
        int64_t entry = sequence_index_find(core->index, request->tenant, request->ids[row]);
        if (entry < 0)
            return REFUSE(NOT_FOUND, "UNKNOWN_SEQUENCE", "%1$s: unknown (never opened, closed, or evicted)%2$s",
                          NAME(row).words, NAME(row).numbers);
        assert((size_t)entry < core->sequences.count);
        request->entries[row] = (uint32_t)entry;
    }
    return true;
}

static bool check_not_stale(struct core *core, struct request *request, const char *call) {
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const uint64_t revision = request->revisions[row], known = revisions_of(core)[cell_of(core, request, row)];
        if (revision && revision < known)
            return REFUSE(ABORTED, "STALE_REVISION",
                          "%1$s, layer %2$u: %3$s has revision %4$llu, the layer is at %5$llu" REVISIONS,
                          NAME(row).words, request->slot.layer, call, (unsigned long long)revision,
                          (unsigned long long)known, NAME(row).numbers);
    }
    return true;
}

/* The append rule. Afterwards `applies` says which rows are to be written: not those that were before. */
static bool check_append(struct core *core, struct request *request) {
    const bool rollback = request->slot.flags & BLOCKDEX_ROLLBACK;
    const uint32_t layer = request->slot.layer;
    if (!check_not_stale(core, request, "append")) return false;
    request->done_already = true;
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const size_t cell = cell_of(core, request, row);
        const int64_t length = lengths_of(core)[cell], end = request->starts[row] + request->lengths[row];
        const uint64_t revision = request->revisions[row];
        request->applies[row] = !revision || revision != revisions_of(core)[cell];
        request->done_already &= !request->applies[row];
        if (!request->applies[row] && !of_pool(request) && end != length)
            return REFUSE(
                ABORTED, "STALE_REVISION",
                "%1$s, layer %2$u: append ends at %3$lld, length at its revision %8$llu is %6$lld" NUMBERS META
                "revision=%8$llu",
                NAME(row).words, layer, (long long)end, START(row), LENGTH(row), (long long)length, NAME(row).numbers,
                (unsigned long long)revision);
    }
    if (of_pool(request)) return true;
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const int64_t length = lengths_of(core)[cell_of(core, request, row)], start = request->starts[row];
        if (!request->applies[row]) continue;
        if (start > length)
            return REFUSE(OUT_OF_RANGE, "APPEND_BEYOND_LENGTH",
                          "%1$s, layer %2$u: append starts at %3$lld, length is %6$lld" NUMBERS, NAME(row).words, layer,
                          (long long)start, START(row), LENGTH(row), (long long)length, NAME(row).numbers);
        if (start < length && !rollback && !request->revisions[row])
            return REFUSE(
                OUT_OF_RANGE, "APPEND_OVERLAPS",
                "%1$s, layer %2$u: append starts at %3$lld, length is %6$lld; to roll back takes a revision or "
                "rollback" NUMBERS,
                NAME(row).words, layer, (long long)start, START(row), LENGTH(row), (long long)length,
                NAME(row).numbers);
    }
    return true;
}

/* Of a selection alone. One that appends for its own tokens reads what it has written. */
static enum verdict check_selection(struct core *core, struct request *request) {
    const bool may_wait = of_pool(request) || request->slot.flags & BLOCKDEX_WAIT_FOR_KEYS;
    const uint32_t spans = request->num_rows, layer = request->slot.layer;
    bool all_named = true;
    if (!of_pool(request) && !check_not_stale(core, request, "selection")) return ENDED;
    for (uint32_t row = 0; row < spans; row++) {
        const uint64_t revision = request->revisions[row], known = revisions_of(core)[cell_of(core, request, row)];
        all_named &= revision != 0;
        if (revision <= known) continue;
        if (may_wait) return WAITS;
        core_refuse(core, request, ABORTED, "FUTURE_REVISION",
                    "%1$s, layer %2$u: %3$s has revision %4$llu, the layer is at %5$llu" REVISIONS, NAME(row).words,
                    layer, "selection", (unsigned long long)revision, (unsigned long long)known, NAME(row).numbers);
        return ENDED;
    }
    if (of_pool(request)) return TAKEN;
    for (uint32_t row = 0; row < spans; row++) {
        const int64_t length = lengths_of(core)[cell_of(core, request, row)];
        const int64_t end = request->starts[row] + request->lengths[row];
        if (end <= length) continue;
        /* Revisions that it names are all there: what names none may yet come. */
        if (may_wait && !all_named) return WAITS;
        core_refuse(core, request, FAILED_PRECONDITION, "KEYS_NOT_APPENDED",
                    "%1$s, layer %2$u: selection ends at %3$lld, length is %6$lld" NUMBERS, NAME(row).words, layer,
                    (long long)end, START(row), LENGTH(row), (long long)length, NAME(row).numbers);
        return ENDED;
    }
    return TAKEN;
}

/* Whether all pages that a row writes are there, and its sequence's alone. */
static bool has_pages(const struct core *core, const struct request *request, uint32_t row) {
    const uint32_t entry = request->entries[row];
    const int64_t size = core->block_size, held = ((const int64_t *)core->sequences.held.buf)[entry];
    const int64_t forked = ((const int64_t *)core->sequences.forked.buf)[entry];
    const int64_t first = request->starts[row] / size;
    const int64_t stop = (request->starts[row] + request->lengths[row] + size - 1) / size;
    if (stop > held) return false;
    const int32_t *cells = core->sequences.cells.buf, *holders = core->sequences.holders.buf;
    const size_t table = (size_t)((const int32_t *)core->sequences.first_rows.buf)[entry] * TABLE_ROW;
    for (int64_t block = first; block < stop && block < forked; block++)
        if (holders[cells[table + (size_t)block]] > 1) return false;
    return true;
}

/* An append, by row: whether it would be told from one in the order of arrival. */
static bool append_conflicts(struct core *core, const struct request *request) {
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const size_t cell = cell_of(core, request, row);
        if (reading_of(core)[cell]) return true;
        if (core->appended_in[cell] != core->serial && core->read_in[cell] != core->serial &&
            core->large_appended_in[cell] != core->serial)
            continue;
        core->changed = true; /* in the next step there is nothing against it */
        return true;
    }
    return false;
}

static bool needs_pages(const struct core *core, const struct request *request) {
    for (uint32_t row = 0; row < request->num_rows && !of_pool(request); row++)
        if (request->applies[row] && !has_pages(core, request, row)) return true;
    return false;
}

/* Whether answer.c would have to write to the device: programs write plain block ids there, and nothing else. */
static bool answers_device(const struct request *request) {
    const bool ids = core_is_on_device(request, BLOCK_IDS), scores = core_is_on_device(request, SCORES);
    const bool plain = request->slot.order == BLOCKDEX_ASCENDING && !core_is_scored(&request->slot) &&
                       !(request->slot.flags & BLOCKDEX_PAGES);
    return scores || (ids && !plain);
}

/* Whether no step can hold a request, however empty: then Python runs it. */
static bool is_large(const struct core *core, const struct request *request) {
    if (answers_device(request)) return true;
    return request->longest > core->longest || request->num_rows > CORE_RUNS || request->tokens > CORE_TOKENS ||
           (!core->run_step && !core_replay(core, request->num_rows, request->longest, request->end));
}

static uint64_t heads_of(const struct request *request) {
    assert(request->slot.num_heads >= 1 && request->slot.num_heads <= 64);
    return UINT64_MAX >> (64 - request->slot.num_heads) << request->slot.first_head;
}

/* Rows of the step that a selection shares with others of the same tokens and other heads; NULL where there are
 * none. */
static struct group *find_group(struct core *core, const struct request *request) {
    struct gathered *to = &core->gathered;
    if (appends(request)) return NULL;
    const uint64_t heads = heads_of(request);
    const uint32_t spans = request->num_rows;
    for (uint32_t number = 0; number < to->num_groups; number++) {
        struct group *group = &to->groups[number];
        if (group->layer != request->slot.layer || group->runs != spans || group->tokens != request->tokens ||
            group->heads & heads)
            continue;
        bool same = true;
        for (uint32_t row = 0, run = group->first_run; row < spans && same; row++, run++)
            same = to->entries[run] == request->entries[row] && to->columns[1][run] == request->starts[row] &&
                   to->columns[2][run] == request->lengths[row];
        if (same) return group;
    }
    return NULL;
}

static bool fits_in_step(const struct core *core, const struct request *request) {
    const struct gathered *to = &core->gathered;
    const uint32_t runs = to->runs + request->num_rows;
    const uint32_t longest = request->longest > to->longest ? request->longest : to->longest;
    const int64_t end = request->end > to->end ? request->end : to->end;
    return runs <= CORE_RUNS && to->tokens + request->tokens <= CORE_TOKENS && to->num_asked < CORE_ASKED &&
           (core->run_step || core_replay(core, runs, longest, end));
}

static void add_runs(struct core *core, const struct request *request) {
    struct gathered *to = &core->gathered;
    struct group *group = &to->groups[to->num_groups++];
    *group = (struct group){
        to->runs, request->num_rows, to->tokens, request->tokens, request->slot.layer, request->tenant, 0};
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const uint32_t run = to->runs++, entry = request->entries[row];
        to->columns[0][run] = (int32_t)request->slot.layer;
        to->columns[1][run] = (int32_t)request->starts[row];
        to->columns[2][run] = (int32_t)request->lengths[row];
        to->columns[3][run] = ((const int32_t *)core->sequences.first_rows.buf)[entry];
        to->columns[4][run] = appends(request) && request->applies[row] ? RUN_APPENDS : 0;
        to->entries[run] = entry;
    }
    to->tokens += request->tokens;
    to->longest = request->longest > to->longest ? request->longest : to->longest;
    to->end = request->end > to->end ? request->end : to->end;
}

/* What a request costs, in blocks of keys to be read. */
static double cost_of(const struct core *core, const struct request *request) {
    if (!has_tokens(request)) return SEQUENCE_COST * num_named(request);
    return request->tokens * (1 + (double)request->end / core->block_size);
}

/* Puts a request into the step that is gathered; it fits. */
static void add_to_step(struct core *core, struct request *request, struct group *group) {
    struct gathered *to = &core->gathered;
    if (!group) {
        to->cost += cost_of(core, request);
        add_runs(core, request);
        group = &to->groups[to->num_groups - 1];
    }
    if (selects(request)) {
        const bool scored = core_is_scored(&request->slot) || request->slot.order == BLOCKDEX_SCORE;
        group->heads |= heads_of(request);
        for (uint32_t run = group->first_run; run < group->first_run + group->runs; run++)
            to->columns[4][run] |= RUN_SELECTS | (scored ? RUN_WANTS_SCORES : 0);
    }
    to->asked[to->num_asked++] = (struct asked){request, group->first_token, group->first_run};
}

/* A layer that reaches fewer pages than before may have been the one that held them. */
static void note_cut(struct core *core, uint32_t entry, int64_t before, int64_t after) {
    if (!before || (after - 1) / core->block_size >= (before - 1) / core->block_size) return;
    if (core->trimmed_in[entry] == core->serial) return;
    core->trimmed_in[entry] = core->serial;
    assert(core->num_to_trim < core->sequences.count);
    core->to_trim[core->num_to_trim++] = entry;
}

/* Enters in the cache's columns what a request appends, and who was called. */
static void enter(struct core *core, struct request *request, int64_t now) {
    if (request->slot.flags & BLOCKDEX_PAGES && selects(request)) core_keep_tables(core, request, 1);
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const size_t cell = cell_of(core, request, row);
        ((double *)core->sequences.last_calls.buf)[request->entries[row]] = 1e-9 * (double)now;
        if (!appends(request) || !request->applies[row]) continue;
        const int64_t end = request->starts[row] + request->lengths[row];
        if (!of_pool(request)) {
            note_cut(core, request->entries[row], lengths_of(core)[cell], end);
            lengths_of(core)[cell] = end;
        }
        if (request->revisions[row]) revisions_of(core)[cell] = request->revisions[row];
        core->appended = true;
    }
}

static void stamp(struct core *core, const struct request *request, bool large) {
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const size_t cell = cell_of(core, request, row);
        if (appends(request)) (large ? core->large_appended_in : core->appended_in)[cell] = core->serial;
        if (selects(request)) core->read_in[cell] = core->serial;
        if (!large && !appends(request) && !of_pool(request)) continue;
        core->used_in[request->entries[row]] = core->serial;
        core->used_in[core_owner(core, request->entries[row])] = core->serial;
    }
}

static void ask_python(struct core *core, const struct request *request) {
    assert(core->num_for_python < core->max_queued);
    core->for_python[core->num_for_python++] = request->number;
    core->gathered.cost_beside += cost_of(core, request);
}

/* Whether a step would run before what is to be written behind it, and so read what is not there. */
static bool reads_too_early(struct core *core, const struct request *request) {
    for (uint32_t row = 0; row < request->num_rows; row++)
        if (core->large_appended_in[cell_of(core, request, row)] == core->serial) return true;
    return false;
}

/* Whether cells of its rows were set in this very round: the device knows of them in the next one. */
static bool reads_new_tables(struct core *core, const struct request *request) {
    for (uint32_t row = 0; row < request->num_rows; row++)
        if (core->tables_set_in[request->entries[row]] == core->serial) return true;
    return false;
}

static enum verdict take_tokens(struct core *core, struct request *request, int64_t now) {
    if (!find_entries(core, request)) return ENDED;
    if (appends(request) && !check_append(core, request)) return ENDED;
    if (!appends(request)) {
        enum verdict verdict = check_selection(core, request);
        if (verdict != TAKEN) return verdict;
    }
    const bool nothing_left = appends(request) && request->done_already && !selects(request);
    if (of_pool(request) && !nothing_left && !core_check_pages(core, request)) return ENDED;
    if (reads_new_tables(core, request)) {
        core->changed = true;
        return HELD_BACK;
    }
    if (appends(request) && !request->done_already && append_conflicts(core, request)) return HELD_BACK;
    if (appends(request) && needs_pages(core, request)) return NEEDS_PYTHON;
    if (nothing_left) {
        enter(core, request, now);
        request->taken = now;
        core_answer(core, request, (struct blockdex_answer){0}, NULL, 0);
        return ENDED;
    }
    const bool large = is_large(core, request);
    struct group *group = large ? NULL : find_group(core, request);
    if (!large && (reads_too_early(core, request) || !(group || fits_in_step(core, request)))) {
        core->gathered.full = core->changed = true;
        return HELD_BACK;
    }
    enter(core, request, now);
    stamp(core, request, large);
    request->taken = now;
    if (large)
        ask_python(core, request);
    else
        add_to_step(core, request, group);
    return TAKEN;
}

/* Whether something is in the way of what changes an entry's table: a prefill that is not done, or this very step. */
static bool is_in_use(struct core *core, int64_t entry) {
    if (entry < 0) return false;
    if (((const int32_t *)core->sequences.reading_sequence.buf)[entry]) return true;
    if (core->used_in[entry] != core->serial) return false;
    core->changed = true;
    return true;
}

/* A sequence's life is Python's, once nothing is in the way, and so is a pool's. */
static enum verdict take_life(struct core *core, struct request *request) {
    const uint16_t kind = request->slot.kind;
    if (kind == BLOCKDEX_OPEN || kind == BLOCKDEX_GET || kind == BLOCKDEX_CREATE_POOL) return NEEDS_PYTHON;
    if (kind == BLOCKDEX_CLOSE_POOL) return is_in_use(core, core_find_pool(core, request)) ? HELD_BACK : NEEDS_PYTHON;
    for (uint32_t row = 0; row < num_named(request); row++)
        if (is_in_use(core, sequence_index_find(core->index, request->tenant, named(request, row)))) return HELD_BACK;
    return NEEDS_PYTHON;
}

/* Cells are set at once where nothing reads the rows as they were. */
static enum verdict take_tables(struct core *core, struct request *request, int64_t now) {
    if (!core_find_rows(core, request) || !core_check_tables(core, request)) return ENDED;
    for (uint32_t row = 0; row < request->num_rows; row++)
        if (is_in_use(core, request->entries[row])) return HELD_BACK;
    core_set_tables(core, request);
    request->taken = now;
    core_answer(core, request, (struct blockdex_answer){.flags = BLOCKDEX_IS_STATE}, NULL, 0);
    return ENDED;
}

static enum verdict judge(struct core *core, struct request *request, int64_t now) {
    /* Whatever is held back that one names which waits came later. */
    if (request->state != IS_WAITING && is_held_back(core, request)) return HELD_BACK;
    if (!check_epoch(core, request)) return ENDED;
    if (request->slot.kind == BLOCKDEX_SET_PAGE_TABLES) return take_tables(core, request, now);
    return has_tokens(request) ? take_tokens(core, request, now) : take_life(core, request);
}

static void move(struct core *core, struct request *request, enum request_state state) {
    if (request->state == state) return;
    if (request->state == IS_QUEUED) list_remove(&core->backlog, request);
    if (request->state == IS_WAITING) list_remove(&core->waiting, request);
    request->state = state;
    if (state == IS_WAITING) list_append(&core->waiting, request);
    if (state == IS_QUEUED) list_prepend(&core->backlog, request);
}

bool core_drop_if_gone(struct core *core, struct request *request, int64_t now) {
    const double waited = 1e-9 * (double)(now - request->received);
    if (request->has_pages) return false; /* it takes effect next */
    if (request->cancelled) {
        core_add(&core->cancelled, 1);
        core_refuse(core, request, CANCELLED, "CANCELLED", "caller: gone after %.3f s", waited);
        return true;
    }
    if (request->slot.deadline > now) return false;
    core_add(&core->late, 1);
    core_refuse(core, request, DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED",
                "timeout: %.3f s were allowed, %.3f s have passed",
                1e-9 * (double)(request->slot.deadline - request->received), waited);
    return true;
}

/* Takes a request, or leaves it where it is; it may be forgotten then. False: no memory is left. */
static bool consider(struct core *core, struct request *request, int64_t now) {
    request->holds_back = false;
    if (core_drop_if_gone(core, request, now)) return true;
    switch (judge(core, request, now)) {
        case ENDED: return true;
        case TAKEN: move(core, request, is_large(core, request) ? LARGE : IN_STEP); return true;
        case WAITS: move(core, request, IS_WAITING); return true;
        case NEEDS_PYTHON:
            ask_python(core, request);
            if (!has_tokens(request)) {
                request->taken = now;
                move(core, request, WITH_PYTHON);
            }
            return hold_back_others(core, request);
        default:
            /* Its keys are there: it comes before whatever could take them away. */
            if (request->state == IS_WAITING) move(core, request, IS_QUEUED);
            return hold_back_others(core, request);
    }
}

/* Most that a step may take of one tenant, in blocks of keys to be read. While nobody else asks, a step is a part of the
 * longest wait only: what comes meanwhile waits for it, and the queue would never be seen to be too long. */
static double most_of(const struct core *core, uint32_t tenant, int64_t now) {
    if (core->spent_seconds <= 0) return INFINITY;
    const double per_second = core->spent_cost / core->spent_seconds;
    if (turns_contended(&core->turns, now))
        return core_weight(core, tenant) * fmax(LEAST_COST, STEP_SECONDS * per_second);
    return fmax(LEAST_COST, 1e-9 * (double)core->longest_queue / STEPS_A_QUEUE * per_second);
}

static bool has_its_part(const struct core *core, uint32_t tenant, int64_t now) {
    const struct turn *turn = &core->turns.of[tenant];
    return turn->step == core->serial && turn->taken >= most_of(core, tenant, now);
}

/* Considers a request at its tenant's cost. */
static bool consider_at_cost(struct core *core, struct request *request, int64_t now) {
    struct turn *turn = &core->turns.of[request->tenant];
    const double before = core->gathered.cost + core->gathered.cost_beside;
    if (turn->step != core->serial) turn->taken = 0;
    turn->step = core->serial;
    const bool memory = consider(core, request, now);
    const double cost = core->gathered.cost + core->gathered.cost_beside - before;
    turn->left -= cost;
    turn->taken += cost;
    return memory;
}

static bool consider_backlog(struct core *core, int64_t now) {
    bool memory = true;
    for (struct request *request = core->backlog.first, *next; request && memory; request = next) {
        next = request->next;
        if (has_its_part(core, request->tenant, now)) {
            core->changed = true; /* in the next step there is nothing against it */
            memory = hold_back_others(core, request);
        } else
            memory = consider_at_cost(core, request, now);
    }
    return memory;
}

static bool consider_waiting(struct core *core, int64_t now) {
    bool memory = true;
    for (struct request *request = core->waiting.first, *next; request && memory; request = next) {
        next = request->next;
        memory = consider_at_cost(core, request, now);
    }
    return memory;
}

/* Considers what has come from one tenant, as much as its turn lets it. */
static bool take_turn(struct core *core, uint32_t tenant, int64_t now) {
    struct turn *turn = &core->turns.of[tenant];
    const double part = core_weight(core, tenant) * TURN_COST;
    bool memory = true;
    turn->left = fmin(turn->left, 0) + part;
    while (memory && turn->num_queues && turn->left > 0 && !core->gathered.full && !has_its_part(core, tenant, now)) {
        struct request *request = turns_take(&core->turns, tenant);
        request->state = IS_QUEUED;
        list_append(&core->backlog, request);
        memory = consider_at_cost(core, request, now);
    }
    turn->left = fmax(turn->left, -MOST_TURNS * part);
    return memory;
}

/* Considers what has come, tenant by tenant, until there is nothing more, or the step is full, or all have their parts
 * of it. */
static bool consider_new(struct core *core, int64_t now) {
    struct turns *turns = &core->turns;
    uint32_t satisfied = 0;
    while (satisfied < turns->tenants && !core->gathered.full) {
        const uint32_t tenant = turns->first;
        if (!take_turn(core, tenant, now)) return false;
        satisfied = has_its_part(core, tenant, now) && turns->of[tenant].num_queues ? satisfied + 1 : 0;
        if (turns->first == tenant) turns_pass(turns);
    }
    return true;
}

static bool is_looked_at(const struct server_link *link) {
    return server_link_is_heard(link) && server_link_filled(link);
}

bool core_anything_came(const struct core *core) {
    if (core->changed || core->turns.count) return true;
    for (size_t number = 0; number < core->num_links; number++)
        if (is_looked_at(core->links[number])) return true;
    return false;
}

static void read_link(struct core *core, struct server_link *link, int64_t now) {
    int64_t filled = server_link_filled(link);
    if (filled < 0) {
        core->broken = link;
        snprintf(core->broken_by, sizeof core->broken_by,
                 "ring: more slots are said to be filled than the %llu there are",
                 (unsigned long long)link->request_slots);
        return;
    }
    for (; filled > 0 && core->broken != link; filled--) core_read(core, link, now);
}

static void read_links(struct core *core, int64_t now) {
    for (size_t number = 0; number < core->num_links && !core->broken; number++) {
        struct server_link *link = core->links[(core->turn + number) % core->num_links];
        if (is_looked_at(link)) read_link(core, link, now);
    }
    core->turn = core->num_links ? (core->turn + 1) % core->num_links : 0;
}

static void refuse_waiting(struct core *core) {
    for (struct request *request = core->waiting.first, *next; request; request = next) {
        next = request->next;
        core_refuse(core, request, UNAVAILABLE, "SHUTTING_DOWN",
                    "server: shutting down, the keys it waits for cannot come");
    }
}

/* When a channel's request was written, nobody says: not before the last look that found none. */
static void look_at_channels(struct core *core, int64_t now) {
    for (size_t number = 0; number < core->num_links; number++) {
        struct server_link *link = core->links[number];
        struct channel *channel = &link->channel;
        if (!channel->bound) continue;
        const bool asked = channel->asks;
        channel->asks = server_link_filled(link) != 0;
        if (!channel->asks) {
            channel->looked = now;
            continue;
        }
        core->rung = now;
        if (asked) continue;
        channel->before = channel->came;
        channel->came = now;
    }
}

static bool comes_with(const struct core *core, const struct channel *late, const struct channel *asking) {
    const int64_t apart = late->came - asking->before;
    return late->came && asking->before && -core->hold < apart && apart < core->hold;
}

/* Ranks of one engine ask at about the same time, layer after layer: one read of the keys serves all of them if their
 * requests are in one step. So who came together last time is waited for, a little. */
static bool others_come(const struct core *core, int64_t now) {
    bool hold = false;
    for (size_t number = 0; number < core->num_links; number++) {
        const struct channel *asking = &core->links[number]->channel;
        if (!asking->asks) continue;
        if (now - asking->came >= core->hold) return false;
        for (size_t other = 0; other < core->num_links && !hold; other++) {
            const struct channel *late = &core->links[other]->channel;
            hold = late->bound && !late->asks && comes_with(core, late, asking);
        }
    }
    return hold;
}

bool core_gather(struct core *core, int64_t now) {
    struct gathered *to = &core->gathered;
    to->runs = to->tokens = to->longest = to->num_asked = to->num_groups = 0;
    to->end = 0;
    to->cost = to->cost_beside = 0;
    to->full = false;
    if (core->num_channels) {
        look_at_channels(core, now);
        if (others_come(core, now)) return true;
    }
    if (!core_anything_came(core)) return true;
    core->serial++;
    core->active = now;
    core->unchecked = true;
    if (core->changed) {
        core->changed = false;
        pair_index_clear(&core->held_back);
        if (!consider_backlog(core, now)) return false;
    }
    read_links(core, now);
    if (!consider_new(core, now)) return false;
    if (core->appended) {
        core->appended = false;
        if (!consider_waiting(core, now)) return false;
    }
    if (core->no_more && !core->backlog.count && !core->turns.count && !core_anything_came(core)) refuse_waiting(core);
    return true;
}

static void drop_gone(struct core *core, const struct list *list, int64_t now) {
    for (struct request *request = list->first, *next; request; request = next) {
        next = request->next;
        if (!core_drop_if_gone(core, request, now) && request->slot.deadline < core->next_deadline)
            core->next_deadline = request->slot.deadline;
    }
}

void core_drop_gone(struct core *core, int64_t now) {
    if (now < core->next_deadline) return;
    core->next_deadline = INT64_MAX;
    for (uint32_t queue = 0; queue < core->turns.num_queues; queue++)
        drop_gone(core, &core->turns.queues[queue].list, now);
    drop_gone(core, &core->backlog, now);
    drop_gone(core, &core->waiting, now);
}
