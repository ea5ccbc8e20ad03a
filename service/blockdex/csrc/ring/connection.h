/* blockdex._native.RingConnection: a client's link to a server on the same host, for Python. */
#ifndef BLOCKDEX_CONNECTION_H
#define BLOCKDEX_CONNECTION_H

#include "native.h"

#include "wire/messages.h"

extern PyType_Spec blockdex_connection_spec;

/* Sends a token request that a slot can carry (`tokens_fit`): its ticket as an int, or what it was refused with, a tuple
 * (code, reason, text); NULL with an error set. What it names has been copied. */
PyObject *connection_submit(PyObject *connection, const struct wire_request *request, double timeout);

#endif
