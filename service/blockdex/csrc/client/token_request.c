#include "client/token_request.h"

#include <stdlib.h>

/* What the requests to one server have in common. `arrays` is numpy's type, `dtypes` its dtypes by the wire's number;
 * `array_of(name, tensor)` makes one of them of any other tensor, and says whether it is the device's memory. */
struct maker {
    PyObject_HEAD
    struct bounds bounds;
    uint64_t epoch;
    uint32_t head_dim, topk;
    PyObject *arrays, *dtypes, *array_of, *refuse, *request_type, *dtype;
};

void raise_refusal(PyObject *refuse_with, int code, const char *reason, PyObject *message, PyObject *numbers) {
    if (message) {
        PyObject *raised =
            PyObject_CallFunction(refuse_with, "isOO", code, reason, message, numbers ? numbers : Py_None);
        if (raised) PyErr_SetString(PyExc_SystemError, "refuse: it has to raise");
        Py_XDECREF(raised);
    }
    Py_XDECREF(message);
    Py_XDECREF(numbers);
}

/* --- Tensors --- */

/* A view of an array that lies as the wire has it: numpy's own kind, a dtype that is known, rows side by side. False
 * with no error where it does not. */
static bool view_plain(const struct maker *maker, PyObject *array, Py_buffer *view, struct wire_tensor *tensor) {
    if (Py_TYPE(array) != (PyTypeObject *)maker->arrays) return false;
    PyObject *dtype = PyObject_GetAttr(array, maker->dtype);
    PyObject *number = dtype ? PyDict_GetItemWithError(maker->dtypes, dtype) : NULL;
    Py_XDECREF(dtype);
    /* Of some dtypes numpy tells no format; nobody asks for it. */
    if (!number || PyObject_GetBuffer(array, view, PyBUF_ND) < 0) {
        PyErr_Clear();
        return false;
    }
    *tensor = (struct wire_tensor){.data = view->buf,
                                   .bytes = (uint64_t)view->len,
                                   .dtype = (uint32_t)PyLong_AsUnsignedLong(number),
                                   .present = true};
    return true;
}

static bool view_tensor(const struct maker *maker, const char *name, PyObject *tensor, Py_buffer *view,
                        struct wire_tensor *into, bool *apart) {
    if (view_plain(maker, tensor, view, into)) return true;
    PyObject *pair = PyErr_Occurred() ? NULL : PyObject_CallFunction(maker->array_of, "sO", name, tensor);
    if (!pair) return false;
    PyObject *array = PyTuple_Check(pair) && PyTuple_Size(pair) == 2 ? PyTuple_GetItem(pair, 0) : NULL;
    bool good = array && view_plain(maker, array, view, into);
    if (good) *apart = PyTuple_GetItem(pair, 1) != Py_False;
    Py_DECREF(pair);
    if (!good) PyErr_Format(PyExc_TypeError, "%s: array_of made no array of it", name);
    return good;
}

static PyObject *text_of_shape(int num_dims, const Py_ssize_t *shape) {
    PyObject *text = PyUnicode_FromString("[");
    for (int at = 0; text && at < num_dims; at++) {
        PyObject *more = PyUnicode_FromFormat("%U%s%zd", text, at ? ", " : "", shape[at]);
        Py_DECREF(text);
        text = more;
    }
    PyObject *whole = text ? PyUnicode_FromFormat("%U]", text) : NULL;
    Py_XDECREF(text);
    return whole;
}

/* All but the rows, of which the server says what is wrong: it sees no shapes, but bytes. */
static bool check_shape(const struct maker *maker, const char *name, const Py_buffer *view, int num_dims,
                        const Py_ssize_t *expected) {
    bool good = view->ndim == num_dims;
    for (int at = 1; good && at < num_dims; at++) good = view->shape[at] == expected[at];
    if (good) return true;
    PyObject *wanted = text_of_shape(num_dims, expected), *got = text_of_shape(view->ndim, view->shape);
    if (wanted && got)
        raise_refusal(maker->refuse, INVALID_ARGUMENT, "INVALID_TENSOR",
                      PyUnicode_FromFormat("%s: shape must be %U, got %U", name, wanted, got), NULL);
    Py_XDECREF(wanted);
    Py_XDECREF(got);
    return false;
}

/* The length of a single sequence may be left to the rows of its tensor. */
static void count_tokens(struct token_request *request, const Py_buffer *view) {
    struct wire_spans *spans = &request->spans;
    if (!spans->counts[LENGTHS] && spans->counts[SEQUENCE_IDS] == 1) {
        spans->columns[LENGTHS][0] = view->ndim ? (uint64_t)view->shape[0] : 0;
        spans->counts[LENGTHS] = 1;
    }
    request->num_tokens = tokens_count(&request->wire);
}

/* Heads that the queries hold; 0 of a range that the server does not have, which is for it to refuse. */
static uint32_t count_heads(const struct maker *maker, const struct wire_request *wire) {
    uint32_t all = (uint32_t)maker->bounds.num_heads, left = wire->first_head < all ? all - wire->first_head : 0;
    return wire->num_heads > left ? 0 : wire->num_heads ? wire->num_heads : left;
}

static bool read_tensors(const struct maker *maker, struct token_request *request, const struct arguments *arguments) {
    struct wire_request *wire = &request->wire;
    bool appends = wire->kind != SELECT_BLOCKS, selects = wire->kind != APPEND_KEYS;
    struct request_places *places = &request->places;
    if (appends && !view_tensor(maker, "keys", arguments->keys, &request->keys, &wire->keys, &places->keys_apart))
        return false;
    if (selects &&
        !view_tensor(maker, "queries", arguments->queries, &request->queries, &wire->queries, &places->queries_apart))
        return false;
    count_tokens(request, appends ? &request->keys : &request->queries);
    Py_ssize_t tokens = (Py_ssize_t)request->num_tokens, head_dim = maker->head_dim;
    if (selects) request->num_heads = count_heads(maker, wire);
    request->topk = maker->topk;
    const Py_ssize_t keys[] = {tokens, head_dim}, queries[] = {tokens, request->num_heads, head_dim};
    if (appends && !check_shape(maker, "keys", &request->keys, 2, keys)) return false;
    return !request->num_heads || check_shape(maker, "queries", &request->queries, 3, queries);
}

static bool check_bytes(const struct maker *maker, const struct wire_request *wire) {
    unsigned long long bytes = wire->keys.bytes + wire->queries.bytes, most = maker->bounds.max_message_bytes;
    if (bytes <= most) return true;
    raise_refusal(maker->refuse, RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE",
                  PyUnicode_FromFormat("keys and queries together must be at most %llu bytes, got %llu", most, bytes),
                  Py_BuildValue("{sKsK}", "bytes", bytes, "max_message_bytes", most));
    return false;
}

/* --- A request --- */

static void request_dealloc(PyObject *object) {
    struct token_request *self = (struct token_request *)object;
    PyTypeObject *type = Py_TYPE(object);
    release_writes(self);
    if (self->keys.obj) PyBuffer_Release(&self->keys);
    if (self->queries.obj) PyBuffer_Release(&self->queries);
    columns_close(&self->spans);
    Py_XDECREF(self->refuse);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

struct token_request *token_request_of(PyObject *object) {
    if (PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)request_dealloc) return (void *)object;
    PyErr_Format(PyExc_TypeError, "a TokenRequest is needed, got %R", object);
    return NULL;
}

/* Its bytes as one of a stream, or alone. The lock is not needed for what is long. */
static PyObject *written(const struct wire_request *wire, const struct request_places *places, bool streamed) {
    enum { LONG = 1 << 20 };
    if (places->keys_apart || places->queries_apart || places->block_ids || places->scores)
        return PyErr_Format(PyExc_RuntimeError, "request: what lies in a region goes over a ring alone");
    uint64_t size = wire_request_size(wire, streamed);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
    uint8_t *to = bytes ? (uint8_t *)PyBytes_AsString(bytes) : NULL;
    PyThreadState *state = to && size >= LONG ? PyEval_SaveThread() : NULL;
    if (to) wire_request_write(wire, streamed, to);
    if (state) PyEval_RestoreThread(state);
    return bytes;
}

static PyObject *request_message(PyObject *object, PyObject *unused) {
    const struct token_request *self = (struct token_request *)object;
    (void)unused;
    return written(&self->wire, &self->places, false);
}

static PyObject *request_frame(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
    struct token_request *self = (struct token_request *)object;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "frame: 2 arguments, got %zd", count);
    struct wire_request wire = self->wire;
    wire.number = PyLong_AsUnsignedLongLong(arguments[0]);
    unsigned long timeout = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLong(arguments[1]);
    if (PyErr_Occurred()) return NULL;
    if (timeout > UINT32_MAX) return PyErr_Format(PyExc_OverflowError, "timeout_ms: it has 32 bits, got %lu", timeout);
    wire.timeout_ms = (uint32_t)timeout;
    return written(&wire, &self->places, true);
}

/* A slot has what a message may leave out, so that it is filled in, of a copy. */
static PyObject *request_submit(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
    const struct token_request *self = (struct token_request *)object;
    struct refusal refusal;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "submit: 2 arguments, got %zd", count);
    double timeout = PyFloat_AsDouble(arguments[1]);
    if (PyErr_Occurred()) return NULL;
    struct wire_request wire = self->wire;
    if (!tokens_fit(&wire, &self->bounds, &refusal))
        return Py_BuildValue("(iss)", (int)refusal.code, refusal.reason, refusal.message);
    return connection_submit(arguments[0], &wire, &self->places, timeout);
}

static PyObject *request_answer_into(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
    struct token_request *self = (struct token_request *)object;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "answer_into: 2 arguments, got %zd", count);
    unsigned long long block_ids = PyLong_AsUnsignedLongLong(arguments[0]);
    unsigned long long scores = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(arguments[1]);
    if (PyErr_Occurred()) return NULL;
    self->places.block_ids = (const uint8_t *)(uintptr_t)block_ids;
    self->places.scores = (const uint8_t *)(uintptr_t)scores;
    Py_RETURN_NONE;
}

static PyObject *request_shape(PyObject *object, void *unused) {
    struct token_request *self = (struct token_request *)object;
    (void)unused;
    return Py_BuildValue("KII", (unsigned long long)self->num_tokens, self->num_heads, self->topk);
}

static PyObject *request_is_repeatable(PyObject *object, void *unused) {
    struct token_request *self = (struct token_request *)object;
    (void)unused;
    bool repeatable = self->wire.kind == SELECT_BLOCKS || self->spans.counts[REVISIONS];
    for (uint32_t span = 0; self->wire.kind != SELECT_BLOCKS && span < self->spans.counts[REVISIONS]; span++)
        repeatable &= self->spans.columns[REVISIONS][span] != 0;
    return PyBool_FromLong(repeatable);
}

static PyMethodDef request_methods[] = {
    {"begin", token_request_begin, METH_O, NULL},
    {"place", token_request_place, METH_O, NULL},
    {"end", token_request_end, METH_NOARGS, NULL},
    {"fail", token_request_fail, METH_O, NULL},
    {"message", request_message, METH_NOARGS, NULL},
    {"frame", (PyCFunction)(void (*)(void))request_frame, METH_FASTCALL, NULL},
    {"answer_into", (PyCFunction)(void (*)(void))request_answer_into, METH_FASTCALL, NULL},
    {"submit", (PyCFunction)(void (*)(void))request_submit, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyObject *request_epoch(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(((struct token_request *)object)->wire.epoch);
}

static PyGetSetDef request_properties[] = {
    {"epoch", request_epoch, NULL, NULL, NULL},
    {"shape", request_shape, NULL, NULL, NULL},
    {"repeatable", request_is_repeatable, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot request_slots[] = {
    {Py_tp_dealloc, request_dealloc}, {Py_tp_methods, request_methods}, {Py_tp_getset, request_properties}, {0, NULL}};

PyType_Spec token_request_spec = {
    .name = "blockdex._native.TokenRequest",
    .basicsize = sizeof(struct token_request),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = request_slots,
};

/* --- Its maker --- */

static bool fill(const struct maker *maker, struct token_request *request, const struct arguments *arguments) {
    if (!read_arguments(request, arguments)) return false;
    uint32_t spans = request->spans.counts[SEQUENCE_IDS];
    if (arguments->lengths == Py_None && spans != 1) {
        raise_refusal(maker->refuse, INVALID_ARGUMENT, "INVALID_SPANS",
                      PyUnicode_FromFormat("lengths: may be left out for 1 sequence only, got %u", (unsigned)spans),
                      NULL);
        return false;
    }
    return read_tensors(maker, request, arguments) && check_bytes(maker, &request->wire);
}

static PyObject *maker_make(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
    struct maker *self = (struct maker *)object;
    struct arguments named;
    if (count != 1 + NUM_ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "make: %d arguments, got %zd", 1 + NUM_ARGUMENTS, count);
    unsigned long kind = PyLong_AsUnsignedLong(arguments[0]);
    if (PyErr_Occurred()) return NULL;
    if (kind >= NUM_KINDS) return PyErr_Format(PyExc_ValueError, "kind: there is none of number %lu", kind);
    memcpy(&named, arguments + 1, sizeof named);
    PyTypeObject *type = (PyTypeObject *)self->request_type;
    struct token_request *request = (void *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!request) return NULL;
    request->wire.spans = &request->spans;
    request->wire.kind = (uint32_t)kind;
    request->wire.epoch = self->epoch;
    request->refuse = Py_NewRef(self->refuse);
    request->bounds = self->bounds;
    if (fill(self, request, &named)) return (PyObject *)request;
    Py_DECREF(request);
    return NULL;
}

static PyObject *maker_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"num_heads", "head_dim", "topk", "max_message_bytes", "epoch", "array", "dtypes",
                            "array_of",  "refuse",   NULL};
    unsigned int heads, head_dim, topk;
    unsigned long long bytes, epoch;
    PyObject *arrays, *dtypes, *array_of, *refuse_with;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "$IIIKKO!O!OO:RequestMaker", names, &heads, &head_dim, &topk,
                                     &bytes, &epoch, &PyType_Type, &arrays, &PyDict_Type, &dtypes, &array_of,
                                     &refuse_with))
        return NULL;
    struct maker *self = (void *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) return NULL;
    self->bounds = (struct bounds){heads, bytes};
    self->epoch = epoch;
    self->head_dim = head_dim;
    self->topk = topk;
    self->arrays = Py_NewRef(arrays);
    self->dtypes = Py_NewRef(dtypes);
    self->array_of = Py_NewRef(array_of);
    self->refuse = Py_NewRef(refuse_with);
    self->dtype = PyUnicode_InternFromString("dtype");
    PyObject *module = PyType_GetModule(type);
    self->request_type = module ? PyObject_GetAttrString(module, "TokenRequest") : NULL;
    if (self->dtype && self->request_type) return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static int maker_traverse(PyObject *object, visitproc visit, void *arg) {
    struct maker *self = (struct maker *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->arrays);
    Py_VISIT(self->dtypes);
    Py_VISIT(self->array_of);
    Py_VISIT(self->refuse);
    Py_VISIT(self->request_type);
    return 0;
}

static void maker_dealloc(PyObject *object) {
    struct maker *self = (struct maker *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    PyObject *held[] = {self->arrays, self->dtypes, self->array_of, self->refuse, self->request_type, self->dtype};
    for (size_t at = 0; at < sizeof held / sizeof *held; at++) Py_XDECREF(held[at]);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMethodDef maker_methods[] = {
    {"make", (PyCFunction)(void (*)(void))maker_make, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot maker_slots[] = {{Py_tp_new, maker_new},
                                    {Py_tp_dealloc, maker_dealloc},
                                    {Py_tp_traverse, maker_traverse},
                                    {Py_tp_methods, maker_methods},
                                    {0, NULL}};

PyType_Spec request_maker_spec = {
    .name = "blockdex._native.RequestMaker",
    .basicsize = sizeof(struct maker),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = maker_slots,
};
