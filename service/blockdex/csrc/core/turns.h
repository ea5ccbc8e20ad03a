/* Whose turn it is: requests that have come and were not looked at, in a queue for each tenant of each link. Tenants take
 * turns, and so do the links of each: they share the room for requests, and the steps of the device. */
#ifndef BLOCKDEX_TURNS_H
#define BLOCKDEX_TURNS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/pair_index.h"

struct request;

struct list {
    struct request *first, *last;
    _Atomic uint32_t count; /* other threads read it */
};

/* Members of a circle, by number. */
struct circle {
    uint32_t before, after;
};

/* What has come from one tenant by one link; the queues of a tenant form a circle. */
struct queue {
    struct circle circle;
    struct list list;
    int64_t since; /* it was not empty */
    uint32_t next_free;
};

/* Of one tenant; those from whom something has come form a circle. */
struct turn {
    struct circle circle;
    uint32_t first_queue, num_queues;
    uint32_t requests; /* of it that the core holds, the begun ones too */
    double left;       /* what it may still take in this round, in blocks of keys to be read */
    uint64_t step;     /* the last one that it took anything in */
    double taken;      /* in that step, in the same measure */
};

/* `recent`: the tenants from whom something came last, the very last one first, and when. */
struct turns {
    struct turn *of; /* by the tenant's number, which is never 0 */
    struct queue *queues;
    struct pair_index by_link; /* numbers of queues */
    uint32_t capacity, num_queues, free_queue;
    uint32_t first, tenants;
    _Atomic uint32_t count;
    struct {
        uint32_t tenant;
        int64_t at;
    } recent[2];
};

void list_append(struct list *list, struct request *request);
void list_prepend(struct list *list, struct request *request);
void list_remove(struct list *list, struct request *request);

/* Room for a tenant; false without memory. */
bool turns_reserve(struct turns *turns, uint32_t tenant);
void turns_close(struct turns *turns);

/* Puts a request behind the others of its tenant and link; false without memory. Or takes it out. */
bool turns_append(struct turns *turns, struct request *request, int64_t now);
void turns_remove(struct turns *turns, struct request *request);

/* Takes out the next request of a tenant in the circle. */
struct request *turns_take(struct turns *turns, uint32_t tenant);

/* For how long the oldest request of a tenant and link has waited, in nanoseconds, and not for longer than there has always
 * been one: what came while the core did something else is not late for that. 0 where there is none. */
int64_t turns_waited(const struct turns *turns, const struct request *like, int64_t now);

/* It is the next tenant's turn, and when it is this one's again, its next link's. */
void turns_pass(struct turns *turns);

/* Something came from a tenant; whether something did from another one shortly before. */
void turns_note(struct turns *turns, uint32_t tenant, int64_t now);
bool turns_contended(const struct turns *turns, int64_t now);

#endif
