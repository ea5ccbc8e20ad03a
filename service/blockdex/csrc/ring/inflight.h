/* The in-flight table of a link: its requests that are not answered yet, by the ticket that the ring carries and by who
 * waits for the answer. */
#ifndef BLOCKDEX_INFLIGHT_H
#define BLOCKDEX_INFLIGHT_H

#include <stdbool.h>
#include <stdint.h>

#include "blockdex_arena.h"

struct outgoing;

/* `owner` waits for the answer: NULL once nobody does. `number` is the owner's own name for the request, `rpc` one
 * of the numbers of blockdex.ring.caller.RPCS, `bytes` what it carries. `unsent` is what is still to be written for it,
 * `cancel_due` says that the engine is to be told that nobody waits any more. */
struct pending {
    uint64_t ticket;
    void *owner;
    uint64_t number, num_tokens, bytes;
    int64_t received;
    struct blockdex_extent extent;
    struct outgoing *unsent;
    uint32_t next, layer, num_spans, tenant;
    uint8_t rpc;
    bool cancel_due;
};

/* `waiting`: entries that have an owner; `cancels_due`: entries whose cancellation is to be sent. */
struct inflight {
    struct pending *all;
    uint32_t *buckets;
    uint32_t capacity, free, waiting, cancels_due;
    uint64_t serial;
};

/* A table of so many entries, a power of two; false without memory. */
bool inflight_open(struct inflight *table, uint32_t capacity);
void inflight_close(struct inflight *table);

static inline bool inflight_full(const struct inflight *table) { return table->free == UINT32_MAX; }

/* A new entry, with a ticket; the table must not be full. */
struct pending *inflight_begin(struct inflight *table, void *owner, uint64_t number, uint8_t rpc);

/* By ticket, also where its owner has gone; by owner and number. NULL where there is none. */
struct pending *inflight_with(const struct inflight *table, uint64_t ticket);
struct pending *inflight_of(const struct inflight *table, const void *owner, uint64_t number);

/* Nobody waits for it any more; its owner is returned, NULL where it had none. */
void *inflight_disown(struct inflight *table, struct pending *pending);

/* It is answered, or was never sent: its entry is free. It must have no owner. */
void inflight_end(struct inflight *table, struct pending *pending);

#endif
