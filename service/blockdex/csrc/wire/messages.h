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

/* Views of the message; `data` is NULL where there is none. */
struct wire_tensor {
    const uint8_t *data;
    uint64_t bytes;
    uint32_t dtype;
    bool present;
};

enum { SEQUENCE_IDS, STARTS, LENGTHS, REVISIONS, NUM_COLUMNS };

/* Columns of numbers, each with room for `most`: more are counted, and not kept. */
struct wire_spans {
    uint64_t *columns[NUM_COLUMNS];
    uint32_t counts[NUM_COLUMNS];
    uint32_t most;
};

/* The features that a request may require, as `Feature` numbers them. */
enum {
    HEAD_RANGES = 1,
    REVISION_CHECKS,
    WAITING_FOR_KEYS,
    SCORES_AND_ORDER,
    ROLLBACKS,
    RAW_SCORE_FORMAT,
    POOLS,
    LAST_FEATURE = POOLS
};

/* As `ScoreFormat` numbers them. */
enum { NO_SCORES, SCALED_SCORES, RAW_SCORES };
/* As `SelectedIds` numbers them. */
enum { UNSAID_IDS, BLOCK_NUMBERS, PAGE_NUMBERS };

struct wire_request {
    struct wire_spans *spans;
    struct wire_tensor keys, queries;
    uint64_t number, epoch, pool_id; /* pool_id 0: its spans are of sequences */
    uint32_t kind, timeout_ms, layer, first_head, num_heads, order, scores, wait_for_keys, rollback, ids;
    bool has_header, has_spans;
};

/* Reads one request of a kind, or one of a stream, which names its kind; `spans` has been set, the rest is zero.
 * False where protobuf has to read it: it is unusual, no such message, of a stream no token request, or it insists
 * on a model or on a feature that the server does not have. */
bool wire_read(struct wire_request *request, const uint8_t *bytes, size_t size);
bool wire_read_streamed(struct wire_request *request, const uint8_t *bytes, size_t size);

/* Bytes of a request, alone or as one of a stream, and the request itself, which insists on whatever feature it
 * uses. */
uint64_t wire_request_size(const struct wire_request *request, bool streamed);
void wire_request_write(const struct wire_request *request, bool streamed, uint8_t *to);

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

/* Reads a response of that kind, alone or of a stream as `streamed` says; both are set, the rest is zero. False where
 * protobuf has to read it: it is unusual, an error, or of another kind. */
bool wire_response_read(struct wire_response *response, const uint8_t *bytes, size_t size);

#endif
