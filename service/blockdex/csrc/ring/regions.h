/* Memory that a client shares with the engine beside its segment, by number. Nothing here knows Python. */
#ifndef BLOCKDEX_REGIONS_H
#define BLOCKDEX_REGIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_REGIONS = 256 };

/* One region. A number comes again only after its entry was used 2^24 times. */
struct region {
    uint32_t id;       /* of the last region that was entered here */
    uint32_t requests; /* on their way, that read or write it */
    bool in_use;
    bool given_back; /* no request may name it any more */
    bool on_device;  /* its addresses are the device's, not the host's */
    char *memory;
    uint64_t bytes;
    void *owner; /* keeps the memory */
};

/* The regions of one link. */
struct regions {
    struct region table[MAX_REGIONS];
};

/* A free entry, with a number of its own; NULL while there is none. */
struct region *regions_add(struct regions *regions, char *memory, uint64_t bytes, bool on_device, void *owner);

/* The region of a number, given back or not; NULL where the link has none. */
struct region *regions_find(struct regions *regions, uint32_t id);

#endif
