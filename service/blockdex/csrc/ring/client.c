#include "ring/client.h"

#include <stdlib.h>

enum { MOST = 1 << 24 };

/* Room for as many requests as may wait, and for as many again that were given up and are to be answered still. */
static bool open_tables(struct client_link *self) {
    uint32_t most = 2 * self->segment.num_request_slots;
    while (most < 2 * (uint64_t)self->max_waiting) most *= 2;
    struct blockdex_extent *holes = calloc(most + (size_t)1, sizeof *holes);
    if (!holes) return false;
    blockdex_arena_open(&self->arena, holes, self->segment.request_arena_bytes);
    return inflight_open(&self->inflight, most);
}

/* What the engine has said it holds requests to, and what of answers is counted and told. */
static bool read_bounds(struct client_link *self, PyObject *arguments, PyObject *keywords, PyObject **memory) {
    static char *names[] = {"memory",      "engine_bell",  "num_heads", "max_spans",   "max_message_bytes",
                            "max_waiting", "tell_seconds", "num_rpcs",  "time_bounds", "spin_seconds",
                            NULL};
    unsigned long long num_heads, max_spans, max_message_bytes;
    unsigned char num_rpcs;
    double spin_seconds = 0.0;
    PyObject *time_bounds;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OiKKKIdbO!|d:Link", names, memory, &self->engine_bell,
                                     &num_heads, &max_spans, &max_message_bytes, &self->max_waiting,
                                     &self->tell_seconds, &num_rpcs, &PyTuple_Type, &time_bounds, &spin_seconds))
        return false;
    if (!max_spans || max_spans > MOST || self->max_waiting > MOST || num_heads > UINT32_MAX ||
        num_rpcs < SEQUENCE_RPCS) {
        PyErr_Format(PyExc_ValueError, "max_spans must be 1 to %d, max_waiting at most that, and RPCs at least %d",
                     MOST, SEQUENCE_RPCS);
        return false;
    }
    self->spin = blockdex_until(0, spin_seconds);
    self->bounds = (struct bounds){num_heads, max_message_bytes};
    if (columns_open(&self->columns, (uint32_t)max_spans) && times_open(&self->times, num_rpcs, time_bounds))
        return true;
    if (!PyErr_Occurred()) PyErr_NoMemory();
    return false;
}

static PyObject *client_link_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    PyObject *memory;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct client_link *self = (struct client_link *)allocate(type, 0);
    if (!self) return NULL;
    self->inflight.free = UINT32_MAX;
    self->outbox.end = &self->outbox.first;
    if (!read_bounds(self, arguments, keywords, &memory) ||
        PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    if (!blockdex_read_segment(self->memory.buf, (uint64_t)self->memory.len, &self->segment)) {
        Py_DECREF(self);
        PyErr_SetString(PyExc_ValueError, "segment: its header is none of a ring");
        return NULL;
    }
    if (!open_tables(self)) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static int client_link_traverse(PyObject *object, visitproc visit, void *arg) {
    struct client_link *self = (struct client_link *)object;
    Py_VISIT(Py_TYPE(object));
    for (uint32_t at = 0; at < self->inflight.capacity; at++) Py_VISIT((PyObject *)self->inflight.all[at].owner);
    return 0;
}

static int client_link_clear(PyObject *object) {
    struct client_link *self = (struct client_link *)object;
    while (self->outbox.first) outbox_release(outbox_remove(self, self->outbox.first));
    for (uint32_t at = 0; at < self->inflight.capacity; at++)
        Py_XDECREF((PyObject *)inflight_disown(&self->inflight, &self->inflight.all[at]));
    return 0;
}

static void client_link_dealloc(PyObject *object) {
    struct client_link *self = (struct client_link *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    client_link_clear(object);
    columns_close(&self->columns);
    times_close(&self->times);
    inflight_close(&self->inflight);
    tenants_close(&self->tenants);
    free(self->shares);
    free(self->arena.holes);
    if (self->memory.obj) PyBuffer_Release(&self->memory);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *client_link_close(PyObject *object, PyObject *unused) {
    (void)unused;
    ((struct client_link *)object)->closed = true;
    Py_RETURN_NONE;
}

static PyObject *client_link_take_times(PyObject *object, PyObject *unused) {
    (void)unused;
    return times_take(&((struct client_link *)object)->times);
}

static PyObject *client_link_waiting(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(((struct client_link *)object)->inflight.waiting);
}

static PyObject *client_link_answered(PyObject *object, void *unused) {
    (void)unused;
    return PyBool_FromLong(client_link_filled((struct client_link *)object) != 0);
}

static PyMethodDef methods[] = {
    {"send", (PyCFunction)(void (*)(void))client_link_send, METH_FASTCALL,
     "Sends a token request as it came off the wire."},
    {"send_sequence", client_link_send_sequence, METH_VARARGS, "Sends a request about a sequence."},
    {"flush", client_link_flush, METH_NOARGS, "Sends what there is room for, and copies a slice of what is long."},
    {"may_begin", client_link_may_begin, METH_VARARGS, "Whether a tenant may have one more request of so many bytes."},
    {"overdue", client_link_overdue, METH_O, "Gives up what has waited for room for so many seconds."},
    {"give_up", client_link_give_up, METH_VARARGS, "Gives up a request of an owner; None where there is none."},
    {"give_up_all", client_link_give_up_all, METH_O, "Gives up all requests of an owner, or of everybody."},
    {"take", client_link_take, METH_NOARGS,
     "The answers that are there; without any, the bell rings when some come, unless it spins."},
    {"await_alone", client_link_await_alone, METH_VARARGS,
     "Waits a moment for the only request in flight, if it spins; whether there are answers."},
    {"may_sleep", client_link_may_sleep, METH_VARARGS,
     "Looks for answers, or events of an epoll, as long as it spins; whether there are none."},
    {"take_times", client_link_take_times, METH_NOARGS,
     "What was timed since the last call: for every RPC its counts and their sum in seconds."},
    {"close", client_link_close, METH_NOARGS, "Writes nothing into the ring from now on, and takes nothing."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"waiting", client_link_waiting, NULL, "Requests that somebody waits for.", NULL},
    {"answered", client_link_answered, NULL, "Whether there are answers to take.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "The frontend's side of a ring, on one thread."},
    {Py_tp_new, client_link_new},
    {Py_tp_dealloc, client_link_dealloc},
    {Py_tp_traverse, client_link_traverse},
    {Py_tp_clear, client_link_clear},
    {Py_tp_methods, methods},
    {Py_tp_getset, attributes},
    {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "blockdex._native.ClientLink",
    .basicsize = sizeof(struct client_link),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = type_slots,
};

int add_link(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &type_spec, NULL);
    if (!type) return -1;
    int added = PyModule_AddObjectRef(module, "ClientLink", type);
    Py_DECREF(type);
    return added;
}
