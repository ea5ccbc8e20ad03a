/* What clients on this host called, how long it took, and what came of it. */
#include <string.h>

#include "core/core_type.h"
#include "wire/messages.h"

/* As blockdex.ring.caller numbers them. */
static uint32_t call_of(const struct server_link *link, const struct blockdex_request *slot) {
    enum { TOKEN_RPCS = 3, SEQUENCE_RPCS = 5 };
    const uint32_t first = link->channel.bound ? CORE_RPCS : 0;
    if (slot->kind >= BLOCKDEX_CREATE_POOL)
        return first + TOKEN_RPCS + SEQUENCE_RPCS + slot->kind - BLOCKDEX_CREATE_POOL;
    if (slot->kind != BLOCKDEX_TOKENS) return first + TOKEN_RPCS + slot->kind - BLOCKDEX_OPEN;
    return first + (slot->keys_dtype ? slot->queries_dtype ? APPEND_AND_SELECT : APPEND_KEYS : SELECT_BLOCKS);
}

/* One more of an outcome; of more kinds than there is room for, the last counts. */
static void count_outcome(struct core *core, uint32_t call, uint32_t code, const char *reason, size_t bytes) {
    const uint32_t count = atomic_load_explicit(&core->num_outcomes, memory_order_relaxed);
    struct outcome *outcomes = core->outcomes, wanted = {.call = call, .code = code};
    if (bytes) memcpy(wanted.reason, reason, bytes < CORE_REASON_BYTES ? bytes : CORE_REASON_BYTES - 1);
    uint32_t at = 0;
    while (at < count &&
           (outcomes[at].call != call || outcomes[at].code != code || strcmp(outcomes[at].reason, wanted.reason)))
        at++;
    if (at == CORE_OUTCOMES) at--;
    if (at == count) {
        outcomes[at] = wanted;
        atomic_store_explicit(&core->num_outcomes, count + 1, memory_order_release);
    }
    core_add(&outcomes[at].count, 1);
}

void core_count_call(struct core *core, const struct server_link *link, const struct blockdex_request *slot,
                     const struct blockdex_answer *answer, const void *payload, int64_t now) {
    if (!link->tenant_bytes) return;
    const uint32_t call = call_of(link, slot);
    core_observe(&core->calls[call], core->seconds_bounds, core->num_seconds_bounds,
                 1e-9 * (double)(now - slot->received), 1e9);
    count_outcome(core, call, answer->code, payload, answer->code ? answer->reason_bytes : 0);
}

PyObject *core_calls_of(const struct core *core) {
    PyObject *calls = PyList_New(CORE_CALLS);
    for (int at = 0; calls && at < CORE_CALLS; at++) {
        PyObject *made = core_histogram_of(&core->calls[at], core->num_seconds_bounds, 1e9);
        if (!made || PyList_SetItem(calls, at, made) < 0) Py_CLEAR(calls);
    }
    return calls;
}

PyObject *core_outcomes_of(const struct core *core) {
    const uint32_t count = atomic_load_explicit(&core->num_outcomes, memory_order_acquire);
    PyObject *list = PyList_New(count);
    for (uint32_t at = 0; list && at < count; at++) {
        const struct outcome *each = &core->outcomes[at];
        PyObject *made = Py_BuildValue("IIsK", each->call, each->code, each->reason,
                                       (unsigned long long)atomic_load_explicit(&each->count, memory_order_relaxed));
        if (!made || PyList_SetItem(list, at, made) < 0) Py_CLEAR(list);
    }
    return list;
}
