#include "ring/inflight.h"

#include <assert.h>
#include <stdlib.h>

static const uint32_t NONE = UINT32_MAX;

bool inflight_open(struct inflight *table, uint32_t capacity) {
    *table = (struct inflight){.capacity = capacity};
    table->all = calloc(capacity, sizeof *table->all);
    table->buckets = malloc(capacity * sizeof *table->buckets);
    if (!table->all || !table->buckets) {
        inflight_close(table);
        return false;
    }
    for (uint32_t at = 0; at < capacity; at++) {
        table->all[at].next = at + 1 < capacity ? at + 1 : NONE;
        table->buckets[at] = NONE;
    }
    return true;
}

void inflight_close(struct inflight *table) {
    free(table->all);
    free(table->buckets);
    *table = (struct inflight){.free = NONE};
}

/* The start of the chain in which an entry stands. */
static uint32_t *bucket_of(const struct inflight *table, const void *owner, uint64_t number) {
    uint64_t mixed = ((uint64_t)(uintptr_t)owner ^ number) * UINT64_C(0x9e3779b97f4a7c15);
    return &table->buckets[(mixed >> 32) & (table->capacity - 1)];
}

static uint32_t index_of(const struct inflight *table, const struct pending *pending) {
    return (uint32_t)(pending - table->all);
}

struct pending *inflight_begin(struct inflight *table, void *owner, uint64_t number, uint8_t rpc) {
    assert(owner && !inflight_full(table));
    uint32_t at = table->free, *bucket = bucket_of(table, owner, number);
    struct pending *pending = &table->all[at];
    assert(at < table->capacity && !pending->ticket && !pending->owner);
    table->free = pending->next;
    table->waiting++;
    *pending = (struct pending){.ticket = ++table->serial * table->capacity + at,
                                .owner = owner,
                                .number = number,
                                .next = *bucket,
                                .rpc = rpc};
    *bucket = at;
    return pending;
}

struct pending *inflight_with(const struct inflight *table, uint64_t ticket) {
    struct pending *pending = &table->all[ticket & (table->capacity - 1)];
    return ticket && pending->ticket == ticket ? pending : NULL;
}

struct pending *inflight_of(const struct inflight *table, const void *owner, uint64_t number) {
    for (uint32_t at = *bucket_of(table, owner, number); at != NONE; at = table->all[at].next) {
        struct pending *pending = &table->all[at];
        if (pending->owner == owner && pending->number == number) return pending;
    }
    return NULL;
}

void *inflight_disown(struct inflight *table, struct pending *pending) {
    void *owner = pending->owner;
    if (!owner) return NULL;
    uint32_t *link = bucket_of(table, owner, pending->number);
    while (*link != index_of(table, pending)) {
        assert(*link != NONE);
        link = &table->all[*link].next;
    }
    *link = pending->next;
    table->waiting--;
    pending->owner = NULL;
    return owner;
}

void inflight_end(struct inflight *table, struct pending *pending) {
    assert(pending->ticket && !pending->owner && !pending->unsent);
    if (pending->cancel_due) table->cancels_due--;
    *pending = (struct pending){.next = table->free};
    table->free = index_of(table, pending);
}
