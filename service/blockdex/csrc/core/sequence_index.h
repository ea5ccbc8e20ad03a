/* Which entry a sequence or a pool has: the one index of both, which the cache writes and the core reads. */
#ifndef BLOCKDEX_SEQUENCE_INDEX_H
#define BLOCKDEX_SEQUENCE_INDEX_H

#include "native.h"

#include "core/pair_index.h"
#include "tenants.h"

struct sequence_index {
    PyObject_HEAD
    struct tenants tenants; /* used by their open sequences and pools, and by their requests */
    uint32_t num_pools;
    struct pair_index entries;
};

/* The entry of a sequence; -1 where it is not open. */
int64_t sequence_index_find(const struct sequence_index *index, uint32_t tenant, uint64_t sequence_id);

/* The same of a pool, whose ids are their own. */
int64_t sequence_index_find_pool(const struct sequence_index *index, uint32_t tenant, uint64_t pool_id);

bool sequence_index_is_one(PyObject *object);

extern PyType_Spec blockdex_sequence_index_spec;

#endif
