#include "ring/client.h"

enum { HEADER_BYTES = 4096 };

static bool is_inside(const struct link *self, uint64_t offset, uint64_t bytes) {
    uint64_t size = (uint64_t)self->memory.len;
    return offset % 64 == 0 && offset >= HEADER_BYTES && offset <= size && bytes <= size - offset;
}

static bool is_slots(const struct link *self, uint64_t offset, uint32_t slots) {
    return slots && !(slots & (slots - 1)) && slots <= 1u << 24 &&
           is_inside(self, offset, (uint64_t)slots * SLOT_BYTES);
}

static bool read_header(struct link *self) {
    char *memory = self->memory.buf;
    struct blockdex_header *header = self->memory.buf;
    if (self->memory.len < HEADER_BYTES || (uintptr_t)memory % 64) return false;
    if (header->magic != BLOCKDEX_MAGIC || header->version != BLOCKDEX_VERSION || header->slot_bytes != SLOT_BYTES)
        return false;
    uint64_t requests_at = header->request_slots_offset, answers_at = header->answer_slots_offset;
    uint64_t requests_arena_at = header->request_arena_offset, answers_arena_at = header->answer_arena_offset;
    self->header = header;
    self->num_request_slots = header->request_slots;
    self->num_answer_slots = header->answer_slots;
    self->answer_arena_bytes = header->answer_arena_bytes;
    self->request_slots = memory + requests_at;
    self->answer_slots = memory + answers_at;
    self->request_arena = memory + requests_arena_at;
    self->answer_arena = memory + answers_arena_at;
    uint64_t arena_bytes = header->request_arena_bytes;
    if (!is_slots(self, requests_at, self->num_request_slots) || !is_slots(self, answers_at, self->num_answer_slots) ||
        !is_inside(self, requests_arena_at, arena_bytes) ||
        !is_inside(self, answers_arena_at, self->answer_arena_bytes))
        return false;
    /* As many as may wait, and once more as many that were given up and are to be answered still. */
    uint32_t most = 2 * self->num_request_slots;
    return arena_open(&self->arena, arena_bytes, most) && flights_open(&self->flights, most);
}

static PyObject *link_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"memory", "engine_bell", "spin_seconds", NULL};
    PyObject *memory;
    int engine_bell;
    double spin_seconds = 0.0;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "Oi|d:Link", names, &memory, &engine_bell, &spin_seconds))
        return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct link *self = (struct link *)allocate(type, 0);
    if (!self) return NULL;
    self->engine_bell = engine_bell;
    self->spin = (int64_t)(1e9 * spin_seconds);
    self->flights.free = UINT32_MAX;
    if (PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    if (!read_header(self)) {
        Py_DECREF(self);
        PyErr_SetString(PyExc_ValueError, "segment: its header is none of a ring");
        return NULL;
    }
    return (PyObject *)self;
}

static void forget_bounds(struct link *self) {
    scratch_close(&self->scratch);
    times_close(&self->times);
}

static int link_traverse(PyObject *object, visitproc visit, void *arg) {
    struct link *self = (struct link *)object;
    Py_VISIT(Py_TYPE(object));
    for (uint32_t at = 0; at < self->flights.capacity; at++) Py_VISIT((PyObject *)self->flights.all[at].owner);
    return 0;
}

static int link_clear(PyObject *object) {
    struct link *self = (struct link *)object;
    for (uint32_t at = 0; at < self->flights.capacity; at++)
        Py_XDECREF((PyObject *)flights_disown(&self->flights, &self->flights.all[at]));
    return 0;
}

static void link_dealloc(PyObject *object) {
    struct link *self = (struct link *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    link_clear(object);
    forget_bounds(self);
    flights_close(&self->flights);
    arena_close(&self->arena);
    if (self->memory.obj) PyBuffer_Release(&self->memory);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *link_open_short_way(PyObject *object, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"num_layers",        "num_heads",   "head_dim",     "max_sequence_tokens", "max_spans",
                            "max_message_bytes", "max_waiting", "slow_seconds", "time_bounds",         NULL};
    struct link *self = (struct link *)object;
    struct bounds bounds;
    unsigned long long numbers[6];
    unsigned int max_waiting;
    double slow_seconds;
    PyObject *time_bounds;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "KKKKKKIdO!:open_short_way", names, &numbers[0], &numbers[1],
                                     &numbers[2], &numbers[3], &numbers[4], &numbers[5], &max_waiting, &slow_seconds,
                                     &PyTuple_Type, &time_bounds))
        return NULL;
    bounds = (struct bounds){numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
    if (!bounds.max_spans || bounds.max_spans > 1u << 24 || bounds.num_heads > UINT32_MAX)
        return PyErr_Format(PyExc_ValueError, "max_spans must be 1 to %d, and heads have 32 bits", 1 << 24);
    forget_bounds(self);
    uint64_t salt = (uint64_t)link_now() * UINT64_C(0x9e3779b97f4a7c15) ^ (uint64_t)(uintptr_t)self;
    if (!scratch_open(&self->scratch, (uint32_t)bounds.max_spans, salt) ||
        !times_open(&self->times, NUM_RPCS, time_bounds)) {
        forget_bounds(self);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    self->bounds = bounds;
    self->max_waiting = max_waiting;
    self->slow_seconds = slow_seconds;
    Py_RETURN_NONE;
}

static PyObject *link_take_times(PyObject *object, PyObject *unused) {
    (void)unused;
    return times_take(&((struct link *)object)->times);
}

static PyObject *link_waiting(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(((struct link *)object)->flights.waiting);
}

static PyObject *link_on_short_way(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(((struct link *)object)->flights.on_short_way);
}

static PyObject *link_answered(PyObject *object, void *unused) {
    (void)unused;
    return PyBool_FromLong(link_filled((struct link *)object) != 0);
}

static PyMethodDef methods[] = {
    {"open_short_way", (PyCFunction)(void (*)(void))link_open_short_way, METH_VARARGS | METH_KEYWORDS,
     "Takes requests on the short way from now on, within these bounds."},
    {"send", (PyCFunction)(void (*)(void))link_send, METH_FASTCALL,
     "Sends a request as it came off the wire; False where it is not for the short way."},
    {"claim", link_claim, METH_VARARGS,
     "A ticket, a slot and room for a request that Python writes; None while there is none of them."},
    {"publish", link_publish, METH_NOARGS, "Shows the engine what was claimed."},
    {"cancel", link_cancel, METH_O, "Tells the engine that nobody waits for a request; False while no slot is free."},
    {"awaits", link_awaits, METH_VARARGS, "Whether somebody's request of that number is on the short way."},
    {"give_up", link_give_up, METH_VARARGS,
     "Takes a request on the short way from who asked; None where there is none."},
    {"give_up_all", link_give_up_all, METH_O, "Takes all requests on the short way from who asked, or from everybody."},
    {"take", link_take, METH_NOARGS,
     "The answers that are there; without any, the bell rings when some come, unless it spins."},
    {"await_alone", link_await_alone, METH_VARARGS,
     "Waits a moment for the only request in flight, if it spins; whether there are answers."},
    {"may_sleep", link_may_sleep, METH_VARARGS,
     "Looks for answers, or events of an epoll, as long as it spins; whether there are none."},
    {"take_times", link_take_times, METH_NOARGS,
     "What was timed since the last call: for every RPC its counts and their sum in seconds."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"waiting", link_waiting, NULL, "Requests that somebody waits for.", NULL},
    {"answered", link_answered, NULL, "Whether there are answers to take.", NULL},
    {"on_short_way", link_on_short_way, NULL, "Those of them that took the short way.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "The frontend's side of a ring, on one thread."},
    {Py_tp_new, link_new},
    {Py_tp_dealloc, link_dealloc},
    {Py_tp_traverse, link_traverse},
    {Py_tp_clear, link_clear},
    {Py_tp_methods, methods},
    {Py_tp_getset, attributes},
    {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "blockdex._native.Link",
    .basicsize = sizeof(struct link),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = type_slots,
};

int add_link(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &type_spec, NULL);
    if (!type) return -1;
    int added = PyModule_AddObjectRef(module, "Link", type);
    Py_DECREF(type);
    return added;
}
