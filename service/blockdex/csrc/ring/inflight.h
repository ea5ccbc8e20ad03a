/* The requests of a link that are not answered yet, by the ticket that the ring carries and by who asked. */
#ifndef BLOCKDEX_FLIGHTS_H
#define BLOCKDEX_FLIGHTS_H

#include <stdbool.h>
#include <stdint.h>

#include "ring/arena.h"

/* `owner` asked: NULL once nobody waits any more. `number` is its own name for the request. `rpc` is LONG_WAY for one that
 * Python wrote and reads the answer of. */
struct flight {
    uint64_t ticket;
    void *owner;
    uint64_t number;
    int64_t received;
    struct extent extent;
    uint32_t next;
    uint8_t rpc;
};

enum { LONG_WAY = 255 };

/* `waiting`: flights that have an owner; `on_short_way`: those of them that Python did not write. */
struct flights {
    struct flight *all;
    uint32_t *buckets;
    uint32_t capacity, free, waiting, on_short_way;
    uint64_t serial;
};

/* Room for so many, a power of two; false without memory. */
bool flights_open(struct flights *flights, uint32_t capacity);
void flights_close(struct flights *flights);

static inline bool flights_full(const struct flights *flights) { return flights->free == UINT32_MAX; }

/* A new one, with a ticket; there must be room. Those on the short way are found by owner and number. */
struct flight *flights_begin(struct flights *flights, void *owner, uint64_t number, uint8_t rpc);

/* By ticket, also where its owner has gone; by owner and number, on the short way alone. NULL where there is none. */
struct flight *flights_with(const struct flights *flights, uint64_t ticket);
struct flight *flights_of(const struct flights *flights, const void *owner, uint64_t number);

/* Nobody waits for it any more; its owner is returned, NULL where it had none. */
void *flights_disown(struct flights *flights, struct flight *flight);

/* It was answered: its place is free. It must have no owner. */
void flights_end(struct flights *flights, struct flight *flight);

#endif
