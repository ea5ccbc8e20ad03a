/* Which entry a sequence or a pool has: the one index of both, which the cache writes and the core reads. */
#ifndef BLOCKDEX_SEQUENCE_INDEX_H
#define BLOCKDEX_SEQUENCE_INDEX_H

#include "core/pair_index.h"
#include "native.h"

/* A tenant's number is its index in `tenants`. It has one as long as it is used: by its open sequences and pools, and by its
 * requests. */
struct tenant {
    char *name; /* NULL where there is none */
    size_t bytes, uses;
    uint32_t next; /* another one of the same hash, or the next free number; 0: none */
};

struct sequence_index {
    PyObject_HEAD
    struct tenant *tenants; /* 0 is nobody's */
    uint32_t num_tenants, first_free, num_pools;
    struct pair_index by_name, entries;
};

/* The number of a tenant, which is used once more from now on; 0 without memory. */
uint32_t sequence_index_use_tenant(struct sequence_index *index, const char *name, size_t bytes);
void sequence_index_release_tenant(struct sequence_index *index, uint32_t tenant);

/* The entry of a sequence; -1 where it is not open. */
int64_t sequence_index_find(const struct sequence_index *index, uint32_t tenant, uint64_t sequence_id);

/* The same of a pool, whose ids are their own. */
int64_t sequence_index_find_pool(const struct sequence_index *index, uint32_t tenant, uint64_t pool_id);

bool sequence_index_is_one(PyObject *object);

extern PyType_Spec blockdex_sequence_index_spec;

#endif
