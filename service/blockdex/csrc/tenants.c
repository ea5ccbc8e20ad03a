#include "tenants.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { FEWEST_TENANTS = 16 };

/* A free number, linked to the next one; 0 without memory. */
static uint32_t take_number(struct tenants *tenants) {
    if (!tenants->first_free) {
        uint32_t old = tenants->count, more = old ? 2 * old : (uint32_t)FEWEST_TENANTS;
        struct tenant *all = realloc(tenants->all, more * sizeof *all);
        if (!all) return 0;
        memset(all + old, 0, (more - old) * sizeof *all);
        for (uint32_t number = more - 1; number > 0 && number >= old; number--) {
            all[number].next = tenants->first_free;
            tenants->first_free = number;
        }
        tenants->all = all;
        tenants->count = more;
    }
    uint32_t number = tenants->first_free;
    tenants->first_free = tenants->all[number].next;
    return number;
}

static void give_number_back(struct tenants *tenants, uint32_t number) {
    tenants->all[number] = (struct tenant){.next = tenants->first_free};
    tenants->first_free = number;
}

/* Weights other than 1; set before tenants come, and read by any thread. */
static struct weight {
    char *name;
    size_t bytes;
    double weight;
} *weights;
static size_t num_weights;

static double weight_of(const char *name, size_t bytes) {
    for (size_t number = 0; number < num_weights; number++)
        if (weights[number].bytes == bytes && !memcmp(weights[number].name, name, bytes)) return weights[number].weight;
    return 1;
}

bool tenants_set_weight(const char *name, size_t bytes, double weight) {
    for (size_t number = 0; number < num_weights; number++) {
        if (weights[number].bytes != bytes || memcmp(weights[number].name, name, bytes)) continue;
        weights[number].weight = weight;
        return true;
    }
    struct weight *more = realloc(weights, (num_weights + 1) * sizeof *more);
    if (!more) return false;
    weights = more;
    char *copy = malloc(bytes + 1);
    if (!copy) return false;
    memcpy(copy, name, bytes);
    weights[num_weights++] = (struct weight){copy, bytes, weight};
    return true;
}

uint32_t tenants_use(struct tenants *tenants, const char *name, size_t bytes) {
    const uint64_t hash = keyed_hash(name, bytes);
    const uint32_t *found = pair_index_find(&tenants->by_name, hash, bytes);
    const uint32_t first = found ? *found : 0;
    for (uint32_t number = first; number; number = tenants->all[number].next) {
        struct tenant *tenant = &tenants->all[number];
        if (memcmp(tenant->name, name, bytes)) continue;
        tenant->uses++;
        return number;
    }
    char *copy = malloc(bytes + 1); /* none takes no memory, which malloc may say with NULL */
    uint32_t number = copy ? take_number(tenants) : 0;
    if (number && pair_index_set(&tenants->by_name, hash, bytes, number)) {
        memcpy(copy, name, bytes);
        tenants->all[number] = (struct tenant){copy, bytes, 1, first, weight_of(name, bytes)};
        return number;
    }
    if (number) give_number_back(tenants, number);
    free(copy);
    return 0;
}

void tenants_release(struct tenants *tenants, uint32_t number) {
    struct tenant *tenant = &tenants->all[number];
    assert(tenant->uses > 0);
    if (--tenant->uses) return;
    const uint64_t hash = keyed_hash(tenant->name, tenant->bytes);
    const uint32_t first = *pair_index_find(&tenants->by_name, hash, tenant->bytes);
    if (first == number) {
        if (tenant->next)
            (void)pair_index_set(&tenants->by_name, hash, tenant->bytes,
                                 tenant->next); /* it is there: no memory needed */
        else
            pair_index_remove(&tenants->by_name, hash, tenant->bytes);
    } else {
        uint32_t before = first;
        while (tenants->all[before].next != number) before = tenants->all[before].next;
        tenants->all[before].next = tenant->next;
    }
    free(tenant->name);
    give_number_back(tenants, number);
}

uint32_t tenants_find(const struct tenants *tenants, const char *name, size_t bytes) {
    const uint32_t *found = pair_index_find(&tenants->by_name, keyed_hash(name, bytes), bytes);
    uint32_t number = found ? *found : 0;
    while (number && memcmp(tenants->all[number].name, name, bytes)) number = tenants->all[number].next;
    return number;
}

void tenants_close(struct tenants *tenants) {
    for (uint32_t number = 0; number < tenants->count; number++) free(tenants->all[number].name);
    free(tenants->all);
    pair_index_free(&tenants->by_name);
}
