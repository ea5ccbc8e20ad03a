/* Tenants by name and by number, for as long as something of theirs is there. Nothing here knows Python. */
#ifndef BLOCKDEX_TENANTS_H
#define BLOCKDEX_TENANTS_H

#include "core/pair_index.h"

/* A tenant's number is its index; it has one as long as it is used. */
struct tenant {
    char *name; /* NULL where there is none */
    size_t bytes, uses;
    uint32_t next; /* another one of the same hash, or the next free number; 0: none */
    double weight;
};

struct tenants {
    struct tenant *all; /* 0 is nobody's */
    uint32_t count, first_free;
    struct pair_index by_name;
};

/* The number of a tenant, which is used once more from now on; 0 without memory. */
uint32_t tenants_use(struct tenants *tenants, const char *name, size_t bytes);
void tenants_release(struct tenants *tenants, uint32_t number);

/* The number of a tenant that is used; 0 where it is not. */
uint32_t tenants_find(const struct tenants *tenants, const char *name, size_t bytes);
void tenants_close(struct tenants *tenants);

/* What a tenant weighs in this process, instead of 1: its share of room and time is to another's as its weight is to
 * theirs. It counts from the next time that it is used. False without memory. */
bool tenants_set_weight(const char *name, size_t bytes, double weight);

/* A tenant that has so much of something may have more as long as that is at most so many times what is left, times its
 * weight: there is always something left for who comes next, and the more ask the less each of them has. */
enum { TENANTS_SHARE = 8 };
static inline bool tenants_may_have(double weight, double has, double left) {
    return has < TENANTS_SHARE * weight * left;
}

#endif
