#include "core/sequence_index.h"

#include <stdlib.h>
#include <string.h>

enum { FEWEST = 256 };

static size_t spread(uint32_t tenant, uint64_t sequence_id) {
    /* Ids are often numbers one after the other; the multiplier is 2^64 divided by the golden ratio. */
    uint64_t mixed = (sequence_id ^ ((uint64_t)tenant << 32)) * UINT64_C(0x9e3779b97f4a7c15);
    return (size_t)(mixed ^ mixed >> 32);
}

static size_t spread_name(const char *name, size_t bytes) {
    uint64_t mixed = UINT64_C(0xcbf29ce484222325); /* FNV-1a */
    for (size_t at = 0; at < bytes; at++) mixed = (mixed ^ (uint8_t)name[at]) * UINT64_C(0x100000001b3);
    return (size_t)(mixed ^ mixed >> 32);
}

static void forget(struct sequence_index *places) {
    for (size_t tenant = 0; tenant < places->capacity; tenant++) free(places->tenants[tenant].name);
    memset(places->tenants, 0, places->capacity * sizeof *places->tenants);
    memset(places->table, 0, places->capacity * sizeof *places->table);
    places->used = 0;
}

bool sequence_index_reset(struct sequence_index *places, size_t sequences) {
    size_t capacity = FEWEST;
    while (capacity < 4 * sequences) capacity *= 2;
    if (capacity == places->capacity) {
        forget(places);
        return true;
    }
    struct sequence_index empty = {
        .table = calloc(capacity, sizeof *empty.table),
        .tenants = calloc(capacity, sizeof *empty.tenants),
        .capacity = capacity,
    };
    if (!empty.table || !empty.tenants) {
        free(empty.table);
        free(empty.tenants);
        return false;
    }
    sequence_index_free(places);
    *places = empty;
    return true;
}

void sequence_index_free(struct sequence_index *places) {
    if (places->capacity) forget(places);
    free(places->tenants);
    free(places->table);
}

/* The place of a tenant; where it is not known, one without a name. */
static struct tenant *look_up_tenant(const struct sequence_index *places, const char *name, size_t bytes) {
    size_t at = spread_name(name, bytes);
    for (;; at++) {
        struct tenant *tenant = &places->tenants[at & (places->capacity - 1)];
        if (!tenant->name || (tenant->bytes == bytes && !memcmp(tenant->name, name, bytes))) return tenant;
    }
}

int64_t sequence_index_tenant(const struct sequence_index *places, const char *name, size_t bytes) {
    const struct tenant *tenant = look_up_tenant(places, name, bytes);
    return tenant->name ? tenant - places->tenants : -1;
}

static struct place_of *look_up(const struct sequence_index *places, uint32_t tenant, uint64_t sequence_id) {
    size_t at = spread(tenant, sequence_id);
    for (;; at++) {
        struct place_of *place = &places->table[at & (places->capacity - 1)];
        if (!place->used || (place->sequence_id == sequence_id && place->tenant == tenant)) return place;
    }
}

const struct place_of *sequence_index_find(const struct sequence_index *places, uint32_t tenant, uint64_t sequence_id) {
    const struct place_of *place = look_up(places, tenant, sequence_id);
    return place->used ? place : NULL;
}

/* The number of a tenant that is known from now on; -1 without memory. */
static int64_t learn_tenant(struct sequence_index *places, const char *name, size_t bytes) {
    struct tenant *tenant = look_up_tenant(places, name, bytes);
    if (!tenant->name) {
        char *copy = malloc(bytes + 1); /* none takes no memory, which malloc may say with NULL */
        if (!copy) return -1;
        memcpy(copy, name, bytes);
        *tenant = (struct tenant){copy, bytes};
    }
    return tenant - places->tenants;
}

bool sequence_index_learn(struct sequence_index *places, const char *tenant, size_t tenant_bytes, uint64_t sequence_id,
                          uint32_t column, uint32_t generation) {
    /* Most of them may be closed by now. Those that are not are learnt again with their next request. Tenants are never
     * more than sequences, so this leaves room for them, too. */
    if (2 * places->used >= places->capacity) forget(places);
    int64_t number = learn_tenant(places, tenant, tenant_bytes);
    if (number < 0) return false;
    struct place_of *place = look_up(places, (uint32_t)number, sequence_id);
    places->used += !place->used;
    *place = (struct place_of){sequence_id, (uint32_t)number, column, generation, true};
    return true;
}
