/* A client and an engine as two threads of one process, so that a sanitizer sees both ends of a link.
 * argv: how many requests. Each is answered with what it carries; both sides sleep whenever there is nothing for them. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "ring/server.h"

enum { SLOTS = 16, ARENA = 4096, LARGEST = 448, PATIENCE = 10000 };

static struct server_link side;
static struct blockdex_ring ring;
static uint64_t count;

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static uint64_t size_of(uint64_t number) { return 8 + 8 * (number * 7 % (LARGEST / 8)); }

/* Requests come to lie one behind the other; never so many at once that one lies where another still does. */
static void ask(uint64_t number) {
    struct blockdex_request *request = blockdex_claim(&ring);
    if (!request) fail("no slot is free");
    request->ticket = number;
    request->payload_offset = number % SLOTS * 512;
    request->payload_bytes = size_of(number);
    memset(blockdex_request_payload(&ring, request->payload_offset), (int)(number & 127), request->payload_bytes);
    blockdex_publish(&ring);
}

static void *be_the_client(void *unused) {
    for (uint64_t asked = 0, answered = 0; answered < count; answered++) {
        for (; asked < count && asked - answered < 1 + answered % SLOTS; asked++) ask(asked);
        const struct blockdex_answer *answer = blockdex_wait(&ring, PATIENCE);
        if (!answer) fail("the client was not woken");
        if (answer->ticket != answered || answer->payload_bytes != size_of(answered)) fail("another answer");
        const char *payload = blockdex_answer_payload(&ring, answer->payload_offset);
        for (uint64_t at = 0; at < answer->payload_bytes; at++)
            if (payload[at] != (char)(answered & 127)) fail("another payload");
        blockdex_release(&ring, answer);
    }
    return unused;
}

static void sleep_until_rung(void) {
    struct pollfd bell = {side.own_bell, POLLIN, 0};
    if (server_link_lie_down(&side) && poll(&bell, 1, PATIENCE) <= 0) fail("the engine was not woken");
    blockdex_silence(side.own_bell);
    server_link_get_up(&side);
}

static void *be_the_engine(void *unused) {
    for (uint64_t answered = 0; answered < count || side.first_unwritten;) {
        for (int64_t filled = server_link_filled(&side); filled > 0; filled--, answered++) {
            struct blockdex_request request = *server_link_head(&side);
            server_link_release(&side);
            struct blockdex_answer answer = {.ticket = request.ticket, .phase = BLOCKDEX_SEQUENCE};
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
    const uint64_t request_arena = answers + slots, answer_arena = request_arena + SLOTS * 512;
    char *memory = aligned_alloc(4096, 1 << 17);
    if (!memory) fail("no memory");
    memset(memory, 0, 1 << 17);
    int links[2], engine_bells[2], client_bells[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, links) || socketpair(AF_UNIX, SOCK_DGRAM, 0, engine_bells) ||
        socketpair(AF_UNIX, SOCK_DGRAM, 0, client_bells))
        fail("no sockets");
    struct blockdex_header *header = (void *)memory;
    header->slot_bytes = BLOCKDEX_SLOT_BYTES;
    header->request_slots = header->answer_slots = SLOTS;
    header->request_slots_offset = requests;
    header->answer_slots_offset = answers;
    header->request_arena_offset = request_arena;
    header->answer_arena_offset = answer_arena;
    ring = (struct blockdex_ring){
        .header = header, .link = links[0], .engine_bell = engine_bells[0], .client_bell = client_bells[1]};
    const struct segment_layout layout = {requests, answers, request_arena, answer_arena,
                                          SLOTS,    SLOTS,   SLOTS * 512,   ARENA};
    if (!server_link_open(&side, memory, 1 << 17, &layout, client_bells[0], engine_bells[1])) fail("no link");
}

int main(int argc, char **argv) {
    pthread_t client, engine;
    if (argc != 2) return 2;
    count = strtoull(argv[1], NULL, 10);
    make_link();
    if (pthread_create(&client, NULL, be_the_client, NULL) || pthread_create(&engine, NULL, be_the_engine, NULL))
        return 2;
    pthread_join(client, NULL);
    pthread_join(engine, NULL);
    puts("done");
    return 0;
}
