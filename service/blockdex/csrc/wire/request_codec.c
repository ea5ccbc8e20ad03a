#include "wire/request_codec.h"

#include <stdlib.h>

enum { BLOCKDEX_INT32 = 5 };

static const uint8_t DTYPE_BYTES[] = {
    [BLOCKDEX_BF16] = 2, [BLOCKDEX_FP16] = 2, [BLOCKDEX_FP32] = 4, [BLOCKDEX_FP8_E4M3] = 1};

/* Places for `max_spans` ids, half of them empty at least. */
static uint64_t num_places(uint64_t num_spans) {
    uint64_t places = 2;
    while (places < 2 * num_spans) places *= 2;
    return places;
}

bool scratch_open(struct scratch *scratch, uint32_t max_spans, uint64_t salt) {
    uint64_t *columns = calloc((size_t)NUM_COLUMNS * max_spans, sizeof *columns);
    scratch->places = calloc(num_places(max_spans), sizeof *scratch->places);
    for (unsigned column = 0; column < NUM_COLUMNS; column++)
        scratch->spans.columns[column] = columns ? columns + (size_t)column * max_spans : NULL;
    scratch->spans.most = max_spans;
    scratch->salt = salt | 1;
    return columns && scratch->places;
}

void scratch_close(struct scratch *scratch) {
    free(scratch->spans.columns[0]);
    free(scratch->places);
    *scratch = (struct scratch){.places = NULL};
}

static bool all_different(const uint64_t *ids, uint32_t count, struct scratch *scratch) {
    uint64_t places = num_places(count);
    memset(scratch->places, 0, places * sizeof *scratch->places);
    for (uint32_t at = 0; at < count; at++) {
        uint64_t mixed = ids[at] * scratch->salt;
        uint64_t place = (mixed ^ mixed >> 32) * scratch->salt >> 32 & (places - 1);
        for (; scratch->places[place]; place = (place + 1) & (places - 1))
            if (ids[scratch->places[place] - 1] == ids[at]) return false;
        scratch->places[place] = at + 1;
    }
    return true;
}

/* Counts the tokens. */
static bool check_spans(struct wire_spans *spans, const struct bounds *bounds, struct scratch *scratch,
                        uint64_t *tokens) {
    uint32_t count = spans->counts[SEQUENCE_IDS];
    if (!count || spans->counts[STARTS] != count || spans->counts[LENGTHS] != count) return false;
    if (!spans->counts[REVISIONS])
        memset(spans->columns[REVISIONS], 0, count * sizeof(uint64_t));
    else if (spans->counts[REVISIONS] != count)
        return false;
    *tokens = 0;
    for (uint32_t at = 0; at < count; at++) {
        /* Both have 32 bits. */
        uint64_t start = spans->columns[STARTS][at], length = spans->columns[LENGTHS][at];
        if (!length || start + length > bounds->max_sequence_tokens) return false;
        *tokens += length;
    }
    return all_different(spans->columns[SEQUENCE_IDS], count, scratch);
}

static bool check_tensor(const struct wire_tensor *tensor, uint64_t tokens, uint64_t heads, uint64_t head_dim) {
    uint64_t expected;
    if (!tensor->data || tensor->dtype < BLOCKDEX_BF16 || tensor->dtype > BLOCKDEX_FP8_E4M3) return false;
    return !__builtin_mul_overflow(tokens, heads, &expected) &&
           !__builtin_mul_overflow(expected, head_dim, &expected) &&
           !__builtin_mul_overflow(expected, DTYPE_BYTES[tensor->dtype], &expected) && tensor->bytes == expected;
}

static bool check_heads(struct wire_request *request, const struct bounds *bounds) {
    if (request->first_head >= bounds->num_heads) return false;
    if (!request->num_heads) request->num_heads = (uint32_t)bounds->num_heads - request->first_head;
    return (uint64_t)request->first_head + request->num_heads <= bounds->num_heads;
}

bool tokens_check(struct wire_request *request, const struct bounds *bounds, struct scratch *scratch) {
    uint64_t tokens;
    if (request->layer >= bounds->num_layers || !check_spans(request->spans, bounds, scratch, &tokens)) return false;
    if (request->kind != SELECT_BLOCKS && !check_tensor(&request->keys, tokens, 1, bounds->head_dim)) return false;
    if (request->kind != APPEND_KEYS) {
        if (!check_heads(request, bounds) || request->order > BLOCKDEX_SCORE) return false;
        if (!check_tensor(&request->queries, tokens, request->num_heads, bounds->head_dim)) return false;
        if (!request->order) request->order = BLOCKDEX_ASCENDING;
    }
    return request->keys.bytes + request->queries.bytes <= bounds->max_message_bytes;
}

/* Where columns, keys and queries begin behind the tenant, as docs/ring.md says. */
struct parts {
    uint64_t columns, keys, queries;
};

static struct parts parts_of(const struct blockdex_request *slot) {
    struct parts parts = {.columns = (slot->tenant_bytes + UINT64_C(7)) / 8 * 8};
    parts.keys = blockdex_aligned(parts.columns + UINT64_C(8) * NUM_COLUMNS * slot->num_spans);
    parts.queries = parts.keys + blockdex_aligned(slot->keys_bytes);
    return parts;
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
                           (request->rollback ? BLOCKDEX_ROLLBACK : 0)),
        .tenant_bytes = (uint16_t)tenant_bytes,
        .epoch = request->epoch,
        .layer = request->layer,
        .num_spans = request->spans->counts[SEQUENCE_IDS],
        .first_head = request->first_head,
        .num_heads = request->num_heads,
        .keys_bytes = request->keys.bytes,
        .queries_bytes = request->queries.bytes,
    };
    slot->payload_bytes = parts_of(slot).queries + slot->queries_bytes;
}

void tokens_carry(const struct wire_request *request, const char *tenant, const struct blockdex_request *slot,
                  char *to) {
    struct parts parts = parts_of(slot);
    size_t column_bytes = slot->num_spans * sizeof(uint64_t);
    memcpy(to, tenant, slot->tenant_bytes);
    for (unsigned column = 0; column < NUM_COLUMNS; column++)
        memcpy(to + parts.columns + column * column_bytes, request->spans->columns[column], column_bytes);
    if (request->keys.data) memcpy(to + parts.keys, request->keys.data, slot->keys_bytes);
    if (request->queries.data) memcpy(to + parts.queries, request->queries.data, slot->queries_bytes);
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
    response->block_ids = (struct wire_tensor){(const uint8_t *)payload, bytes, BLOCKDEX_INT32};
    if (slot->flags & BLOCKDEX_HAS_SCORES) {
        scores_at = blockdex_aligned(bytes);
        if (scores_at > slot->payload_bytes || bytes > slot->payload_bytes - scores_at) return false;
        response->scores = (struct wire_tensor){(const uint8_t *)payload + scores_at, bytes, BLOCKDEX_FP32};
    }
    return true;
}
