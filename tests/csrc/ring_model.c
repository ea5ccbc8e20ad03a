/* The ring's real code, both sides, in every interleaving of a few requests and answers: nothing is lost, nobody sleeps on,
 * no slot or payload is written while it is read. Prints the executions of each scenario. */
#include <stdio.h>

#include "blockdex_client.h"
#include "ring/server.h"

enum { MOST_SLOTS = 2, REQUESTS = 2, ARENA = 128, SEGMENT = 4096 + 2 * MOST_SLOTS * 256 + 2 * ARENA };
/* Numbers that the model knows the ends of a pair by. */
enum { ENGINE_BELL = 1, CLIENT_BELL, LINK };

static _Alignas(4096) char segment[SEGMENT];
static struct server_link side;
static struct blockdex_client client;
static struct blockdex_pending pending[REQUESTS];
static struct blockdex_extent holes[REQUESTS + 1];
static uint32_t slots;

static void reset(void) {
    const uint64_t requests = 4096, answers = requests + slots * 256, arena = answers + slots * 256;
    const struct segment_layout layout = {requests, answers, arena, arena + ARENA, slots, slots, ARENA, ARENA};
    for (size_t at = 0; at < SEGMENT; at++) segment[at] = 0;
    client = (struct blockdex_client){
        .segment = {(void *)segment, segment + requests, segment + answers, segment + arena, segment + arena + ARENA,
                    ARENA, ARENA, slots, slots},
        .link = LINK,
        .engine_bell = ENGINE_BELL,
        .client_bell = CLIENT_BELL,
        .pending = pending,
        .capacity = REQUESTS,
        .free = BLOCKDEX_NONE,
        .first = BLOCKDEX_NONE,
        .last = BLOCKDEX_NONE,
    };
    blockdex_arena_open(&client.arena, holes, ARENA);
    if (!server_link_open(&side, segment, SEGMENT, &layout, CLIENT_BELL, ENGINE_BELL)) model_fail("no link");
}

/* --- What the sides do, a step each --- */

/* What the client gives its requests, one after the other. */
static uint64_t ticket_of(uint64_t number) { return (number + 1) * REQUESTS + number; }

static bool ask(uint64_t number) {
    const struct blockdex_sequences get = {.kind = BLOCKDEX_GET};
    const uint64_t ticket = blockdex_submit_sequences(&client, &get, 0, NULL);
    if (ticket && ticket != ticket_of(number)) model_fail("another ticket");
    return ticket;
}

static void hear(uint64_t number) {
    struct blockdex_result result;
    if (blockdex_wait(&client, ticket_of(number), 1000, &result, NULL) != BLOCKDEX_ANSWERED)
        model_fail("the client gave up");
    model_access(result.block_ids, 4 * result.num_tokens, false);
    for (uint64_t at = 0; at < result.num_tokens; at++)
        if (result.block_ids[at] != (int32_t)number) model_fail("another payload");
    blockdex_release(&client, ticket_of(number));
}

/* Those that the engine answers without having read them. */
static void have_asked(void) {
    for (uint64_t number = 0; number < REQUESTS; number++)
        if (blockdex_begin(&client, 0)->ticket != ticket_of(number)) model_fail("another ticket");
}

static void answer(uint64_t number, uint64_t bytes) {
    int32_t payload[ARENA / 4];
    for (uint64_t at = 0; at < ARENA / 4; at++) payload[at] = (int32_t)number;
    const struct blockdex_answer numbers = {.ticket = ticket_of(number),
                                            .flags = bytes ? BLOCKDEX_HAS_BLOCK_IDS : 0,
                                            .num_tokens = (uint32_t)bytes / 4,
                                            .num_heads = 1,
                                            .topk = 1};
    if (!server_link_answer(&side, numbers, payload, bytes)) model_fail("no memory");
}

/* Takes the requests that are there; how many. */
static uint64_t take(uint64_t first) {
    int64_t filled = server_link_filled(&side);
    if (filled < 0) model_fail("more requests than slots");
    for (int64_t at = 0; at < filled; at++) {
        const struct blockdex_request *request = server_link_head(&side);
        model_access(request, sizeof *request, false);
        if (request->ticket != ticket_of(first + (uint64_t)at)) model_fail("another request");
        server_link_release(&side);
    }
    return (uint64_t)filled;
}

static void engine_sleep(void) {
    struct pollfd bell = {ENGINE_BELL, POLLIN, 0};
    if (server_link_lie_down(&side) && poll(&bell, 1, -1) > 0) blockdex_silence(ENGINE_BELL);
    server_link_get_up(&side);
}

/* --- Scenarios --- */

static void two_requests(void) {
    for (uint64_t number = 0; number < 2; number++)
        if (!ask(number)) model_fail("no slot is free");
}

static void take_two(void) {
    for (uint64_t taken = 0; taken < 2;) {
        uint64_t more = take(taken);
        taken += more;
        if (!more) engine_sleep();
    }
}

static void hear_two(void) {
    have_asked();
    for (uint64_t number = 0; number < 2; number++) hear(number);
}

static void hear_one(void) {
    have_asked();
    hear(0);
}

static void answer_two(void) {
    for (uint64_t number = 0; number < 2; number++) {
        answer(number, 8);
        server_link_publish(&side);
    }
}

static void ask_and_hear(void) {
    if (!ask(0)) model_fail("no slot is free");
    hear(0);
}

static void take_and_answer(void) {
    while (!take(0)) engine_sleep();
    answer(0, 8);
    server_link_publish(&side);
}

/* The second takes the slot of the first, if that is seen to be free. */
static void ask_again_at_once(void) {
    if (!ask(0)) model_fail("no slot is free");
    ask(1);
}

static void take_and_look_again(void) {
    while (!take(0)) engine_sleep();
    take(1);
}

static void answer_twice(uint64_t bytes) {
    for (uint64_t number = 0; number < 2; number++) answer(number, bytes);
    server_link_publish(&side);
    while (side.first_unwritten) {
        engine_sleep();
        server_link_publish(&side);
    }
}

/* The second waits until the first was given back, and lies where it lay. */
static void answer_with_all_the_room(void) { answer_twice(ARENA); }
static void answer_with_nothing(void) { answer_twice(0); }

static void explore(const char *name, uint32_t of_slots, void (*client)(void), void (*engine)(void)) {
    slots = of_slots;
    void (*threads[MODEL_THREADS])(void) = {[MODEL_CLIENT] = client, [MODEL_ENGINE] = engine};
    printf("%s: %llu\n", name, (unsigned long long)model_explore(reset, threads, segment + 4096, SEGMENT - 4096));
    fflush(stdout);
}

int main(void) {
    explore("requests", 2, two_requests, take_two);
    explore("answers", 2, hear_two, answer_two);
    explore("round trip", 2, ask_and_hear, take_and_answer);
    explore("room in the arena", 2, hear_one, answer_with_all_the_room);
    explore("request slots", 1, ask_again_at_once, take_and_look_again);
    explore("answer slots", 1, hear_two, answer_with_nothing);
    return 0;
}
