/* Room for what requests carry: extents that are given back in any order, since some requests wait and others do
 * not. */
#ifndef BLOCKDEX_ARENA_H
#define BLOCKDEX_ARENA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct extent {
    uint64_t offset, bytes;
};

/* The holes, by rising offset; no two touch. */
struct arena {
    struct extent *holes;
    size_t num_holes;
};

/* An arena of that many bytes out of which at most `most` extents are taken at a time; false without memory. */
bool arena_open(struct arena *arena, uint64_t bytes, size_t most);
void arena_close(struct arena *arena);

/* The lowest hole that is wide enough is taken, so that memory which was never needed is never touched. An extent
 * has 64 bytes at least, and a multiple of them; false where no hole is wide enough. */
bool arena_take(struct arena *arena, uint64_t bytes, struct extent *taken);
void arena_give_back(struct arena *arena, struct extent taken);

#endif
