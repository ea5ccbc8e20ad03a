/* The ring of blockdex for C11 and C++17: what docs/ring.md says, as structures, and the few functions by which both
 * sides show each other what they wrote, sleep and wake. Any little-endian machine whose 64-bit atomics are lock-free.
 * `blockdex_client.h` is a client made of it.
 */
#ifndef BLOCKDEX_RING_H
#define BLOCKDEX_RING_H

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#ifdef __cplusplus
#include <atomic>
#define BLOCKDEX_ATOMIC(type) std::atomic<type>
using std::atomic_exchange_explicit;
using std::atomic_load_explicit;
using std::atomic_store_explicit;
using std::atomic_thread_fence;
using std::memory_order_acquire;
using std::memory_order_relaxed;
using std::memory_order_release;
using std::memory_order_seq_cst;
#else
#include <stdalign.h>
#include <stdatomic.h>
#define BLOCKDEX_ATOMIC(type) _Atomic type
#endif

#define BLOCKDEX_MAGIC UINT64_C(0x474e5258444b4c42) /* "BLKDXRNG" */
#define BLOCKDEX_VERSION 3u
#define BLOCKDEX_HEADER_BYTES 4096u
#define BLOCKDEX_SLOT_BYTES 256u
#define BLOCKDEX_MAX_SLOTS (1u << 24)
#define BLOCKDEX_MAX_TENANT_BYTES 256u
#define BLOCKDEX_MAX_REFUSAL_BYTES 512u

enum {
    BLOCKDEX_OPEN = 1,
    BLOCKDEX_GET,
    BLOCKDEX_FORK,
    BLOCKDEX_TRUNCATE,
    BLOCKDEX_CLOSE,
    BLOCKDEX_TOKENS,
    BLOCKDEX_CANCEL,
    BLOCKDEX_CREATE_POOL,
    BLOCKDEX_SET_PAGE_TABLES,
    BLOCKDEX_CLOSE_POOL
};
enum { BLOCKDEX_BF16 = 1, BLOCKDEX_FP16, BLOCKDEX_FP32, BLOCKDEX_FP8_E4M3 };
enum { BLOCKDEX_ASCENDING = 1, BLOCKDEX_SCORE };
enum {
    BLOCKDEX_RETURN_SCORES = 1,
    BLOCKDEX_WAIT_FOR_KEYS = 2,
    BLOCKDEX_ROLLBACK = 4,
    BLOCKDEX_RAW_SCORES = 8,
    BLOCKDEX_PAGES = 16
};
enum { BLOCKDEX_APPEND = 1, BLOCKDEX_DECODE, BLOCKDEX_PREFILL, BLOCKDEX_SEQUENCE };
enum { BLOCKDEX_HAS_BLOCK_IDS = 1, BLOCKDEX_HAS_SCORES = 2, BLOCKDEX_HAS_LENGTHS = 4, BLOCKDEX_IS_STATE = 8 };

/* What a client says first, the tenant behind it; no tenant: its own, or, of a frontend, every request names one. */
struct blockdex_hello {
    uint64_t magic;
    uint32_t version, tenant_bytes;
};

/* What the engine answers; with it come the segment and the two wake-up sockets, unless the versions differ, or why there
 * is no link stands behind it. */
struct blockdex_greeting {
    uint64_t magic;
    uint32_t version, refusal_bytes;
};

struct blockdex_header {
    uint64_t magic;
    uint32_t version, slot_bytes, request_slots, answer_slots;
    uint64_t epoch, request_slots_offset, answer_slots_offset, request_arena_offset, request_arena_bytes;
    uint64_t answer_arena_offset, answer_arena_bytes, segment_bytes;
    alignas(128) BLOCKDEX_ATOMIC(uint64_t) requests_written;
    alignas(128) BLOCKDEX_ATOMIC(uint64_t) requests_read;
    alignas(128) BLOCKDEX_ATOMIC(uint64_t) answers_written;
    alignas(128) BLOCKDEX_ATOMIC(uint64_t) answers_read;
    alignas(128) BLOCKDEX_ATOMIC(uint64_t) answer_bytes_freed;
    alignas(128) BLOCKDEX_ATOMIC(uint32_t) engine_sleeps;
    alignas(128) BLOCKDEX_ATOMIC(uint32_t) client_sleeps;
    alignas(128) BLOCKDEX_ATOMIC(uint32_t) engine_waits_for_room;
    alignas(128) BLOCKDEX_ATOMIC(uint32_t) channel_error;
};

/* Of each source: region 0 is the arena, where the payload says. */
struct blockdex_request {
    uint64_t ticket;
    uint16_t kind;
    uint8_t keys_dtype, queries_dtype, order, flags;
    uint16_t tenant_bytes;
    uint64_t epoch;
    int64_t received, deadline;
    uint32_t layer, num_spans, first_head, num_heads;
    uint64_t sequence_id, child_id, number;
    uint64_t payload_offset, payload_bytes, keys_bytes, queries_bytes;
    uint32_t keys_region, queries_region, block_ids_region, scores_region;
    uint64_t keys_offset, queries_offset, block_ids_offset, scores_offset;
};

struct blockdex_answer {
    uint64_t ticket;
    uint16_t code, reason_bytes;
    uint32_t flags;
    uint64_t epoch, payload_offset, payload_bytes, payload_end;
    uint32_t num_tokens, num_heads, topk, num_layers;
    uint64_t phase;
    double queue_seconds, plan_seconds, device_seconds, reply_seconds;
};

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the ring is little-endian");
static_assert(ATOMIC_INT_LOCK_FREE == 2 && ATOMIC_LLONG_LOCK_FREE == 2, "a lock would be known to one process alone");
static_assert(sizeof(BLOCKDEX_ATOMIC(uint64_t)) == 8 && sizeof(BLOCKDEX_ATOMIC(uint32_t)) == 4, "what they hold");
static_assert(offsetof(struct blockdex_header, segment_bytes) == 80, "docs/ring.md");
static_assert(offsetof(struct blockdex_header, requests_written) == 128, "docs/ring.md");
static_assert(offsetof(struct blockdex_header, answer_bytes_freed) == 640, "docs/ring.md");
static_assert(offsetof(struct blockdex_header, engine_waits_for_room) == 1024, "docs/ring.md");
static_assert(offsetof(struct blockdex_request, payload_offset) == 80, "docs/ring.md");
static_assert(offsetof(struct blockdex_request, keys_region) == 112, "docs/ring.md");
static_assert(offsetof(struct blockdex_answer, phase) == 64, "docs/ring.md");
static_assert(sizeof(struct blockdex_request) == 160 && sizeof(struct blockdex_answer) == 104, "no padding");
static_assert(sizeof(struct blockdex_request) <= BLOCKDEX_SLOT_BYTES, "a slot holds a request");
static_assert(sizeof(struct blockdex_hello) == 16 && sizeof(struct blockdex_greeting) == 16, "no padding");

/* A segment, as its header says it is divided. What the header says is copied once: nobody changes it afterwards. */
struct blockdex_segment {
    struct blockdex_header *header;
    char *request_slots, *answer_slots, *request_arena, *answer_arena;
    uint64_t request_arena_bytes, answer_arena_bytes;
    uint32_t num_request_slots, num_answer_slots;
};

/* The next multiple of 64: tensors and payloads begin at one. */
static inline uint64_t blockdex_aligned(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Whether a kind is about the life of sequences or pools. */
static inline bool blockdex_is_lifecycle(uint16_t kind) {
    return (kind >= BLOCKDEX_OPEN && kind <= BLOCKDEX_CLOSE) ||
           (kind >= BLOCKDEX_CREATE_POOL && kind <= BLOCKDEX_CLOSE_POOL);
}

/* Columns of N numbers that a request of a kind carries behind its tenant. */
static inline unsigned blockdex_num_columns(uint16_t kind) {
    return kind == BLOCKDEX_TOKENS            ? 4
           : kind == BLOCKDEX_OPEN            ? 2
           : kind == BLOCKDEX_CLOSE           ? 1
           : kind == BLOCKDEX_SET_PAGE_TABLES ? 3
                                              : 0;
}

/* Where the parts of a token request begin in its payload, and how long that is: what lies in a region is not in it. */
struct blockdex_parts {
    uint64_t columns, keys, queries, bytes;
};

static inline struct blockdex_parts blockdex_parts_of(const struct blockdex_request *request) {
    struct blockdex_parts parts;
    parts.columns = (request->tenant_bytes + UINT64_C(7)) / 8 * 8;
    parts.keys = blockdex_aligned(parts.columns + UINT64_C(32) * request->num_spans);
    parts.queries = parts.keys + (request->keys_region ? 0 : blockdex_aligned(request->keys_bytes));
    parts.bytes = parts.queries + (request->queries_region ? 0 : request->queries_bytes);
    return parts;
}

/* Nanoseconds of CLOCK_MONOTONIC, as slots have them. */
static inline int64_t blockdex_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* So many seconds from a time on: as long as 31 years at most, which has 63 bits; NaN is none. */
static inline int64_t blockdex_until(int64_t from, double seconds) {
    return from + (seconds >= 1e9 ? (int64_t)1e18 : seconds > 0 ? (int64_t)(1e9 * seconds) : 0);
}

/* Whether so many bytes at that offset lie in a segment, behind its header. */
static inline bool blockdex_is_inside(uint64_t segment_bytes, uint64_t offset, uint64_t bytes) {
    return offset % 64 == 0 && offset >= BLOCKDEX_HEADER_BYTES && offset <= segment_bytes &&
           bytes <= segment_bytes - offset;
}

/* The same of slots: counters run on through 2^64, so that their number has to divide it. */
static inline bool blockdex_are_slots(uint64_t segment_bytes, uint64_t offset, uint64_t slots) {
    return slots && !(slots & (slots - 1)) && slots <= BLOCKDEX_MAX_SLOTS &&
           blockdex_is_inside(segment_bytes, offset, slots * BLOCKDEX_SLOT_BYTES);
}

/* Reads the header of a segment of so many bytes; false where it is none of this version, or names what is outside. */
static inline bool blockdex_read_segment(void *memory, uint64_t bytes, struct blockdex_segment *segment) {
    struct blockdex_header *header = (struct blockdex_header *)memory;
    char *begin = (char *)memory;
    if (bytes < BLOCKDEX_HEADER_BYTES || (uintptr_t)memory % 64 || header->magic != BLOCKDEX_MAGIC ||
        header->version != BLOCKDEX_VERSION || header->slot_bytes != BLOCKDEX_SLOT_BYTES ||
        header->segment_bytes != bytes)
        return false;
    const uint64_t requests_at = header->request_slots_offset, answers_at = header->answer_slots_offset;
    const uint64_t request_arena_at = header->request_arena_offset, answer_arena_at = header->answer_arena_offset;
    segment->header = header;
    segment->num_request_slots = header->request_slots;
    segment->num_answer_slots = header->answer_slots;
    segment->request_arena_bytes = header->request_arena_bytes;
    segment->answer_arena_bytes = header->answer_arena_bytes;
    segment->request_slots = begin + requests_at;
    segment->answer_slots = begin + answers_at;
    segment->request_arena = begin + request_arena_at;
    segment->answer_arena = begin + answer_arena_at;
    return blockdex_are_slots(bytes, requests_at, segment->num_request_slots) &&
           blockdex_are_slots(bytes, answers_at, segment->num_answer_slots) &&
           blockdex_is_inside(bytes, request_arena_at, segment->request_arena_bytes) &&
           blockdex_is_inside(bytes, answer_arena_at, segment->answer_arena_bytes);
}

/* --- Sleeping and waking: all of the protocol, for both sides --- */

/* Wakes who sleeps; after what it is to see was stored. A socket that is full has woken it already. */
static inline void blockdex_ring_bell(BLOCKDEX_ATOMIC(uint32_t) * sleeps, int bell) {
    /* Orders the store before and the load behind it: without it both sides could miss what the other has stored. */
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(sleeps, memory_order_relaxed) && atomic_exchange_explicit(sleeps, 0, memory_order_relaxed))
        (void)!send(bell, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Shows the other side the slots before that number, and what they carry, and wakes it if it sleeps. */
static inline void blockdex_show(BLOCKDEX_ATOMIC(uint64_t) * counter, uint64_t number,
                                 BLOCKDEX_ATOMIC(uint32_t) * sleeps, int bell) {
    atomic_store_explicit(counter, number, memory_order_release);
    blockdex_ring_bell(sleeps, bell);
}

/* Says that this side sleeps, and looks once more: whether nothing has come, so that it may. */
static inline bool blockdex_may_sleep(BLOCKDEX_ATOMIC(uint32_t) * sleeps, const BLOCKDEX_ATOMIC(uint64_t) * counter,
                                      uint64_t seen) {
    atomic_store_explicit(sleeps, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    return atomic_load_explicit(counter, memory_order_acquire) == seen;
}

static inline void blockdex_awake(BLOCKDEX_ATOMIC(uint32_t) * sleeps) {
    atomic_store_explicit(sleeps, 0, memory_order_relaxed);
}

/* Takes wake-ups off a socket: no more than one may hold, though others come meanwhile. */
static inline void blockdex_silence(int bell) {
    char rung;
    for (int count = 0; count < 16 && recv(bell, &rung, 1, MSG_DONTWAIT) >= 0; count++) continue;
}

#endif
