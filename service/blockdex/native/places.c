#include "places.h"

#include <stdlib.h>
#include <string.h>

enum { FEWEST = 256 };

static size_t spread(uint32_t tenant, uint64_t sequence_id) {
    /* Ids are often numbers one after the other; the multiplier is 2^64 divided by the golden ratio. */
    uint64_t mixed = (sequence_id ^ ((uint64_t)tenant << 32)) * UINT64_C(0x9e3779b97f4a7c15);
    return (size_t)(mixed ^ mixed >> 32);
}

static void forget_tenants(struct places *places) {
    for (uint32_t tenant = 0; tenant < places->num_tenants; tenant++) free(places->tenants[tenant].name);
    places->num_tenants = 0;
}

bool places_reset(struct places *places, size_t sequences) {
    size_t capacity = FEWEST;
    while (capacity < 4 * sequences) capacity *= 2;
    forget_tenants(places);
    places->used = 0;
    if (capacity == places->capacity) {
        memset(places->table, 0, capacity * sizeof *places->table);
        return true;
    }
    struct place_of *table = calloc(capacity, sizeof *table);
    if (!table) return false;
    free(places->table);
    places->table = table;
    places->capacity = capacity;
    return true;
}

void places_free(struct places *places) {
    forget_tenants(places);
    free(places->tenants);
    free(places->table);
}

int64_t places_tenant(const struct places *places, const char *name, size_t bytes) {
    for (uint32_t tenant = 0; tenant < places->num_tenants; tenant++) {
        const struct tenant *known = &places->tenants[tenant];
        if (known->bytes == bytes && !memcmp(known->name, name, bytes)) return tenant;
    }
    return -1;
}

static struct place_of *look_up(const struct places *places, uint32_t tenant, uint64_t sequence_id) {
    size_t at = spread(tenant, sequence_id);
    for (;; at++) {
        struct place_of *place = &places->table[at & (places->capacity - 1)];
        if (!place->used || (place->sequence_id == sequence_id && place->tenant == tenant)) return place;
    }
}

const struct place_of *places_find(const struct places *places, uint32_t tenant, uint64_t sequence_id) {
    const struct place_of *place = look_up(places, tenant, sequence_id);
    return place->used ? place : NULL;
}

static int64_t add_tenant(struct places *places, const char *name, size_t bytes) {
    if (places->num_tenants == places->room_for_tenants) {
        uint32_t room = places->room_for_tenants ? 2 * places->room_for_tenants : 16;
        struct tenant *tenants = realloc(places->tenants, room * sizeof *tenants);
        if (!tenants) return -1;
        places->tenants = tenants;
        places->room_for_tenants = room;
    }
    char *copy = malloc(bytes + 1); /* none takes no memory, which malloc may say with NULL */
    if (!copy) return -1;
    memcpy(copy, name, bytes);
    places->tenants[places->num_tenants] = (struct tenant){copy, bytes};
    return places->num_tenants++;
}

bool places_learn(struct places *places, const char *tenant, size_t tenant_bytes, uint64_t sequence_id, uint32_t column,
                  uint32_t generation) {
    if (2 * places->used >= places->capacity) {
        /* Most of them may be closed by now. Those that are not are learnt again with their next request. */
        forget_tenants(places);
        memset(places->table, 0, places->capacity * sizeof *places->table);
        places->used = 0;
    }
    int64_t number = places_tenant(places, tenant, tenant_bytes);
    if (number < 0) number = add_tenant(places, tenant, tenant_bytes);
    if (number < 0) return false;
    struct place_of *place = look_up(places, (uint32_t)number, sequence_id);
    places->used += !place->used;
    *place = (struct place_of){sequence_id, (uint32_t)number, column, generation, true};
    return true;
}
