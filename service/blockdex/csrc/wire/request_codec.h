/* Token requests between the wire and the ring: what no slot can carry, and where the parts of a request lie. */
#ifndef BLOCKDEX_TOKENS_H
#define BLOCKDEX_TOKENS_H

#include "blockdex_ring.h"
#include "wire/messages.h"

/* What the parser has to know of the engine: heads of the indexer, and bytes of keys and queries of one request. */
struct bounds {
    uint64_t num_heads, max_message_bytes;
};

/* Room for the spans of a request; false without memory. */
bool columns_open(struct wire_spans *spans, uint32_t most);
void columns_close(struct wire_spans *spans);

/* What a request is refused with: a canonical code, a word of blockdex.contract.errors.Reason, and a message; behind
 * it, a line each, what of its numbers has a name: `name=value`. */
struct refusal {
    uint16_t code;
    const char *reason;
    char message[256];
};

/* The canonical codes of what is refused before the ring. */
enum { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8 };

/* Always false, with the refusal filled. */
__attribute__((format(printf, 4, 5))) bool refuse(struct refusal *refusal, uint16_t code, const char *reason,
                                                  const char *format, ...);

/* Whether a slot can carry what the request says; the core checks the rest. 0 heads become all of them. */
bool tokens_fit(struct wire_request *request, const struct bounds *bounds, struct refusal *refusal);

/* Fills the slot's numbers of the request itself, those of its payload's sizes included. */
void tokens_describe(const struct wire_request *request, size_t tenant_bytes, struct blockdex_request *slot);

/* Writes tenant and columns to the place in the arena of what such a slot carries. */
void tokens_write_columns(const struct wire_request *request, const char *tenant, const struct blockdex_request *slot,
                          char *to);

/* Writes up to `most` bytes of its keys and queries there, of which the first `written` are there already; how many. */
uint64_t tokens_write_tensors(const struct wire_tensor *keys, const struct wire_tensor *queries,
                              const struct blockdex_request *slot, char *to, uint64_t written, uint64_t most);

/* The sum of the lengths of its spans. */
uint64_t tokens_count(const struct wire_request *request);

/* Fills the response of an answer without an error from its slot; false where its parts are not in its payload. */
bool tokens_answer(const struct blockdex_answer *slot, const char *payload, struct wire_response *response);

#endif
