/* blockdex._native.RingConnection: a client's link to a server on the same host, for Python. */
#ifndef BLOCKDEX_CONNECTION_H
#define BLOCKDEX_CONNECTION_H

#include "native.h"

#include "wire/messages.h"

extern PyType_Spec blockdex_connection_spec;

/* Where block ids and scores are to be written; NULL: they come with the answer. `apart`: a tensor that this process
 * cannot copy, since it lies in memory of a device. All these have to lie in what was lent. */
struct request_places {
    const uint8_t *block_ids, *scores;
    bool keys_apart, queries_apart;
};

/* Sends a token request that a slot can carry (`tokens_fit`): its ticket as an int, or what it was refused with, a tuple
 * (code, reason, text); NULL with an error set. What it names has been copied, unless it lies in what was lent. */
PyObject *connection_submit(PyObject *connection, const struct wire_request *request,
                            const struct request_places *places, double timeout);

#endif
