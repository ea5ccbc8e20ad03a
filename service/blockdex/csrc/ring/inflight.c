#include "ring/inflight.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static const uint32_t NONE = UINT32_MAX;

bool flights_open(struct flights *flights, uint32_t capacity) {
    assert(capacity && !(capacity & (capacity - 1)));
    *flights = (struct flights){.capacity = capacity};
    flights->all = calloc(capacity, sizeof *flights->all);
    flights->buckets = malloc(capacity * sizeof *flights->buckets);
    if (!flights->all || !flights->buckets) {
        flights_close(flights);
        return false;
    }
    for (uint32_t at = 0; at < capacity; at++) {
        flights->all[at].next = at + 1 < capacity ? at + 1 : NONE;
        flights->buckets[at] = NONE;
    }
    return true;
}

void flights_close(struct flights *flights) {
    free(flights->all);
    free(flights->buckets);
    *flights = (struct flights){.free = NONE};
}

/* The start of the chain in which a flight on the short way stands. */
static uint32_t *bucket_of(const struct flights *flights, const void *owner, uint64_t number) {
    uint64_t mixed = ((uint64_t)(uintptr_t)owner ^ number) * UINT64_C(0x9e3779b97f4a7c15);
    return &flights->buckets[(mixed >> 32) & (flights->capacity - 1)];
}

static uint32_t index_of(const struct flights *flights, const struct flight *flight) {
    return (uint32_t)(flight - flights->all);
}

struct flight *flights_begin(struct flights *flights, void *owner, uint64_t number, uint8_t rpc) {
    uint32_t at = flights->free;
    assert(at < flights->capacity && owner);
    struct flight *flight = &flights->all[at];
    assert(!flight->ticket && !flight->owner);
    flights->free = flight->next;
    flights->waiting++;
    *flight = (struct flight){.ticket = ++flights->serial * flights->capacity + at, .owner = owner, .number = number};
    flight->rpc = rpc;
    if (rpc != LONG_WAY) {
        uint32_t *bucket = bucket_of(flights, owner, number);
        flight->next = *bucket;
        *bucket = at;
        flights->on_short_way++;
    }
    return flight;
}

struct flight *flights_with(const struct flights *flights, uint64_t ticket) {
    struct flight *flight = &flights->all[ticket & (flights->capacity - 1)];
    return ticket && flight->ticket == ticket ? flight : NULL;
}

struct flight *flights_of(const struct flights *flights, const void *owner, uint64_t number) {
    for (uint32_t at = *bucket_of(flights, owner, number); at != NONE; at = flights->all[at].next) {
        struct flight *flight = &flights->all[at];
        if (flight->owner == owner && flight->number == number) return flight;
    }
    return NULL;
}

void *flights_disown(struct flights *flights, struct flight *flight) {
    void *owner = flight->owner;
    if (!owner) return NULL;
    if (flight->rpc != LONG_WAY) {
        uint32_t *link = bucket_of(flights, owner, flight->number);
        while (*link != index_of(flights, flight)) {
            assert(*link != NONE);
            link = &flights->all[*link].next;
        }
        *link = flight->next;
        flights->on_short_way--;
    }
    flights->waiting--;
    flight->owner = NULL;
    return owner;
}

void flights_end(struct flights *flights, struct flight *flight) {
    assert(flight->ticket && !flight->owner);
    flight->ticket = 0;
    flight->next = flights->free;
    flights->free = index_of(flights, flight);
}
