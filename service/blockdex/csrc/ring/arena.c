#include "ring/arena.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "blockdex_ring.h"

bool arena_open(struct arena *arena, uint64_t bytes, size_t most) {
    /* Between any two holes lies an extent. */
    arena->holes = calloc(most + 1, sizeof *arena->holes);
    if (!arena->holes) return false;
    arena->holes[0] = (struct extent){0, bytes};
    arena->num_holes = 1;
    return true;
}

void arena_close(struct arena *arena) {
    free(arena->holes);
    arena->holes = NULL;
}

static void remove_hole(struct arena *arena, size_t at) {
    memmove(&arena->holes[at], &arena->holes[at + 1], (--arena->num_holes - at) * sizeof *arena->holes);
}

bool arena_take(struct arena *arena, uint64_t bytes, struct extent *taken) {
    if (bytes > UINT64_MAX - 63) return false;
    uint64_t wanted = blockdex_aligned(bytes ? bytes : 1);
    for (size_t at = 0; at < arena->num_holes; at++) {
        struct extent *hole = &arena->holes[at];
        if (hole->bytes < wanted) continue;
        assert(hole->offset % 64 == 0);
        *taken = (struct extent){hole->offset, wanted};
        hole->offset += wanted;
        hole->bytes -= wanted;
        if (!hole->bytes) remove_hole(arena, at);
        return true;
    }
    return false;
}

/* The first hole behind an offset. */
static size_t hole_behind(const struct arena *arena, uint64_t offset) {
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

void arena_give_back(struct arena *arena, struct extent taken) {
    size_t at = hole_behind(arena, taken.offset);
    assert(at == arena->num_holes || taken.offset + taken.bytes <= arena->holes[at].offset);
    assert(!at || arena->holes[at - 1].offset + arena->holes[at - 1].bytes <= taken.offset);
    if (at < arena->num_holes && taken.offset + taken.bytes == arena->holes[at].offset) {
        taken.bytes += arena->holes[at].bytes;
        remove_hole(arena, at);
    }
    if (at && arena->holes[at - 1].offset + arena->holes[at - 1].bytes == taken.offset) {
        arena->holes[at - 1].bytes += taken.bytes;
        return;
    }
    memmove(&arena->holes[at + 1], &arena->holes[at], (arena->num_holes++ - at) * sizeof *arena->holes);
    arena->holes[at] = taken;
}
