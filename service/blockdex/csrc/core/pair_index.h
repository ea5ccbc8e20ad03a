/* A map from pairs of numbers to a number. Its hash is keyed at random in each process, so that nobody can choose
 * ids that collide; its memory is bounded by what it holds. */
#ifndef BLOCKDEX_PAIR_INDEX_H
#define BLOCKDEX_PAIR_INDEX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pair_slot {
    uint64_t owner, id;
    uint32_t value;
    bool used;
};

/* Open addressing with linear probing; `capacity` is a power of two, or 0 before the first entry. */
struct pair_index {
    struct pair_slot *slots;
    size_t capacity, used;
};

/* SipHash-1-3 of some bytes under the key of this process. */
uint64_t keyed_hash(const void *bytes, size_t count);

/* The value of a pair; NULL where it is not there. Good until the map changes. */
const uint32_t *pair_index_find(const struct pair_index *index, uint64_t owner, uint64_t id);

/* Enters a pair, or gives one that is there another value; false without memory. */
bool pair_index_set(struct pair_index *index, uint64_t owner, uint64_t id, uint32_t value);

/* Takes a pair out; one that is not there is fine. */
void pair_index_remove(struct pair_index *index, uint64_t owner, uint64_t id);

/* Forgets all pairs, and gives memory back that so few do not need. */
void pair_index_clear(struct pair_index *index);
void pair_index_free(struct pair_index *index);

#endif
