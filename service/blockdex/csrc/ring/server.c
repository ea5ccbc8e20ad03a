#include "ring/server.h"

#include <assert.h>
#include <stdlib.h>

/* Its own cache lines: the header has a page. */
enum { HEADER_BYTES = 4096 };

static bool is_inside(uint64_t size, uint64_t offset, uint64_t bytes) {
    return offset % 64 == 0 && offset >= HEADER_BYTES && offset <= size && bytes <= size - offset;
}

static bool are_slots(uint64_t size, uint64_t offset, uint64_t slots) {
    /* Counters run on through 2^64, so their number has to divide it. */
    return slots && !(slots & (slots - 1)) && slots <= 1u << 24 && is_inside(size, offset, slots * BLOCKDEX_SLOT_BYTES);
}

bool line_open(struct line *line, void *memory, uint64_t bytes, const struct segment_layout *layout, int bell,
               int own_bell) {
    char *begin = memory;
    if (bytes < HEADER_BYTES || (uintptr_t)memory % 128 ||
        !are_slots(bytes, layout->requests_at, layout->request_slots) ||
        !are_slots(bytes, layout->answers_at, layout->answer_slots) ||
        !is_inside(bytes, layout->request_arena_at, layout->request_arena_bytes) ||
        !is_inside(bytes, layout->answer_arena_at, layout->answer_arena_bytes) || !layout->answer_arena_bytes ||
        layout->answer_arena_bytes % 64)
        return false;
    *line = (struct line){
        .header = memory,
        .requests = begin + layout->requests_at,
        .answers = begin + layout->answers_at,
        .request_arena = begin + layout->request_arena_at,
        .answer_arena = begin + layout->answer_arena_at,
        .request_slots = layout->request_slots,
        .answer_slots = layout->answer_slots,
        .request_arena_bytes = layout->request_arena_bytes,
        .answer_arena_bytes = layout->answer_arena_bytes,
        .bell = bell,
        .own_bell = own_bell,
    };
    line->last_unwritten = &line->first_unwritten;
    return true;
}

static void forget_unwritten(struct line *line) {
    for (struct unwritten *left = line->first_unwritten, *next; left; left = next) {
        next = left->next;
        free(left);
    }
    line->first_unwritten = NULL;
    line->last_unwritten = &line->first_unwritten;
}

void line_close(struct line *line) { forget_unwritten(line); }

int64_t line_filled(const struct line *line) {
    uint64_t filled = atomic_load_explicit(&line->header->requests_written, memory_order_acquire) - line->read;
    return filled <= line->request_slots ? (int64_t)filled : -1;
}

uint64_t line_longest(const struct line *line) { return line->answer_arena_bytes / 2; }

const struct blockdex_request *line_head(const struct line *line) {
    return (const void *)(line->requests + line->read % line->request_slots * BLOCKDEX_SLOT_BYTES);
}

void line_release(struct line *line) {
    atomic_store_explicit(&line->header->requests_read, ++line->read, memory_order_release);
}

/* Extents of the answers' arena are given back in order, round and round; positions count bytes from the beginning. */
static bool take_extent(struct line *line, uint64_t bytes, struct claim *claim) {
    uint64_t freed = atomic_load_explicit(&line->header->answer_bytes_freed, memory_order_acquire);
    uint64_t size = line->answer_arena_bytes, begin = line->arena_end, wanted = blockdex_aligned(bytes);
    uint64_t to_the_edge = size - begin % size;
    if (bytes > size) return false;
    if (begin - freed > size) return false; /* no such position: only who harms itself says that */
    /* From the front again where nothing is in use, so that memory which was never needed is never touched. */
    bool unused = freed == begin && to_the_edge + wanted <= size;
    if (wanted > to_the_edge || unused) begin += to_the_edge;
    if (begin + wanted - freed > size) return false;
    line->arena_end = claim->end = begin + wanted;
    claim->offset = begin % size;
    assert(claim->offset % 64 == 0 && claim->offset + wanted <= size);
    claim->payload = line->answer_arena + claim->offset;
    return true;
}

bool line_claim(struct line *line, uint64_t bytes, struct claim *claim) {
    uint64_t taken = line->written - atomic_load_explicit(&line->header->answers_read, memory_order_acquire);
    if (taken >= line->answer_slots) return false;
    *claim = (struct claim){.payload = line->answer_arena};
    if (bytes && !take_extent(line, bytes, claim)) return false;
    claim->slot = (void *)(line->answers + line->written++ % line->answer_slots * BLOCKDEX_SLOT_BYTES);
    line->changed = true;
    return true;
}

static bool write_answer(struct line *line, const struct blockdex_answer *numbers, const void *payload) {
    struct claim claim;
    if (!line_claim(line, numbers->payload_bytes, &claim)) return false;
    memcpy(claim.payload, payload, numbers->payload_bytes);
    struct blockdex_answer answer = *numbers;
    answer.payload_offset = claim.offset;
    answer.payload_end = claim.end;
    memcpy(claim.slot, &answer, sizeof answer);
    return true;
}

bool line_answer(struct line *line, struct blockdex_answer numbers, const void *payload, uint64_t bytes) {
    if (line->gone) return true;
    numbers.payload_bytes = bytes;
    if (!line->first_unwritten && write_answer(line, &numbers, payload)) return true;
    struct unwritten *left = malloc(sizeof *left + bytes);
    if (!left) return false;
    left->next = NULL;
    left->numbers = numbers;
    memcpy(left->payload, payload, bytes);
    *line->last_unwritten = left;
    line->last_unwritten = &left->next;
    return true;
}

static void write_unwritten(struct line *line) {
    struct unwritten *left;
    while ((left = line->first_unwritten) && write_answer(line, &left->numbers, left->payload)) {
        if (!(line->first_unwritten = left->next)) line->last_unwritten = &line->first_unwritten;
        free(left);
    }
}

void line_publish(struct line *line) {
    if (line->gone) {
        forget_unwritten(line);
        return;
    }
    if (line->first_unwritten) {
        write_unwritten(line);
        if (line->first_unwritten) {
            line_wait_for_room(line);
            write_unwritten(line); /* room may have come just before that was said */
        }
    }
    if (!line->changed) return;
    line->changed = false;
    blockdex_show(&line->header->answers_written, line->written, &line->header->client_sleeps, line->bell);
}

void line_wait_for_room(struct line *line) {
    atomic_store_explicit(&line->header->engine_waits_for_room, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
}

bool line_is_heard(const struct line *line) { return !line->gone && !line->first_unwritten && !line->crowded; }

bool line_is_for_python(const struct line *line) { return line->waits && line_is_heard(line); }

bool line_has_room_again(const struct line *line) {
    return line->crowded && !atomic_load_explicit(&line->header->engine_waits_for_room, memory_order_acquire);
}

bool line_lie_down(struct line *line) {
    bool nothing = blockdex_may_sleep(&line->header->engine_sleeps, &line->header->requests_written, line->read);
    return nothing || line->waits || !line_is_heard(line);
}

void line_get_up(struct line *line) { blockdex_awake(&line->header->engine_sleeps); }
