/* The client's arena and its in-flight table, beside the plainest thing that does the same. argv: how many steps. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ring/inflight.h"

enum { BLOCKS = 64, MOST = 32, OWNERS = 4, NUMBERS = 8 };

static uint64_t state = 1;

static uint64_t draw(uint64_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % below;
}

static void check(bool holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

/* The lowest run of so many free blocks; -1 where there is none. */
static int lowest(const bool taken[BLOCKS], uint64_t blocks) {
    for (uint64_t at = 0, run = 0; at < BLOCKS; at++) {
        run = taken[at] ? 0 : run + 1;
        if (run == blocks) return (int)(at + 1 - blocks);
    }
    return -1;
}

static void mark(bool taken[BLOCKS], struct blockdex_extent extent, bool as) {
    check(extent.offset % 64 == 0 && extent.bytes % 64 == 0 && extent.bytes, "an extent is not aligned");
    check(extent.offset + extent.bytes <= 64 * BLOCKS, "an extent is not in the arena");
    for (uint64_t at = extent.offset / 64; at < (extent.offset + extent.bytes) / 64; at++) {
        check(taken[at] != as, as ? "an extent lies where another one is" : "an extent is given back twice");
        taken[at] = as;
    }
}

static void use_arena(uint64_t steps) {
    struct blockdex_extent holes[MOST + 1];
    struct blockdex_arena arena;
    struct blockdex_extent held[MOST], extent;
    bool taken[BLOCKS] = {false};
    size_t count = 0;
    blockdex_arena_open(&arena, holes, 64 * BLOCKS);
    check(!blockdex_arena_take(&arena, UINT64_MAX, &extent) && !blockdex_arena_take(&arena, 64 * BLOCKS + 1, &extent),
          "too much was had");
    for (uint64_t step = 0; step < steps; step++) {
        uint64_t bytes = draw(64 * BLOCKS / 6);
        if (count < MOST && draw(2)) {
            int expected = lowest(taken, bytes ? (bytes + 63) / 64 : 1);
            bool got = blockdex_arena_take(&arena, bytes, &extent);
            check(got == (expected >= 0), "room that is there was not found, or the other way round");
            if (!got) continue;
            check(extent.offset == 64 * (uint64_t)expected, "not the lowest hole");
            mark(taken, extent, true);
            held[count++] = extent;
        } else if (count) {
            size_t which = draw(count);
            mark(taken, held[which], false);
            blockdex_arena_give_back(&arena, held[which]);
            held[which] = held[--count];
        }
    }
    while (count) blockdex_arena_give_back(&arena, held[--count]);
    check(arena.num_holes == 1 && arena.holes[0].bytes == 64 * BLOCKS, "not all came back");
}

/* A request as the test remembers it. */
struct known {
    uint64_t ticket, owner, number;
    bool owned;
};

static int owners[OWNERS];

static void check_known(const struct inflight *table, const struct known *known, size_t count) {
    uint32_t owned = 0;
    for (size_t at = 0; at < count; at++) {
        const struct pending *pending = inflight_with(table, known[at].ticket);
        check(pending && pending->number == known[at].number, "a request is not found by its ticket");
        check(pending->owner == (known[at].owned ? &owners[known[at].owner] : NULL), "a request has another owner");
        const struct pending *found = inflight_of(table, &owners[known[at].owner], known[at].number);
        check(!known[at].owned || found == pending, "a request is not found by its owner and number");
        owned += known[at].owned;
    }
    check(table->waiting == owned, "those that are waited for are miscounted");
    check(inflight_full(table) == (count == MOST), "full where there is room, or the other way round");
}

static void use_table(uint64_t steps) {
    struct inflight table;
    struct known known[MOST];
    size_t count = 0;
    uint64_t ended = 0;
    check(inflight_open(&table, MOST), "no memory");
    for (uint64_t step = 0; step < steps; step++) {
        uint64_t owner = draw(OWNERS), number = draw(NUMBERS);
        if (draw(2) && !inflight_full(&table) && !inflight_of(&table, &owners[owner], number)) {
            const struct pending *pending = inflight_begin(&table, &owners[owner], number, 0);
            check(pending->ticket && pending->ticket != ended, "a ticket is used again");
            known[count++] = (struct known){pending->ticket, owner, number, true};
        } else if (count) {
            struct known *one = &known[draw(count)];
            struct pending *pending = inflight_with(&table, one->ticket);
            check(inflight_disown(&table, pending) == (one->owned ? &owners[one->owner] : NULL), "another owner");
            one->owned = false;
            if (draw(2)) {
                ended = one->ticket;
                inflight_end(&table, pending);
                *one = known[--count];
                check(!inflight_with(&table, ended), "what was answered is in flight still");
            }
        }
        check_known(&table, known, count);
    }
    check(!inflight_with(&table, 0) && !inflight_with(&table, UINT64_MAX), "a ticket that was never given");
    inflight_close(&table);
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    uint64_t steps = strtoull(argv[1], NULL, 10);
    use_arena(steps);
    use_table(steps);
    puts("done");
    return 0;
}
