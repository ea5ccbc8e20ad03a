#include "core/pair_index.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { FEWEST = 256, MOST_KEPT = 1 << 16 };

static uint64_t key[2];

static void draw_key(void) {
    size_t drawn = 0;
    while (drawn < sizeof key) {
        ssize_t more = getrandom((char *)key + drawn, sizeof key - drawn, 0);
        if (more > 0) drawn += (size_t)more;
    }
}

static uint64_t rotated(uint64_t word, int bits) { return word << bits | word >> (64 - bits); }

static void mix(uint64_t v[4]) {
    v[0] += v[1];
    v[1] = rotated(v[1], 13) ^ v[0];
    v[0] = rotated(v[0], 32);
    v[2] += v[3];
    v[3] = rotated(v[3], 16) ^ v[2];
    v[0] += v[3];
    v[3] = rotated(v[3], 21) ^ v[0];
    v[2] += v[1];
    v[1] = rotated(v[1], 17) ^ v[2];
    v[2] = rotated(v[2], 32);
}

uint64_t keyed_hash(const void *bytes, size_t count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, draw_key);
    uint64_t v[4] = {key[0] ^ UINT64_C(0x736f6d6570736575), key[1] ^ UINT64_C(0x646f72616e646f6d),
                     key[0] ^ UINT64_C(0x6c7967656e657261), key[1] ^ UINT64_C(0x7465646279746573)};
    const char *at = bytes;
    size_t left = count;
    for (; left >= 8; left -= 8, at += 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        v[3] ^= word;
        mix(v);
        v[0] ^= word;
    }
    uint64_t last = 0;
    memcpy(&last, at, left);
    last |= (uint64_t)count << 56;
    v[3] ^= last;
    mix(v);
    v[0] ^= last;
    v[2] ^= 0xff;
    for (int round = 0; round < 3; round++) mix(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

static size_t place_of(const struct pair_index *index, uint64_t owner, uint64_t id) {
    const uint64_t pair[2] = {owner, id};
    return (size_t)keyed_hash(pair, sizeof pair) & (index->capacity - 1);
}

/* The pair's slot, or the unused one where it would go. */
static struct pair_slot *look_up(const struct pair_index *index, uint64_t owner, uint64_t id) {
    assert(index->used < index->capacity); /* else this would not end */
    for (size_t at = place_of(index, owner, id);; at++) {
        struct pair_slot *slot = &index->slots[at & (index->capacity - 1)];
        if (!slot->used || (slot->owner == owner && slot->id == id)) return slot;
    }
}

const uint32_t *pair_index_find(const struct pair_index *index, uint64_t owner, uint64_t id) {
    if (!index->used) return NULL;
    const struct pair_slot *slot = look_up(index, owner, id);
    return slot->used ? &slot->value : NULL;
}

static bool resize(struct pair_index *index, size_t capacity) {
    struct pair_index wider = {calloc(capacity, sizeof *wider.slots), capacity, index->used};
    if (!wider.slots) return false;
    for (size_t at = 0; at < index->capacity; at++) {
        const struct pair_slot *slot = &index->slots[at];
        if (slot->used) *look_up(&wider, slot->owner, slot->id) = *slot;
    }
    free(index->slots);
    *index = wider;
    return true;
}

bool pair_index_set(struct pair_index *index, uint64_t owner, uint64_t id, uint32_t value) {
    if (2 * (index->used + 1) > index->capacity && !resize(index, index->capacity ? 2 * index->capacity : FEWEST))
        return false;
    struct pair_slot *slot = look_up(index, owner, id);
    index->used += !slot->used;
    *slot = (struct pair_slot){owner, id, value, true};
    return true;
}

void pair_index_remove(struct pair_index *index, uint64_t owner, uint64_t id) {
    if (!pair_index_find(index, owner, id)) return;
    const size_t mask = index->capacity - 1;
    size_t hole = (size_t)(look_up(index, owner, id) - index->slots);
    /* Those behind it move up, unless they would come before the place where they are looked for first. */
    for (size_t at = hole + 1; index->slots[at & mask].used; at++) {
        const struct pair_slot *slot = &index->slots[at & mask];
        size_t wanted = place_of(index, slot->owner, slot->id);
        if (((at - wanted) & mask) < ((at - hole) & mask)) continue;
        index->slots[hole & mask] = *slot;
        hole = at;
    }
    index->slots[hole & mask].used = false;
    index->used--;
    if (index->capacity > FEWEST && 8 * index->used < index->capacity)
        (void)resize(index, index->capacity / 2); /* without memory it stays as it is */
}

void pair_index_clear(struct pair_index *index) {
    if (index->capacity > MOST_KEPT) {
        pair_index_free(index);
        return;
    }
    if (index->used) memset(index->slots, 0, index->capacity * sizeof *index->slots);
    index->used = 0;
}

void pair_index_free(struct pair_index *index) {
    free(index->slots);
    *index = (struct pair_index){0};
}
