/* Room for what requests carry: extents that are given back in any order, since some requests wait and others do
 * not. The lowest hole that is wide enough is taken, so that memory which was never needed is never touched. */
#ifndef BLOCKDEX_ARENA_H
#define BLOCKDEX_ARENA_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct blockdex_extent {
    uint64_t offset, bytes;
};

/* The holes, by rising offset; no two touch. */
struct blockdex_arena {
    struct blockdex_extent *holes;
    size_t num_holes;
};

/* An arena of that many bytes. `holes` has room for one more than the extents that are taken at a time: between any
 * two holes lies an extent. */
static inline void blockdex_arena_open(struct blockdex_arena *arena, struct blockdex_extent *holes, uint64_t bytes) {
    arena->holes = holes;
    arena->holes[0].offset = 0;
    arena->holes[0].bytes = bytes;
    arena->num_holes = 1;
}

static inline void blockdex_arena_remove_hole(struct blockdex_arena *arena, size_t at) {
    memmove(&arena->holes[at], &arena->holes[at + 1], (--arena->num_holes - at) * sizeof *arena->holes);
}

/* An extent has 64 bytes at least, and a multiple of them; false where no hole is wide enough. */
static inline bool blockdex_arena_take(struct blockdex_arena *arena, uint64_t bytes, struct blockdex_extent *taken) {
    if (bytes > UINT64_MAX - 63) return false;
    uint64_t wanted = ((bytes ? bytes : 1) + 63) / 64 * 64;
    for (size_t at = 0; at < arena->num_holes; at++) {
        struct blockdex_extent *hole = &arena->holes[at];
        if (hole->bytes < wanted) continue;
        assert(hole->offset % 64 == 0);
        taken->offset = hole->offset;
        taken->bytes = wanted;
        hole->offset += wanted;
        hole->bytes -= wanted;
        if (!hole->bytes) blockdex_arena_remove_hole(arena, at);
        return true;
    }
    return false;
}

/* The first hole behind an offset. */
static inline size_t blockdex_arena_hole_behind(const struct blockdex_arena *arena, uint64_t offset) {
    size_t low = 0, high = arena->num_holes;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (arena->holes[middle].offset < offset)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static inline void blockdex_arena_give_back(struct blockdex_arena *arena, struct blockdex_extent taken) {
    size_t at = blockdex_arena_hole_behind(arena, taken.offset);
    assert(at == arena->num_holes || taken.offset + taken.bytes <= arena->holes[at].offset);
    assert(!at || arena->holes[at - 1].offset + arena->holes[at - 1].bytes <= taken.offset);
    if (at < arena->num_holes && taken.offset + taken.bytes == arena->holes[at].offset) {
        taken.bytes += arena->holes[at].bytes;
        blockdex_arena_remove_hole(arena, at);
    }
    if (at && arena->holes[at - 1].offset + arena->holes[at - 1].bytes == taken.offset) {
        arena->holes[at - 1].bytes += taken.bytes;
        return;
    }
    memmove(&arena->holes[at + 1], &arena->holes[at], (arena->num_holes++ - at) * sizeof *arena->holes);
    arena->holes[at] = taken;
}

#endif
