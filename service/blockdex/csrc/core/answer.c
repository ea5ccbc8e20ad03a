/* What requests are answered, and how long they took. */
#include "core/core.h"

#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_MESSAGE_BYTES = 4096 };

void core_observe(struct histogram *histogram, const double *bounds, uint32_t num_bounds, double value, double unit) {
    uint32_t bucket = 0;
    while (bucket < num_bounds && bounds[bucket] < value) bucket++;
    core_add(&histogram->counts[bucket], 1);
    core_add(&histogram->total, value > 0 ? (uint64_t)(value * unit) : 0);
}

/* Seconds in each stage that a request reached, one behind the other from its arrival until now; below 0 where it
 * did not. Without any kernel there is no `device`, and `plan` lasts until the answer was there. What was never
 * taken up was in `queue` all the time. */
static void set_stages(const struct request *request, int64_t now, struct blockdex_answer *answer) {
    const int64_t finished = request->finished ? request->finished : now;
    answer->queue_seconds = 1e-9 * (double)((request->taken ? request->taken : now) - request->received);
    answer->plan_seconds = answer->device_seconds = answer->reply_seconds = -1;
    if (!request->taken) return;
    answer->plan_seconds = 1e-9 * (double)((request->launched ? request->launched : finished) - request->taken);
    if (request->launched) answer->device_seconds = 1e-9 * (double)(finished - request->launched);
    answer->reply_seconds = 1e-9 * (double)(now - finished);
}

static void observe_stages(struct core *core, const struct blockdex_answer *answer) {
    const double *seconds = &answer->queue_seconds;
    assert(answer->phase >= 1 && answer->phase <= CORE_PHASES);
    for (int stage = 0; stage < CORE_STAGES; stage++)
        if (seconds[stage] >= 0)
            core_observe(&core->stages[answer->phase - 1][stage], core->seconds_bounds, core->num_seconds_bounds,
                         seconds[stage], 1e9);
}

void core_signal(struct core *core, struct request *request) {
    const struct channel *channel = &request->link->channel;
    uint64_t *answered = channel->answered, number = request->slot.ticket;
    if (!channel->on_device)
        __atomic_store_n(answered, number, __ATOMIC_RELEASE);
    else if (core->signal)
        core_note_driver(core, "cuStreamWriteValue64", core->signal(core->stream, (uintptr_t)answered, number, 0));
    request->signalled = true;
}

void core_answer(struct core *core, struct request *request, struct blockdex_answer answer, const void *payload,
                 uint64_t bytes) {
    if (!request->link->gone) {
        answer.ticket = request->slot.ticket;
        if (!answer.code) answer.epoch = core->epoch;
        answer.phase = request->phase;
        const int64_t now = core_now();
        set_stages(request, now, &answer);
        /* One that nothing took up has no stages to count. */
        if (request->taken) observe_stages(core, &answer);
        core_count_call(core, request->link, &request->slot, &answer, payload, now);
        const bool succeeded = request->link->channel.bound && !answer.code;
        if (succeeded && !request->signalled) core_signal(core, request);
        if (!succeeded && !server_link_answer(request->link, answer, payload, bytes)) {
            core->no_memory = true;
            return;
        }
    }
    core_forget(core, request);
}

/* Reason and message, one behind the other; how many bytes of either. */
static uint16_t write_refusal(char text[MAX_MESSAGE_BYTES], const char *reason, const char *format, va_list numbers,
                              uint64_t *bytes) {
    int reason_bytes = snprintf(text, MAX_MESSAGE_BYTES, "%s", reason);
    int more = vsnprintf(text + reason_bytes, (size_t)(MAX_MESSAGE_BYTES - reason_bytes), format, numbers);
    uint64_t all = (uint64_t)reason_bytes + (uint64_t)more;
    *bytes = all < MAX_MESSAGE_BYTES ? all : MAX_MESSAGE_BYTES - 1;
    for (char *at = text; at < text + *bytes; at++)
        if (*at == META[0]) *at = 0;
    return (uint16_t)reason_bytes;
}

void core_refuse(struct core *core, struct request *request, uint16_t code, const char *reason, const char *format,
                 ...) {
    char text[MAX_MESSAGE_BYTES];
    uint64_t bytes;
    va_list numbers;
    va_start(numbers, format);
    struct blockdex_answer answer = {.code = code,
                                     .reason_bytes = write_refusal(text, reason, format, numbers, &bytes)};
    va_end(numbers);
    core_answer(core, request, answer, text, bytes);
}

void core_refuse_slot(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now,
                      uint16_t code, const char *reason, const char *format, ...) {
    char text[MAX_MESSAGE_BYTES];
    uint64_t bytes;
    va_list numbers;
    va_start(numbers, format);
    struct blockdex_answer answer = {.code = code,
                                     .reason_bytes = write_refusal(text, reason, format, numbers, &bytes)};
    va_end(numbers);
    answer.ticket = slot->ticket;
    answer.phase = BLOCKDEX_SEQUENCE;
    answer.queue_seconds = 1e-9 * (double)(now - slot->received);
    answer.plan_seconds = answer.device_seconds = answer.reply_seconds = -1;
    core_count_call(core, link, slot, &answer, text, now);
    core->no_memory |= !server_link_answer(link, answer, text, bytes);
}

/* One row's blocks, and their unscaled scores, as the device has written them: by rising id, -1 at the end. */
struct row {
    const int32_t *ids;
    const float *scores;
    int64_t last_block;
};

static bool is_init(const struct core *core, int32_t id) { return id < (int32_t)core->init_blocks; }
static bool is_local(const struct core *core, const struct row *row, int32_t id) {
    return id > row->last_block - (int64_t)core->local_blocks;
}

/* Where a place of the answer has its block in the row: init blocks, local blocks, then by falling score, equal ones by
 * rising id; or, without scores, as they are. */
static void sort_places(const struct core *core, const struct row *row, bool by_score, uint32_t places[]) {
    uint32_t count = 0;
    for (uint32_t place = 0; place < core->topk; place++) places[place] = place;
    if (!by_score) return;
    while (count < core->topk && row->ids[count] >= 0) count++;
    uint32_t sorted = 0;
    for (uint32_t at = 0; at < count; at++)
        if (is_init(core, row->ids[at])) places[sorted++] = at;
    for (uint32_t at = 0; at < count; at++)
        if (!is_init(core, row->ids[at]) && is_local(core, row, row->ids[at])) places[sorted++] = at;
    const uint32_t forced = sorted;
    for (uint32_t at = 0; at < count; at++) {
        if (is_init(core, row->ids[at]) || is_local(core, row, row->ids[at])) continue;
        uint32_t to = sorted++;
        for (; to > forced && row->scores[places[to - 1]] < row->scores[at]; to--) places[to] = places[to - 1];
        places[to] = at;
    }
}

static float told_score(const struct core *core, const struct row *row, uint32_t at, bool raw) {
    const int32_t id = row->ids[at];
    if (id < 0) return -INFINITY;
    if (raw) return row->scores[at];
    return is_init(core, id) || is_local(core, row, id) ? INFINITY : row->scores[at] * core->scale;
}

static char *scratch(struct core *core, size_t bytes) {
    if (bytes > core->scratch_bytes || !core->scratch) {
        char *wider = realloc(core->scratch, bytes + 1); /* of none too */
        if (!wider) return NULL;
        core->scratch = wider;
        core->scratch_bytes = bytes;
    }
    return core->scratch;
}

/* Writes the ids, and the scores that are asked for, of one token and head. */
static void write_row(const struct core *core, const struct request *request, const struct row *row, int32_t *ids,
                      float *scores) {
    uint32_t places[core->topk];
    const bool raw = request->slot.flags & BLOCKDEX_RAW_SCORES;
    sort_places(core, row, request->slot.order == BLOCKDEX_SCORE, places);
    for (uint32_t place = 0; place < core->topk; place++) {
        ids[place] = row->ids[places[place]];
        if (scores) scores[place] = told_score(core, row, places[place], raw);
    }
}

void core_answer_selection(struct core *core, struct request *request, const struct step *step, uint32_t first_token) {
    const uint32_t heads = request->slot.num_heads, topk = core->topk;
    const size_t all_bytes = sizeof(int32_t) * request->tokens * heads * topk;
    const bool scored = core_is_scored(&request->slot);
    const size_t row_of_all = (size_t)first_token * core->heads * topk;
    const int32_t *all_ids = (const int32_t *)step->block_ids.buf + row_of_all;
    const float *all_scores = (const float *)step->scores.buf + row_of_all;
    struct blockdex_answer answer = {.flags = BLOCKDEX_HAS_BLOCK_IDS | (scored ? BLOCKDEX_HAS_SCORES : 0),
                                     .num_tokens = request->tokens,
                                     .num_heads = heads,
                                     .topk = topk};
    char *own_ids = request->tensors[BLOCK_IDS], *own_scores = request->tensors[SCORES];
    if (core_is_on_device(request, BLOCK_IDS)) {
        core_answer(core, request, answer, NULL, 0);
        return;
    }
    const bool pages = request->slot.flags & BLOCKDEX_PAGES;
    if (!scored && !pages && heads == core->heads && request->slot.order == BLOCKDEX_ASCENDING) {
        if (own_ids) memcpy(own_ids, all_ids, all_bytes);
        core_answer(core, request, answer, all_ids, own_ids ? 0 : all_bytes);
        return;
    }
    const size_t scores_at = own_ids ? 0 : blockdex_aligned(all_bytes);
    const size_t bytes = scored && !own_scores ? scores_at + all_bytes : own_ids ? 0 : all_bytes;
    char *payload = scratch(core, bytes);
    if (!payload) {
        core->no_memory = true;
        return;
    }
    int32_t *ids = (int32_t *)(void *)(own_ids ? own_ids : payload);
    float *scores = scored ? (float *)(void *)(own_scores ? own_scores : payload + scores_at) : NULL;
    uint32_t token = 0;
    for (uint32_t run = 0; run < request->num_rows; run++)
        for (int64_t in_run = 0; in_run < request->lengths[run]; in_run++, token++)
            for (uint32_t head = 0; head < heads; head++) {
                const size_t from = ((size_t)token * core->heads + request->slot.first_head + head) * topk;
                const struct row row = {all_ids + from, all_scores + from,
                                        (request->starts[run] + in_run) / core->block_size};
                const size_t to = ((size_t)token * heads + head) * topk;
                write_row(core, request, &row, ids + to, scores ? scores + to : NULL);
            }
    if (pages) core_name_pages(core, request, ids);
    core_answer(core, request, answer, payload, bytes);
}

void core_publish(struct core *core) {
    for (size_t number = 0; number < core->num_links; number++) server_link_publish(core->links[number]);
}
