/* A target of libFuzzer: bytes that may be a request or a response, read as each kind by the first byte. What is read as
 * a request is written into no more room than its slot says, and once more as protobuf, which is to be read as the same. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "wire/request_codec.h"

static const struct bounds BOUNDS = {4, 1 << 20};
enum { MOST_SPANS = 64 };

static void write_payload(const struct wire_request *request) {
    struct blockdex_request slot = {0};
    tokens_describe(request, 1, &slot);
    char *to = malloc(slot.payload_bytes);
    if (!to) return;
    tokens_write_columns(request, "t", &slot, to);
    tokens_write_tensors(&request->keys, &request->queries, &slot, to, 0, UINT64_MAX);
    free(to);
}

static void check_same(const struct wire_request *one, const struct wire_request *other) {
    assert(one->layer == other->layer && one->order == other->order && one->epoch == other->epoch);
    assert(one->first_head == other->first_head && one->rollback == other->rollback && one->pool_id == other->pool_id);
    assert(one->keys.bytes == other->keys.bytes && one->queries.bytes == other->queries.bytes);
    for (int column = 0; column < NUM_COLUMNS; column++) {
        const uint32_t count = one->spans->counts[column];
        assert(count == other->spans->counts[column]);
        assert(!memcmp(one->spans->columns[column], other->spans->columns[column], count * sizeof(uint64_t)));
    }
}

static void write_again(const struct wire_request *request, bool streamed) {
    static struct wire_spans columns;
    if (!columns.most && !columns_open(&columns, MOST_SPANS)) abort();
    const uint64_t size = wire_request_size(request, streamed);
    uint8_t *to = malloc(size + 1);
    if (!to) return;
    wire_request_write(request, streamed, to);
    struct wire_request again = {.spans = &columns, .kind = streamed ? 0 : request->kind};
    memset(columns.counts, 0, sizeof columns.counts);
    if (!(streamed ? wire_read_streamed : wire_read)(&again, to, size)) abort();
    check_same(request, &again);
    free(to);
}

static void read_request(uint32_t kind, bool streamed, const uint8_t *bytes, size_t size) {
    static struct wire_spans columns;
    if (!columns.most && !columns_open(&columns, MOST_SPANS)) abort();
    struct wire_request request = {.spans = &columns, .kind = kind};
    struct refusal refusal;
    memset(columns.counts, 0, sizeof columns.counts);
    if (!(streamed ? wire_read_streamed : wire_read)(&request, bytes, size)) return;
    if (!tokens_fit(&request, &BOUNDS, &refusal)) return;
    write_payload(&request);
    write_again(&request, streamed);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    if (!size) return 0;
    const uint32_t kind = bytes[0] % NUM_KINDS;
    const bool streamed = bytes[0] & 64;
    struct wire_response response = {.kind = kind, .streamed = streamed};
    /* Copied, so that it ends where its memory does. */
    uint8_t *copied = malloc(size > 1 ? size - 1 : 1);
    if (!copied) return 0;
    memcpy(copied, bytes + 1, size - 1);
    if (bytes[0] & 128)
        wire_response_read(&response, copied, size - 1);
    else
        read_request(kind, streamed, copied, size - 1);
    free(copied);
    return 0;
}
