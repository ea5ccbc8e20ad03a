/* Which column a sequence has: as much of that as requests had to be told so far. */
#ifndef BLOCKDEX_PLACES_H
#define BLOCKDEX_PLACES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A sequence's column, and how often that column had been given back when it was its. */
struct place_of {
    uint64_t sequence_id;
    uint32_t tenant, column, generation;
    bool used;
};

struct tenant {
    char *name; /* NULL where there is none */
    size_t bytes;
};

/* Two tables with open addressing, of `capacity` each, a power of two. A tenant's number is its place. */
struct sequence_index {
    struct place_of *table;
    struct tenant *tenants;
    size_t capacity, used;
};

/* Makes it empty, with room for so many sequences; false without memory. What it held is forgotten. */
bool sequence_index_reset(struct sequence_index *places, size_t sequences);
void sequence_index_free(struct sequence_index *places);

/* Number of a tenant, any bytes; -1 for one that nothing is known of. */
int64_t sequence_index_tenant(const struct sequence_index *places, const char *name, size_t bytes);

/* NULL where nothing is known of the sequence. */
const struct place_of *sequence_index_find(const struct sequence_index *places, uint32_t tenant, uint64_t sequence_id);

/* Takes note of a sequence, instead of what was known of it; false without memory. Forgets all others when full. */
bool sequence_index_learn(struct sequence_index *places, const char *tenant, size_t tenant_bytes, uint64_t sequence_id,
                          uint32_t column, uint32_t generation);

#endif
