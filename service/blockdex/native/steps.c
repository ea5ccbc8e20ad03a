/* Steps of the lane: what was gathered goes to the device, and what it has written to who asked. */
#include "lane.h"

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

static struct shape shape_of(const struct lane *lane, const struct replay *replay) {
    const struct gathered *from = &lane->gathered;
    struct shape shape = {.runs = replay ? replay->runs : from->runs};
    shape.tokens = replay ? (size_t)replay->runs * replay->length : from->tokens;
    /* Keys and queries begin at multiples of 16 bytes. */
    shape.keys_at = sizeof(int32_t) * COLUMNS * (shape.runs < 4 ? 4 : shape.runs);
    shape.queries_at = shape.keys_at + ITEM_BYTES * shape.tokens * lane->head_dim;
    shape.end = shape.queries_at + ITEM_BYTES * shape.tokens * lane->head_dim * lane->heads;
    shape.ids = shape.tokens * lane->heads * lane->topk;
    return shape;
}

static void copy_column(char *to, uint32_t number, const struct shape *shape, const int32_t *from, uint32_t runs) {
    memcpy(to + sizeof(int32_t) * number * shape->runs, from, sizeof(int32_t) * runs);
}

/* The one copy that the host makes of what came. */
static void fill(const struct lane *lane, const struct shape *shape, struct step *step) {
    const struct gathered *from = &lane->gathered;
    char *to = step->host.buf, *keys = to + shape->keys_at, *queries = to + shape->queries_at;
    copy_column(to, 0, shape, from->layers, from->runs);
    copy_column(to, 1, shape, from->starts, from->runs);
    copy_column(to, 2, shape, from->lengths, from->runs);
    copy_column(to, 3, shape, from->rows, from->runs);
    /* Runs of length 0 are padding. */
    memset(to + sizeof(int32_t) * (2 * shape->runs + from->runs), 0, sizeof(int32_t) * (shape->runs - from->runs));
    for (uint32_t number = 0; number < from->num_asked; number++) {
        size_t bytes = ITEM_BYTES * (size_t)from->asked[number].tokens * lane->head_dim;
        memcpy(keys, from->keys[number], bytes);
        memcpy(queries, from->queries[number], bytes * lane->heads);
        keys += bytes;
        queries += bytes * lane->heads;
    }
    int32_t *ids = step->block_ids.buf;
    for (size_t place = 0; place < shape->ids; place++) ids[place] = UNWRITTEN;
}

static bool run_in_python(struct lane *lane, uint32_t number) {
    const struct gathered *from = &lane->gathered;
    PyEval_RestoreThread(lane->without_gil);
    lane->without_gil = NULL;
    PyObject *done = PyObject_CallFunction(lane->run_step, "III", number, from->runs, from->tokens);
    if (!done) return false;
    Py_DECREF(done);
    lane->without_gil = PyEval_SaveThread();
    return true;
}

static void count(struct histogram *histogram, const double *bounds, uint32_t num_bounds, double value) {
    uint32_t bucket = 0;
    while (bucket < num_bounds && bounds[bucket] < value) bucket++;
    histogram->counts[bucket]++;
    histogram->total += value;
}

bool lane_begin(struct lane *lane, int64_t now) {
    const struct gathered *from = &lane->gathered;
    uint32_t number = (lane->first + lane->in_flight) % LANE_STEPS;
    struct step *step = &lane->steps[number];
    const struct replay *replay = lane->run_step ? NULL : lane_replay(lane, from->runs, from->longest, from->end);
    struct shape shape = shape_of(lane, replay);
    fill(lane, &shape, step);
    memcpy(step->asked, from->asked, sizeof *from->asked * from->num_asked);
    step->num_asked = from->num_asked;
    step->ids = shape.ids;
    step->seen_ids = 0;
    step->taken = now;
    if (!lane->in_flight++) lane->busy_since = now;
    if (lane->run_step) {
        step->launched = lane_now();
        if (!run_in_python(lane, number)) return false;
    } else {
        lane->launch_error = lane->launch(replay->programs[number], lane->stream);
        if (lane->launch_error) return false;
        step->launched = lane_now();
    }
    lane->num_steps++;
    lane->num_tokens += from->tokens;
    count(&lane->requests, lane->size_bounds, lane->num_size_bounds, from->num_asked);
    count(&lane->tokens, lane->size_bounds, lane->num_size_bounds, from->tokens);
    return true;
}

/* Whether the device has written every block id: it writes them straight into the host's memory. */
static bool has_ended(struct step *step) {
    const volatile int32_t *ids = step->block_ids.buf;
    while (step->seen_ids < step->ids && ids[step->seen_ids] != UNWRITTEN) step->seen_ids++;
    return step->seen_ids == step->ids;
}

static bool answer_one(struct lane *lane, const struct step *step, const struct asked *asked, const int32_t *ids,
                       int64_t ended) {
    struct blockdex_answer answer = {
        .ticket = asked->ticket,
        .flags = BLOCKDEX_HAS_BLOCK_IDS,
        .epoch = lane->epoch,
        .num_tokens = asked->tokens,
        .num_heads = lane->heads,
        .topk = lane->topk,
        .phase = BLOCKDEX_DECODE,
        .queue_seconds = 1e-9 * ((double)step->taken - (double)asked->received),
        .plan_seconds = 1e-9 * (double)(step->launched - step->taken),
        .device_seconds = 1e-9 * (double)(ended - step->launched),
        .reply_seconds = 1e-9 * (double)(lane_now() - ended),
    };
    const double *seconds = &answer.queue_seconds;
    for (int stage = 0; stage < LANE_STAGES; stage++)
        count(&lane->stages[stage], lane->seconds_bounds, lane->num_seconds_bounds, seconds[stage]);
    return line_answer(asked->line, answer, ids, sizeof *ids * asked->tokens * lane->heads * lane->topk);
}

bool lane_land(struct lane *lane, int64_t now) {
    while (lane->in_flight && has_ended(&lane->steps[lane->first])) {
        struct step *step = &lane->steps[lane->first];
        atomic_thread_fence(memory_order_acquire);
        const int32_t *ids = step->block_ids.buf;
        for (uint32_t number = 0; number < step->num_asked; number++) {
            struct asked *asked = &step->asked[number];
            if (asked->line && !answer_one(lane, step, asked, ids, now)) return false;
            asked->line = NULL;
            ids += (size_t)asked->tokens * lane->heads * lane->topk;
        }
        lane->device_seconds += 1e-9 * (double)(now - step->launched);
        lane->first = (lane->first + 1) % LANE_STEPS;
        if (!--lane->in_flight) lane->device_busy_seconds += 1e-9 * (double)(now - lane->busy_since);
        lane->active = now;
    }
    for (size_t number = 0; number < lane->num_lines; number++) line_publish(lane->lines[number]);
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

bool lane_abandon(struct lane *lane, uint16_t code, const char *text, size_t bytes, uint16_t reason_bytes) {
    const struct blockdex_answer answer = {.code = code,
                                           .reason_bytes = reason_bytes,
                                           .phase = BLOCKDEX_DECODE,
                                           .queue_seconds = -1,
                                           .plan_seconds = -1,
                                           .device_seconds = -1,
                                           .reply_seconds = -1};
    if (!lane->in_flight) return true;
    for (; lane->in_flight; lane->in_flight--) {
        if (!refuse(&lane->steps[lane->first], answer, text, bytes)) return false;
        lane->first = (lane->first + 1) % LANE_STEPS;
    }
    lane->device_busy_seconds += 1e-9 * (double)(lane_now() - lane->busy_since);
    for (size_t number = 0; number < lane->num_lines; number++) line_publish(lane->lines[number]);
    return true;
}

const struct replay *lane_replay(const struct lane *lane, uint32_t runs, uint32_t longest, int64_t end) {
    for (size_t number = 0; number < lane->num_replays; number++) {
        const struct replay *replay = &lane->replays[number];
        if (replay->runs >= runs && replay->length >= longest && (int64_t)replay->width * lane->block_size >= end)
            return replay;
    }
    return NULL;
}
