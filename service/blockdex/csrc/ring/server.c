#include "ring/server.h"

#include <assert.h>
#include <stdlib.h>

bool server_link_open(struct server_link *link, void *memory, uint64_t bytes, const struct segment_layout *layout,
                      int bell, int own_bell) {
    char *begin = memory;
    if (bytes < BLOCKDEX_HEADER_BYTES || (uintptr_t)memory % 128 ||
        !blockdex_are_slots(bytes, layout->requests_at, layout->request_slots) ||
        !blockdex_are_slots(bytes, layout->answers_at, layout->answer_slots) ||
        !blockdex_is_inside(bytes, layout->request_arena_at, layout->request_arena_bytes) ||
        !blockdex_is_inside(bytes, layout->answer_arena_at, layout->answer_arena_bytes) ||
        !layout->answer_arena_bytes || layout->answer_arena_bytes % 64)
        return false;
    *link = (struct server_link){
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
    link->last_unwritten = &link->first_unwritten;
    return true;
}

bool server_link_make_channel(struct server_link *link, const struct region *memory, int64_t bound, uint64_t epoch) {
    if (memory->bytes < BLOCKDEX_HEADER_BYTES || bound < 1) return false;
    struct blockdex_header *header = link->header;
    link->channel = (struct channel){
        .bound = bound, .epoch = epoch, .answered = (void *)memory->memory, .on_device = memory->on_device};
    link->read = atomic_load_explicit(&header->requests_written, memory_order_acquire);
    link->written = atomic_load_explicit(&header->answers_read, memory_order_acquire);
    link->arena_end = atomic_load_explicit(&header->answer_bytes_freed, memory_order_acquire);
    atomic_store_explicit(&header->requests_read, link->read, memory_order_release);
    return true;
}

static void forget_unwritten(struct server_link *link) {
    for (struct unwritten *left = link->first_unwritten, *next; left; left = next) {
        next = left->next;
        free(left);
    }
    link->first_unwritten = NULL;
    link->last_unwritten = &link->first_unwritten;
}

void server_link_close(struct server_link *link) { forget_unwritten(link); }

int64_t server_link_filled(const struct server_link *link) {
    uint64_t filled = atomic_load_explicit(&link->header->requests_written, memory_order_acquire) - link->read;
    return filled <= link->request_slots ? (int64_t)filled : -1;
}

uint64_t server_link_longest(const struct server_link *link) { return link->answer_arena_bytes / 2; }

const struct blockdex_request *server_link_head(const struct server_link *link) {
    return (const void *)(link->requests + link->read % link->request_slots * BLOCKDEX_SLOT_BYTES);
}

void server_link_release(struct server_link *link) {
    atomic_store_explicit(&link->header->requests_read, ++link->read, memory_order_release);
}

/* Extents of the answers' arena are given back in order, round and round; positions count bytes from the beginning. */
static bool take_extent(struct server_link *link, uint64_t bytes, struct claim *claim) {
    uint64_t freed = atomic_load_explicit(&link->header->answer_bytes_freed, memory_order_acquire);
    uint64_t size = link->answer_arena_bytes, begin = link->arena_end, wanted = blockdex_aligned(bytes);
    uint64_t to_the_edge = size - begin % size;
    if (bytes > size) return false;
    if (begin - freed > 2 * size) return false; /* no such position: only who harms itself says that */
    if (freed < link->used_from) freed = link->used_from;
    /* From the front again where nothing is in use, so that memory which was never needed is never touched. */
    bool unused = freed == begin && to_the_edge + wanted <= size;
    if (wanted > to_the_edge || unused) begin += to_the_edge;
    if (unused) link->used_from = freed = begin; /* what was passed over is free, though nobody gives it back yet */
    if (begin + wanted - freed > size) return false;
    link->arena_end = claim->end = begin + wanted;
    claim->offset = begin % size;
    assert(claim->offset % 64 == 0 && claim->offset + wanted <= size);
    claim->payload = link->answer_arena + claim->offset;
    return true;
}

bool server_link_claim(struct server_link *link, uint64_t bytes, struct claim *claim) {
    uint64_t taken = link->written - atomic_load_explicit(&link->header->answers_read, memory_order_acquire);
    if (taken >= link->answer_slots) return false;
    *claim = (struct claim){.payload = link->answer_arena};
    if (bytes && !take_extent(link, bytes, claim)) return false;
    claim->slot = (void *)(link->answers + link->written++ % link->answer_slots * BLOCKDEX_SLOT_BYTES);
    link->changed = true;
    return true;
}

static bool write_answer(struct server_link *link, const struct blockdex_answer *numbers, const void *payload) {
    struct claim claim;
    if (!server_link_claim(link, numbers->payload_bytes, &claim)) return false;
    if (numbers->payload_bytes) memcpy(claim.payload, payload, numbers->payload_bytes);
    struct blockdex_answer answer = *numbers;
    answer.payload_offset = claim.offset;
    answer.payload_end = claim.end;
    memcpy(claim.slot, &answer, sizeof answer);
    return true;
}

bool server_link_answer(struct server_link *link, struct blockdex_answer numbers, const void *payload, uint64_t bytes) {
    if (link->gone) return true;
    numbers.payload_bytes = bytes;
    if (!link->first_unwritten && write_answer(link, &numbers, payload)) return true;
    struct unwritten *left = malloc(sizeof *left + bytes);
    if (!left) return false;
    left->next = NULL;
    left->numbers = numbers;
    if (bytes) memcpy(left->payload, payload, bytes);
    *link->last_unwritten = left;
    link->last_unwritten = &left->next;
    return true;
}

static void write_unwritten(struct server_link *link) {
    struct unwritten *left;
    while ((left = link->first_unwritten) && write_answer(link, &left->numbers, left->payload)) {
        if (!(link->first_unwritten = left->next)) link->last_unwritten = &link->first_unwritten;
        free(left);
    }
}

void server_link_publish(struct server_link *link) {
    if (link->gone) {
        forget_unwritten(link);
        return;
    }
    if (link->first_unwritten) {
        write_unwritten(link);
        if (link->first_unwritten) {
            server_link_wait_for_room(link);
            write_unwritten(link); /* room may have come just before that was said */
        }
    }
    if (!link->changed) return;
    link->changed = false;
    blockdex_show(&link->header->answers_written, link->written, &link->header->client_sleeps, link->bell);
}

void server_link_wait_for_room(struct server_link *link) {
    atomic_store_explicit(&link->header->engine_waits_for_room, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
}

bool server_link_is_heard(const struct server_link *link) {
    return !link->gone && !link->first_unwritten && !link->crowded;
}

bool server_link_is_for_python(const struct server_link *link) { return link->waits && server_link_is_heard(link); }

bool server_link_has_room_again(const struct server_link *link) {
    return link->crowded && !atomic_load_explicit(&link->header->engine_waits_for_room, memory_order_acquire);
}

bool server_link_lie_down(struct server_link *link) {
    bool nothing = blockdex_may_sleep(&link->header->engine_sleeps, &link->header->requests_written, link->read);
    return nothing || link->waits || !server_link_is_heard(link);
}

void server_link_get_up(struct server_link *link) { blockdex_awake(&link->header->engine_sleeps); }
