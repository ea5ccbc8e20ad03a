/* One link, as the engine's thread sees it: requests come off it, answers go onto it. Nothing here knows Python. */
#ifndef BLOCKDEX_LINE_H
#define BLOCKDEX_LINE_H

#include "blockdex_ring.h"
#include "ring/regions.h"

/* An answer for which there was no room. */
struct unwritten {
    struct unwritten *next;
    struct blockdex_answer numbers;
    char payload[];
};

/* Where the parts of a segment lie, in bytes from its beginning, and how large they are. */
struct segment_layout {
    uint64_t requests_at, answers_at, request_arena_at, answer_arena_at;
    uint64_t request_slots, answer_slots, request_arena_bytes, answer_arena_bytes;
};

/* Of a link whose requests a GPU writes: it cannot wake who sleeps, and is told of a success by a number alone. */
struct channel {
    int64_t bound;        /* nanoseconds that its kernels wait for an answer; 0: the link is no channel */
    int64_t looked;       /* when there was no request last */
    int64_t came, before; /* when its last request was first seen, and the one before it; 0: never */
    bool asks;            /* whether that is still to be read */
    uint64_t epoch;       /* that its requests name */
    uint64_t *answered;   /* the number of the last request that succeeded, in the channel's memory */
    bool on_device;       /* whose memory that is */
};

struct server_link {
    struct blockdex_header *header;
    char *requests, *answers, *request_arena, *answer_arena;
    uint64_t request_slots, answer_slots, request_arena_bytes, answer_arena_bytes;
    uint64_t read, written, arena_end, used_from; /* nothing before that position in the arena is in use */
    struct unwritten *first_unwritten, **last_unwritten;
    int bell, own_bell;
    uint16_t tenant_bytes; /* 0: every request names its own */
    char tenant[BLOCKDEX_MAX_TENANT_BYTES];
    struct regions regions;
    struct channel channel;
    bool gone;    /* nobody is there to be answered */
    bool waits;   /* the oldest request is one for Python */
    bool changed; /* answers were written and not yet shown */
    bool crowded; /* Python has answers for which there was no room */
};

/* Where an answer is written: its slot, and its payload in the arena. */
struct claim {
    struct blockdex_answer *slot;
    char *payload;
    uint64_t offset, end;
};

/* A link in memory of so many bytes; `bell` is sent to, `own_bell` received from. False: the parts are not inside
 * it. */
bool server_link_open(struct server_link *link, void *memory, uint64_t bytes, const struct segment_layout *layout,
                      int bell, int own_bell);
void server_link_close(struct server_link *link);

/* Makes it a channel, whose memory is a region of the link. What its kernels have counted so far is taken over. False:
 * there is no room for the number of the last request. */
bool server_link_make_channel(struct server_link *link, const struct region *memory, int64_t bound, uint64_t epoch);

/* Requests that are there, as far as that can be; -1 where the client says what cannot be. */
int64_t server_link_filled(const struct server_link *link);

/* Bytes of an answer that there is room for at some time. */
uint64_t server_link_longest(const struct server_link *link);

/* The oldest request, of which there is one. It stays as it is until server_link_release. */
const struct blockdex_request *server_link_head(const struct server_link *link);
void server_link_release(struct server_link *link);

/* The next free slot, and room for what the answer carries; false while there is none of either. */
bool server_link_claim(struct server_link *link, uint64_t bytes, struct claim *claim);

/* Answers, as soon as there is room: `numbers` without payload_offset and payload_end. False: no memory is left. */
bool server_link_answer(struct server_link *link, struct blockdex_answer numbers, const void *payload, uint64_t bytes);

/* Writes answers that there was no room for; shows the client what was written, and wakes it. */
void server_link_publish(struct server_link *link);

/* Has the engine woken when there is room again; who has said so tries once more. */
void server_link_wait_for_room(struct server_link *link);

/* Whether it gets answers: who does not read them gets no more, and so is asked nothing until there is room. */
bool server_link_is_heard(const struct server_link *link);

/* Whether the oldest request is one for Python to take now. */
bool server_link_is_for_python(const struct server_link *link);

/* Whether the client says that Python may try again to write its answers. */
bool server_link_has_room_again(const struct server_link *link);

/* Says that the engine sleeps from now on, and looks once more: whether nothing has come that it would look at. */
bool server_link_lie_down(struct server_link *link);

/* Says that the engine is awake. */
void server_link_get_up(struct server_link *link);

#endif
