/* Steps of the device: what was gathered goes there, and what it has written to who asked. */
#include "core/casts.h"
#include "core/core.h"
#include "faults.h"

#include <assert.h>

enum { CUDA_ERROR_UNKNOWN = 999 };
enum { ITEM_BYTES = 2, UNWRITTEN = -2 }; /* less than any block id, and than the -1 of a place without one */
/* A NaN that no kernel writes: where a score is still to come. */
static const uint32_t UNWRITTEN_SCORE = 0xffffffff;

/* How much of a step's memory a step takes: with the padding of its program, where it is one of the device's. The
 * device's programs also read addresses, of each row of keys, of queries and of block ids: 0 for what is staged here. */
struct shape {
    uint32_t runs;
    size_t tokens, keys_at, queries_at, addresses_at, num_addresses;
};

static struct shape shape_of(const struct core *core, const struct replay *replay) {
    const struct gathered *from = &core->gathered;
    struct shape shape = {.runs = replay ? replay->runs : from->runs};
    shape.tokens = replay ? (size_t)replay->runs * replay->length : from->tokens;
    /* Keys and queries begin at multiples of 16 bytes. */
    shape.keys_at = (sizeof(int32_t) * CORE_COLUMNS * shape.runs + 15) / 16 * 16;
    shape.queries_at = shape.keys_at + ITEM_BYTES * shape.tokens * core->head_dim;
    shape.addresses_at = shape.queries_at + ITEM_BYTES * shape.tokens * core->heads * core->head_dim;
    shape.num_addresses = replay ? shape.tokens * (1 + 2 * (size_t)core->heads) + 2 * CORE_SIGNALS : 0;
    return shape;
}

static void stage_queries(const struct core *core, const struct request *request, uint16_t *to) {
    const uint32_t heads = request->slot.num_heads, dim = core->head_dim;
    const uint8_t dtype = request->slot.queries_dtype;
    const char *queries = request->tensors[QUERIES];
    if (heads == core->heads) {
        cast_to_bf16(to, queries, dtype, (size_t)request->tokens * heads * dim, core->odd_queries);
        return;
    }
    const size_t own = (size_t)heads * dim, own_bytes = own * dtype_bytes(dtype);
    to += (size_t)request->slot.first_head * dim;
    for (uint32_t token = 0; token < request->tokens; token++, to += (size_t)core->heads * dim)
        cast_to_bf16(to, queries + token * own_bytes, dtype, own, core->odd_queries);
}

/* Has the device read or write rows of a tensor where it lies: `per_token` of them, from `first_row` on, of a token's
 * `all`. Rows begin at multiples of 16 bytes, so that the dtype has room in their addresses. */
static void point_at(uint64_t *addresses, const char *tensor, uint32_t tokens, uint32_t all, uint32_t first_row,
                     uint32_t per_token, size_t row_bytes, uint8_t dtype) {
    uint64_t address = (uintptr_t)tensor;
    for (uint32_t token = 0; token < tokens; token++)
        for (uint32_t row = 0; row < per_token; row++, address += row_bytes)
            addresses[(size_t)token * all + first_row + row] = address | dtype;
}

static void point(const struct core *core, const struct shape *shape, const struct asked *asked, char *to) {
    const struct request *request = asked->request;
    const struct blockdex_request *slot = &request->slot;
    const uint32_t heads = core->heads, tokens = request->tokens;
    uint64_t *keys = (uint64_t *)(void *)(to + shape->addresses_at), *queries = keys + shape->tokens;
    uint64_t *block_ids = queries + shape->tokens * heads;
    const size_t first = asked->first_token;
    if (core_is_on_device(request, KEYS))
        point_at(keys + first, request->tensors[KEYS], tokens, 1, 0, 1, core->head_dim * dtype_bytes(slot->keys_dtype),
                 slot->keys_dtype);
    if (core_is_on_device(request, QUERIES))
        point_at(queries + first * heads, request->tensors[QUERIES], tokens, heads, slot->first_head, slot->num_heads,
                 core->head_dim * dtype_bytes(slot->queries_dtype), slot->queries_dtype);
    if (core_is_on_device(request, BLOCK_IDS))
        point_at(block_ids + first * heads, request->tensors[BLOCK_IDS], tokens, heads, slot->first_head,
                 slot->num_heads, sizeof(int32_t) * core->topk, 0);
}

/* Has the device tell channels in its memory that they are answered, behind their block ids; as many as there is room
 * for. */
static void signal_behind(const struct core *core, const struct shape *shape, char *to) {
    const struct gathered *from = &core->gathered;
    uint64_t *addresses = (uint64_t *)(void *)(to + shape->addresses_at) + shape->num_addresses - 2 * CORE_SIGNALS;
    for (uint32_t number = 0, signals = 0; number < from->num_asked && signals < CORE_SIGNALS; number++) {
        struct request *request = from->asked[number].request;
        if (!shape->num_addresses || !request->link->channel.on_device) continue;
        addresses[signals] = (uintptr_t)request->link->channel.answered;
        addresses[CORE_SIGNALS + signals++] = request->slot.ticket;
        request->signalled = true;
    }
}

/* The one copy that the host makes of what came. */
static void fill(struct core *core, const struct shape *shape, struct step *step) {
    const struct gathered *from = &core->gathered;
    char *to = step->host.buf;
    assert(shape->addresses_at + sizeof(uint64_t) * shape->num_addresses <= (size_t)step->host.len);
    memset(to + shape->addresses_at, 0, sizeof(uint64_t) * shape->num_addresses);
    for (uint32_t column = 0; column < CORE_COLUMNS; column++) {
        int32_t *cells = (int32_t *)(void *)to + (size_t)column * shape->runs;
        memcpy(cells, from->columns[column], sizeof(int32_t) * from->runs);
        /* Runs of length 0 are padding. */
        if (column == 2) memset(cells + from->runs, 0, sizeof(int32_t) * (shape->runs - from->runs));
    }
    uint16_t *keys = (uint16_t *)(void *)(to + shape->keys_at), *queries = (uint16_t *)(void *)(to + shape->queries_at);
    const size_t token_queries = (size_t)core->heads * core->head_dim;
    const uint64_t all_heads = UINT64_MAX >> (64 - core->heads);
    for (uint32_t number = 0; number < from->num_groups; number++) {
        const struct group *group = &from->groups[number];
        /* Heads that nobody asks for. */
        if (group->heads && group->heads != all_heads)
            memset(queries + group->first_token * token_queries, 0, ITEM_BYTES * group->tokens * token_queries);
    }
    for (uint32_t number = 0; number < from->num_asked; number++) {
        const struct request *request = from->asked[number].request;
        const size_t first = from->asked[number].first_token;
        if (request->slot.keys_dtype && !core_is_on_device(request, KEYS))
            cast_to_bf16(keys + first * core->head_dim, request->tensors[KEYS], request->slot.keys_dtype,
                         (size_t)request->tokens * core->head_dim, core->odd_keys);
        if (request->slot.queries_dtype && !core_is_on_device(request, QUERIES))
            stage_queries(core, request, queries + first * token_queries);
        point(core, shape, &from->asked[number], to);
    }
    signal_behind(core, shape, to);
}

/* Marks what the device is to write, to see when it is there. */
static void mark_unwritten(const struct core *core, const struct shape *shape, struct step *step) {
    const struct gathered *from = &core->gathered;
    const size_t row = (size_t)core->heads * core->topk;
    int32_t *ids = step->block_ids.buf;
    uint32_t *scores = step->scores.buf, token = 0;
    step->ids = shape->tokens * row;
    for (size_t place = 0; place < step->ids; place++) ids[place] = UNWRITTEN;
    for (uint32_t run = 0; run < from->runs; run++) {
        const uint32_t length = (uint32_t)from->columns[2][run];
        step->flags[run] = (uint8_t)from->columns[4][run];
        step->first_tokens[run] = token;
        if (step->flags[run] & RUN_WANTS_SCORES)
            for (size_t place = token * row; place < (token + length) * row; place++) scores[place] = UNWRITTEN_SCORE;
        token += length;
    }
    step->first_tokens[from->runs] = token;
    step->num_runs = from->runs;
    step->seen_ids = step->seen_run = 0;
}

static bool run_in_python(struct core *core, uint32_t number) {
    const struct gathered *from = &core->gathered;
    PyEval_RestoreThread(core->without_gil);
    core->without_gil = NULL;
    PyObject *done = PyObject_CallFunction(core->run_step, "III", number, from->runs, from->tokens);
    if (!done) return false;
    Py_DECREF(done);
    core->without_gil = PyEval_SaveThread();
    return true;
}

/* Counts a launch, of appends (0) or selections (1), by what its requests are. */
static void count_launch(struct core *core, int phase) {
    const struct gathered *from = &core->gathered;
    uint32_t requests = 0, tokens = 0;
    for (uint32_t number = 0; number < from->num_asked; number++) {
        const struct request *request = from->asked[number].request;
        if (!(phase ? request->slot.queries_dtype : request->slot.keys_dtype) || (!phase && request->done_already))
            continue;
        requests++;
        tokens += request->tokens;
    }
    if (!requests) return;
    core_observe(&core->phase_requests[phase], core->size_bounds, core->num_size_bounds, requests, 1);
    core_observe(&core->phase_tokens[phase], core->size_bounds, core->num_size_bounds, tokens, 1);
    core_add(&core->num_tokens[phase], tokens);
}

/* Requests that only append are answered as soon as nobody reads their keys any more. */
static void answer_appends(struct core *core, struct step *step) {
    for (uint32_t number = 0; number < step->num_asked; number++) {
        struct request *request = step->asked[number].request;
        request->launched = step->launched;
        request->phase = request->slot.queries_dtype ? BLOCKDEX_DECODE : BLOCKDEX_APPEND;
        if (request->slot.queries_dtype || core_is_on_device(request, KEYS)) continue;
        step->asked[number].request = NULL;
        request->finished = core_now();
        core_answer(core, request, (struct blockdex_answer){0}, NULL, 0);
    }
}

bool core_begin(struct core *core, int64_t now) {
    const struct gathered *from = &core->gathered;
    uint32_t number = (core->first + core->in_flight) % CORE_STEPS;
    struct step *step = &core->steps[number];
    const struct replay *replay = core->run_step ? NULL : core_replay(core, from->runs, from->longest, from->end);
    const struct shape shape = shape_of(core, replay);
    fill(core, &shape, step);
    mark_unwritten(core, &shape, step);
    memcpy(step->asked, from->asked, sizeof *from->asked * from->num_asked);
    step->num_asked = from->num_asked;
    step->taken = now;
    step->cost = from->cost;
    step->alone = !core->in_flight;
    if (!core->in_flight++) core->busy_since = now;
    if (fault_strikes(FAULT_LAUNCH)) {
        core_note_driver(core, "cuGraphLaunch", CUDA_ERROR_UNKNOWN);
        return false;
    }
    if (core->run_step) {
        step->launched = core_now();
        if (!run_in_python(core, number)) return false;
    } else {
        core_note_driver(core, "cuGraphLaunch", core->launch(replay->programs[number], core->stream));
        for (uint32_t asked = 0; asked < from->num_asked; asked++) {
            struct request *request = from->asked[asked].request;
            if (request->link->channel.on_device && !request->signalled) core_signal(core, request);
        }
        if (core->driver_error) return false;
        step->launched = core_now();
    }
    core_add(&core->num_steps, 1);
    core_observe(&core->step_requests, core->size_bounds, core->num_size_bounds, from->num_asked, 1);
    count_launch(core, 0);
    count_launch(core, 1);
    answer_appends(core, step);
    return true;
}

/* Whether the device has written every block id, and every score that is wanted, straight into the host's memory. */
static bool has_ended(const struct core *core, struct step *step) {
    const size_t row = (size_t)core->heads * core->topk;
    const volatile int32_t *ids = step->block_ids.buf;
    const volatile uint32_t *scores = step->scores.buf;
    while (step->seen_ids < step->ids && ids[step->seen_ids] != UNWRITTEN) step->seen_ids++;
    if (step->seen_ids < step->ids) return false;
    for (; step->seen_run < step->num_runs; step->seen_run++) {
        if (!(step->flags[step->seen_run] & RUN_WANTS_SCORES)) continue;
        const size_t end = step->first_tokens[step->seen_run + 1] * row;
        for (size_t place = step->first_tokens[step->seen_run] * row; place < end; place++)
            if (scores[place] == UNWRITTEN_SCORE) return false;
    }
    return true;
}

/* What the device takes for what it costs, of late. */
static void learn(struct core *core, const struct step *step, int64_t now) {
    static const double kept = 0.9;
    if (!step->alone) return; /* it may have waited for the other one */
    core->spent_seconds = kept * core->spent_seconds + 1e-9 * (double)(now - step->launched);
    core->spent_cost = kept * core->spent_cost + step->cost;
}

bool core_land(struct core *core, int64_t now) {
    while (core->in_flight && has_ended(core, &core->steps[core->first])) {
        struct step *step = &core->steps[core->first];
        atomic_thread_fence(memory_order_acquire);
        for (uint32_t number = 0; number < step->num_asked; number++) {
            struct request *request = step->asked[number].request;
            if (!request) continue;
            request->finished = now;
            if (request->slot.queries_dtype)
                core_answer_selection(core, request, step, step->asked[number].first_token);
            else
                core_answer(core, request, (struct blockdex_answer){0}, NULL, 0);
            if (core->no_memory) return false;
            step->asked[number].request = NULL;
        }
        step->num_asked = 0;
        learn(core, step, now);
        core_add(&core->device_nanoseconds[1], (uint64_t)(now - step->launched));
        core->first = (core->first + 1) % CORE_STEPS;
        if (!--core->in_flight) core_add(&core->busy_nanoseconds, (uint64_t)(now - core->busy_since));
        core->active = now;
    }
    return !core->no_memory;
}

const struct replay *core_replay(const struct core *core, uint32_t runs, uint32_t longest, int64_t end) {
    for (size_t number = 0; number < core->num_replays; number++) {
        const struct replay *replay = &core->replays[number];
        if (replay->runs >= runs && replay->length >= longest && (int64_t)replay->width * core->block_size >= end)
            return replay;
    }
    return NULL;
}
