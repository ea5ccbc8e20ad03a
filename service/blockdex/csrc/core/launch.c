/* Steps of the core: what was gathered goes to the device, and what it has written to who asked. */
#include "core/core.h"

enum {
    ITEM_BYTES = 2,
    COLUMNS = 4,
    UNWRITTEN = -2
}; /* less than any block id, and than the -1 of a place without one */

/* How much of a step's memory a step takes: with the padding of its program, where it is one of the device's. */
struct shape {
    uint32_t runs;
    size_t tokens, keys_at, queries_at, end, ids;
};

static struct shape shape_of(const struct core *core, const struct replay *replay) {
    const struct gathered *from = &core->gathered;
    struct shape shape = {.runs = replay ? replay->runs : from->runs};
    shape.tokens = replay ? (size_t)replay->runs * replay->length : from->tokens;
    /* Keys and queries begin at multiples of 16 bytes. */
    shape.keys_at = sizeof(int32_t) * COLUMNS * (shape.runs < 4 ? 4 : shape.runs);
    shape.queries_at = shape.keys_at + ITEM_BYTES * shape.tokens * core->head_dim;
    shape.end = shape.queries_at + ITEM_BYTES * shape.tokens * core->head_dim * core->heads;
    shape.ids = shape.tokens * core->heads * core->topk;
    return shape;
}

static void copy_column(char *to, uint32_t number, const struct shape *shape, const int32_t *from, uint32_t runs) {
    memcpy(to + sizeof(int32_t) * number * shape->runs, from, sizeof(int32_t) * runs);
}

/* The one copy that the host makes of what came. */
static void fill(const struct core *core, const struct shape *shape, struct step *step) {
    const struct gathered *from = &core->gathered;
    char *to = step->host.buf, *keys = to + shape->keys_at, *queries = to + shape->queries_at;
    copy_column(to, 0, shape, from->layers, from->runs);
    copy_column(to, 1, shape, from->starts, from->runs);
    copy_column(to, 2, shape, from->lengths, from->runs);
    copy_column(to, 3, shape, from->rows, from->runs);
    /* Runs of length 0 are padding. */
    memset(to + sizeof(int32_t) * (2 * shape->runs + from->runs), 0, sizeof(int32_t) * (shape->runs - from->runs));
    for (uint32_t number = 0; number < from->num_asked; number++) {
        size_t bytes = ITEM_BYTES * (size_t)from->asked[number].tokens * core->head_dim;
        memcpy(keys, from->keys[number], bytes);
        memcpy(queries, from->queries[number], bytes * core->heads);
        keys += bytes;
        queries += bytes * core->heads;
    }
    int32_t *ids = step->block_ids.buf;
    for (size_t place = 0; place < shape->ids; place++) ids[place] = UNWRITTEN;
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

static void count(struct histogram *histogram, const double *bounds, uint32_t num_bounds, double value) {
    uint32_t bucket = 0;
    while (bucket < num_bounds && bounds[bucket] < value) bucket++;
    histogram->counts[bucket]++;
    histogram->total += value;
}

bool core_begin(struct core *core, int64_t now) {
    const struct gathered *from = &core->gathered;
    uint32_t number = (core->first + core->in_flight) % CORE_STEPS;
    struct step *step = &core->steps[number];
    const struct replay *replay = core->run_step ? NULL : core_replay(core, from->runs, from->longest, from->end);
    struct shape shape = shape_of(core, replay);
    fill(core, &shape, step);
    memcpy(step->asked, from->asked, sizeof *from->asked * from->num_asked);
    step->num_asked = from->num_asked;
    step->ids = shape.ids;
    step->seen_ids = 0;
    step->taken = now;
    if (!core->in_flight++) core->busy_since = now;
    if (core->run_step) {
        step->launched = core_now();
        if (!run_in_python(core, number)) return false;
    } else {
        core->launch_error = core->launch(replay->programs[number], core->stream);
        if (core->launch_error) return false;
        step->launched = core_now();
    }
    core->num_steps++;
    core->num_tokens += from->tokens;
    count(&core->requests, core->size_bounds, core->num_size_bounds, from->num_asked);
    count(&core->tokens, core->size_bounds, core->num_size_bounds, from->tokens);
    return true;
}

/* Whether the device has written every block id: it writes them straight into the host's memory. */
static bool has_ended(struct step *step) {
    const volatile int32_t *ids = step->block_ids.buf;
    while (step->seen_ids < step->ids && ids[step->seen_ids] != UNWRITTEN) step->seen_ids++;
    return step->seen_ids == step->ids;
}

static bool answer_one(struct core *core, const struct step *step, const struct asked *asked, const int32_t *ids,
                       int64_t ended) {
    struct blockdex_answer answer = {
        .ticket = asked->ticket,
        .flags = BLOCKDEX_HAS_BLOCK_IDS,
        .epoch = core->epoch,
        .num_tokens = asked->tokens,
        .num_heads = core->heads,
        .topk = core->topk,
        .phase = BLOCKDEX_DECODE,
        .queue_seconds = 1e-9 * ((double)step->taken - (double)asked->received),
        .plan_seconds = 1e-9 * (double)(step->launched - step->taken),
        .device_seconds = 1e-9 * (double)(ended - step->launched),
        .reply_seconds = 1e-9 * (double)(core_now() - ended),
    };
    const double *seconds = &answer.queue_seconds;
    for (int stage = 0; stage < CORE_STAGES; stage++)
        count(&core->stages[stage], core->seconds_bounds, core->num_seconds_bounds, seconds[stage]);
    return line_answer(asked->line, answer, ids, sizeof *ids * asked->tokens * core->heads * core->topk);
}

bool core_land(struct core *core, int64_t now) {
    while (core->in_flight && has_ended(&core->steps[core->first])) {
        struct step *step = &core->steps[core->first];
        atomic_thread_fence(memory_order_acquire);
        const int32_t *ids = step->block_ids.buf;
        for (uint32_t number = 0; number < step->num_asked; number++) {
            struct asked *asked = &step->asked[number];
            if (asked->line && !answer_one(core, step, asked, ids, now)) return false;
            asked->line = NULL;
            ids += (size_t)asked->tokens * core->heads * core->topk;
        }
        core->device_seconds += 1e-9 * (double)(now - step->launched);
        core->first = (core->first + 1) % CORE_STEPS;
        if (!--core->in_flight) core->device_busy_seconds += 1e-9 * (double)(now - core->busy_since);
        core->active = now;
    }
    for (size_t number = 0; number < core->num_lines; number++) line_publish(core->lines[number]);
    return true;
}

static bool refuse(struct step *step, struct blockdex_answer answer, const char *text, size_t bytes) {
    for (uint32_t number = 0; number < step->num_asked; number++) {
        struct asked *asked = &step->asked[number];
        answer.ticket = asked->ticket;
        if (asked->line && !line_answer(asked->line, answer, text, bytes)) return false;
        asked->line = NULL;
    }
    return true;
}

bool core_abandon(struct core *core, uint16_t code, const char *text, size_t bytes, uint16_t reason_bytes) {
    const struct blockdex_answer answer = {.code = code,
                                           .reason_bytes = reason_bytes,
                                           .phase = BLOCKDEX_DECODE,
                                           .queue_seconds = -1,
                                           .plan_seconds = -1,
                                           .device_seconds = -1,
                                           .reply_seconds = -1};
    if (!core->in_flight) return true;
    for (; core->in_flight; core->in_flight--) {
        if (!refuse(&core->steps[core->first], answer, text, bytes)) return false;
        core->first = (core->first + 1) % CORE_STEPS;
    }
    core->device_busy_seconds += 1e-9 * (double)(core_now() - core->busy_since);
    for (size_t number = 0; number < core->num_lines; number++) line_publish(core->lines[number]);
    return true;
}

const struct replay *core_replay(const struct core *core, uint32_t runs, uint32_t longest, int64_t end) {
    for (size_t number = 0; number < core->num_replays; number++) {
        const struct replay *replay = &core->replays[number];
        if (replay->runs >= runs && replay->length >= longest && (int64_t)replay->width * core->block_size >= end)
            return replay;
    }
    return NULL;
}
