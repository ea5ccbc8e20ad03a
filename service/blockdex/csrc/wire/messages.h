/* Token requests and their answers as protobuf, as proto/blockdex/v1/indexer.proto has them.
 *
 * What is read here is what encoders write: any order of fields, packed and unpacked numbers, unknown fields. What else
 * protobuf takes (one message in two pieces, groups, numbers beyond their type) it has to write anew first.
 */
#ifndef BLOCKDEX_WIRE_H
#define BLOCKDEX_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { APPEND_KEYS, SELECT_BLOCKS, APPEND_AND_SELECT, NUM_KINDS };

/* Views of the message; `data` is NULL where there is none, or where it is said to be in a region. */
struct wire_tensor {
    const uint8_t *data;
    uint64_t bytes;
    uint32_t dtype;
    bool present, in_region;
};

enum { SEQUENCE_IDS, STARTS, LENGTHS, REVISIONS, NUM_COLUMNS };

/* Columns of numbers, each with room for `most`: more are counted, and not kept. */
struct wire_spans {
    uint64_t *columns[NUM_COLUMNS];
    uint32_t counts[NUM_COLUMNS];
    uint32_t most;
};

/* What a request may require, as `Feature` numbers it. */
enum { HEAD_RANGES = 1, REVISION_CHECKS, WAITING_FOR_KEYS, SCORES_AND_ORDER, LAST_FEATURE = SCORES_AND_ORDER };

struct wire_request {
    struct wire_spans *spans;
    struct wire_tensor keys, queries;
    uint64_t number, epoch;
    uint32_t kind, timeout_ms, layer, first_head, num_heads, order, return_scores, wait_for_keys;
    bool has_spans, has_unknown_feature;
    int32_t unknown_feature;
    /* Written, and not read: those that are known say nothing more. */
    uint8_t features[LAST_FEATURE], num_features;
};

/* Reads one request of a kind, or one of a stream, which names its kind; `spans` has been set, the rest is zero. False
 * where protobuf has to read it: it is unusual, no such message, or, of a stream, no token request. */
bool wire_read(struct wire_request *request, const uint8_t *bytes, size_t size);
bool wire_read_streamed(struct wire_request *request, const uint8_t *bytes, size_t size);

/* Bytes that `wire_write_request` writes: the same as protobuf would, features in their order. */
uint64_t wire_request_size(const struct wire_request *request);
void wire_write_request(const struct wire_request *request, uint8_t *to);

/* An answer to such a request; a tensor without data is left out. */
struct wire_response {
    struct wire_tensor block_ids, scores;
    uint64_t number, epoch;
    uint32_t kind;
    bool streamed;
};

/* Bytes that `wire_write` writes. */
uint64_t wire_size(const struct wire_response *response);
void wire_write(const struct wire_response *response, uint8_t *to);

/* Finds the tensors of an answer, which starts as zero. False where it is to be left to protobuf. */
bool wire_read_response(struct wire_response *response, const uint8_t *bytes, size_t size);

/* Finds the answer to a request of a kind in what a stream says. False where it is none or is to be left to protobuf. */
bool wire_find_response(uint32_t kind, const uint8_t *bytes, size_t size, const uint8_t **body, size_t *body_size);

#endif
