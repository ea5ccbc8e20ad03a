/* A client of a blockdex server on the same host, over the ring of docs/ring.md; for C11 (gnu11, or _GNU_SOURCE) and
 * C++17. docs/c-client.md shows how it is used.
 *
 *   struct blockdex_client client;
 *   struct blockdex_error error;
 *   if (!blockdex_connect(&client, "/run/blockdex/ring.sock", "my-engine", 5.0, &error)) ...
 *   uint64_t ids[] = {1, 2};
 *   blockdex_open_sequences(&client, ids, NULL, 2, 5.0, &error);
 *   blockdex_append_and_select(&client, &tokens, block_ids, room, NULL, 5.0, &error);
 *   blockdex_disconnect(&client);
 *
 * One thread at a time uses a client; threads that call at once have a client each. After fork the child must not use
 * its parent's. There is no thread and no global in here; nothing is allocated but by blockdex_connect. All timeouts are
 * in seconds, and nothing waits longer. What a server writes is checked before it is followed.
 */
#ifndef BLOCKDEX_CLIENT_H
#define BLOCKDEX_CLIENT_H

#include <sched.h>

#include "blockdex_link.h"

/* --- Answers: taken off the ring in their order, kept until they are released in any --- */

static inline struct blockdex_pending *blockdex_with(const struct blockdex_client *client, uint64_t ticket) {
    struct blockdex_pending *pending = client->pending ? &client->pending[ticket & (client->capacity - 1)] : NULL;
    return pending && ticket && pending->ticket == ticket ? pending : NULL;
}

static inline uint32_t blockdex_index_of(const struct blockdex_client *client, const struct blockdex_pending *pending) {
    return (uint32_t)(pending - client->pending);
}

/* An answered request leaves the table. Payloads go back in the order of their answers: what another one's lies before
 * goes back with that. */
static inline void blockdex_leave(struct blockdex_client *client, struct blockdex_pending *pending) {
    struct blockdex_header *header = client->segment.header;
    const uint32_t at = blockdex_index_of(client, pending), before = pending->before, after = pending->after;
    const uint64_t end = pending->payload_end;
    if (before != BLOCKDEX_NONE) {
        client->pending[before].after = after;
        if (end) client->pending[before].payload_end = end;
    } else {
        client->first = after;
        if (end) atomic_store_explicit(&header->answer_bytes_freed, end, memory_order_release);
        if (end) blockdex_ring_bell(&header->engine_waits_for_room, client->engine_bell);
    }
    if (after == BLOCKDEX_NONE)
        client->last = before;
    else
        client->pending[after].before = before;
    pending->ticket = 0;
    pending->after = client->free;
    client->free = at;
}

/* Whether an answer is one to a request in flight, and its payload where payloads lie; the link is over if not. */
static inline bool blockdex_check(struct blockdex_client *client, const struct blockdex_answer *answer) {
    const struct blockdex_pending *pending = blockdex_with(client, answer->ticket);
    const uint64_t room = client->segment.answer_arena_bytes, bytes = answer->payload_bytes;
    if (!pending || pending->answered)
        return blockdex_end(client, BLOCKDEX_INTERNAL, "INTERNAL", "answer: its ticket is not in flight");
    if (bytes > room || answer->payload_offset > room - bytes || answer->payload_offset % 64)
        return blockdex_end(client, BLOCKDEX_INTERNAL, "INTERNAL", "answer: its payload is not in the arena");
    return true;
}

static inline bool blockdex_take_one(struct blockdex_client *client) {
    struct blockdex_answer answer;
    const uint64_t slot = client->read % client->segment.num_answer_slots;
    memcpy(&answer, client->segment.answer_slots + slot * BLOCKDEX_SLOT_BYTES, sizeof answer);
    /* What is checked is the copy, whatever a compiler knows of where it came from. */
    __asm__ volatile("" ::: "memory");
    if (!blockdex_check(client, &answer)) return false;
    client->read++;
    struct blockdex_pending *pending = blockdex_with(client, answer.ticket);
    blockdex_arena_give_back(&client->arena, pending->extent);
    pending->answer = answer;
    pending->payload_end = answer.payload_bytes ? answer.payload_end : 0;
    pending->answered = true;
    pending->before = client->last;
    pending->after = BLOCKDEX_NONE;
    if (client->last == BLOCKDEX_NONE)
        client->first = blockdex_index_of(client, pending);
    else
        client->pending[client->last].after = blockdex_index_of(client, pending);
    client->last = blockdex_index_of(client, pending);
    if (pending->given_up) blockdex_leave(client, pending);
    return true;
}

/* Takes all answers off the ring; whether there were any. */
static inline bool blockdex_take(struct blockdex_client *client) {
    struct blockdex_header *header = client->segment.header;
    uint64_t count = atomic_load_explicit(&header->answers_written, memory_order_acquire) - client->read;
    if (!count || client->over.code) return false;
    if (count > client->segment.num_answer_slots)
        return blockdex_end(client, BLOCKDEX_INTERNAL, "INTERNAL", "ring: more answers than slots");
    while (count && blockdex_take_one(client)) count--;
    blockdex_show(&header->answers_read, client->read, &header->engine_waits_for_room, client->engine_bell);
    return true;
}

static inline void blockdex_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield" ::: "memory");
#endif
}

/* Looks for answers until then, unless somebody else wants this core: giving it up takes longer only then. */
static inline bool blockdex_spin(struct blockdex_client *client, int64_t until) {
    const int64_t longest_yield = 20000;
    for (int64_t at = blockdex_now(), before = at; at < until && at - before < longest_yield; at = blockdex_now()) {
        for (int look = 0; look < 64; look++) {
            if (blockdex_take(client)) return true;
            blockdex_relax();
        }
        before = blockdex_now();
        sched_yield();
    }
    return false;
}

/* Sleeps until there are answers, which it takes; false where there are none by then, or the link is over. */
static inline bool blockdex_sleep(struct blockdex_client *client, int64_t until) {
    struct blockdex_header *header = client->segment.header;
    bool taken = false, late = false;
    while (!taken && !late && !client->over.code) {
        struct pollfd files[2] = {{client->client_bell, POLLIN, 0}, {client->link, POLLIN, 0}};
        if (blockdex_may_sleep(&header->client_sleeps, &header->answers_written, client->read)) {
            /* Also where somebody wakes it for nothing, again and again. */
            late = blockdex_poll_until(files, 2, until) <= 0 || blockdex_now() > until;
            blockdex_silence(client->client_bell);
        }
        blockdex_awake(&header->client_sleeps);
        taken = blockdex_take(client);
        /* What it has answered before it was gone counts. */
        if (!taken && files[1].revents) blockdex_hear(client);
    }
    return taken;
}

static inline bool blockdex_await(struct blockdex_client *client, int64_t until) {
    const int64_t spin_until = blockdex_until(blockdex_now(), client->spin_seconds);
    return blockdex_spin(client, spin_until < until ? spin_until : until) || blockdex_sleep(client, until);
}

/* What became of a request. */
enum blockdex_outcome { BLOCKDEX_FAILED = -1, BLOCKDEX_IN_FLIGHT, BLOCKDEX_ANSWERED };

/* An answer, as it lies in shared memory until its ticket is released; what it has not, or a region has, is NULL.
 * block_ids, scores: [num_tokens, num_heads, topk]; lengths, revisions: [num_layers]. `phase` is BLOCKDEX_APPEND and so
 * on; the four times, in seconds since the request arrived, say how it went: -1 where it did not come to that. */
struct blockdex_result {
    uint64_t epoch;
    const int32_t *block_ids;
    const float *scores;
    const int64_t *lengths;
    const uint64_t *revisions;
    uint32_t num_tokens, num_heads, topk, num_layers;
    uint64_t phase;
    double queue_seconds, plan_seconds, device_seconds, reply_seconds;
};

/* Two tensors of so many bytes, which may be none, behind one another; whether they lie in the payload. */
static inline bool blockdex_find_two(const struct blockdex_client *client, const struct blockdex_answer *answer,
                                     uint64_t first_bytes, uint64_t second_bytes, const void **first,
                                     const void **second) {
    const char *payload = client->segment.answer_arena + answer->payload_offset;
    const uint64_t room = answer->payload_bytes, second_at = blockdex_aligned(first_bytes);
    if (first_bytes > room || (second_bytes && (second_at > room || second_bytes > room - second_at))) return false;
    *first = first_bytes ? payload : NULL;
    *second = second_bytes ? payload + second_at : NULL;
    return true;
}

static inline bool blockdex_read_selection(const struct blockdex_client *client, const struct blockdex_pending *pending,
                                           struct blockdex_result *result) {
    const struct blockdex_answer *answer = &pending->answer;
    const void *ids, *scores;
    uint64_t bytes;
    result->num_tokens = answer->num_tokens;
    result->num_heads = answer->num_heads;
    result->topk = answer->topk;
    if (__builtin_mul_overflow((uint64_t)answer->num_tokens * answer->num_heads, 4 * (uint64_t)answer->topk, &bytes))
        return false;
    const bool scored = (answer->flags & BLOCKDEX_HAS_SCORES) && !pending->scores_apart;
    if (!blockdex_find_two(client, answer, pending->ids_apart ? 0 : bytes, scored ? bytes : 0, &ids, &scores))
        return false;
    result->block_ids = (const int32_t *)ids;
    result->scores = (const float *)scores;
    return true;
}

static inline bool blockdex_read_state(const struct blockdex_client *client, const struct blockdex_answer *answer,
                                       struct blockdex_result *result) {
    const uint64_t bytes = UINT64_C(8) * answer->num_layers;
    const void *lengths, *revisions;
    result->num_layers = answer->num_layers;
    if (!blockdex_find_two(client, answer, bytes, bytes, &lengths, &revisions)) return false;
    result->lengths = (const int64_t *)lengths;
    result->revisions = (const uint64_t *)revisions;
    return true;
}

static inline bool blockdex_read_result(const struct blockdex_client *client, const struct blockdex_pending *pending,
                                        struct blockdex_result *result) {
    const struct blockdex_answer *answer = &pending->answer;
    memset(result, 0, sizeof *result);
    result->epoch = answer->epoch;
    result->phase = answer->phase;
    result->queue_seconds = answer->queue_seconds;
    result->plan_seconds = answer->plan_seconds;
    result->device_seconds = answer->device_seconds;
    result->reply_seconds = answer->reply_seconds;
    if (answer->flags & BLOCKDEX_HAS_BLOCK_IDS) return blockdex_read_selection(client, pending, result);
    return !(answer->flags & BLOCKDEX_HAS_LENGTHS) || blockdex_read_state(client, answer, result);
}

/* What a refusal says; a text that is too long is cut. */
static inline void blockdex_read_error(const struct blockdex_client *client, const struct blockdex_answer *answer,
                                       struct blockdex_error *error) {
    const char *payload = client->segment.answer_arena + answer->payload_offset;
    uint64_t reason = answer->reason_bytes, bytes = answer->payload_bytes;
    if (!error) return;
    if (reason > bytes) reason = bytes;
    bytes -= reason;
    if (bytes >= sizeof error->message) bytes = sizeof error->message - 1;
    error->code = answer->code;
    snprintf(error->reason, sizeof error->reason, "%.*s", (int)reason, payload);
    memcpy(error->message, payload + reason, bytes);
    error->message[bytes] = 0;
    error->message_bytes = (uint32_t)bytes + 1;
}

/* An answer that was waited for is done with: what it carries is the server's again. A ticket that is unknown, still in
 * flight, or failed, is left alone. */
static inline void blockdex_release(struct blockdex_client *client, uint64_t ticket) {
    struct blockdex_pending *pending = blockdex_with(client, ticket);
    if (pending && pending->answered) blockdex_leave(client, pending);
}

/* Waits for the answer to a ticket. ANSWERED: `result` has it, and the ticket is to be released. FAILED: `error` says
 * why, and the ticket is done with; after UNREACHABLE nobody knows whether the request took effect. IN_FLIGHT: not
 * answered in time (0 looks once); wait again, or give it up. */
static inline enum blockdex_outcome blockdex_wait(struct blockdex_client *client, uint64_t ticket, double timeout,
                                                  struct blockdex_result *result, struct blockdex_error *error) {
    const struct blockdex_pending *pending = blockdex_with(client, ticket);
    const int64_t until = blockdex_until(blockdex_now(), timeout);
    if (!pending || pending->given_up) {
        blockdex_fail(error, BLOCKDEX_INVALID_ARGUMENT, "INTERNAL", "ticket: %llu is not in flight",
                      (unsigned long long)ticket);
        return BLOCKDEX_FAILED;
    }
    while (!pending->answered && blockdex_await(client, until)) continue;
    if (!pending->answered) return blockdex_is_over(client, error) ? BLOCKDEX_FAILED : BLOCKDEX_IN_FLIGHT;
    if (!pending->answer.code && blockdex_read_result(client, pending, result)) return BLOCKDEX_ANSWERED;
    if (pending->answer.code)
        blockdex_read_error(client, &pending->answer, error);
    else
        blockdex_fail(error, BLOCKDEX_INTERNAL, "INTERNAL", "answer: what it has is not in its payload");
    blockdex_release(client, ticket);
    return BLOCKDEX_FAILED;
}

/* The ticket of the oldest answer that was taken and not released; 0 where there is none. */
static inline uint64_t blockdex_oldest(const struct blockdex_client *client) {
    return client->first == BLOCKDEX_NONE ? 0 : client->pending[client->first].ticket;
}

/* The same, for whoever waits for several: 0 where none comes in time, or the link is over. */
static inline uint64_t blockdex_wait_for_any(struct blockdex_client *client, double timeout) {
    const int64_t until = blockdex_until(blockdex_now(), timeout);
    while (!blockdex_oldest(client) && blockdex_await(client, until)) continue;
    return blockdex_oldest(client);
}

/* For a loop of one's own, which waits until `client_bell` can be read (answers are there) or `link` (the server says
 * something, or is gone): called before each such wait. False where there are answers already, or the link is over. */
static inline bool blockdex_may_wait(struct blockdex_client *client) {
    struct blockdex_header *header = client->segment.header;
    if (!client->over.code) {
        blockdex_silence(client->client_bell);
        if (blockdex_may_sleep(&header->client_sleeps, &header->answers_written, client->read) &&
            client->first == BLOCKDEX_NONE)
            return blockdex_hear(client);
        blockdex_awake(&header->client_sleeps);
        blockdex_take(client);
    }
    return false;
}

/* --- Requests --- */

/* A free entry with room for a payload, and a slot for it; NULL while there is none of one. */
static inline struct blockdex_pending *blockdex_begin(struct blockdex_client *client, uint64_t payload_bytes) {
    const struct blockdex_header *header = client->segment.header;
    const uint64_t unread = client->written - atomic_load_explicit(&header->requests_read, memory_order_acquire);
    const uint32_t at = client->free != BLOCKDEX_NONE ? client->free : client->fresh;
    struct blockdex_extent extent;
    if (unread >= client->segment.num_request_slots || at >= client->capacity ||
        !blockdex_arena_take(&client->arena, payload_bytes, &extent))
        return NULL;
    struct blockdex_pending *pending = &client->pending[at];
    if (at == client->free)
        client->free = pending->after;
    else
        client->fresh++;
    memset(pending, 0, sizeof *pending);
    pending->ticket = ++client->serial * client->capacity + at;
    pending->extent = extent;
    return pending;
}

/* The same, once there is room: while there is none, answers are taken. NULL where none comes in time. */
static inline struct blockdex_pending *blockdex_begin_soon(struct blockdex_client *client, uint64_t payload_bytes,
                                                           double timeout, struct blockdex_error *error) {
    const double patience = timeout < client->room_seconds ? timeout : client->room_seconds;
    const int64_t look_again = 1000000;
    struct blockdex_pending *pending;
    int64_t until = 0;
    while (!(pending = blockdex_begin(client, payload_bytes))) {
        const int64_t now = blockdex_now();
        if (!until) until = blockdex_until(now, patience);
        if (now >= until) break;
        /* The server tells of answers, but not of slots that it has emptied. */
        if (!blockdex_take(client)) blockdex_sleep(client, until - now < look_again ? until : now + look_again);
        if (blockdex_is_over(client, error)) return NULL;
    }
    if (!pending)
        blockdex_fail(error, BLOCKDEX_RESOURCE_EXHAUSTED, "OVERLOADED",
                      "queue: waited %g s for %llu bytes and a slot among %llu and %u", patience > 0 ? patience : 0,
                      (unsigned long long)payload_bytes, (unsigned long long)client->segment.request_arena_bytes,
                      client->segment.num_request_slots);
    return pending;
}

/* Shows the server one more slot, which blockdex_begin has found free. */
static inline void blockdex_publish(struct blockdex_client *client, const struct blockdex_request *request) {
    struct blockdex_header *header = client->segment.header;
    const uint64_t slot = client->written % client->segment.num_request_slots;
    memcpy(client->segment.request_slots + slot * BLOCKDEX_SLOT_BYTES, request, sizeof *request);
    blockdex_show(&header->requests_written, ++client->written, &header->engine_sleeps, client->engine_bell);
}

/* Reserves what a request needs, whose numbers are filled but for ticket, epoch, times and offset, which this fills;
 * NULL with an error. The payload is to be written, and the request published. */
static inline char *blockdex_reserve(struct blockdex_client *client, struct blockdex_request *request, double timeout,
                                     struct blockdex_error *error) {
    /* Now and then, so that a client which never sleeps hears what it is told, too. */
    if (client->written % 1024 == 1023) blockdex_hear(client);
    if (blockdex_is_over(client, error)) return NULL;
    if (request->payload_bytes > client->segment.request_arena_bytes) {
        blockdex_fail(error, BLOCKDEX_RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE",
                      "request: is larger than the %llu bytes that there are for requests",
                      (unsigned long long)client->segment.request_arena_bytes);
        return NULL;
    }
    const int64_t received = blockdex_now();
    struct blockdex_pending *pending = blockdex_begin_soon(client, request->payload_bytes, timeout, error);
    if (!pending) return NULL;
    pending->ids_apart = request->block_ids_region;
    pending->scores_apart = request->scores_region;
    request->ticket = pending->ticket;
    request->epoch = client->epoch;
    request->received = received;
    request->deadline = blockdex_until(received, timeout);
    request->payload_offset = pending->extent.offset;
    return client->segment.request_arena + request->payload_offset;
}

/* A place in a region, at a multiple of 64; region 0 is none. */
struct blockdex_place {
    uint32_t region;
    uint64_t offset;
};

/* Tokens of sequences: keys to append, queries to select blocks for, or both.
 * T is the sum of the lengths. `keys` are [T, head_dim], `queries` [T, num_heads, head_dim], both row-major, of the
 * dtypes BLOCKDEX_BF16 and so on; a dtype of 0: there are none. `revisions` NULL: unchecked. `order` is
 * BLOCKDEX_ASCENDING (also 0) or BLOCKDEX_SCORE, `flags` are of BLOCKDEX_RETURN_SCORES and so on. The heads of the queries are
 * first_head.. of the indexer's.
 * With a place in a region `keys` or `queries` are read where they lie, and have a size alone; block ids and scores are
 * written to theirs before the answer comes, and are not in that. */
struct blockdex_tokens {
    uint64_t pool_id; /* 0: sequences; else `sequence_ids` are rows of that pool, whose one revision all of them name */
    uint32_t layer, num_spans;
    const uint64_t *sequence_ids;
    const int64_t *starts, *lengths;
    const uint64_t *revisions;
    const void *keys, *queries;
    uint64_t keys_bytes, queries_bytes;
    uint8_t keys_dtype, queries_dtype, order, flags;
    uint32_t first_head, num_heads;
    struct blockdex_place keys_place, queries_place, block_ids_place, scores_place;
};

/* A server ends the link for numbers that mean nothing, so that they are refused here. */
static inline bool blockdex_are_known(const struct blockdex_tokens *tokens, struct blockdex_error *error) {
    const unsigned all = 2 * BLOCKDEX_PAGES - 1;
    if (tokens->keys_dtype > BLOCKDEX_FP8_E4M3 || tokens->queries_dtype > BLOCKDEX_FP8_E4M3)
        return blockdex_fail(error, BLOCKDEX_INVALID_ARGUMENT, "INVALID_TENSOR",
                             "keys, queries: dtypes must be 0 to %d, got %u and %u", BLOCKDEX_FP8_E4M3,
                             tokens->keys_dtype, tokens->queries_dtype);
    if (tokens->order > BLOCKDEX_SCORE)
        return blockdex_fail(error, BLOCKDEX_INVALID_ARGUMENT, "INVALID_ORDER", "order must be 0 to %d, got %u",
                             BLOCKDEX_SCORE, tokens->order);
    return tokens->flags <= all || blockdex_fail(error, BLOCKDEX_INVALID_ARGUMENT, "INVALID_SCORES",
                                                 "flags must be 0 to %u, got %u", all, tokens->flags);
}

/* Fills a request's numbers, but for how long its payload is. */
static inline void blockdex_describe_tokens(const struct blockdex_tokens *tokens, struct blockdex_request *request) {
    memset(request, 0, sizeof *request);
    request->kind = BLOCKDEX_TOKENS;
    request->flags = tokens->flags;
    request->layer = tokens->layer;
    request->sequence_id = tokens->pool_id;
    request->num_spans = tokens->num_spans;
    if (tokens->keys_dtype) {
        request->keys_dtype = tokens->keys_dtype;
        request->keys_bytes = tokens->keys_bytes;
        request->keys_region = tokens->keys_place.region;
        request->keys_offset = tokens->keys_place.offset;
    }
    if (tokens->queries_dtype) {
        request->queries_dtype = tokens->queries_dtype;
        request->queries_bytes = tokens->queries_bytes;
        request->queries_region = tokens->queries_place.region;
        request->queries_offset = tokens->queries_place.offset;
        request->order = tokens->order;
        if (!request->order) request->order = BLOCKDEX_ASCENDING;
        request->first_head = tokens->first_head;
        request->num_heads = tokens->num_heads;
        request->block_ids_region = tokens->block_ids_place.region;
        request->block_ids_offset = tokens->block_ids_place.offset;
        request->scores_region = tokens->scores_place.region;
        request->scores_offset = tokens->scores_place.offset;
    }
}

/* Sends a token request; its ticket, or 0 with an error and nothing sent. All that it names has been copied. The server
 * drops it once `timeout` is over. */
static inline uint64_t blockdex_submit_tokens(struct blockdex_client *client, const struct blockdex_tokens *tokens,
                                              double timeout, struct blockdex_error *error) {
    const uint64_t column = UINT64_C(8) * tokens->num_spans;
    struct blockdex_request request;
    if (!blockdex_are_known(tokens, error)) return 0;
    blockdex_describe_tokens(tokens, &request);
    const struct blockdex_parts parts = blockdex_parts_of(&request);
    const uint64_t most = client->segment.request_arena_bytes;
    const bool fits = request.keys_bytes <= UINT64_MAX / 4 && request.queries_bytes <= UINT64_MAX / 4;
    request.payload_bytes = fits ? parts.bytes : most + 1;
    char *payload = blockdex_reserve(client, &request, timeout, error);
    if (!payload) return 0;
    if (column) {
        memcpy(payload, tokens->sequence_ids, column);
        memcpy(payload + column, tokens->starts, column);
        memcpy(payload + 2 * column, tokens->lengths, column);
    }
    if (tokens->revisions && column)
        memcpy(payload + 3 * column, tokens->revisions, column);
    else
        memset(payload + 3 * column, 0, column);
    if (request.keys_bytes && !request.keys_region) memcpy(payload + parts.keys, tokens->keys, request.keys_bytes);
    if (request.queries_bytes && !request.queries_region)
        memcpy(payload + parts.queries, tokens->queries, request.queries_bytes);
    blockdex_publish(client, &request);
    return request.ticket;
}

/* A request about sequences or a pool, by its kind:
 * BLOCKDEX_OPEN: sequence_ids, and lease_seconds (NULL: the server's own) of num_sequences; BLOCKDEX_CLOSE: sequence_ids.
 * BLOCKDEX_GET: sequence_id. BLOCKDEX_FORK: sequence_id, child_id, length. BLOCKDEX_TRUNCATE: sequence_id, length.
 * BLOCKDEX_CREATE_POOL: its id, rows, blocks of a row and pages as sequence_id, num_sequences, child_id and length.
 * BLOCKDEX_CLOSE_POOL: its id as sequence_id. */
struct blockdex_sequences {
    uint16_t kind;
    uint32_t num_sequences;
    const uint64_t *sequence_ids, *lease_seconds;
    uint64_t sequence_id, child_id, length;
};

/* Fills a request's numbers; its payload is the columns of the sequences. */
static inline void blockdex_describe_sequences(const struct blockdex_sequences *sequences,
                                               struct blockdex_request *request) {
    memset(request, 0, sizeof *request);
    request->kind = sequences->kind;
    request->num_spans = sequences->num_sequences;
    request->sequence_id = sequences->sequence_id;
    request->child_id = sequences->child_id;
    request->number = sequences->length;
    request->payload_bytes = UINT64_C(8) * request->num_spans * blockdex_num_columns(request->kind);
}

/* Sends a request about sequences, as blockdex_submit_tokens does. */
static inline uint64_t blockdex_submit_sequences(struct blockdex_client *client,
                                                 const struct blockdex_sequences *sequences, double timeout,
                                                 struct blockdex_error *error) {
    struct blockdex_request request;
    blockdex_describe_sequences(sequences, &request);
    char *payload = blockdex_reserve(client, &request, timeout, error);
    if (!payload) return 0;
    const uint64_t column = UINT64_C(8) * request.num_spans;
    memset(payload, 0, request.payload_bytes);
    if (request.payload_bytes) memcpy(payload, sequences->sequence_ids, column);
    if (request.payload_bytes > column && sequences->lease_seconds)
        memcpy(payload + column, sequences->lease_seconds, column);
    blockdex_publish(client, &request);
    return request.ticket;
}

/* Runs of cells of a pool's table: the i-th writes `counts[i]` cells of a row from a block on, with the next page numbers
 * of the `num_page_ids`, which are as many as the counts add up to. */
struct blockdex_page_tables {
    uint64_t pool_id;
    uint32_t num_runs, num_page_ids;
    const uint32_t *rows, *first_blocks, *counts;
    const int32_t *page_ids;
};

/* Sends cells to set, as blockdex_submit_tokens does tokens. */
static inline uint64_t blockdex_submit_page_tables(struct blockdex_client *client,
                                                   const struct blockdex_page_tables *tables, double timeout,
                                                   struct blockdex_error *error) {
    const uint64_t runs = tables->num_runs;
    struct blockdex_request request;
    memset(&request, 0, sizeof request);
    request.kind = BLOCKDEX_SET_PAGE_TABLES;
    request.sequence_id = tables->pool_id;
    request.num_spans = tables->num_runs;
    request.number = tables->num_page_ids;
    request.payload_bytes = UINT64_C(8) * (3 * runs + tables->num_page_ids);
    uint64_t *payload = (uint64_t *)(void *)blockdex_reserve(client, &request, timeout, error);
    if (!payload) return 0;
    for (uint64_t run = 0; run < runs; run++) {
        payload[run] = tables->rows[run];
        payload[runs + run] = tables->first_blocks[run];
        payload[2 * runs + run] = tables->counts[run];
    }
    /* One below 0 is larger than any. */
    for (uint64_t at = 0; at < tables->num_page_ids; at++) payload[3 * runs + at] = (uint64_t)tables->page_ids[at];
    blockdex_publish(client, &request);
    return request.ticket;
}

/* Nobody waits for it any more: its answer is thrown away when it comes. The server is told, if there is a slot for it;
 * else the request's own deadline ends it. */
static inline void blockdex_give_up(struct blockdex_client *client, uint64_t ticket) {
    struct blockdex_pending *pending = blockdex_with(client, ticket);
    const uint64_t read = atomic_load_explicit(&client->segment.header->requests_read, memory_order_acquire);
    struct blockdex_request request;
    if (!pending || pending->given_up) return;
    if (pending->answered) {
        blockdex_leave(client, pending);
        return;
    }
    pending->given_up = true;
    if (client->written - read >= client->segment.num_request_slots) return;
    memset(&request, 0, sizeof request);
    request.ticket = ticket;
    request.kind = BLOCKDEX_CANCEL;
    blockdex_publish(client, &request);
}

/* --- Calls: a request sent and waited for. False with an error: what was not answered in time was given up, and may
 * have taken effect all the same (DEADLINE_EXCEEDED), as may what was in flight to a server that is gone. --- */

/* The answer of a ticket, to be released; 0 is one that was not sent. */
static inline bool blockdex_finish(struct blockdex_client *client, uint64_t ticket, double timeout,
                                   struct blockdex_result *result, struct blockdex_error *error) {
    if (!ticket) return false;
    const enum blockdex_outcome outcome = blockdex_wait(client, ticket, timeout, result, error);
    if (outcome != BLOCKDEX_IN_FLIGHT) return outcome == BLOCKDEX_ANSWERED;
    blockdex_give_up(client, ticket);
    return blockdex_fail(error, BLOCKDEX_DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "timeout: no answer within %g s",
                         timeout);
}

/* Block ids, [T, num_heads, topk], go to memory that has room for so many; so do scores, unless that is NULL. What has
 * its place in a region goes there instead. */
static inline bool blockdex_call_tokens(struct blockdex_client *client, const struct blockdex_tokens *tokens,
                                        int32_t *block_ids, uint64_t room, float *scores, double timeout,
                                        struct blockdex_error *error) {
    struct blockdex_result result;
    const int64_t until = blockdex_until(blockdex_now(), timeout);
    const uint64_t ticket = blockdex_submit_tokens(client, tokens, timeout, error);
    const double left = (double)(until - blockdex_now()) / 1e9;
    if (!blockdex_finish(client, ticket, left, &result, error)) return false;
    const uint64_t count = (uint64_t)result.num_tokens * result.num_heads * result.topk;
    const bool fits = count <= room || (!result.block_ids && !result.scores);
    if (fits && result.block_ids) memcpy(block_ids, result.block_ids, 4 * count);
    if (fits && scores && result.scores) memcpy(scores, result.scores, 4 * count);
    blockdex_release(client, ticket);
    return fits || blockdex_fail(error, BLOCKDEX_INVALID_ARGUMENT, "INVALID_LENGTH",
                                 "block_ids: %llu were answered, there is room for %llu", (unsigned long long)count,
                                 (unsigned long long)room);
}

/* Appends the keys alone. */
static inline bool blockdex_append_keys(struct blockdex_client *client, const struct blockdex_tokens *tokens,
                                        double timeout, struct blockdex_error *error) {
    struct blockdex_tokens keys = *tokens;
    keys.queries_dtype = 0;
    keys.flags &= BLOCKDEX_ROLLBACK;
    return blockdex_call_tokens(client, &keys, NULL, 0, NULL, timeout, error);
}

/* Selects for the queries alone. */
static inline bool blockdex_select_blocks(struct blockdex_client *client, const struct blockdex_tokens *tokens,
                                          int32_t *block_ids, uint64_t room, float *scores, double timeout,
                                          struct blockdex_error *error) {
    struct blockdex_tokens queries = *tokens;
    queries.keys_dtype = 0;
    queries.flags &= (uint8_t)~BLOCKDEX_ROLLBACK;
    return blockdex_call_tokens(client, &queries, block_ids, room, scores, timeout, error);
}

static inline bool blockdex_append_and_select(struct blockdex_client *client, const struct blockdex_tokens *tokens,
                                              int32_t *block_ids, uint64_t room, float *scores, double timeout,
                                              struct blockdex_error *error) {
    return blockdex_call_tokens(client, tokens, block_ids, room, scores, timeout, error);
}

/* Of what is answered with them, lengths and revisions of the first `room` layers go to where those point, unless NULL. */
static inline bool blockdex_call_sequences(struct blockdex_client *client, const struct blockdex_sequences *sequences,
                                           int64_t *lengths, uint64_t *revisions, uint32_t room, double timeout,
                                           struct blockdex_error *error) {
    struct blockdex_result result;
    const int64_t until = blockdex_until(blockdex_now(), timeout);
    const uint64_t ticket = blockdex_submit_sequences(client, sequences, timeout, error);
    const double left = (double)(until - blockdex_now()) / 1e9;
    if (!blockdex_finish(client, ticket, left, &result, error)) return false;
    const size_t bytes = 8 * (size_t)(result.num_layers < room ? result.num_layers : room);
    if (lengths && bytes) memcpy(lengths, result.lengths, bytes);
    if (revisions && bytes) memcpy(revisions, result.revisions, bytes);
    blockdex_release(client, ticket);
    return true;
}

/* `lease_seconds` NULL: the server's own; opening what is open and empty is fine. */
static inline bool blockdex_open_sequences(struct blockdex_client *client, const uint64_t *sequence_ids,
                                           const uint64_t *lease_seconds, uint32_t count, double timeout,
                                           struct blockdex_error *error) {
    const struct blockdex_sequences open = {BLOCKDEX_OPEN, count, sequence_ids, lease_seconds, 0, 0, 0};
    return blockdex_call_sequences(client, &open, NULL, NULL, 0, timeout, error);
}

/* Closing what is closed is fine. */
static inline bool blockdex_close_sequences(struct blockdex_client *client, const uint64_t *sequence_ids,
                                            uint32_t count, double timeout, struct blockdex_error *error) {
    const struct blockdex_sequences close = {BLOCKDEX_CLOSE, count, sequence_ids, NULL, 0, 0, 0};
    return blockdex_call_sequences(client, &close, NULL, NULL, 0, timeout, error);
}

/* Lengths and revisions of its layers. */
static inline bool blockdex_get_sequence(struct blockdex_client *client, uint64_t sequence_id, int64_t *lengths,
                                         uint64_t *revisions, uint32_t room, double timeout,
                                         struct blockdex_error *error) {
    const struct blockdex_sequences get = {BLOCKDEX_GET, 0, NULL, NULL, sequence_id, 0, 0};
    return blockdex_call_sequences(client, &get, lengths, revisions, room, timeout, error);
}

/* `lengths` are the child's: each layer has at most `length` tokens. */
static inline bool blockdex_fork_sequence(struct blockdex_client *client, uint64_t parent_id, uint64_t child_id,
                                          uint64_t length, int64_t *lengths, uint32_t room, double timeout,
                                          struct blockdex_error *error) {
    const struct blockdex_sequences fork = {BLOCKDEX_FORK, 0, NULL, NULL, parent_id, child_id, length};
    return blockdex_call_sequences(client, &fork, lengths, NULL, room, timeout, error);
}

/* `lengths` are what is left of it. */
static inline bool blockdex_truncate_sequence(struct blockdex_client *client, uint64_t sequence_id, uint64_t length,
                                              int64_t *lengths, uint32_t room, double timeout,
                                              struct blockdex_error *error) {
    const struct blockdex_sequences truncate = {BLOCKDEX_TRUNCATE, 0, NULL, NULL, sequence_id, 0, length};
    return blockdex_call_sequences(client, &truncate, lengths, NULL, room, timeout, error);
}

/* Sets `num_pages` pages aside, which the caller numbers from 0, and a table of rows, of so many cells each, that name
 * them. Creating a pool that is still as it was created is fine. */
static inline bool blockdex_create_pool(struct blockdex_client *client, uint64_t pool_id, uint32_t num_pages,
                                        uint32_t num_rows, uint32_t max_blocks, double timeout,
                                        struct blockdex_error *error) {
    const struct blockdex_sequences create = {BLOCKDEX_CREATE_POOL, num_rows, NULL, NULL, pool_id,
                                              max_blocks,           num_pages};
    return blockdex_call_sequences(client, &create, NULL, NULL, 0, timeout, error);
}

/* All cells are set, or, on any error, none. */
static inline bool blockdex_set_page_tables(struct blockdex_client *client, const struct blockdex_page_tables *tables,
                                            double timeout, struct blockdex_error *error) {
    struct blockdex_result result;
    const int64_t until = blockdex_until(blockdex_now(), timeout);
    const uint64_t ticket = blockdex_submit_page_tables(client, tables, timeout, error);
    if (!blockdex_finish(client, ticket, (double)(until - blockdex_now()) / 1e9, &result, error)) return false;
    blockdex_release(client, ticket);
    return true;
}

/* Closing what is closed is fine. */
static inline bool blockdex_close_pool(struct blockdex_client *client, uint64_t pool_id, double timeout,
                                       struct blockdex_error *error) {
    const struct blockdex_sequences close = {BLOCKDEX_CLOSE_POOL, 0, NULL, NULL, pool_id, 0, 0};
    return blockdex_call_sequences(client, &close, NULL, NULL, 0, timeout, error);
}

#endif
