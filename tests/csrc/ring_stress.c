/* A client and an engine as two threads of one process, so that a sanitizer sees both ends of a link.
 * argv: how many requests. Each is answered with what it carries; both sides sleep whenever there is nothing for them. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "blockdex_client.h"
#include "ring/server.h"

enum { SLOTS = 16, ARENA = 4096, REQUESTS = SLOTS * 512, LARGEST = 448, PATIENCE = 10 };

static struct server_link side;
static struct blockdex_client client;
static struct blockdex_error error;
static uint64_t count;

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static uint64_t size_of(uint64_t number) { return 8 + 8 * (number * 7 % (LARGEST / 8)); }

/* Asks to close as many sequences as make a payload of that size, all of one id. */
static uint64_t ask(uint64_t number) {
    uint64_t ids[LARGEST / 8];
    const uint32_t count = (uint32_t)(size_of(number) / 8);
    for (uint32_t at = 0; at < count; at++) ids[at] = number;
    const struct blockdex_sequences close_all = {BLOCKDEX_CLOSE, count, ids, NULL, 0, 0, 0};
    const uint64_t ticket = blockdex_submit_sequences(&client, &close_all, PATIENCE, &error);
    if (!ticket) fail(error.message);
    return ticket;
}

/* The engine sends the payload back as block ids. */
static void hear(uint64_t ticket, uint64_t number) {
    struct blockdex_result result;
    uint64_t id;
    if (blockdex_wait(&client, ticket, PATIENCE, &result, &error) != BLOCKDEX_ANSWERED)
        fail("the client was not woken");
    if (4 * result.num_tokens != size_of(number)) fail("another answer");
    for (uint32_t at = 0; at < result.num_tokens; at += 2) {
        memcpy(&id, &result.block_ids[at], sizeof id);
        if (id != number) fail("another payload");
    }
    blockdex_release(&client, ticket);
}

/* It waits for the oldest first, or for the newest: of so many that there is room for all their answers. */
static void *be_the_client(void *unused) {
    uint64_t tickets[SLOTS];
    for (uint64_t first = 0; first < count;) {
        const uint64_t most = 1 + first % (first % 2 ? SLOTS : ARENA / 512),
                       asked = count - first < most ? count - first : most;
        for (uint64_t at = 0; at < asked; at++) tickets[at] = ask(first + at);
        for (uint64_t heard = 0; heard < asked; heard++) {
            const uint64_t at = first % 2 ? heard : asked - 1 - heard;
            hear(tickets[at], first + at);
        }
        first += asked;
    }
    return unused;
}

static void sleep_until_rung(void) {
    struct pollfd bell = {side.own_bell, POLLIN, 0};
    if (server_link_lie_down(&side) && poll(&bell, 1, 1000 * PATIENCE) <= 0) fail("the engine was not woken");
    blockdex_silence(side.own_bell);
    server_link_get_up(&side);
}

static void *be_the_engine(void *unused) {
    for (uint64_t answered = 0; answered < count || side.first_unwritten;) {
        for (int64_t filled = server_link_filled(&side); filled > 0; filled--, answered++) {
            struct blockdex_request request = *server_link_head(&side);
            server_link_release(&side);
            struct blockdex_answer answer = {.ticket = request.ticket,
                                             .flags = BLOCKDEX_HAS_BLOCK_IDS,
                                             .num_tokens = (uint32_t)request.payload_bytes / 4,
                                             .num_heads = 1,
                                             .topk = 1};
            const char *payload = side.request_arena + request.payload_offset;
            if (!server_link_answer(&side, answer, payload, request.payload_bytes)) fail("no memory");
        }
        server_link_publish(&side);
        if (!server_link_filled(&side) && (answered < count || side.first_unwritten)) sleep_until_rung();
    }
    return unused;
}

static void make_link(void) {
    const uint64_t slots = BLOCKDEX_SLOT_BYTES * SLOTS, requests = 4096, answers = requests + slots;
    const uint64_t request_arena = answers + slots, answer_arena = request_arena + REQUESTS;
    char *memory = aligned_alloc(4096, 1 << 17);
    if (!memory) fail("no memory");
    memset(memory, 0, 1 << 17);
    int links[2], engine_bells[2], client_bells[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, links) || socketpair(AF_UNIX, SOCK_DGRAM, 0, engine_bells) ||
        socketpair(AF_UNIX, SOCK_DGRAM, 0, client_bells))
        fail("no sockets");
    struct blockdex_header *header = (void *)memory;
    *header = (struct blockdex_header){
        .magic = BLOCKDEX_MAGIC,
        .version = BLOCKDEX_VERSION,
        .slot_bytes = BLOCKDEX_SLOT_BYTES,
        .request_slots = SLOTS,
        .answer_slots = SLOTS,
        .request_slots_offset = requests,
        .answer_slots_offset = answers,
        .request_arena_offset = request_arena,
        .request_arena_bytes = REQUESTS,
        .answer_arena_offset = answer_arena,
        .answer_arena_bytes = ARENA,
        .segment_bytes = 1 << 17,
    };
    client = (struct blockdex_client){.room_seconds = PATIENCE,
                                      .link = links[0],
                                      .engine_bell = engine_bells[0],
                                      .client_bell = client_bells[1],
                                      .free = BLOCKDEX_NONE,
                                      .first = BLOCKDEX_NONE,
                                      .last = BLOCKDEX_NONE};
    if (!blockdex_read_segment(memory, 1 << 17, &client.segment) || !blockdex_make_tables(&client, &error))
        fail("no client");
    const struct segment_layout layout = {requests, answers, request_arena, answer_arena,
                                          SLOTS,    SLOTS,   REQUESTS,      ARENA};
    if (!server_link_open(&side, memory, 1 << 17, &layout, client_bells[0], engine_bells[1])) fail("no link");
}

int main(int argc, char **argv) {
    pthread_t threads[2];
    if (argc != 2) return 2;
    count = strtoull(argv[1], NULL, 10);
    make_link();
    if (pthread_create(&threads[0], NULL, be_the_client, NULL) ||
        pthread_create(&threads[1], NULL, be_the_engine, NULL))
        return 2;
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    puts("done");
    return 0;
}
