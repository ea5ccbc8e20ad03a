/* A small inference engine in C: fills a sequence over the ring, asks for blocks, prints what it is told.
 * argv: the socket's name without its zero byte, the element count of a key. stdin: 64 fp32 keys, then 1 x 4 queries. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "blockdex_ring.h"

static const uint64_t SECOND = 1000000000;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * (int64_t)SECOND + time.tv_nsec;
}

static const struct blockdex_answer *ask(struct blockdex_ring *ring, struct blockdex_request *request) {
    request->ticket = ring->written;
    request->received = now();
    request->deadline = request->received + 10 * (int64_t)SECOND;
    blockdex_publish(ring);
    const struct blockdex_answer *answer = blockdex_wait(ring, 10000);
    if (!answer || answer->ticket != request->ticket) exit(3);
    return answer;
}

/* What a token request of one span carries, at the beginning of the arena; the tenant is the link's. */
static struct blockdex_request *tokens(struct blockdex_ring *ring, uint64_t start, uint64_t length,
                                       uint64_t keys_bytes) {
    struct blockdex_request *request = blockdex_claim(ring);
    const uint64_t columns[4] = {7, start, length, 0};
    memcpy(blockdex_request_payload(ring, 0), columns, sizeof columns);
    request->kind = BLOCKDEX_TOKENS;
    request->num_spans = 1;
    request->keys_bytes = keys_bytes;
    request->payload_bytes = 64 + blockdex_aligned(keys_bytes);
    return request;
}

int main(int argc, char **argv) {
    struct blockdex_ring ring;
    char name[64] = "";
    if (argc != 3) return 2;
    size_t head_dim = (size_t)atoi(argv[2]), keys_bytes = 64 * head_dim * 4, queries_bytes = 4 * head_dim * 4;
    memcpy(name + 1, argv[1], strlen(argv[1]));
    if (blockdex_connect(name, 1 + strlen(argv[1]), "c", 10000, &ring) < 0) return 2;

    struct blockdex_request *request = blockdex_claim(&ring);
    const uint64_t opened[2] = {7, 0}; /* and the server's own lease */
    memcpy(blockdex_request_payload(&ring, 0), opened, sizeof opened);
    request->kind = BLOCKDEX_OPEN;
    request->num_spans = 1;
    request->payload_bytes = sizeof opened;
    const struct blockdex_answer *answer = ask(&ring, request);
    if (answer->code || answer->epoch != ring.header->epoch) return 4;
    blockdex_release(&ring, answer);

    request = tokens(&ring, 0, 64, keys_bytes);
    request->keys_dtype = BLOCKDEX_FP32;
    if (fread(blockdex_request_payload(&ring, 64), 1, keys_bytes, stdin) != keys_bytes) return 2;
    answer = ask(&ring, request);
    if (answer->code) return 5;
    blockdex_release(&ring, answer);

    request = tokens(&ring, 63, 1, 0);
    request->queries_dtype = BLOCKDEX_FP32;
    request->order = BLOCKDEX_SCORE;
    request->flags = BLOCKDEX_RETURN_SCORES;
    request->num_heads = 4;
    request->queries_bytes = queries_bytes;
    request->payload_bytes = 64 + queries_bytes;
    if (fread(blockdex_request_payload(&ring, 64), 1, queries_bytes, stdin) != queries_bytes) return 2;
    answer = ask(&ring, request);
    if (answer->code || answer->flags != (BLOCKDEX_HAS_BLOCK_IDS | BLOCKDEX_HAS_SCORES)) return 6;
    const int32_t *block_ids = (const void *)blockdex_answer_payload(&ring, answer->payload_offset);
    uint64_t count = (uint64_t)answer->num_tokens * answer->num_heads * answer->topk;
    const float *scores = (const void *)((const char *)block_ids + blockdex_aligned(4 * count));
    for (uint64_t i = 0; i < count; i++) printf("%d %.9g\n", block_ids[i], (double)scores[i]);
    blockdex_release(&ring, answer);

    request = tokens(&ring, 100, 1, 0); /* a gap */
    request->keys_dtype = BLOCKDEX_FP32;
    request->keys_bytes = head_dim * 4;
    request->payload_bytes = 64 + head_dim * 4;
    answer = ask(&ring, request);
    printf("%d %.*s\n", answer->code, (int)answer->reason_bytes,
           blockdex_answer_payload(&ring, answer->payload_offset));
    blockdex_release(&ring, answer);
    blockdex_disconnect(&ring);
    return 0;
}
