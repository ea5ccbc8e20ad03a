/* A token request of the Python client: arguments as wire/messages.h has a request, read once; from there protobuf for
 * gRPC or a slot of a ring. */
#ifndef BLOCKDEX_TOKEN_REQUEST_H
#define BLOCKDEX_TOKEN_REQUEST_H

#include "native.h"
#include "ring/connection.h"
#include "wire/request_codec.h"

/* A write of one span in its layer: the layer's numbers, its length before, and which write it is. */
struct write {
    Py_buffer numbers;
    int64_t before, number;
};

/* `keys` and `queries` keep the arrays that `wire` looks into, `writes` the lengths that an append has changed; both
 * until it ends. `ends`: starts were left out, so that they follow from the lengths. */
struct token_request {
    PyObject_HEAD
    struct wire_request wire;
    struct wire_spans spans;
    struct bounds bounds;
    struct request_places places;
    Py_buffer keys, queries;
    struct write *writes;
    uint32_t num_writes;
    bool at_ends;
    uint64_t num_tokens;
    uint32_t num_heads, topk;
    PyObject *refuse;
};

/* What a `TokenRequest` holds; NULL with an error set for any other object. */
struct token_request *token_request_of(PyObject *object);

/* Raises what `refuse(code, reason, message, numbers)` raises; takes over message and numbers, which may be NULL. */
void raise_refusal(PyObject *refuse, int code, const char *reason, PyObject *message, PyObject *numbers);

/* Columns, numbers and words out of Python's objects into `request`; false with an error set. */
struct arguments {
    PyObject *layer, *sequences, *lengths, *starts, *revisions, *epoch, *keys, *queries;
    PyObject *first_head, *num_heads, *order, *return_scores, *wait_for_keys, *rollback, *pool_id, *ids;
};
enum { NUM_ARGUMENTS = sizeof(struct arguments) / sizeof(PyObject *) };
bool read_arguments(struct token_request *request, const struct arguments *arguments);

/* Methods of the lengths by sequence: see blockdex/client/lengths.py. */
PyObject *token_request_begin(PyObject *object, PyObject *sequences);
PyObject *token_request_place(PyObject *object, PyObject *sequences);
PyObject *token_request_end(PyObject *object, PyObject *unused);
PyObject *token_request_fail(PyObject *object, PyObject *changed_nothing);

/* Lets go of the lengths, as they are. */
void release_writes(struct token_request *request);

extern PyType_Spec token_request_spec, request_maker_spec;

/* Of the module: block ids and scores out of an answer's bytes. */
PyObject *read_selection(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

#endif
