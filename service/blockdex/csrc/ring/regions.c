#include "ring/regions.h"

struct region *regions_add(struct regions *regions, char *memory, uint64_t bytes, bool on_device, void *owner) {
    for (uint32_t entry = 0; entry < MAX_REGIONS; entry++) {
        struct region *region = &regions->table[entry];
        if (region->in_use) continue;
        uint32_t id = region->id ? region->id + MAX_REGIONS : entry + 1;
        if (!id) id = MAX_REGIONS; /* 0 is the arena */
        *region = (struct region){
            .id = id, .in_use = true, .on_device = on_device, .memory = memory, .bytes = bytes, .owner = owner};
        return region;
    }
    return NULL;
}

struct region *regions_find(struct regions *regions, uint32_t id) {
    struct region *region = &regions->table[(id - 1) % MAX_REGIONS];
    return region->in_use && region->id == id ? region : NULL;
}
