/* Token requests between the wire and the ring: what blockdex.contract.limits holds them to, and where their parts lie. */
#ifndef BLOCKDEX_TOKENS_H
#define BLOCKDEX_TOKENS_H

#include "blockdex_ring.h"
#include "wire/messages.h"

/* What requests must keep, as blockdex.contract.messages.Limits and IndexSpec say. */
struct bounds {
    uint64_t num_layers, num_heads, head_dim, max_sequence_tokens, max_spans, max_message_bytes;
};

/* StepBuffer for the spans of one request, and for finding ids that come twice. */
struct scratch {
    struct wire_spans spans;
    uint32_t *places;
    uint64_t salt;
};

/* `salt`: any number that nobody outside knows, so that none can choose ids that meet in one place. */
bool scratch_open(struct scratch *scratch, uint32_t max_spans, uint64_t salt);
void scratch_close(struct scratch *scratch);

/* Whether nothing is wrong with a request, but for what only the cache knows; 0 heads become all of them. */
bool tokens_check(struct wire_request *request, const struct bounds *bounds, struct scratch *scratch);

/* Fills the slot's numbers of the request itself, those of its payload's sizes included. */
void tokens_describe(const struct wire_request *request, size_t tenant_bytes, struct blockdex_request *slot);

/* Writes what a slot that was so filled has described to its place in the arena. */
void tokens_carry(const struct wire_request *request, const char *tenant, const struct blockdex_request *slot,
                  char *to);

/* Fills the response of an answer without an error from its slot; false where its parts are not in its payload. */
bool tokens_answer(const struct blockdex_answer *slot, const char *payload, struct wire_response *response);

#endif
