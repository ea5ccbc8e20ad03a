/* Where the tensors of a request lie: in the arenas, or in regions that its link shares. */
#include "core/core.h"

enum { INVALID_ARGUMENT = 3 };

struct source {
    const char *name;
    uint32_t region;
    uint64_t offset, bytes;
};

#define REFUSE(...) (core_refuse_slot(core, link, slot, now, INVALID_ARGUMENT, "INVALID_REGION", __VA_ARGS__), false)
#define REGION(more) META "region=%2$u" more

static bool find(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now,
                 const struct source *source, struct region **found) {
    const unsigned long long offset = source->offset, bytes = source->bytes;
    if (!source->region)
        return !offset || REFUSE("%1$s_offset: must be 0 where %1$s_region is 0, got %2$llu" META "offset=%2$llu",
                                 source->name, offset);
    if (!bytes)
        return REFUSE("%1$s_region: the request has no %1$s, got %2$u" REGION(""), source->name, source->region);
    struct region *region = regions_find(&link->regions, source->region);
    if (!region || region->given_back)
        return REFUSE("%1$s_region: the link has no region %2$u" REGION(""), source->name, source->region);
    if (offset % 64)
        return REFUSE("%1$s_offset: must be a multiple of 64, got %3$llu" REGION(META "offset=%3$llu"), source->name,
                      source->region, offset);
    if (bytes > region->bytes || offset > region->bytes - bytes)
        return REFUSE("%1$s: %3$llu bytes at %4$llu are not in region %2$u of %5$llu" REGION(
                          META "bytes=%3$llu" META "offset=%4$llu" META "region_bytes=%5$llu"),
                      source->name, source->region, bytes, offset, (unsigned long long)region->bytes);
    *found = region;
    return true;
}

bool core_find_sources(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now,
                       struct request *request, uint64_t ids_bytes) {
    const bool has_tokens = slot->kind == BLOCKDEX_TOKENS;
    const struct source sources[NUM_SOURCES] = {
        {"keys", slot->keys_region, slot->keys_offset, has_tokens ? slot->keys_bytes : 0},
        {"queries", slot->queries_region, slot->queries_offset, has_tokens ? slot->queries_bytes : 0},
        {"block_ids", slot->block_ids_region, slot->block_ids_offset, ids_bytes},
        {"scores", slot->scores_region, slot->scores_offset, core_is_scored(slot) ? ids_bytes : 0},
    };
    for (int number = 0; number < NUM_SOURCES; number++) {
        struct region *region = NULL;
        if (!find(core, link, slot, now, &sources[number], &region)) return false;
        request->regions[number] = region;
        if (region) request->tensors[number] = region->memory + sources[number].offset;
    }
    return true;
}

void core_use_regions(struct request *request) {
    for (int number = 0; number < NUM_SOURCES; number++)
        if (request->regions[number]) request->regions[number]->requests++;
}

void core_leave_regions(struct core *core, struct request *request) {
    for (int number = 0; number < NUM_SOURCES; number++) {
        struct region *region = request->regions[number];
        /* Python waits for the last request that uses a region which was given back. */
        if (region && !--region->requests && region->given_back)
            atomic_store_explicit(&core->noticed, 1, memory_order_release);
    }
}

bool core_is_on_device(const struct request *request, int number) {
    return request->regions[number] && request->regions[number]->on_device;
}
