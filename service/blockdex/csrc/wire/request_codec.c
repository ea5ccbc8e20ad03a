#include "wire/request_codec.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum { BLOCKDEX_INT32 = 5 };

bool columns_open(struct wire_spans *spans, uint32_t most) {
    uint64_t *columns = calloc((size_t)NUM_COLUMNS * most, sizeof *columns);
    for (unsigned column = 0; columns && column < NUM_COLUMNS; column++)
        spans->columns[column] = columns + (size_t)column * most;
    spans->most = most;
    return columns;
}

void columns_close(struct wire_spans *spans) { free(spans->columns[0]); }

bool refuse(struct refusal *refusal, uint16_t code, const char *reason, const char *format, ...) {
    va_list numbers;
    *refusal = (struct refusal){.code = code, .reason = reason};
    va_start(numbers, format);
    vsnprintf(refusal->message, sizeof refusal->message, format, numbers);
    va_end(numbers);
    return false;
}

static bool columns_fit(const struct wire_spans *spans, struct refusal *refusal) {
    const uint32_t *counts = spans->counts;
    uint32_t count = counts[SEQUENCE_IDS], revisions = counts[REVISIONS];
    if (counts[STARTS] != count || counts[LENGTHS] != count || (revisions && revisions != count))
        return refuse(refusal, INVALID_ARGUMENT, "INVALID_SPANS",
                      "spans: columns must be equally long, got %u sequence_ids, %u starts, %u lengths, %u revisions"
                      "\nsequence_ids=%u\nstarts=%u\nlengths=%u\nrevisions=%u",
                      count, counts[STARTS], counts[LENGTHS], revisions ? revisions : count, count, counts[STARTS],
                      counts[LENGTHS], revisions ? revisions : count);
    if (count > spans->most)
        return refuse(refusal, INVALID_ARGUMENT, "INVALID_SPANS",
                      "spans: must be 1 to %u, got %u\ncount=%u\nmax_spans=%u", spans->most, count, count, spans->most);
    if (!revisions) memset(spans->columns[REVISIONS], 0, count * sizeof(uint64_t));
    return true;
}

static bool tensor_fits(const char *name, const struct wire_tensor *tensor, struct refusal *refusal) {
#define DTYPE_OF "%s: dtype must be one of DTYPE_BF16, DTYPE_FP16, DTYPE_FP32, DTYPE_FP8_E4M3, got "
    static const char *const others[] = {[0] = "DTYPE_UNSPECIFIED", [5] = "DTYPE_INT32"};
    const uint64_t dtype = tensor->dtype;
    if (dtype >= BLOCKDEX_BF16 && dtype <= BLOCKDEX_FP8_E4M3) return true;
    if (dtype < sizeof others / sizeof *others)
        return refuse(refusal, INVALID_ARGUMENT, "INVALID_TENSOR", DTYPE_OF "%s", name, others[dtype]);
    return refuse(refusal, INVALID_ARGUMENT, "INVALID_TENSOR", DTYPE_OF "%d", name, (int)tensor->dtype);
#undef DTYPE_OF
}

bool tokens_fit(struct wire_request *request, const struct bounds *bounds, struct refusal *refusal) {
    bool appends = request->kind != SELECT_BLOCKS, selects = request->kind != APPEND_KEYS;
    if (!columns_fit(request->spans, refusal)) return false;
    if (appends && !tensor_fits("keys", &request->keys, refusal)) return false;
    if (selects && !tensor_fits("queries", &request->queries, refusal)) return false;
    if (selects && request->order > BLOCKDEX_SCORE)
        return refuse(refusal, INVALID_ARGUMENT, "INVALID_ORDER", "order must be one of 0, 1, 2, got %d",
                      (int)request->order);
    if (selects && request->scores > RAW_SCORES)
        return refuse(refusal, INVALID_ARGUMENT, "INVALID_SCORES", "return_scores must be one of 0, 1, 2, got %d",
                      (int)request->scores);
    if (selects && request->ids > PAGE_NUMBERS)
        return refuse(refusal, INVALID_ARGUMENT, "INVALID_POOL", "ids must be one of 0, 1, 2, got %d",
                      (int)request->ids);
    uint64_t bytes = request->keys.bytes + request->queries.bytes;
    unsigned long long allowed = bounds->max_message_bytes, got = bytes;
    if (bytes > allowed)
        return refuse(
            refusal, RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE",
            "keys and queries together must be at most %llu bytes, got %llu\nbytes=%llu\nmax_message_bytes=%llu",
            allowed, got, got, allowed);
    if (selects && !request->order) request->order = BLOCKDEX_ASCENDING;
    if (selects && !request->num_heads && request->first_head < bounds->num_heads)
        request->num_heads = (uint32_t)bounds->num_heads - request->first_head;
    return true;
}

uint64_t tokens_count(const struct wire_request *request) {
    uint64_t tokens = 0;
    for (uint32_t at = 0; at < request->spans->counts[LENGTHS]; at++) tokens += request->spans->columns[LENGTHS][at];
    return tokens;
}

void tokens_describe(const struct wire_request *request, size_t tenant_bytes, struct blockdex_request *slot) {
    *slot = (struct blockdex_request){
        .kind = BLOCKDEX_TOKENS,
        .keys_dtype = (uint8_t)request->keys.dtype,
        .queries_dtype = (uint8_t)request->queries.dtype,
        .order = (uint8_t)request->order,
        .flags = (uint8_t)((request->scores ? BLOCKDEX_RETURN_SCORES : 0) |
                           (request->scores == RAW_SCORES ? BLOCKDEX_RAW_SCORES : 0) |
                           (request->wait_for_keys ? BLOCKDEX_WAIT_FOR_KEYS : 0) |
                           (request->rollback ? BLOCKDEX_ROLLBACK : 0) |
                           (request->ids == PAGE_NUMBERS ? BLOCKDEX_PAGES : 0)),
        .tenant_bytes = (uint16_t)tenant_bytes,
        .epoch = request->epoch,
        .layer = request->layer,
        .sequence_id = request->pool_id,
        .num_spans = request->spans->counts[SEQUENCE_IDS],
        .first_head = request->first_head,
        .num_heads = request->num_heads,
        .keys_bytes = request->keys.bytes,
        .queries_bytes = request->queries.bytes,
    };
    slot->payload_bytes = blockdex_parts_of(slot).bytes;
}

void tokens_write_columns(const struct wire_request *request, const char *tenant, const struct blockdex_request *slot,
                          char *to) {
    const struct blockdex_parts parts = blockdex_parts_of(slot);
    size_t column_bytes = slot->num_spans * sizeof(uint64_t);
    memcpy(to, tenant, slot->tenant_bytes);
    for (unsigned column = 0; column < NUM_COLUMNS; column++)
        memcpy(to + parts.columns + column * column_bytes, request->spans->columns[column], column_bytes);
}

uint64_t tokens_write_tensors(const struct wire_tensor *keys, const struct wire_tensor *queries,
                              const struct blockdex_request *slot, char *to, uint64_t written, uint64_t most) {
    const struct blockdex_parts parts = blockdex_parts_of(slot);
    uint64_t bytes = 0;
    if (written < keys->bytes) {
        bytes = keys->bytes - written < most ? keys->bytes - written : most;
        memcpy(to + parts.keys + written, keys->data + written, bytes);
    }
    uint64_t at = written + bytes - keys->bytes, left = most - bytes;
    if (written + bytes >= keys->bytes && at < queries->bytes) {
        uint64_t more = queries->bytes - at < left ? queries->bytes - at : left;
        memcpy(to + parts.queries + at, queries->data + at, more);
        bytes += more;
    }
    return bytes;
}

bool tokens_answer(const struct blockdex_answer *slot, const char *payload, struct wire_response *response) {
    uint64_t bytes, scores_at = 0;
    response->epoch = slot->epoch;
    if (slot->flags & (BLOCKDEX_IS_STATE | BLOCKDEX_HAS_LENGTHS)) return false;
    if (response->kind == APPEND_KEYS) return !(slot->flags & BLOCKDEX_HAS_BLOCK_IDS);
    if (!(slot->flags & BLOCKDEX_HAS_BLOCK_IDS)) return false;
    if (__builtin_mul_overflow((uint64_t)slot->num_tokens * slot->num_heads, 4 * (uint64_t)slot->topk, &bytes) ||
        bytes > slot->payload_bytes)
        return false;
    response->block_ids =
        (struct wire_tensor){.data = (const uint8_t *)payload, .bytes = bytes, .dtype = BLOCKDEX_INT32};
    if (slot->flags & BLOCKDEX_HAS_SCORES) {
        scores_at = blockdex_aligned(bytes);
        if (scores_at > slot->payload_bytes || bytes > slot->payload_bytes - scores_at) return false;
        response->scores =
            (struct wire_tensor){.data = (const uint8_t *)payload + scores_at, .bytes = bytes, .dtype = BLOCKDEX_FP32};
    }
    return true;
}
