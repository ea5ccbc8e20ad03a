/* The ring of blockdex for C11: what docs/ring.md says, as structures and the few functions that touch shared memory.
 *
 *   int link = blockdex_connect(name, name_bytes, tenant, milliseconds, &ring);    a link to an engine
 *   struct blockdex_request *request = blockdex_claim(&ring);    a slot to fill; NULL while none is free
 *   blockdex_publish(&ring);                                     shows it to the engine, and wakes it
 *   const struct blockdex_answer *answer = blockdex_wait(&ring, milliseconds);
 *   blockdex_release(&ring, answer);                             after its payload was read
 *   blockdex_disconnect(&ring);
 *
 * One thread at a time; any little-endian machine whose 64-bit atomics are lock-free.
 */
#ifndef BLOCKDEX_RING_H
#define BLOCKDEX_RING_H

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define BLOCKDEX_MAGIC UINT64_C(0x474e5258444b4c42) /* "BLKDXRNG" */
#define BLOCKDEX_VERSION 3u
#define BLOCKDEX_SLOT_BYTES 256u
#define BLOCKDEX_MAX_TENANT_BYTES 256u

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

/* What a client says first, the tenant behind it; no tenant: every request names its own. */
struct blockdex_hello {
    uint64_t magic;
    uint32_t version, tenant_bytes;
};

/* What the engine answers; with it come the segment and the two wake-up sockets, unless the versions differ. */
struct blockdex_greeting {
    uint64_t magic;
    uint32_t version, reserved;
};

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
    _Alignas(128) _Atomic uint32_t channel_error;
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

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the ring is little-endian");
_Static_assert(ATOMIC_INT_LOCK_FREE == 2 && ATOMIC_LLONG_LOCK_FREE == 2, "a lock would be known to one process alone");
_Static_assert(sizeof(_Atomic uint64_t) == 8 && sizeof(_Atomic uint32_t) == 4, "atomics are what they hold");
_Static_assert(offsetof(struct blockdex_header, segment_bytes) == 80, "docs/ring.md");
_Static_assert(offsetof(struct blockdex_header, requests_written) == 128, "docs/ring.md");
_Static_assert(offsetof(struct blockdex_header, answer_bytes_freed) == 640, "docs/ring.md");
_Static_assert(offsetof(struct blockdex_header, engine_waits_for_room) == 1024, "docs/ring.md");
_Static_assert(offsetof(struct blockdex_request, payload_offset) == 80, "docs/ring.md");
_Static_assert(offsetof(struct blockdex_request, keys_region) == 112, "docs/ring.md");
_Static_assert(offsetof(struct blockdex_answer, phase) == 64, "docs/ring.md");
_Static_assert(sizeof(struct blockdex_request) == 160 && sizeof(struct blockdex_answer) == 104, "no padding");
_Static_assert(sizeof(struct blockdex_request) <= BLOCKDEX_SLOT_BYTES, "a slot holds a request");
_Static_assert(sizeof(struct blockdex_hello) == 16 && sizeof(struct blockdex_greeting) == 16, "no padding");

/* `engine_bell` is sent to, `client_bell` received from; `segment_bytes` are mapped. */
struct blockdex_ring {
    struct blockdex_header *header;
    uint64_t written, read, segment_bytes;
    int link, engine_bell, client_bell;
};

/* The next multiple of 64: tensors and payloads begin at one. */
static inline uint64_t blockdex_aligned(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

/* A place in the requests' arena, which the client divides as it likes, and in the answers', which the engine does. */
static inline char *blockdex_request_payload(const struct blockdex_ring *ring, uint64_t offset) {
    return (char *)ring->header + ring->header->request_arena_offset + offset;
}
static inline const char *blockdex_answer_payload(const struct blockdex_ring *ring, uint64_t offset) {
    return (const char *)ring->header + ring->header->answer_arena_offset + offset;
}

/* --- Sleeping and waking: all of the protocol, for both sides --- */

/* Wakes who sleeps; after what it is to see was stored. A socket that is full has woken it already. */
static inline void blockdex_ring_bell(_Atomic uint32_t *sleeps, int bell) {
    /* Orders the store before and the load behind it: without it both sides could miss what the other has stored. */
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(sleeps, memory_order_relaxed) && atomic_exchange_explicit(sleeps, 0, memory_order_relaxed))
        (void)!send(bell, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Shows the other side the slots before that number, and what they carry, and wakes it if it sleeps. */
static inline void blockdex_show(_Atomic uint64_t *counter, uint64_t number, _Atomic uint32_t *sleeps, int bell) {
    atomic_store_explicit(counter, number, memory_order_release);
    blockdex_ring_bell(sleeps, bell);
}

/* Says that this side sleeps, and looks once more: whether nothing has come, so that it may. */
static inline bool blockdex_may_sleep(_Atomic uint32_t *sleeps, const _Atomic uint64_t *counter, uint64_t seen) {
    atomic_store_explicit(sleeps, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    return atomic_load_explicit(counter, memory_order_acquire) == seen;
}

static inline void blockdex_awake(_Atomic uint32_t *sleeps) { atomic_store_explicit(sleeps, 0, memory_order_relaxed); }

/* Takes wake-ups off a socket: no more than one may hold, though others come meanwhile. */
static inline void blockdex_silence(int bell) {
    char rung;
    for (int count = 0; count < 16 && recv(bell, &rung, 1, MSG_DONTWAIT) >= 0; count++) continue;
}

/* --- A link --- */

static inline int64_t blockdex_milliseconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

/* As poll, until then, whatever signals come. */
static inline int blockdex_poll(struct pollfd *files, nfds_t count, int64_t until) {
    int ready;
    do {
        int64_t left = until - blockdex_milliseconds();
        ready = poll(files, count, left < 0 ? 0 : left > INT32_MAX ? INT32_MAX : (int)left);
    } while (ready < 0 && errno == EINTR);
    return ready;
}

/* Sends the hello, waits for the greeting, and takes the files that come with it; false: they are not there. */
static inline bool blockdex_greet(int link, const char *tenant, int64_t until, int fds[3]) {
    struct blockdex_hello hello = {BLOCKDEX_MAGIC, BLOCKDEX_VERSION, (uint32_t)strlen(tenant)};
    struct blockdex_greeting greeting = {0};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(3 * sizeof(int))];
    } control;
    struct iovec said[2] = {{&hello, sizeof hello}, {(void *)(uintptr_t)tenant, hello.tenant_bytes}};
    struct iovec heard = {&greeting, sizeof greeting};
    struct msghdr out = {.msg_iov = said, .msg_iovlen = 2};
    struct msghdr in = {
        .msg_iov = &heard,
        .msg_iovlen = 1,
        .msg_control = control.bytes,
        .msg_controllen = CMSG_LEN(3 * sizeof(int))}; /* not the padding behind, where a fourth would fit */
    struct pollfd readable = {link, POLLIN, 0};
    ssize_t size = (ssize_t)(sizeof hello + hello.tenant_bytes);
    if (hello.tenant_bytes > BLOCKDEX_MAX_TENANT_BYTES || sendmsg(link, &out, MSG_DONTWAIT | MSG_NOSIGNAL) != size)
        return false;
    if (blockdex_poll(&readable, 1, until) <= 0) return false;
    ssize_t got = recvmsg(link, &in, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    struct cmsghdr *files = got < 0 ? NULL : CMSG_FIRSTHDR(&in);
    if (!files || files->cmsg_level != SOL_SOCKET || files->cmsg_type != SCM_RIGHTS) return false;
    size_t count = (files->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    memcpy(fds, CMSG_DATA(files), count * sizeof(int));
    return count == 3 && !(in.msg_flags & MSG_CTRUNC) && got == sizeof greeting && greeting.magic == BLOCKDEX_MAGIC &&
           greeting.version == BLOCKDEX_VERSION;
}

/* Maps the segment; false: it is none of this version. */
static inline bool blockdex_map(int segment, struct blockdex_ring *ring) {
    struct stat file;
    if (fstat(segment, &file) || (size_t)file.st_size < sizeof(struct blockdex_header)) return false;
    void *memory = mmap(NULL, (size_t)file.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, segment, 0);
    if (memory == MAP_FAILED) return false;
    ring->header = memory;
    ring->segment_bytes = (uint64_t)file.st_size;
    return ring->header->magic == BLOCKDEX_MAGIC && ring->header->version == BLOCKDEX_VERSION &&
           ring->header->slot_bytes == BLOCKDEX_SLOT_BYTES && ring->header->segment_bytes == ring->segment_bytes;
}

/* Ends a link: the engine gives up what was in flight. Also one that blockdex_connect has not finished. */
static inline void blockdex_disconnect(struct blockdex_ring *ring) {
    if (ring->header) munmap(ring->header, (size_t)ring->segment_bytes);
    int files[3] = {ring->link, ring->engine_bell, ring->client_bell};
    for (int at = 0; at < 3; at++)
        if (files[at] >= 0) close(files[at]);
    *ring = (struct blockdex_ring){.link = -1, .engine_bell = -1, .client_bell = -1};
}

/* Connects to the socket of that name; an abstract one begins with a zero byte. `tenant` is that of all requests; where
 * it is "", each names its own. The link's socket, or -1, and nothing is held then. */
static inline int blockdex_connect(const char *name, size_t name_bytes, const char *tenant, int milliseconds,
                                   struct blockdex_ring *ring) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int64_t until = blockdex_milliseconds() + milliseconds;
    int fds[3] = {-1, -1, -1};
    *ring = (struct blockdex_ring){.link = -1, .engine_bell = -1, .client_bell = -1};
    if (name_bytes > sizeof address.sun_path) return -1;
    memcpy(address.sun_path, name, name_bytes);
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + name_bytes);
    ring->link = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    /* Of an engine that lets nobody in. */
    struct timeval patience = {milliseconds / 1000, milliseconds % 1000 * 1000};
    setsockopt(ring->link, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    bool greeted = ring->link >= 0 && !connect(ring->link, (struct sockaddr *)&address, size) &&
                   blockdex_greet(ring->link, tenant, until, fds);
    ring->engine_bell = fds[1];
    ring->client_bell = fds[2];
    bool mapped = greeted && blockdex_map(fds[0], ring);
    if (fds[0] >= 0) close(fds[0]);
    if (!mapped) blockdex_disconnect(ring);
    return ring->link;
}

/* The next free slot, all zero; NULL while the engine has not emptied one. */
static inline struct blockdex_request *blockdex_claim(struct blockdex_ring *ring) {
    struct blockdex_header *header = ring->header;
    uint64_t taken = ring->written - atomic_load_explicit(&header->requests_read, memory_order_acquire);
    if (taken >= header->request_slots) return NULL;
    char *slots = (char *)header + header->request_slots_offset;
    void *slot = slots + ring->written++ % header->request_slots * BLOCKDEX_SLOT_BYTES;
    return memset(slot, 0, BLOCKDEX_SLOT_BYTES);
}

/* Shows the engine every slot that was claimed. */
static inline void blockdex_publish(struct blockdex_ring *ring) {
    struct blockdex_header *header = ring->header;
    blockdex_show(&header->requests_written, ring->written, &header->engine_sleeps, ring->engine_bell);
}

/* The oldest answer that was not released; NULL if none comes within so many milliseconds, or once the engine is
 * gone. */
static inline const struct blockdex_answer *blockdex_wait(struct blockdex_ring *ring, int milliseconds) {
    struct blockdex_header *header = ring->header;
    struct pollfd bells[2] = {{ring->client_bell, POLLIN, 0}, {ring->link, POLLIN, 0}};
    const int64_t until = blockdex_milliseconds() + milliseconds;
    while (blockdex_may_sleep(&header->client_sleeps, &header->answers_written, ring->read)) {
        if (blockdex_poll(bells, 2, until) <= 0 || bells[1].revents) return NULL;
        blockdex_silence(ring->client_bell);
    }
    blockdex_awake(&header->client_sleeps);
    char *slots = (char *)header + header->answer_slots_offset;
    return (const void *)(slots + ring->read % header->answer_slots * BLOCKDEX_SLOT_BYTES);
}

/* Gives back the answer that blockdex_wait returned, and its payload. */
static inline void blockdex_release(struct blockdex_ring *ring, const struct blockdex_answer *answer) {
    struct blockdex_header *header = ring->header;
    if (answer->payload_bytes)
        atomic_store_explicit(&header->answer_bytes_freed, answer->payload_end, memory_order_release);
    blockdex_show(&header->answers_read, ++ring->read, &header->engine_waits_for_room, ring->engine_bell);
}

#endif
