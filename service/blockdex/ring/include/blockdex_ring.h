/* The ring of blockdex for C11: what docs/ring.md says, as structures and the few functions that touch shared memory.
 *
 *   int link = blockdex_connect(name, name_bytes, &ring);        a link to an engine
 *   struct blockdex_request *request = blockdex_claim(&ring);    a slot to fill; NULL while none is free
 *   blockdex_publish(&ring);                                     shows it to the engine, and wakes it
 *   const struct blockdex_answer *answer = blockdex_wait(&ring, milliseconds);
 *   blockdex_release(&ring, answer);                             after its payload was read
 *
 * One thread at a time. Little-endian machines alone; the atomics here order what x86-64 orders by itself, and ARM not.
 */
#ifndef BLOCKDEX_RING_H
#define BLOCKDEX_RING_H

#include <poll.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define BLOCKDEX_MAGIC UINT64_C(0x474e5258444b4c42) /* "BLKDXRNG" */
#define BLOCKDEX_VERSION 2u
#define BLOCKDEX_SLOT_BYTES 128u

enum {
    BLOCKDEX_OPEN = 1,
    BLOCKDEX_GET,
    BLOCKDEX_FORK,
    BLOCKDEX_TRUNCATE,
    BLOCKDEX_CLOSE,
    BLOCKDEX_TOKENS,
    BLOCKDEX_CANCEL
};
enum { BLOCKDEX_BF16 = 1, BLOCKDEX_FP16, BLOCKDEX_FP32, BLOCKDEX_FP8_E4M3 };
enum { BLOCKDEX_ASCENDING = 1, BLOCKDEX_SCORE };
enum { BLOCKDEX_RETURN_SCORES = 1, BLOCKDEX_WAIT_FOR_KEYS = 2, BLOCKDEX_ROLLBACK = 4, BLOCKDEX_RAW_SCORES = 8 };
enum { BLOCKDEX_APPEND = 1, BLOCKDEX_DECODE, BLOCKDEX_PREFILL, BLOCKDEX_SEQUENCE };
enum { BLOCKDEX_HAS_BLOCK_IDS = 1, BLOCKDEX_HAS_SCORES = 2, BLOCKDEX_HAS_LENGTHS = 4, BLOCKDEX_IS_STATE = 8 };

struct blockdex_header {
    uint64_t magic;
    uint32_t version, slot_bytes, request_slots, answer_slots;
    uint64_t epoch, request_slots_offset, answer_slots_offset, request_arena_offset, request_arena_bytes;
    uint64_t answer_arena_offset, answer_arena_bytes, segment_bytes;
    _Alignas(128) _Atomic uint64_t requests_written;
    _Alignas(128) _Atomic uint64_t requests_read;
    _Alignas(128) _Atomic uint64_t answers_written;
    _Alignas(128) _Atomic uint64_t answers_read;
    _Alignas(128) _Atomic uint64_t answer_bytes_freed;
    _Alignas(128) _Atomic uint32_t engine_sleeps;
    _Alignas(128) _Atomic uint32_t client_sleeps;
    _Alignas(128) _Atomic uint32_t engine_waits_for_room;
};

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

struct blockdex_ring {
    struct blockdex_header *header;
    uint64_t written, read;
    int link, engine_bell, client_bell;
};

/* The next multiple of 64: tensors and payloads begin at one. */
static inline uint64_t blockdex_aligned(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

/* A place in the requests' arena, which the frontend divides as it likes, and in the answers', which the engine does. */
static inline char *blockdex_request_payload(const struct blockdex_ring *ring, uint64_t offset) {
    return (char *)ring->header + ring->header->request_arena_offset + offset;
}
static inline const char *blockdex_answer_payload(const struct blockdex_ring *ring, uint64_t offset) {
    return (const char *)ring->header + ring->header->answer_arena_offset + offset;
}

/* Connects to the socket of that name; an abstract one begins with a zero byte. The link, which is to be kept open, or -1. */
static inline int blockdex_connect(const char *name, size_t name_bytes, struct blockdex_ring *ring) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    uint64_t magic = 0;
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(3 * sizeof(int))];
    } control;
    struct iovec greeting = {&magic, sizeof magic};
    struct msghdr message = {
        .msg_iov = &greeting, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    struct stat file;
    int fds[3];
    if (name_bytes > sizeof address.sun_path) return -1;
    memcpy(address.sun_path, name, name_bytes);
    int link = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + name_bytes);
    if (link < 0) return -1;
    if (connect(link, (struct sockaddr *)&address, size) || recvmsg(link, &message, MSG_CMSG_CLOEXEC) != sizeof magic ||
        magic != BLOCKDEX_MAGIC || message.msg_controllen < CMSG_LEN(sizeof fds)) {
        close(link);
        return -1;
    }
    memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fds);
    void *memory = MAP_FAILED;
    if (!fstat(fds[0], &file)) memory = mmap(NULL, (size_t)file.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    close(fds[0]);
    *ring = (struct blockdex_ring){.header = memory, .link = link, .engine_bell = fds[1], .client_bell = fds[2]};
    if (memory == MAP_FAILED || ring->header->magic != BLOCKDEX_MAGIC || ring->header->version != BLOCKDEX_VERSION) {
        close(link);
        return -1;
    }
    return link;
}

/* The next free slot, all zero; NULL while the engine has not emptied one. */
static inline struct blockdex_request *blockdex_claim(struct blockdex_ring *ring) {
    struct blockdex_header *header = ring->header;
    uint64_t taken = ring->written - atomic_load_explicit(&header->requests_read, memory_order_acquire);
    if (taken >= header->request_slots) return NULL;
    char *slots = (char *)header + header->request_slots_offset;
    void *slot = slots + ring->written++ % header->request_slots * header->slot_bytes;
    return memset(slot, 0, sizeof(struct blockdex_request));
}

/* Rings a bell if who hears it sleeps; after what it is to see was stored. */
static inline void blockdex_ring_bell(_Atomic uint32_t *sleeps, int bell) {
    const uint64_t once = 1;
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_exchange_explicit(sleeps, 0, memory_order_relaxed)) (void)!write(bell, &once, sizeof once);
}

/* Shows the engine every slot that was claimed. */
static inline void blockdex_publish(struct blockdex_ring *ring) {
    atomic_store_explicit(&ring->header->requests_written, ring->written, memory_order_release);
    blockdex_ring_bell(&ring->header->engine_sleeps, ring->engine_bell);
}

/* The oldest answer that was not released; NULL if none comes in time, or once the engine is gone. */
static inline const struct blockdex_answer *blockdex_wait(struct blockdex_ring *ring, int milliseconds) {
    struct blockdex_header *header = ring->header;
    struct pollfd bells[2] = {{ring->client_bell, POLLIN, 0}, {ring->link, POLLIN, 0}};
    uint64_t rung;
    for (;;) {
        atomic_store_explicit(&header->client_sleeps, 1, memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst);
        if (atomic_load_explicit(&header->answers_written, memory_order_acquire) != ring->read) break;
        if (poll(bells, 2, milliseconds) <= 0 || bells[1].revents) return NULL;
        (void)!read(ring->client_bell, &rung, sizeof rung);
    }
    atomic_store_explicit(&header->client_sleeps, 0, memory_order_relaxed);
    char *slots = (char *)header + header->answer_slots_offset;
    return (const void *)(slots + ring->read % header->answer_slots * header->slot_bytes);
}

/* Gives back the answer that blockdex_wait returned, and its payload. */
static inline void blockdex_release(struct blockdex_ring *ring, const struct blockdex_answer *answer) {
    struct blockdex_header *header = ring->header;
    if (answer->payload_bytes)
        atomic_store_explicit(&header->answer_bytes_freed, answer->payload_end, memory_order_release);
    atomic_store_explicit(&header->answers_read, ++ring->read, memory_order_release);
    blockdex_ring_bell(&header->engine_waits_for_room, ring->engine_bell);
}

#endif
