/* A client's link to a blockdex server on the same host: how it begins and ends, and what both say beside the ring.
 * `blockdex_client.h` is what to include: it sends requests over it.
 */
#ifndef BLOCKDEX_LINK_H
#define BLOCKDEX_LINK_H

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
    BLOCKDEX_UNAVAILABLE = 14,
    BLOCKDEX_UNAUTHENTICATED = 16
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
    uint64_t payload_end;                             /* what is given back with it; 0: nothing */
    uint32_t before, after;                           /* of a free entry: `after` is the next free one */
    bool answered, given_up, ids_apart, scores_apart; /* the last two lie in regions */
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
    uint32_t replies_due; /* to that question, and to those before it that were not waited for */
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
    struct {
        struct blockdex_greeting greeting;
        char refusal[BLOCKDEX_MAX_REFUSAL_BYTES];
    } said;
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(3 * sizeof(int))];
    } control;
    struct iovec heard = {&said, sizeof said};
    struct msghdr in;
    struct pollfd readable = {link, POLLIN, 0};
    size_t count = 0;
    memset(&said, 0, sizeof said);
    memset(&in, 0, sizeof in);
    in.msg_iov = &heard;
    in.msg_iovlen = 1;
    in.msg_control = control.bytes;
    in.msg_controllen = CMSG_LEN(3 * sizeof(int)); /* not the padding behind, where a fourth would fit */
    if (blockdex_poll_until(&readable, 1, until) <= 0)
        return blockdex_fail(error, BLOCKDEX_DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "link: no greeting in time");
    const ssize_t got = recvmsg(link, &in, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (got <= 0) return blockdex_fail(error, BLOCKDEX_UNAVAILABLE, "UNREACHABLE", "link: the server hung up");
    struct cmsghdr *files = CMSG_FIRSTHDR(&in);
    if (files && files->cmsg_level == SOL_SOCKET && files->cmsg_type == SCM_RIGHTS) {
        count = (files->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(fds, CMSG_DATA(files), count * sizeof(int));
    }
    const struct blockdex_greeting greeting = said.greeting;
    const bool greets = got >= (ssize_t)sizeof greeting && greeting.magic == BLOCKDEX_MAGIC;
    if (greets && greeting.version != BLOCKDEX_VERSION)
        return blockdex_fail(error, BLOCKDEX_FAILED_PRECONDITION, "UNREACHABLE",
                             "link: the server speaks version %u of the ring, this client %u", greeting.version,
                             BLOCKDEX_VERSION);
    if (greets && greeting.refusal_bytes)
        return blockdex_fail(error, BLOCKDEX_UNAUTHENTICATED, "UNKNOWN_CREDENTIALS", "link: %.*s",
                             (int)(got - (ssize_t)sizeof greeting), said.refusal);
    if (!greets || count != 3 || (in.msg_flags & MSG_CTRUNC))
        return blockdex_fail(error, BLOCKDEX_INTERNAL, "INTERNAL", "link: what greets is no server of blockdex");
    return true;
}

/* Maps the segment. */
static inline bool blockdex_map(struct blockdex_client *client, int segment, struct blockdex_error *error) {
    struct stat file;
    void *memory = MAP_FAILED;
    if (!fstat(segment, &file))
        memory = mmap(NULL, (size_t)file.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, segment, 0);
    if (memory == MAP_FAILED)
        return blockdex_fail(error, BLOCKDEX_RESOURCE_EXHAUSTED, "INTERNAL", "segment: cannot be mapped (%s)",
                             strerror(errno));
    client->segment.header = (struct blockdex_header *)memory;
    client->segment_bytes = (uint64_t)file.st_size;
    return blockdex_read_segment(memory, client->segment_bytes, &client->segment) ||
           blockdex_fail(error, BLOCKDEX_INTERNAL, "INTERNAL", "segment: it is none of version %u", BLOCKDEX_VERSION);
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
    /* A server that refuses this user does not wait for the hello, and has said why. */
    if (client->link < 0 || !size || connect(client->link, (struct sockaddr *)&address, size) ||
        (!blockdex_say_hello(client->link, tenant) && errno != EPIPE))
        return blockdex_fail(error, BLOCKDEX_UNAVAILABLE, "UNREACHABLE", "link: cannot connect to %s (%s)", path,
                             size ? strerror(errno) : "its name is too long");
    const bool greeted = blockdex_take_greeting(client->link, until, fds, error);
    client->engine_bell = fds[1];
    client->client_bell = fds[2];
    const bool mapped = greeted && blockdex_map(client, fds[0], error);
    if (fds[0] >= 0) close(fds[0]);
    return mapped;
}

/* Connects to the server that listens at a path (@NAME: an abstract socket). All requests are the tenant's, of up to
 * 256 bytes; "" is the one that the server knows this process by. False with an error, and nothing is held then. */
static inline bool blockdex_connect(struct blockdex_client *client, const char *path, const char *tenant,
                                    double timeout, struct blockdex_error *error) {
    blockdex_init(client);
    if (strlen(tenant) > BLOCKDEX_MAX_TENANT_BYTES)
        return blockdex_fail(error, BLOCKDEX_INVALID_ARGUMENT, "INVALID_TENANT",
                             "tenant: must have at most %u bytes, got %zu", BLOCKDEX_MAX_TENANT_BYTES, strlen(tenant));
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

/* --- Beside the ring: JSON objects on the link's socket, each with four bytes of length before it --- */

static inline void blockdex_hear_one(struct blockdex_client *client, const char *json, size_t bytes) {
    const bool answers = bytes > 9 && (!memcmp(json, "{\"answer\"", 9) || !memcmp(json, "{\"failed\"", 9));
    if (!answers) {
        if (client->told) client->told(client->context, json, bytes);
    } else if (client->replies_due && !--client->replies_due && client->reply) {
        client->reply_bytes = bytes;
        if (bytes < client->reply_room) memcpy(client->reply, json, bytes);
        client->reply = NULL;
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

/* --- Questions, beside the ring --- */

/* The number behind a name such as "\"bytes\":"; 0 where there is none. */
static inline uint64_t blockdex_number_behind(const char *json, const char *name) {
    const char *at = strstr(json, name);
    return at ? strtoull(at + strlen(name), NULL, 10) : 0;
}

/* The text behind a name such as "\"failed\":\"", as it stands there. */
static inline void blockdex_text_behind(const char *json, const char *name, char *text, size_t room) {
    const char *at = strstr(json, name);
    size_t length = 0;
    if (at)
        for (at += strlen(name); *at && *at != '"' && length + 1 < room; at++)
            text[length++] = *at == '\\' && at[1] ? *++at : *at;
    text[length] = 0;
}

/* Sends a question with the files that come with it. */
static inline bool blockdex_send_question(struct blockdex_client *client, const char *question, const int *files,
                                          size_t num_files) {
    uint32_t length = (uint32_t)strlen(question);
    struct iovec said[2] = {{&length, 4}, {(void *)(uintptr_t)question, length}};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(4 * sizeof(int))];
    } control;
    struct msghdr out;
    memset(&out, 0, sizeof out);
    memset(&control, 0, sizeof control);
    out.msg_iov = said;
    out.msg_iovlen = 2;
    if (num_files) {
        out.msg_control = control.bytes;
        out.msg_controllen = CMSG_SPACE(num_files * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&out);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(num_files * sizeof(int));
        memcpy(CMSG_DATA(header), files, num_files * sizeof(int));
    }
    return sendmsg(client->link, &out, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)(4 + length);
}

/* Asks the server something (docs/ring.md), a JSON object, with up to four files; its reply goes to `reply` as it is
 * heard, by whatever uses the client meanwhile. One question at a time. */
static inline bool blockdex_begin_question(struct blockdex_client *client, const char *question, const int *files,
                                           size_t num_files, char *reply, size_t room, struct blockdex_error *error) {
    if (blockdex_is_over(client, error)) return false;
    if (num_files > 4 || !room)
        return blockdex_fail(error, BLOCKDEX_INVALID_ARGUMENT, "INVALID_LENGTH",
                             "question: at most 4 files may come with it, and its answer needs room");
    if (!blockdex_send_question(client, question, files, num_files)) {
        blockdex_end(client, BLOCKDEX_UNAVAILABLE, "UNREACHABLE", "server: it takes no questions");
        blockdex_is_over(client, error);
        return false;
    }
    client->reply = reply;
    client->reply_room = room;
    client->replies_due++;
    return true;
}

/* What a refusal beside the ring says. */
static inline void blockdex_read_failure(const char *reply, struct blockdex_error *error) {
    const uint64_t code = blockdex_number_behind(reply, "\"code\":");
    if (!error) return;
    memset(error, 0, sizeof *error);
    error->code = BLOCKDEX_UNAVAILABLE;
    if (code) error->code = (uint32_t)code;
    blockdex_text_behind(reply, "\"reason\":\"", error->reason, sizeof error->reason);
    blockdex_text_behind(reply, "\"failed\":\"", error->message, sizeof error->message);
    error->message_bytes = (uint32_t)strlen(error->message) + 1;
}

/* The reply that came to a question, in its room: whether it is an answer. */
static inline bool blockdex_end_question(struct blockdex_client *client, char *reply, struct blockdex_error *error) {
    if (client->reply_bytes >= client->reply_room)
        return blockdex_fail(error, BLOCKDEX_INVALID_ARGUMENT, "INVALID_LENGTH",
                             "answer: has %zu bytes, there is room for %zu", client->reply_bytes,
                             client->reply_room - 1);
    reply[client->reply_bytes] = 0;
    if (strncmp(reply, "{\"failed\"", 9)) return true;
    blockdex_read_failure(reply, error);
    return false;
}

/* Asks the server something, and waits for its reply, JSON text. */
static inline bool blockdex_ask(struct blockdex_client *client, const char *question, const int *files,
                                size_t num_files, char *reply, size_t room, double timeout,
                                struct blockdex_error *error) {
    const int64_t until = blockdex_until(blockdex_now(), timeout);
    if (!blockdex_begin_question(client, question, files, num_files, reply, room, error)) return false;
    while (client->reply && !client->over.code) {
        struct pollfd link = {client->link, POLLIN, 0};
        if (blockdex_poll_until(&link, 1, until) <= 0 || !blockdex_hear(client) || blockdex_now() > until) break;
    }
    const bool replied = !client->reply;
    client->reply = NULL;
    if (replied) return blockdex_end_question(client, reply, error);
    return !blockdex_is_over(client, error) && blockdex_fail(error, BLOCKDEX_DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED",
                                                             "timeout: no answer within %g s", timeout);
}

/* What the server is: `{"answer": {"spec": ..., "limits": ..., "epoch": ..., ...}}`, without spaces. */
static inline bool blockdex_get_info(struct blockdex_client *client, char *json, size_t room, double timeout,
                                     struct blockdex_error *error) {
    return blockdex_ask(client, "{\"ask\":\"info\"}", NULL, 0, json, room, timeout, error);
}

/* --- Regions: memory that requests name instead of copying what lies there. They end with the link. --- */

struct blockdex_region {
    uint32_t region;
    uint64_t bytes;
};

static inline bool blockdex_share(struct blockdex_client *client, const char *question, int file, double timeout,
                                  struct blockdex_region *shared, struct blockdex_error *error) {
    char reply[1024];
    if (!blockdex_ask(client, question, &file, file >= 0, reply, sizeof reply, timeout, error)) return false;
    shared->region = (uint32_t)blockdex_number_behind(reply, "\"region\":");
    shared->bytes = blockdex_number_behind(reply, "\"bytes\":");
    return true;
}

/* Shares a memfd that is sealed against shrinking (F_SEAL_SHRINK). The file can be closed afterwards. */
static inline bool blockdex_share_memfd(struct blockdex_client *client, int file, double timeout,
                                        struct blockdex_region *shared, struct blockdex_error *error) {
    return blockdex_share(client, "{\"share\":\"memfd\"}", file, timeout, shared, error);
}

/* Shares memory of a GPU that was exported as a file (cuMemExportToShareableHandle). `device` is the GPU's UUID, as 32
 * hexadecimal digits. */
static inline bool blockdex_share_cuda_fd(struct blockdex_client *client, int file, uint64_t bytes, const char *device,
                                          double timeout, struct blockdex_region *shared,
                                          struct blockdex_error *error) {
    char question[256];
    snprintf(question, sizeof question, "{\"share\":\"cuda_fd\",\"bytes\":%llu,\"device\":\"%.32s\"}",
             (unsigned long long)bytes, device);
    return blockdex_share(client, question, file, timeout, shared, error);
}

/* Shares memory of a GPU by its handle (cuIpcGetMemHandle). It must not be freed before it was given back. */
static inline bool blockdex_share_cuda_ipc(struct blockdex_client *client, const unsigned char handle[64],
                                           const char *device, double timeout, struct blockdex_region *shared,
                                           struct blockdex_error *error) {
    char digits[2 * 64 + 1], question[256];
    for (int at = 0; at < 64; at++) snprintf(digits + 2 * at, 3, "%02x", handle[at]);
    snprintf(question, sizeof question, "{\"share\":\"cuda_ipc\",\"handle\":\"%s\",\"device\":\"%.32s\"}", digits,
             device);
    return blockdex_share(client, question, -1, timeout, shared, error);
}

/* Gives a region back. Once this is true nobody reads or writes it any more; while requests use it for long, it is
 * refused (OVERLOADED), and to be tried again. */
static inline bool blockdex_release_region(struct blockdex_client *client, uint32_t region, double timeout,
                                           struct blockdex_error *error) {
    char question[64], reply[1024];
    snprintf(question, sizeof question, "{\"release\":%u}", region);
    return blockdex_ask(client, question, NULL, 0, reply, sizeof reply, timeout, error);
}

#endif
