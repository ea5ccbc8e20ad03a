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
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "blockdex_arena.h"
#include "blockdex_ring.h"

/* --- Errors --- */

/* Canonical codes, as google.rpc.Code numbers them; a server answers others of them too. */
enum {
    BLOCKDEX_INVALID_ARGUMENT = 3,
    BLOCKDEX_DEADLINE_EXCEEDED = 4,
    BLOCKDEX_NOT_FOUND = 5,
    BLOCKDEX_RESOURCE_EXHAUSTED = 8,
    BLOCKDEX_FAILED_PRECONDITION = 9,
    BLOCKDEX_ABORTED = 10,
    BLOCKDEX_OUT_OF_RANGE = 11,
    BLOCKDEX_INTERNAL = 13,
    BLOCKDEX_UNAVAILABLE = 14
};

/* Why something failed. `reason` is a word such as UNKNOWN_SEQUENCE; `message` says it in a sentence, and behind its
 * zero byte stand its numbers, each as `name=value` and a zero byte (blockdex_error_number finds them). Functions that
 * fill one take NULL as well. */
struct blockdex_error {
    uint32_t code, message_bytes; /* with the numbers */
    char reason[64], message[1024];
};

/* A number of the message by its name, such as "sequence_id", as text; NULL where it has none of that name. */
static inline const char *blockdex_error_number(const struct blockdex_error *error, const char *name) {
    const char *end = error->message + error->message_bytes;
    const size_t length = strlen(name);
    for (const char *at = error->message; at < end; at += strlen(at) + 1)
        if (at != error->message && !strncmp(at, name, length) && at[length] == '=') return at + length + 1;
    return NULL;
}

/* Always false, with the error filled. */
__attribute__((format(printf, 4, 5))) static inline bool blockdex_fail(struct blockdex_error *error, uint32_t code,
                                                                       const char *reason, const char *format, ...) {
    va_list numbers;
    if (!error) return false;
    error->code = code;
    snprintf(error->reason, sizeof error->reason, "%s", reason);
    va_start(numbers, format);
    vsnprintf(error->message, sizeof error->message, format, numbers);
    va_end(numbers);
    error->message_bytes = (uint32_t)strlen(error->message) + 1;
    return false;
}

/* --- A client --- */

#define BLOCKDEX_NONE UINT32_MAX
#define BLOCKDEX_LONGEST_TOLD 65536u

/* A request in flight. Answered ones stand in a list, in the order of their answers, until they are released. */
struct blockdex_pending {
    uint64_t ticket; /* 0: the entry is free */
    struct blockdex_extent extent;
    struct blockdex_answer answer;
    uint64_t payload_end;   /* what is given back with it; 0: nothing */
    uint32_t before, after; /* of a free entry: `after` is the next free one */
    bool answered, given_up;
};

/* Set after blockdex_connect, as you like:
 * - epoch: named by every request, so that a cache which was born anew is noticed (EPOCH_MISMATCH); 0 names none. It
 *   begins as the cache's when the link began.
 * - spin_seconds: how long a wait looks for the answer before it sleeps; 0 sleeps at once.
 * - room_seconds: how long a request waits for a free slot or room in the arena; then it is refused as OVERLOADED.
 * - told: called with every JSON object that the server tells unasked (`{"evicted": [...], "tenant": ...}`,
 *   `{"new_epoch": ...}`), by the function that comes across it; it must not use the client.
 * The rest is the header's own. */
struct blockdex_client {
    uint64_t epoch;
    double spin_seconds, room_seconds;
    void (*told)(void *context, const char *json, size_t bytes);
    void *context;

    struct blockdex_segment segment;
    uint64_t segment_bytes, written, read, serial;
    int link, engine_bell, client_bell;
    struct blockdex_arena arena;
    struct blockdex_pending *pending;
    uint32_t capacity, fresh, free, first, last; /* entries from `fresh` on were never used */
    struct blockdex_error over;                  /* why the link is over; its code is 0 while it is not */
    char *heard;                                 /* received beside the ring, and not complete yet */
    size_t heard_bytes;
    char *reply; /* where the answer to a question goes, while one is asked */
    size_t reply_bytes, reply_room;
};

/* As poll, until then, whatever signals come; a last look where that is past. */
static inline int blockdex_poll_until(struct pollfd *files, nfds_t count, int64_t until) {
    int ready;
    do {
        const int64_t left = (until - blockdex_now() + 999999) / 1000000;
        ready = poll(files, count, left < 0 ? 0 : left > INT32_MAX ? INT32_MAX : (int)left);
    } while (ready < 0 && errno == EINTR);
    return ready;
}

/* The link is over: every call from now on says why. Always false. */
static inline bool blockdex_end(struct blockdex_client *client, uint32_t code, const char *reason, const char *words) {
    if (!client->over.code) blockdex_fail(&client->over, code, reason, "%s", words);
    return false;
}

static inline bool blockdex_is_over(const struct blockdex_client *client, struct blockdex_error *error) {
    if (client->over.code && error) *error = client->over;
    return client->over.code != 0;
}

/* --- Beside the ring: JSON objects on the link's socket, each with four bytes of length before it --- */

static inline void blockdex_hear_one(struct blockdex_client *client, const char *json, size_t bytes) {
    const bool answers = bytes > 9 && (!memcmp(json, "{\"answer\"", 9) || !memcmp(json, "{\"failed\"", 9));
    if (answers && client->reply) {
        client->reply_bytes = bytes;
        if (bytes < client->reply_room) memcpy(client->reply, json, bytes);
        client->reply = NULL;
    } else if (!answers && client->told) {
        client->told(client->context, json, bytes);
    }
}

/* Takes what the server has said; false once it is gone, and the link over. */
static inline bool blockdex_hear(struct blockdex_client *client) {
    const ssize_t got = recv(client->link, client->heard + client->heard_bytes,
                             BLOCKDEX_LONGEST_TOLD - client->heard_bytes, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    if (got <= 0) return blockdex_end(client, BLOCKDEX_UNAVAILABLE, "UNREACHABLE", "server: it is gone");
    const char *at = client->heard, *end = client->heard + client->heard_bytes + got;
    for (uint32_t length; end - at >= 4; at += 4 + length) {
        memcpy(&length, at, 4);
        if (length > BLOCKDEX_LONGEST_TOLD - 4)
            return blockdex_end(client, BLOCKDEX_INTERNAL, "INTERNAL", "server: what it says is too long");
        if ((size_t)(end - at) - 4 < length) break;
        blockdex_hear_one(client, at + 4, length);
    }
    client->heard_bytes = (size_t)(end - at);
    memmove(client->heard, at, client->heard_bytes);
    return true;
}

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

/* An answer, as it lies in shared memory until its ticket is released; what it has not is NULL.
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

/* Two tensors of so many bytes each behind one another; whether they lie in the payload. */
static inline bool blockdex_find_two(const struct blockdex_client *client, const struct blockdex_answer *answer,
                                     uint64_t bytes, bool has_second, const void **first, const void **second) {
    const char *payload = client->segment.answer_arena + answer->payload_offset;
    const uint64_t room = answer->payload_bytes;
    if (bytes > room || (has_second && (blockdex_aligned(bytes) > room || bytes > room - blockdex_aligned(bytes))))
        return false;
    *first = payload;
    *second = has_second ? payload + blockdex_aligned(bytes) : NULL;
    return true;
}

static inline bool blockdex_read_result(const struct blockdex_client *client, const struct blockdex_answer *answer,
                                        struct blockdex_result *result) {
    const void *first = NULL, *second = NULL;
    uint64_t bytes;
    memset(result, 0, sizeof *result);
    result->epoch = answer->epoch;
    result->phase = answer->phase;
    result->queue_seconds = answer->queue_seconds;
    result->plan_seconds = answer->plan_seconds;
    result->device_seconds = answer->device_seconds;
    result->reply_seconds = answer->reply_seconds;
    if (answer->flags & BLOCKDEX_HAS_BLOCK_IDS) {
        const bool scored = answer->flags & BLOCKDEX_HAS_SCORES;
        if (__builtin_mul_overflow((uint64_t)answer->num_tokens * answer->num_heads, 4 * (uint64_t)answer->topk,
                                   &bytes) ||
            !blockdex_find_two(client, answer, bytes, scored, &first, &second))
            return false;
        result->num_tokens = answer->num_tokens;
        result->num_heads = answer->num_heads;
        result->topk = answer->topk;
        result->block_ids = (const int32_t *)first;
        result->scores = (const float *)second;
    } else if (answer->flags & BLOCKDEX_HAS_LENGTHS) {
        if (!blockdex_find_two(client, answer, UINT64_C(8) * answer->num_layers, true, &first, &second)) return false;
        result->num_layers = answer->num_layers;
        result->lengths = (const int64_t *)first;
        result->revisions = (const uint64_t *)second;
    }
    return true;
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
    if (!pending->answer.code && blockdex_read_result(client, &pending->answer, result)) return BLOCKDEX_ANSWERED;
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
    const struct blockdex_pending *pending = blockdex_begin_soon(client, request->payload_bytes, timeout, error);
    if (!pending) return NULL;
    request->ticket = pending->ticket;
    request->epoch = client->epoch;
    request->received = received;
    request->deadline = blockdex_until(received, timeout);
    request->payload_offset = pending->extent.offset;
    return client->segment.request_arena + request->payload_offset;
}

/* Tokens of sequences: keys to append, queries to select blocks for, or both.
 * T is the sum of the lengths. `keys` are [T, head_dim], `queries` [T, num_heads, head_dim], both row-major, of the
 * dtypes BLOCKDEX_BF16 and so on; a dtype of 0: there are none. `revisions` NULL: unchecked. `order` is
 * BLOCKDEX_ASCENDING (also 0) or BLOCKDEX_SCORE, `flags` are of BLOCKDEX_RETURN_SCORES and so on. The heads of the queries are
 * first_head.. of the indexer's. */
struct blockdex_tokens {
    uint32_t layer, num_spans;
    const uint64_t *sequence_ids;
    const int64_t *starts, *lengths;
    const uint64_t *revisions;
    const void *keys, *queries;
    uint64_t keys_bytes, queries_bytes;
    uint8_t keys_dtype, queries_dtype, order, flags;
    uint32_t first_head, num_heads;
};

/* A server ends the link for numbers that mean nothing, so that they are refused here. */
static inline bool blockdex_are_known(const struct blockdex_tokens *tokens, struct blockdex_error *error) {
    const unsigned all = 2 * BLOCKDEX_RAW_SCORES - 1;
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

/* Sends a token request; its ticket, or 0 with an error and nothing sent. All that it names has been copied. The server
 * drops it once `timeout` is over. */
static inline uint64_t blockdex_submit_tokens(struct blockdex_client *client, const struct blockdex_tokens *tokens,
                                              double timeout, struct blockdex_error *error) {
    const uint64_t column = UINT64_C(8) * tokens->num_spans;
    const uint64_t keys_bytes = tokens->keys_dtype ? tokens->keys_bytes : 0;
    const uint64_t queries_bytes = tokens->queries_dtype ? tokens->queries_bytes : 0;
    const uint64_t most = client->segment.request_arena_bytes;
    const bool fits = keys_bytes <= most && queries_bytes <= most;
    if (!blockdex_are_known(tokens, error)) return 0;
    struct blockdex_request request;
    memset(&request, 0, sizeof request);
    request.kind = BLOCKDEX_TOKENS;
    request.keys_dtype = tokens->keys_dtype;
    request.queries_dtype = tokens->queries_dtype;
    request.order = tokens->order;
    if (!request.order) request.order = BLOCKDEX_ASCENDING;
    request.flags = tokens->flags;
    request.layer = tokens->layer;
    request.num_spans = tokens->num_spans;
    request.first_head = tokens->first_head;
    request.num_heads = tokens->num_heads;
    request.keys_bytes = keys_bytes;
    request.queries_bytes = queries_bytes;
    const struct blockdex_parts parts = blockdex_parts_of(&request);
    request.payload_bytes = fits ? parts.bytes : UINT64_MAX;
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
    if (keys_bytes) memcpy(payload + parts.keys, tokens->keys, keys_bytes);
    if (queries_bytes) memcpy(payload + parts.queries, tokens->queries, queries_bytes);
    blockdex_publish(client, &request);
    return request.ticket;
}

/* A request about sequences, by its kind:
 * BLOCKDEX_OPEN: sequence_ids, and lease_seconds (NULL: the server's own) of num_sequences; BLOCKDEX_CLOSE: sequence_ids.
 * BLOCKDEX_GET: sequence_id. BLOCKDEX_FORK: sequence_id, child_id, length. BLOCKDEX_TRUNCATE: sequence_id, length. */
struct blockdex_sequences {
    uint16_t kind;
    uint32_t num_sequences;
    const uint64_t *sequence_ids, *lease_seconds;
    uint64_t sequence_id, child_id, length;
};

/* Fills a request's numbers; its payload is the columns of the sequences. */
static inline void blockdex_describe_sequences(const struct blockdex_sequences *sequences,
                                               struct blockdex_request *request) {
    const bool opens = sequences->kind == BLOCKDEX_OPEN, closes = sequences->kind == BLOCKDEX_CLOSE;
    memset(request, 0, sizeof *request);
    request->kind = sequences->kind;
    request->num_spans = opens || closes ? sequences->num_sequences : 0;
    request->sequence_id = sequences->sequence_id;
    request->child_id = sequences->child_id;
    request->number = sequences->length;
    request->payload_bytes = UINT64_C(8) * request->num_spans * (opens ? 2 : 1);
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
    if (column) memcpy(payload, sequences->sequence_ids, column);
    if (request.payload_bytes > column && sequences->lease_seconds)
        memcpy(payload + column, sequences->lease_seconds, column);
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

/* Block ids, [T, num_heads, topk], go to memory that has room for so many; so do scores, unless that is NULL. */
static inline bool blockdex_call_tokens(struct blockdex_client *client, const struct blockdex_tokens *tokens,
                                        int32_t *block_ids, uint64_t room, float *scores, double timeout,
                                        struct blockdex_error *error) {
    struct blockdex_result result;
    const int64_t until = blockdex_until(blockdex_now(), timeout);
    const uint64_t ticket = blockdex_submit_tokens(client, tokens, timeout, error);
    const double left = (double)(until - blockdex_now()) / 1e9;
    if (!blockdex_finish(client, ticket, left, &result, error)) return false;
    const uint64_t count = (uint64_t)result.num_tokens * result.num_heads * result.topk;
    const bool fits = count <= room;
    if (fits && count) memcpy(block_ids, result.block_ids, 4 * count);
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
    keys.queries_dtype = keys.order = 0;
    keys.flags &= BLOCKDEX_ROLLBACK;
    keys.first_head = keys.num_heads = 0;
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

/* What the server is, as JSON text: `{"answer": {"spec": ..., "limits": ..., "epoch": ..., ...}}`. */
static inline bool blockdex_get_info(struct blockdex_client *client, char *json, size_t room, double timeout,
                                     struct blockdex_error *error) {
    static const char question[] = "\016\0\0\0{\"ask\":\"info\"}";
    const int64_t until = blockdex_until(blockdex_now(), timeout);
    if (blockdex_is_over(client, error)) return false;
    if (send(client->link, question, sizeof question - 1, MSG_DONTWAIT | MSG_NOSIGNAL) != sizeof question - 1)
        return blockdex_fail(error, BLOCKDEX_UNAVAILABLE, "UNREACHABLE", "server: it takes no questions");
    client->reply = json;
    client->reply_room = room;
    while (client->reply && !client->over.code) {
        struct pollfd link = {client->link, POLLIN, 0};
        if (blockdex_poll_until(&link, 1, until) <= 0 || !blockdex_hear(client) || blockdex_now() > until) break;
    }
    const bool answered = !client->reply;
    client->reply = NULL;
    if (blockdex_is_over(client, error)) return false;
    if (!answered)
        return blockdex_fail(error, BLOCKDEX_DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "timeout: no answer within %g s",
                             timeout);
    if (client->reply_bytes >= room)
        return blockdex_fail(error, BLOCKDEX_INVALID_ARGUMENT, "INVALID_LENGTH",
                             "info: has %zu bytes, there is room for %zu", client->reply_bytes + 1, room);
    json[client->reply_bytes] = 0;
    return true;
}

/* --- Connecting --- */

/* A client that is not connected. */
static inline void blockdex_init(struct blockdex_client *client) {
    memset(client, 0, sizeof *client);
    client->link = client->engine_bell = client->client_bell = -1;
    client->first = client->last = client->free = BLOCKDEX_NONE;
    client->capacity = 1;
    blockdex_end(client, BLOCKDEX_UNAVAILABLE, "UNREACHABLE", "client: it is not connected");
}

/* Gives everything back; the server gives up what was in flight. Once is enough, and again is fine. */
static inline void blockdex_disconnect(struct blockdex_client *client) {
    const int files[3] = {client->link, client->engine_bell, client->client_bell};
    if (client->segment.header) munmap((void *)client->segment.header, (size_t)client->segment_bytes);
    for (int at = 0; at < 3; at++)
        if (files[at] >= 0) close(files[at]);
    free(client->pending);
    blockdex_init(client);
}

/* Sends the hello, within the socket's own timeout. */
static inline bool blockdex_say_hello(int link, const char *tenant) {
    struct blockdex_hello hello = {BLOCKDEX_MAGIC, BLOCKDEX_VERSION, (uint32_t)strlen(tenant)};
    char said[sizeof hello + BLOCKDEX_MAX_TENANT_BYTES];
    memcpy(said, &hello, sizeof hello);
    memcpy(said + sizeof hello, tenant, hello.tenant_bytes);
    const ssize_t size = (ssize_t)(sizeof hello + hello.tenant_bytes);
    return send(link, said, (size_t)size, MSG_DONTWAIT | MSG_NOSIGNAL) == size;
}

/* Waits for the greeting, and takes the files that come with it. */
static inline bool blockdex_take_greeting(int link, int64_t until, int fds[3], struct blockdex_error *error) {
    struct blockdex_greeting greeting = {0, 0, 0};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(3 * sizeof(int))];
    } control;
    struct iovec heard = {&greeting, sizeof greeting};
    struct msghdr in;
    struct pollfd readable = {link, POLLIN, 0};
    size_t count = 0;
    memset(&in, 0, sizeof in);
    in.msg_iov = &heard;
    in.msg_iovlen = 1;
    in.msg_control = control.bytes;
    in.msg_controllen = CMSG_LEN(3 * sizeof(int)); /* not the padding behind, where a fourth would fit */
    if (blockdex_poll_until(&readable, 1, until) <= 0)
        return blockdex_fail(error, BLOCKDEX_DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "link: no greeting in time");
    const ssize_t got = recvmsg(link, &in, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (got <= 0)
        return blockdex_fail(error, BLOCKDEX_UNAVAILABLE, "UNREACHABLE",
                             "link: the server hung up; it lets in its own user alone");
    struct cmsghdr *files = CMSG_FIRSTHDR(&in);
    if (files && files->cmsg_level == SOL_SOCKET && files->cmsg_type == SCM_RIGHTS) {
        count = (files->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(fds, CMSG_DATA(files), count * sizeof(int));
    }
    if (got == sizeof greeting && greeting.magic == BLOCKDEX_MAGIC && greeting.version != BLOCKDEX_VERSION)
        return blockdex_fail(error, BLOCKDEX_FAILED_PRECONDITION, "UNREACHABLE",
                             "link: the server speaks version %u of the ring, this client %u", greeting.version,
                             BLOCKDEX_VERSION);
    if (got != sizeof greeting || greeting.magic != BLOCKDEX_MAGIC || count != 3 || (in.msg_flags & MSG_CTRUNC))
        return blockdex_fail(error, BLOCKDEX_INTERNAL, "INTERNAL", "link: what greets is no server of blockdex");
    return true;
}

/* Maps the segment. */
static inline bool blockdex_map(struct blockdex_client *client, int segment, struct blockdex_error *error) {
    struct stat file;
    if (!fstat(segment, &file) && (uint64_t)file.st_size >= BLOCKDEX_HEADER_BYTES) {
        void *memory = mmap(NULL, (size_t)file.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, segment, 0);
        if (memory == MAP_FAILED)
            return blockdex_fail(error, BLOCKDEX_RESOURCE_EXHAUSTED, "INTERNAL", "segment: cannot be mapped (%s)",
                                 strerror(errno));
        client->segment.header = (struct blockdex_header *)memory;
        client->segment_bytes = (uint64_t)file.st_size;
        if (blockdex_read_segment(memory, client->segment_bytes, &client->segment)) return true;
    }
    return blockdex_fail(error, BLOCKDEX_INTERNAL, "INTERNAL", "segment: it is none of version %u", BLOCKDEX_VERSION);
}

/* One allocation: the table of requests in flight, the arena's holes, and what is heard beside the ring. */
static inline bool blockdex_make_tables(struct blockdex_client *client, struct blockdex_error *error) {
    const size_t capacity = client->segment.num_request_slots;
    const size_t table = capacity * sizeof *client->pending, holes = (capacity + 1) * sizeof *client->arena.holes;
    char *memory = (char *)calloc(1, table + holes + BLOCKDEX_LONGEST_TOLD);
    if (!memory)
        return blockdex_fail(error, BLOCKDEX_RESOURCE_EXHAUSTED, "INTERNAL", "client: no memory for %zu requests",
                             capacity);
    client->pending = (struct blockdex_pending *)(void *)memory;
    client->capacity = (uint32_t)capacity;
    client->heard = memory + table + holes;
    blockdex_arena_open(&client->arena, (struct blockdex_extent *)(void *)(memory + table),
                        client->segment.request_arena_bytes);
    return true;
}

/* The address of a socket by its path; an abstract one's is written with an @ instead of its first, zero, byte. */
static inline socklen_t blockdex_address(const char *path, struct sockaddr_un *address) {
    const size_t length = strlen(path), begin = offsetof(struct sockaddr_un, sun_path);
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    if (length >= sizeof address->sun_path) return 0;
    memcpy(address->sun_path, path, length);
    if (*path == '@') address->sun_path[0] = 0;
    return (socklen_t)(begin + length + (*path != '@'));
}

static inline bool blockdex_open_link(struct blockdex_client *client, const char *path, const char *tenant,
                                      double timeout, struct blockdex_error *error) {
    const int64_t until = blockdex_until(blockdex_now(), timeout);
    const int64_t left = (until - blockdex_now()) / 1000 + 1;
    struct timeval patience = {(time_t)(left / 1000000), (suseconds_t)(left % 1000000)};
    struct sockaddr_un address;
    const socklen_t size = blockdex_address(path, &address);
    int fds[3] = {-1, -1, -1};
    client->link = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    /* Of a server that lets nobody in. */
    setsockopt(client->link, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (client->link < 0 || !size || connect(client->link, (struct sockaddr *)&address, size) ||
        !blockdex_say_hello(client->link, tenant))
        return blockdex_fail(error, BLOCKDEX_UNAVAILABLE, "UNREACHABLE", "link: cannot connect to %s (%s)", path,
                             size ? strerror(errno) : "its name is too long");
    const bool greeted = blockdex_take_greeting(client->link, until, fds, error);
    client->engine_bell = fds[1];
    client->client_bell = fds[2];
    const bool mapped = greeted && blockdex_map(client, fds[0], error);
    if (fds[0] >= 0) close(fds[0]);
    return mapped;
}

/* Connects to the server that listens at a path (@NAME: an abstract socket). All requests are the tenant's, of 1 to 256
 * bytes. False with an error, and nothing is held then. */
static inline bool blockdex_connect(struct blockdex_client *client, const char *path, const char *tenant,
                                    double timeout, struct blockdex_error *error) {
    blockdex_init(client);
    if (!*tenant || strlen(tenant) > BLOCKDEX_MAX_TENANT_BYTES)
        return blockdex_fail(error, BLOCKDEX_INVALID_ARGUMENT, "INVALID_TENANT",
                             "tenant: must have 1 to %u bytes, got %zu", BLOCKDEX_MAX_TENANT_BYTES, strlen(tenant));
    if (!blockdex_open_link(client, path, tenant, timeout, error) || !blockdex_make_tables(client, error)) {
        blockdex_disconnect(client);
        return false;
    }
    client->over.code = 0;
    client->epoch = client->segment.header->epoch;
    client->spin_seconds = 50e-6;
    client->room_seconds = 2;
    return true;
}

#endif
