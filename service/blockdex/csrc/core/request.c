/* What is in a slot: read once, since another process can write it at any time, and checked as far as that takes no
 * knowledge of the cache. What the layout forbids breaks the link; what the contract forbids is refused. */
#include "core/casts.h"
#include "core/core.h"
#include "faults.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum { WORDS = 5, FEW_SPANS = 8 };
enum { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8, UNIMPLEMENTED = 12, INTERNAL = 13 };

static const char *const DTYPE_NAMES[] = {"", "bf16", "fp16", "fp32", "fp8_e4m3"};

void core_forget(struct core *core, struct request *request) {
    if (request->state == HAS_COME) turns_remove(&core->turns, request);
    if (request->state == IS_QUEUED) list_remove(&core->backlog, request);
    if (request->state == IS_WAITING) list_remove(&core->waiting, request);
    core->changed |= request->holds_back || request->keeps_tables;
    if (request->keeps_tables) core_keep_tables(core, request, -1);
    core_leave_regions(core, request);
    /* So that its memory goes with its last request. */
    if (request->link->gone) atomic_store_explicit(&core->noticed, 1, memory_order_release);
    pair_index_remove(&core->tickets, (uintptr_t)request->link, request->slot.ticket);
    assert(core->requests[request->number] == request);
    core->requests[request->number] = NULL;
    core->free_numbers[core->num_free++] = request->number;
    core->turns.of[request->tenant].requests--;
    tenants_release(&core->index->tenants, request->tenant);
    free(request);
}

__attribute__((format(printf, 3, 4))) static void break_link(struct core *core, struct server_link *link,
                                                             const char *format, ...) {
    va_list numbers;
    va_start(numbers, format);
    vsnprintf(core->broken_by, sizeof core->broken_by, format, numbers);
    va_end(numbers);
    core->broken = link;
}

static void cancel(struct core *core, struct server_link *link, uint64_t ticket) {
    const uint32_t *number = pair_index_find(&core->tickets, (uintptr_t)link, ticket);
    if (!number) return;
    core->requests[*number]->cancelled = true;
    core->next_deadline = 0; /* passed already */
}

/* Where in the arena a request's parts are. */
struct parts {
    char *tenant, *columns, *keys, *queries;
};

static unsigned num_columns(const struct blockdex_request *slot) { return blockdex_num_columns(slot->kind); }

static bool sets_tables(const struct blockdex_request *slot) { return slot->kind == BLOCKDEX_SET_PAGE_TABLES; }

struct row_name core_name_row(const struct blockdex_request *slot, uint64_t id) {
    const unsigned long long pool = slot->sequence_id, row = id;
    struct row_name name;
    if (core_is_of_pool(slot)) {
        snprintf(name.words, sizeof name.words, "pool %llu, row %llu", pool, row);
        snprintf(name.numbers, sizeof name.numbers, META "pool_id=%llu" META "row=%llu", pool, row);
    } else {
        snprintf(name.words, sizeof name.words, "sequence %llu", row);
        snprintf(name.numbers, sizeof name.numbers, META "sequence_id=%llu", row);
    }
    return name;
}

#define REFUSE(code, reason, ...) (core_refuse_slot(core, link, slot, now, code, reason, __VA_ARGS__), false)

static bool find_parts(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now,
                       struct parts *parts) {
    const uint64_t arena = link->request_arena_bytes, offset = slot->payload_offset, bytes = slot->payload_bytes;
    if (offset % 64 || offset > arena || bytes > arena - offset) {
        break_link(core, link, "request: %llu bytes at %llu are not in an arena of %llu", (unsigned long long)bytes,
                   (unsigned long long)offset, (unsigned long long)arena);
        return false;
    }
    if (slot->tenant_bytes > bytes) {
        break_link(core, link, "request: a tenant of %u bytes in %llu", slot->tenant_bytes, (unsigned long long)bytes);
        return false;
    }
    char *begin = link->request_arena + offset;
    const uint64_t columns = (slot->tenant_bytes + 7u) / 8 * 8;
    *parts = (struct parts){.tenant = begin, .columns = begin + columns};
    if (slot->kind != BLOCKDEX_TOKENS) {
        const uint64_t cells = sets_tables(slot) ? slot->number < bytes ? slot->number : bytes : 0;
        const uint64_t rows = columns + 8 * ((uint64_t)num_columns(slot) * slot->num_spans + cells);
        if (!num_columns(slot) || rows == bytes) return true;
        break_link(core, link, "request: its parts take %llu bytes, got %llu", (unsigned long long)rows,
                   (unsigned long long)bytes);
        return false;
    }
    const bool has_regions = slot->keys_region || slot->queries_region;
    const uint64_t keys_bytes = slot->keys_region ? 0 : slot->keys_bytes;
    const uint64_t queries_bytes = slot->queries_region ? 0 : slot->queries_bytes;
    const struct blockdex_parts at = blockdex_parts_of(slot);
    if (keys_bytes > bytes || queries_bytes > bytes || at.bytes != bytes) {
        if (has_regions && at.bytes < bytes)
            return REFUSE(INVALID_ARGUMENT, "INVALID_REGION",
                          "request: what is in no region takes %1$llu bytes, the payload has %2$llu" META
                          "expected_bytes=%1$llu" META "bytes=%2$llu",
                          (unsigned long long)at.bytes, (unsigned long long)bytes);
        break_link(core, link, "request: its parts take %llu bytes, got %llu", (unsigned long long)at.bytes,
                   (unsigned long long)bytes);
        return false;
    }
    *parts = (struct parts){begin, begin + at.columns, begin + at.keys, begin + at.queries};
    return true;
}

static bool keeps_layout(struct core *core, struct server_link *link, const struct blockdex_request *slot) {
    enum {
        FLAGS = BLOCKDEX_RETURN_SCORES | BLOCKDEX_WAIT_FOR_KEYS | BLOCKDEX_ROLLBACK | BLOCKDEX_RAW_SCORES |
        BLOCKDEX_PAGES
    };
    if (slot->kind < BLOCKDEX_OPEN || slot->kind > BLOCKDEX_CLOSE_POOL)
        break_link(core, link, "request: kind must be %d to %d, got %u", BLOCKDEX_OPEN, BLOCKDEX_CLOSE_POOL,
                   slot->kind);
    else if (slot->kind != BLOCKDEX_TOKENS)
        return true;
    else if (slot->flags & ~FLAGS)
        break_link(core, link, "request: flags must be 0 to %d, got %u", FLAGS, slot->flags);
    else if ((slot->keys_bytes && !slot->keys_dtype) || (slot->queries_bytes && !slot->queries_dtype))
        break_link(core, link, "request: %llu bytes of keys and %llu of queries, one without a dtype",
                   (unsigned long long)slot->keys_bytes, (unsigned long long)slot->queries_bytes);
    else if ((slot->keys_dtype && !dtype_bytes(slot->keys_dtype)) ||
             (slot->queries_dtype && !dtype_bytes(slot->queries_dtype)))
        break_link(core, link, "request: dtype must be 1 to %d, got %u and %u", BLOCKDEX_FP8_E4M3, slot->keys_dtype,
                   slot->queries_dtype);
    else if (slot->queries_dtype && (slot->order < BLOCKDEX_ASCENDING || slot->order > BLOCKDEX_SCORE))
        break_link(core, link, "request: order must be 1 to %d, got %u", BLOCKDEX_SCORE, slot->order);
    else
        return true;
    return false;
}

/* In quotes, and printable. */
static const char *quoted(const char *bytes, uint32_t count, char text[4 * BLOCKDEX_MAX_TENANT_BYTES + 3]) {
    char *to = text;
    *to++ = '\'';
    for (uint32_t at = 0; at < count && at < BLOCKDEX_MAX_TENANT_BYTES; at++) {
        const bool plain = bytes[at] >= ' ' && bytes[at] <= '~';
        to += snprintf(to, 5, plain ? "%c" : "\\x%02x", plain ? bytes[at] : (unsigned char)bytes[at]);
    }
    *to++ = '\'';
    *to = 0;
    return text;
}

static bool check_tenant(struct core *core, struct server_link *link, const struct blockdex_request *slot,
                         const char *tenant, int64_t now) {
    char own[4 * BLOCKDEX_MAX_TENANT_BYTES + 3], named[4 * BLOCKDEX_MAX_TENANT_BYTES + 3];
    const uint32_t bytes = slot->tenant_bytes;
    bool printable = true;
    if (link->tenant_bytes)
        return !bytes || REFUSE(INVALID_ARGUMENT, "INVALID_TENANT",
                                "tenant: the link's is %s, a request of it names none, got %s",
                                quoted(link->tenant, link->tenant_bytes, own), quoted(tenant, bytes, named));
    if (bytes < 1 || bytes > BLOCKDEX_MAX_TENANT_BYTES)
        return REFUSE(INVALID_ARGUMENT, "INVALID_TENANT", "blockdex-tenant: must have 1 to %d characters, got %u",
                      BLOCKDEX_MAX_TENANT_BYTES, bytes);
    for (uint32_t at = 0; at < bytes; at++) printable &= tenant[at] >= ' ' && tenant[at] <= '~';
    if (!printable)
        return REFUSE(INVALID_ARGUMENT, "INVALID_TENANT", "blockdex-tenant: must be printable ASCII, got %s",
                      quoted(tenant, bytes, named));
    return true;
}

static bool check_tensor(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now,
                         const char *name, uint8_t dtype, uint64_t bytes, uint64_t tokens, uint32_t heads) {
    const uint64_t expected = tokens * (heads ? heads : 1) * core->head_dim * dtype_bytes(dtype);
    char shape[64];
    if (bytes == expected) return true;
    if (heads)
        snprintf(shape, sizeof shape, "[%llu, %u, %u]", (unsigned long long)tokens, heads, core->head_dim);
    else
        snprintf(shape, sizeof shape, "[%llu, %u]", (unsigned long long)tokens, core->head_dim);
    return REFUSE(INVALID_ARGUMENT, "INVALID_TENSOR",
                  "%1$s: %2$s of %3$s takes %4$llu bytes, got %5$llu" META "expected_bytes=%4$llu" META "bytes=%5$llu",
                  name, shape, DTYPE_NAMES[dtype], (unsigned long long)expected, (unsigned long long)bytes);
}

static bool check_heads(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now) {
    const uint32_t first = slot->first_head, heads = slot->num_heads;
    if (first >= core->heads)
        return REFUSE(INVALID_ARGUMENT, "INVALID_HEADS",
                      "first_head must be below %1$u, got %2$u" META "first_head=%2$u" META "num_index_heads=%1$u",
                      core->heads, first);
    if (heads > core->heads - first)
        return REFUSE(INVALID_ARGUMENT, "INVALID_HEADS",
                      "first_head + num_heads must be at most %1$u, got %2$u + %3$u" META "first_head=%2$u" META
                      "num_heads=%3$u" META "num_index_heads=%1$u",
                      core->heads, first, heads);
    if (!heads) return REFUSE(INVALID_ARGUMENT, "INVALID_HEADS", "num_heads must be at least 1, got 0");
    return true;
}

/* What only rows of pools can be asked. */
static bool check_pool(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now) {
    if (!(slot->flags & BLOCKDEX_PAGES)) return true;
    if (!slot->sequence_id)
        return REFUSE(INVALID_ARGUMENT, "INVALID_POOL", "ids: pages are a pool's, and the request names none");
    return !link->channel.bound ||
           REFUSE(UNIMPLEMENTED, "UNKNOWN_FEATURE",
                  "pool %1$llu: a device channel answers with block ids, not with pages" META "pool_id=%1$llu",
                  (unsigned long long)slot->sequence_id);
}

/* Everything of a token request but its columns and their sums. */
static bool check_numbers(struct core *core, struct server_link *link, const struct blockdex_request *slot,
                          int64_t now) {
    const uint64_t bytes = slot->keys_bytes + slot->queries_bytes;
    if (slot->layer >= core->layers)
        return REFUSE(INVALID_ARGUMENT, "INVALID_LAYER",
                      "layer must be below %1$u, got %2$u" META "layer=%2$u" META "num_layers=%1$u", core->layers,
                      slot->layer);
    if (slot->num_spans < 1 || slot->num_spans > core->max_spans)
        return REFUSE(INVALID_ARGUMENT, "INVALID_SPANS",
                      "spans: must be 1 to %1$u, got %2$u" META "count=%2$u" META "max_spans=%1$u", core->max_spans,
                      slot->num_spans);
    if (!slot->keys_dtype && !slot->queries_dtype)
        return REFUSE(INVALID_ARGUMENT, "EMPTY_REQUEST", "request: has neither keys nor queries");
    if (bytes > core->max_message_bytes)
        return REFUSE(RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE",
                      "keys and queries together must be at most %1$llu bytes, got %2$llu" META "bytes=%2$llu" META
                      "max_message_bytes=%1$llu",
                      (unsigned long long)core->max_message_bytes, (unsigned long long)bytes);
    return check_pool(core, link, slot, now) && (!slot->queries_dtype || check_heads(core, link, slot, now));
}

static bool check_span(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now,
                       uint64_t id, int64_t start, int64_t length) {
    const long long first = start, count = length, most = core->max_tokens;
    if (length >= 1 && start >= 0 && first <= most && count <= most - first) return true;
    const struct row_name name = core_name_row(slot, id);
#define NUMBERS "%4$s" META "start=%2$lld" META "length=%3$lld"
    if (length < 1)
        return REFUSE(INVALID_ARGUMENT, "INVALID_SPANS", "%1$s: length must be at least 1, got %3$lld" NUMBERS,
                      name.words, first, count, name.numbers);
    if (start < 0)
        return REFUSE(INVALID_ARGUMENT, "INVALID_SPANS", "%1$s: start must be at least 0, got %2$lld" NUMBERS,
                      name.words, first, count, name.numbers);
    return REFUSE(INVALID_ARGUMENT, "INVALID_SPANS",
                  "%1$s: start + length must be at most %5$lld, got %2$lld + %3$lld" NUMBERS, name.words, first, count,
                  name.numbers, most);
}

/* The row of an id that an earlier row names; -1 where all differ, -2 without memory. */
static int64_t find_duplicate(const uint64_t *ids, uint32_t count) {
    if (count <= FEW_SPANS) {
        for (uint32_t row = 1; row < count; row++)
            for (uint32_t before = 0; before < row; before++)
                if (ids[before] == ids[row]) return row;
        return -1;
    }
    struct pair_index seen = {0};
    int64_t found = -1;
    for (uint32_t row = 0; row < count && found == -1; row++) {
        if (pair_index_find(&seen, 0, ids[row]))
            found = row;
        else if (!pair_index_set(&seen, 0, ids[row], row))
            found = -2;
    }
    pair_index_free(&seen);
    return found;
}

static bool check_different(struct core *core, struct server_link *link, const struct blockdex_request *slot,
                            int64_t now, const struct request *request, const char *rows) {
    const int64_t twice = find_duplicate(request->ids, request->num_rows);
    uint32_t times = 0;
    if (twice == -2) return REFUSE(RESOURCE_EXHAUSTED, "OVERLOADED", "engine: no memory left for a request");
    if (twice < 0) return true;
    for (uint32_t row = 0; row < request->num_rows; row++) times += request->ids[row] == request->ids[twice];
    const struct row_name name = core_name_row(slot, request->ids[twice]);
    return REFUSE(INVALID_ARGUMENT, "DUPLICATE_SEQUENCE",
                  "%1$s: %2$s is named %3$u times, at most 1 is allowed%4$s" META "count=%3$u", rows, name.words, times,
                  name.numbers);
}

static void copy_columns(const struct blockdex_request *slot, const struct parts *parts, struct request *request) {
    const volatile uint64_t *words = (const volatile uint64_t *)(const void *)parts->columns;
    const size_t rows = num_columns(slot) * (size_t)request->num_rows;
    for (size_t at = 0; at < rows; at++) request->words[at] = words[at];
    for (size_t at = 0; sets_tables(slot) && at < slot->number; at++) request->page_ids[at] = words[rows + at];
}

/* A pool's revision is one number. */
static bool check_revisions(struct core *core, struct server_link *link, const struct blockdex_request *slot,
                            int64_t now, const struct request *request) {
    for (uint32_t row = 1; slot->sequence_id && row < request->num_rows; row++)
        if (request->revisions[row] != request->revisions[0])
            return REFUSE(INVALID_ARGUMENT, "INVALID_POOL",
                          "pool %1$llu: revisions must be the same in all rows, got %2$llu and %3$llu" META
                          "pool_id=%1$llu",
                          (unsigned long long)slot->sequence_id, (unsigned long long)request->revisions[0],
                          (unsigned long long)request->revisions[row]);
    return true;
}

/* Whether the page numbers are as many as the runs of cells take, each of one at least. */
static bool check_counts(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now,
                         const struct request *request) {
    const unsigned long long cells = slot->number;
    unsigned long long sum = 0;
    for (uint32_t row = 0; row < request->num_rows; row++) {
        const unsigned long long count = (uint64_t)request->lengths[row];
        if (!count) {
            const struct row_name name = core_name_row(slot, request->ids[row]);
            return REFUSE(INVALID_ARGUMENT, "INVALID_POOL", "%1$s: count must be at least 1, got 0%2$s" META "count=0",
                          name.words, name.numbers);
        }
        sum = count > cells || sum > cells ? cells + 1 : sum + count;
    }
    return sum == cells || REFUSE(INVALID_ARGUMENT, "INVALID_POOL",
                                  "pool %1$llu: page_ids must be as many as the counts add up to, got %2$llu" META
                                  "pool_id=%1$llu" META "page_ids=%2$llu",
                                  (unsigned long long)slot->sequence_id, cells);
}

/* Of spans, and of what follows from them. */
static bool check_columns(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now,
                          struct request *request) {
    const uint32_t spans = slot->num_spans;
    uint64_t tokens = 0;
    for (uint32_t row = 0; row < spans; row++) {
        const int64_t start = request->starts[row], length = request->lengths[row];
        if (!check_span(core, link, slot, now, request->ids[row], start, length)) return false;
        tokens += (uint64_t)length;
        if (length > request->longest) request->longest = (uint32_t)length;
        if (start + length > request->end) request->end = start + length;
        request->applies[row] = 1;
    }
    if (!check_different(core, link, slot, now, request, "spans") || !check_revisions(core, link, slot, now, request))
        return false;
    if (slot->keys_dtype && !check_tensor(core, link, slot, now, "keys", slot->keys_dtype, slot->keys_bytes, tokens, 0))
        return false;
    if (slot->queries_dtype && !check_tensor(core, link, slot, now, "queries", slot->queries_dtype, slot->queries_bytes,
                                             tokens, slot->num_heads))
        return false;
    const bool scored = core_is_scored(slot);
    const uint64_t ids = slot->queries_dtype ? 4 * tokens * slot->num_heads * core->topk : 0;
    const uint64_t own_ids = slot->block_ids_region ? 0 : ids, own_scores = scored && !slot->scores_region ? ids : 0;
    const uint64_t answer = own_scores ? blockdex_aligned(own_ids) + own_scores : own_ids;
    if (answer > server_link_longest(link))
        return REFUSE(INTERNAL, "INTERNAL", "answer: %llu bytes, there is room for %llu", (unsigned long long)answer,
                      (unsigned long long)server_link_longest(link));
    request->tokens = (uint32_t)tokens;
    return core_find_sources(core, link, slot, now, request, ids);
}

/* Everything of a request on sequences or pools but its columns. */
static bool check_sequences(struct core *core, struct server_link *link, const struct blockdex_request *slot,
                            int64_t now) {
    const uint32_t count = slot->num_spans;
    const unsigned long long length = slot->number, most = (unsigned long long)core->max_tokens;
    if (num_columns(slot) && (count < 1 || count > core->max_spans))
        return REFUSE(INVALID_ARGUMENT, "INVALID_SPANS",
                      "%3$s: must be 1 to %1$u, got %2$u" META "count=%2$u" META "max_spans=%1$u", core->max_spans,
                      count, sets_tables(slot) ? "rows" : "sequences");
    if (sets_tables(slot) && slot->number > core->max_message_bytes / 8)
        return REFUSE(RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE",
                      "pool %1$llu: page_ids must be at most %2$llu, got %3$llu" META "pool_id=%1$llu" META
                      "page_ids=%3$llu",
                      (unsigned long long)slot->sequence_id, (unsigned long long)core->max_message_bytes / 8, length);
    if ((slot->kind != BLOCKDEX_FORK && slot->kind != BLOCKDEX_TRUNCATE) || length <= most) return true;
    return REFUSE(INVALID_ARGUMENT, "INVALID_LENGTH",
                  "sequence %1$llu: length must be 0 to %2$llu, got %3$llu" META "sequence_id=%1$llu" META
                  "length=%3$llu" META "max_sequence_tokens=%2$llu",
                  (unsigned long long)slot->sequence_id, most, length);
}

static struct request *new_request(struct server_link *link, const struct blockdex_request *slot, uint32_t spans) {
    const size_t applies = (spans + 7) / 8, cells = sets_tables(slot) ? slot->number : 0;
    const size_t words = WORDS * (size_t)spans + applies + cells;
    struct request *request = fault_strikes(FAULT_ALLOCATION) ? NULL : calloc(1, sizeof *request + 8 * words);
    if (!request) return NULL;
    request->link = link;
    request->slot = *slot;
    request->num_rows = spans;
    request->phase = BLOCKDEX_SEQUENCE;
    request->ids = request->words;
    request->starts = (int64_t *)request->words + spans;
    request->lengths = request->starts + spans;
    request->revisions = request->words + 3 * (size_t)spans;
    request->entries = (uint32_t *)(request->words + 4 * (size_t)spans);
    request->applies = (uint8_t *)(request->words + WORDS * (size_t)spans);
    request->page_ids = request->words + WORDS * (size_t)spans + applies;
    return request;
}

#define NO_MEMORY "engine: no memory left for %u requests, %u wait"

/* Refuses one request too many. */
__attribute__((format(printf, 5, 0))) static bool refuse(struct core *core, struct server_link *link,
                                                         const struct blockdex_request *slot, int64_t now,
                                                         const char *format) {
    core_refuse_slot(core, link, slot, now, RESOURCE_EXHAUSTED, "OVERLOADED", format, core->max_queued,
                     core->max_queued - core->num_free);
    return false;
}

/* Refuses a request where one of the same tenant waits for too long: the device takes less than is asked of it, and what
 * came behind would wait longer still. */
static bool check_queue(struct core *core, struct request *request, int64_t now) {
    struct server_link *link = request->link;
    const struct blockdex_request *slot = &request->slot;
    const int64_t waited = turns_waited(&core->turns, request, now);
    if (waited <= core->longest_queue) return true;
    return REFUSE(RESOURCE_EXHAUSTED, "OVERLOADED",
                  "queue: a request of the tenant has waited %.3f s, at most %.3f s are allowed", 1e-9 * (double)waited,
                  1e-9 * (double)core->longest_queue);
}

/* Gives it a number, a tenant and its ticket; false where it was refused. */
static bool enter(struct core *core, struct request *request, const char *tenant, size_t tenant_bytes, int64_t now) {
    request->tenant = tenants_use(&core->index->tenants, tenant, tenant_bytes);
    if (!request->tenant) return refuse(core, request->link, &request->slot, now, NO_MEMORY);
    uint32_t number = core->free_numbers[core->num_free - 1];
    const bool memory = turns_reserve(&core->turns, request->tenant);
    struct turn *turn = memory ? &core->turns.of[request->tenant] : NULL;
    const double weight = core_weight(core, request->tenant);
    const bool may = memory && tenants_may_have(weight, turn->requests, core->num_free);
    if (may && !check_queue(core, request, now)) {
        tenants_release(&core->index->tenants, request->tenant);
        return false;
    }
    if (!may || !turns_append(&core->turns, request, now) ||
        !pair_index_set(&core->tickets, (uintptr_t)request->link, request->slot.ticket, number)) {
        if (request->queue) turns_remove(&core->turns, request);
        tenants_release(&core->index->tenants, request->tenant);
        return refuse(core, request->link, &request->slot, now,
                      memory && !may ? "queue: of %u requests that may wait %u do, and the tenant's share is used up"
                                     : NO_MEMORY);
    }
    core->num_free--;
    turn->requests++;
    turns_note(&core->turns, request->tenant, now);
    core_use_regions(request);
    request->number = number;
    core->requests[number] = request;
    if (request->slot.deadline < core->next_deadline) core->next_deadline = request->slot.deadline;
    return true;
}

static bool check_rows(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now,
                       struct request *request) {
    if (slot->kind == BLOCKDEX_TOKENS) return check_columns(core, link, slot, now, request);
    const bool differ = sets_tables(slot) ? check_counts(core, link, slot, now, request)
                                          : check_different(core, link, slot, now, request, "sequences");
    return differ && core_find_sources(core, link, slot, now, request, 0);
}

static void read_slot(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now) {
    const bool has_tokens = slot->kind == BLOCKDEX_TOKENS, own = !link->tenant_bytes;
    struct parts parts;
    char tenant[BLOCKDEX_MAX_TENANT_BYTES];
    if (!keeps_layout(core, link, slot)) return;
    if (pair_index_find(&core->tickets, (uintptr_t)link, slot->ticket)) {
        break_link(core, link, "request: ticket %llu is in flight already", (unsigned long long)slot->ticket);
        return;
    }
    if (!find_parts(core, link, slot, now, &parts)) return;
    /* Frontends send none any more by then. */
    if (core->no_more && !own) {
        core_refuse_slot(core, link, slot, now, UNAVAILABLE, "SHUTTING_DOWN",
                         "server: shutting down, takes no new requests");
        return;
    }
    memcpy(tenant, parts.tenant, slot->tenant_bytes < sizeof tenant ? slot->tenant_bytes : sizeof tenant);
    if (!check_tenant(core, link, slot, tenant, now) ||
        !(has_tokens ? check_numbers : check_sequences)(core, link, slot, now))
        return;
    if (!core->num_free) {
        refuse(core, link, slot, now, "queue: at most %u requests may wait, %u do");
        return;
    }
    struct request *request = new_request(link, slot, num_columns(slot) ? slot->num_spans : 0);
    if (!request) {
        refuse(core, link, slot, now, NO_MEMORY);
        return;
    }
    copy_columns(slot, &parts, request);
    request->tensors[KEYS] = parts.keys;
    request->tensors[QUERIES] = parts.queries;
    request->received = slot->received;
    if (!check_rows(core, link, slot, now, request) ||
        !enter(core, request, own ? tenant : link->tenant, own ? slot->tenant_bytes : link->tenant_bytes, now))
        free(request);
}

void core_read(struct core *core, struct server_link *link, int64_t now) {
    struct blockdex_request slot = *(const volatile struct blockdex_request *)server_link_head(link);
    server_link_release(link);
    /* Its times are any numbers: no clock was below 0, and it has not come later than now. */
    if (slot.received < 0) slot.received = 0;
    if (slot.received > now) slot.received = now;
    if (slot.deadline < 0) slot.deadline = 0;
    if (link->channel.bound) {
        /* Whose kernels wait no more, they have said so. */
        if (atomic_load_explicit(&link->header->channel_error, memory_order_acquire)) return;
        slot.epoch = link->channel.epoch;
        slot.received = link->channel.looked; /* at the earliest */
        slot.deadline = slot.received + link->channel.bound;
    }
    if (slot.kind == BLOCKDEX_CANCEL)
        cancel(core, link, slot.ticket);
    else
        read_slot(core, link, &slot, now);
}
