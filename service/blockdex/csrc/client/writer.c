#include "client/client.h"
#include "wire/request_codec.h"

#include <string.h>

/* Writes the requests that one server would take. `array` is numpy's type, `dtypes` its dtypes by their wire's number.
 *
 * The scratch is one request's at a time. Whatever allocates may run the collector, and with it finalizers, which may
 * come back here or let another thread do so: while it is `busy`, requests are left to Python. */
typedef struct {
    PyObject_HEAD
    struct bounds bounds;
    struct scratch scratch;
    bool busy;
    PyObject *array, *dtypes, *dtype_name;
} Writer;

/* The arguments of `write`, in order. */
enum argument {
    KIND,
    LAYER,
    EPOCH,
    COLUMNS,
    KEYS = COLUMNS + NUM_COLUMNS,
    QUERIES,
    FIRST_HEAD,
    NUM_HEADS,
    ORDER,
    RETURN_SCORES,
    WAIT_FOR_KEYS,
    NUM_ARGUMENTS
};

/* --- Its beginning and its end --- */

static int writer_traverse(PyObject *object, visitproc visit, void *arg) {
    Writer *self = (Writer *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->array);
    Py_VISIT(self->dtypes);
    return 0;
}

static int writer_clear(PyObject *object) {
    Writer *self = (Writer *)object;
    Py_CLEAR(self->array);
    Py_CLEAR(self->dtypes);
    return 0;
}

static void writer_dealloc(PyObject *object) {
    Writer *self = (Writer *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    writer_clear(object);
    Py_CLEAR(self->dtype_name);
    scratch_close(&self->scratch);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *writer_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"num_layers", "num_heads",         "head_dim", "max_sequence_tokens",
                            "max_spans",  "max_message_bytes", "array",    "dtypes",
                            NULL};
    unsigned long long numbers[6];
    PyObject *array, *dtypes;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "$KKKKKKO!O!:Writer", names, &numbers[0], &numbers[1],
                                     &numbers[2], &numbers[3], &numbers[4], &numbers[5], &PyType_Type, &array,
                                     &PyDict_Type, &dtypes))
        return NULL;
    struct bounds bounds = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
    if (!bounds.max_spans || bounds.max_spans > 1u << 24 || bounds.num_heads > UINT32_MAX)
        return PyErr_Format(PyExc_ValueError, "max_spans must be 1 to %d, and heads have 32 bits", 1 << 24);
    Writer *self = (Writer *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) return NULL;
    self->bounds = bounds;
    self->array = Py_NewRef(array);
    self->dtypes = Py_NewRef(dtypes);
    self->dtype_name = PyUnicode_InternFromString("dtype");
    /* Whoever chooses these ids waits for them, too: any salt will do. */
    bool opened = scratch_open(&self->scratch, (uint32_t)bounds.max_spans, (uint64_t)(uintptr_t)self);
    if (opened && self->dtype_name) return (PyObject *)self;
    Py_DECREF(self);
    return PyErr_Occurred() ? NULL : PyErr_NoMemory();
}

/* --- From Python's objects; false where one is not plainly right --- */

static bool read_integer(PyObject *object, uint64_t largest, uint64_t *number) {
    if (!PyLong_CheckExact(object)) return false;
    *number = PyLong_AsUnsignedLongLong(object);
    if (*number == UINT64_MAX && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return *number <= largest;
}

static bool read_number(PyObject *object, uint32_t *number) {
    uint64_t value = 0;
    bool good = read_integer(object, UINT32_MAX, &value);
    *number = (uint32_t)value;
    return good;
}

static bool read_flag(PyObject *object, uint32_t *flag) {
    *flag = object == Py_True;
    return PyBool_Check(object);
}

static bool read_column(PyObject *list, struct wire_spans *spans, unsigned column) {
    if (list == Py_None) return true;
    uint64_t largest = column == STARTS || column == LENGTHS ? UINT32_MAX : UINT64_MAX;
    if (!PyList_CheckExact(list)) return false;
    Py_ssize_t count = PyList_Size(list);
    if (count > (Py_ssize_t)spans->most) return false;
    for (Py_ssize_t at = 0; at < count; at++)
        if (!read_integer(PyList_GetItem(list, at), largest, &spans->columns[column][at])) return false;
    spans->counts[column] = (uint32_t)count;
    return true;
}

/* Of the shape [rows, head_dim] or [rows, heads, head_dim], with C's order; whoever reads it releases the view. */
static bool read_tensor(const Writer *self, PyObject *object, int ndim, Py_buffer *view, struct wire_tensor *tensor) {
    if (Py_TYPE(object) != (PyTypeObject *)self->array) return false;
    PyObject *dtype = PyObject_GetAttr(object, self->dtype_name);
    PyObject *number = dtype ? PyDict_GetItemWithError(self->dtypes, dtype) : NULL;
    Py_XDECREF(dtype);
    if (!number || !read_number(number, &tensor->dtype) || PyObject_GetBuffer(object, view, PyBUF_ND) < 0) {
        PyErr_Clear();
        return false;
    }
    tensor->data = view->buf;
    tensor->bytes = (uint64_t)view->len;
    return view->ndim == ndim && (uint64_t)view->shape[ndim - 1] == self->bounds.head_dim;
}

/* What the request holds of an array; its size is checked with the rest, so only what the size does not tell is here. */
static bool read_tensors(const Writer *self, PyObject *const *arguments, Py_buffer *keys, Py_buffer *queries,
                         struct wire_request *request) {
    if (request->kind != SELECT_BLOCKS && !read_tensor(self, arguments[KEYS], 2, keys, &request->keys)) return false;
    if (request->kind == APPEND_KEYS) return true;
    if (!read_tensor(self, arguments[QUERIES], 3, queries, &request->queries)) return false;
    uint32_t heads = request->num_heads ? request->num_heads : (uint32_t)self->bounds.num_heads - request->first_head;
    return (uint64_t)queries->shape[1] == heads;
}

static void require(struct wire_request *request, uint8_t feature) {
    request->features[request->num_features++] = feature;
}

static bool read_selection(PyObject *const *arguments, struct wire_request *request) {
    if (!read_number(arguments[FIRST_HEAD], &request->first_head)) return false;
    if (!read_number(arguments[NUM_HEADS], &request->num_heads)) return false;
    if (!read_number(arguments[ORDER], &request->order)) return false;
    if (!read_flag(arguments[RETURN_SCORES], &request->return_scores)) return false;
    if (!read_flag(arguments[WAIT_FOR_KEYS], &request->wait_for_keys)) return false;
    if (request->first_head || request->num_heads) require(request, HEAD_RANGES);
    if (request->order != BLOCKDEX_ASCENDING || request->return_scores)
        require(request, SCORES_AND_ORDER);
    else
        request->order = 0;
    if (request->wait_for_keys) require(request, WAITING_FOR_KEYS);
    return true;
}

static bool read_arguments(PyObject *const *arguments, struct wire_request *request) {
    if (!read_number(arguments[KIND], &request->kind) || request->kind >= NUM_KINDS) return false;
    if (!read_number(arguments[LAYER], &request->layer)) return false;
    if (!read_integer(arguments[EPOCH], UINT64_MAX, &request->epoch)) return false;
    for (unsigned column = 0; column < NUM_COLUMNS; column++)
        if (!read_column(arguments[COLUMNS + column], request->spans, column)) return false;
    if (request->kind != APPEND_KEYS && !read_selection(arguments, request)) return false;
    if (request->spans->counts[REVISIONS]) require(request, REVISION_CHECKS);
    return true;
}

/* --- To bytes --- */

/* The check fills in what a request leaves out, so it gets one of its own, which then counts the heads. */
static bool is_right(Writer *self, const struct wire_request *request, struct wire_request *whole) {
    *whole = *request;
    return tokens_check(whole, &self->bounds, &self->scratch);
}

static uint64_t sum(const struct wire_spans *spans, unsigned column) {
    uint64_t total = 0;
    for (uint32_t at = 0; at < spans->counts[column]; at++) total += spans->columns[column][at];
    return total;
}

static PyObject *written(const struct wire_request *request, uint32_t num_heads) {
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)wire_request_size(request));
    if (!bytes) return NULL;
    wire_write_request(request, (uint8_t *)PyBytes_AsString(bytes));
    return Py_BuildValue("NKI", bytes, (unsigned long long)sum(request->spans, LENGTHS), num_heads);
}

/* What is held of a request while it is written. */
struct draft {
    struct wire_request request;
    Py_buffer keys, queries;
};

static void begin_draft(Writer *self, struct draft *draft) {
    *draft = (struct draft){.request = {.spans = &self->scratch.spans}};
    memset(self->scratch.spans.counts, 0, sizeof self->scratch.spans.counts);
    self->busy = true;
}

static void end_draft(Writer *self, struct draft *draft) {
    if (draft->keys.obj) PyBuffer_Release(&draft->keys);
    if (draft->queries.obj) PyBuffer_Release(&draft->queries);
    self->busy = false;
}

/* The request, of which all but the tensors was read; NULL without an error where it is not plainly right. */
static PyObject *finish_draft(Writer *self, struct draft *draft, PyObject *const *arguments) {
    struct wire_request whole;
    if (!read_tensors(self, arguments, &draft->keys, &draft->queries, &draft->request)) return NULL;
    return is_right(self, &draft->request, &whole) ? written(&draft->request, whole.num_heads) : NULL;
}

static PyObject *found_or_none(PyObject *found) {
    if (!found && !PyErr_Occurred()) Py_RETURN_NONE;
    return found;
}

static PyObject *writer_write(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
    Writer *self = (Writer *)object;
    struct draft draft;
    if (count != NUM_ARGUMENTS) return PyErr_Format(PyExc_TypeError, "write takes %d arguments", (int)NUM_ARGUMENTS);
    if (self->busy) Py_RETURN_NONE;
    begin_draft(self, &draft);
    PyObject *message = read_arguments(arguments, &draft.request) ? finish_draft(self, &draft, arguments) : NULL;
    end_draft(self, &draft);
    return found_or_none(message);
}

/* --- An append, in the client's books too --- */

/* What it will change, where all sequences are known to have such a layer; else NULL without an error. Where no starts
 * are named, its runs go to the ends of the sequences. */
static PyObject *find_changes(PyObject *sequences, bool counts, const struct wire_request *request) {
    struct wire_spans *spans = request->spans;
    PyObject *changes = PyList_New(spans->counts[SEQUENCE_IDS]);
    for (uint32_t at = 0; changes && at < spans->counts[SEQUENCE_IDS]; at++) {
        PyObject *layers = blockdex_layers_of(sequences, spans->columns[SEQUENCE_IDS][at], request->layer);
        int64_t length = layers ? blockdex_length_of(layers, request->layer) : -1;
        bool known = layers && !(counts && length < 0);
        PyObject *change = known ? blockdex_change_of(layers, request->layer) : NULL;
        if (counts) spans->columns[STARTS][at] = (uint64_t)length;
        Py_XDECREF(layers);
        if (change)
            PyList_SetItem(changes, at, change);
        else
            Py_CLEAR(changes);
    }
    if (counts) spans->counts[STARTS] = spans->counts[SEQUENCE_IDS];
    return changes;
}

/* Nothing fails here, and nothing is allocated. */
static void begin_changes(PyObject *changes, const struct wire_request *request) {
    const struct wire_spans *spans = request->spans;
    for (uint32_t at = 0; at < spans->counts[SEQUENCE_IDS]; at++) {
        PyObject *layers = PyTuple_GetItem(PyList_GetItem(changes, at), 0);
        int64_t start = (int64_t)spans->columns[STARTS][at], length = (int64_t)spans->columns[LENGTHS][at];
        blockdex_begin(layers, request->layer, start, start + length);
    }
}

static PyObject *writer_append(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
    Writer *self = (Writer *)object;
    PyObject *changes = NULL, *message = NULL, *begun = NULL;
    struct draft draft;
    if (count != 1 + NUM_ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "append takes %d arguments", 1 + NUM_ARGUMENTS);
    if (self->busy) Py_RETURN_NONE;
    PyObject *sequences = *arguments++;
    begin_draft(self, &draft);
    if (read_arguments(arguments, &draft.request))
        changes = find_changes(sequences, arguments[COLUMNS + STARTS] == Py_None, &draft.request);
    if (changes) message = finish_draft(self, &draft, arguments);
    if (message) begun = Py_BuildValue("OO", message, changes);
    if (begun) begin_changes(changes, &draft.request);
    Py_XDECREF(message);
    Py_XDECREF(changes);
    end_draft(self, &draft);
    return found_or_none(begun);
}

static PyMethodDef writer_methods[] = {
    {"append", (PyCFunction)(void (*)(void))writer_append, METH_FASTCALL, NULL},
    {"write", (PyCFunction)(void (*)(void))writer_write, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot writer_slots[] = {
    {Py_tp_new, writer_new},     {Py_tp_dealloc, writer_dealloc}, {Py_tp_traverse, writer_traverse},
    {Py_tp_clear, writer_clear}, {Py_tp_methods, writer_methods}, {0, NULL},
};

PyType_Spec blockdex_writer_spec = {
    .name = "blockdex._native.Writer",
    .basicsize = sizeof(Writer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = writer_slots,
};
