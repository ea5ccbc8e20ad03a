/* The wire's reader on messages of a stream from stdin, a u32 of length before each: whole, cut off everywhere, and changed.
 * Each lies at the very end of what was allocated, so that a sanitizer sees a byte too many. argv: how many changes of each.
 * Prints of every message the layer that was read, or -1 where it is left to protobuf. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wire/request_codec.h"

static uint64_t state = 1;

static uint64_t draw(uint64_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % below;
}

static struct wire_spans columns;

/* What a slot would carry, into no more room than the slot says. */
static void write_payload(const struct wire_request *request) {
    struct blockdex_request slot = {0};
    tokens_describe(request, 1, &slot);
    char *to = malloc(slot.payload_bytes);
    if (!to) exit(2);
    tokens_write_columns(request, "t", &slot, to);
    tokens_write_tensors(&request->keys, &request->queries, &slot, to, 0, UINT64_MAX);
    free(to);
}

static int read_one(const uint8_t *bytes, size_t size) {
    static const struct bounds bounds = {4, 1 << 27};
    struct wire_request request = {.spans = &columns};
    struct refusal refusal;
    uint8_t *copied = malloc(size ? size : 1);
    if (!copied) exit(2);
    memcpy(copied, bytes, size);
    memset(columns.counts, 0, sizeof columns.counts);
    bool taken = wire_read_streamed(&request, copied, size) && tokens_fit(&request, &bounds, &refusal);
    if (taken) write_payload(&request);
    free(copied);
    return taken ? (int)request.layer : -1;
}

static void use(uint8_t *bytes, uint32_t size, uint64_t changes) {
    printf("%d\n", read_one(bytes, size));
    for (uint32_t cut = 0; cut < size && cut < 300; cut++) read_one(bytes, cut);
    for (; changes; changes--) {
        size_t at = draw(size < 200 ? size : 200);
        uint8_t before = bytes[at];
        bytes[at] = (uint8_t)draw(256);
        read_one(bytes, size);
        if (draw(2)) bytes[at] = before;
    }
}

int main(int argc, char **argv) {
    uint32_t size;
    if (argc != 2 || !columns_open(&columns, 256)) return 2;
    while (fread(&size, sizeof size, 1, stdin) == 1) {
        uint8_t *bytes = malloc(size + 1);
        if (!bytes || fread(bytes, 1, size, stdin) != size) return 2;
        use(bytes, size, strtoull(argv[1], NULL, 10));
        free(bytes);
    }
    columns_close(&columns);
    return 0;
}
