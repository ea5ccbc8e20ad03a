#include "ring/server.h"

#include <stdlib.h>

int64_t line_filled(const struct line *line) {
    uint64_t filled = atomic_load_explicit(&line->header->requests_written, memory_order_acquire) - line->read;
    return filled <= line->request_slots ? (int64_t)filled : -1;
}

uint64_t line_longest(const struct line *line) { return line->answer_arena_bytes / 2; }

const struct blockdex_request *line_head(const struct line *line) {
    return (const void *)(line->requests + line->read % line->request_slots * BLOCKDEX_SLOT_BYTES);
}

void line_release(struct line *line) {
    atomic_store_explicit(&line->header->requests_read, ++line->read, memory_order_release);
}

/* Extents of the answers' arena are given back in order, round and round; positions count bytes from the beginning. */
static bool take_extent(struct line *line, uint64_t bytes, struct place *place) {
    uint64_t freed = atomic_load_explicit(&line->header->answer_bytes_freed, memory_order_acquire);
    uint64_t size = line->answer_arena_bytes, begin = line->tape_end, wanted = blockdex_aligned(bytes);
    uint64_t to_the_edge = size - begin % size;
    if (begin - freed > size) return false; /* no such position: only who harms itself says that */
    /* From the front again where nothing is in use, so that memory which was never needed is never touched. */
    bool unused = freed == begin && to_the_edge + wanted <= size;
    if (wanted > to_the_edge || unused) begin += to_the_edge;
    if (begin + wanted - freed > size) return false;
    line->tape_end = place->end = begin + wanted;
    place->offset = begin % size;
    place->payload = line->answer_arena + place->offset;
    return true;
}

/* The next free slot, and room for what the answer carries; false while there is none of either. */
static bool claim(struct line *line, uint64_t bytes, struct place *place) {
    uint64_t taken = line->written - atomic_load_explicit(&line->header->answers_read, memory_order_acquire);
    if (taken >= line->answer_slots) return false;
    *place = (struct place){.payload = line->answer_arena};
    if (bytes && !take_extent(line, bytes, place)) return false;
    place->slot = (void *)(line->answers + line->written++ % line->answer_slots * BLOCKDEX_SLOT_BYTES);
    line->changed = true;
    return true;
}

static bool write_answer(struct line *line, const struct blockdex_answer *numbers, const void *payload) {
    struct place place;
    if (!claim(line, numbers->payload_bytes, &place)) return false;
    memcpy(place.payload, payload, numbers->payload_bytes);
    *place.slot = *numbers;
    place.slot->payload_offset = place.offset;
    place.slot->payload_end = place.end;
    return true;
}

bool line_answer(struct line *line, struct blockdex_answer numbers, const void *payload, uint64_t bytes) {
    if (line->gone) return true;
    numbers.payload_bytes = bytes;
    if (!line->first_unwritten && write_answer(line, &numbers, payload)) return true;
    struct unwritten *left = malloc(sizeof *left + bytes);
    if (!left) return false;
    left->next = NULL;
    left->numbers = numbers;
    memcpy(left->payload, payload, bytes);
    *line->last_unwritten = left;
    line->last_unwritten = &left->next;
    return true;
}

static void write_unwritten(struct line *line) {
    struct unwritten *left;
    while ((left = line->first_unwritten) && write_answer(line, &left->numbers, left->payload)) {
        if (!(line->first_unwritten = left->next)) line->last_unwritten = &line->first_unwritten;
        free(left);
    }
}

static void forget_unwritten(struct line *line) {
    for (struct unwritten *left = line->first_unwritten, *next; left; left = next) {
        next = left->next;
        free(left);
    }
    line->first_unwritten = NULL;
    line->last_unwritten = &line->first_unwritten;
}

/* A frontend may have made its bell one that blocks, and filled it up: then it rings already. */
static void ring_client_bell(struct line *line) {
    const uint64_t once = 1;
    struct pollfd bell = {line->bell, POLLOUT, 0};
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_exchange_explicit(&line->header->client_sleeps, 0, memory_order_relaxed) && poll(&bell, 1, 0) > 0)
        (void)!write(line->bell, &once, sizeof once);
}

void line_publish(struct line *line) {
    if (line->gone) {
        forget_unwritten(line);
        return;
    }
    if (line->first_unwritten) {
        write_unwritten(line);
        if (line->first_unwritten) {
            atomic_store_explicit(&line->header->engine_waits_for_room, 1, memory_order_relaxed);
            atomic_thread_fence(memory_order_seq_cst);
            write_unwritten(line); /* room may have come just before that was said */
        }
    }
    if (!line->changed) return;
    line->changed = false;
    atomic_store_explicit(&line->header->answers_written, line->written, memory_order_release);
    ring_client_bell(line);
}

bool line_is_heard(const struct line *line) { return !line->gone && !line->first_unwritten && !line->crowded; }

bool line_is_for_python(const struct line *line) { return line->waits && line_is_heard(line); }

bool line_has_room_again(const struct line *line) {
    return line->crowded && !atomic_load_explicit(&line->header->engine_waits_for_room, memory_order_acquire);
}

void line_lie_down(struct line *line) {
    atomic_store_explicit(&line->header->engine_sleeps, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
}

void line_get_up(struct line *line) { atomic_store_explicit(&line->header->engine_sleeps, 0, memory_order_relaxed); }

static bool number_of(PyObject *segment, const char *name, uint64_t *number) {
    PyObject *value = PyObject_GetAttrString(segment, name);
    if (!value) return false;
    *number = PyLong_AsUnsignedLongLong(value);
    Py_DECREF(value);
    return !PyErr_Occurred();
}

/* Sizes are read once, from who made the segment: the other side can write its header at any time. */
static bool map_segment(struct line *line, PyObject *segment) {
    uint64_t requests, answers, request_arena, answer_arena;
    PyObject *memory = PyObject_GetAttrString(segment, "memory");
    if (!memory) return false;
    int got = PyObject_GetBuffer(memory, &line->memory, PyBUF_WRITABLE);
    Py_DECREF(memory);
    if (got < 0) return false;
    if (!number_of(segment, "request_slots_offset", &requests) ||
        !number_of(segment, "answer_slots_offset", &answers) ||
        !number_of(segment, "request_arena_offset", &request_arena) ||
        !number_of(segment, "answer_arena_offset", &answer_arena) ||
        !number_of(segment, "request_slots", &line->request_slots) ||
        !number_of(segment, "answer_slots", &line->answer_slots) ||
        !number_of(segment, "request_arena_bytes", &line->request_arena_bytes) ||
        !number_of(segment, "answer_arena_bytes", &line->answer_arena_bytes))
        return false;
    char *begin = line->memory.buf;
    line->header = (void *)begin;
    line->requests = begin + requests;
    line->answers = begin + answers;
    line->request_arena = begin + request_arena;
    line->answer_arena = begin + answer_arena;
    return true;
}

static PyObject *line_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"segment", "bell", "own_bell", NULL};
    PyObject *segment;
    int bell, own_bell;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "Oii", names, &segment, &bell, &own_bell)) return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct line *line = (void *)allocate(type, 0);
    if (!line) return NULL;
    line->bell = bell;
    line->own_bell = own_bell;
    line->last_unwritten = &line->first_unwritten;
    if (!map_segment(line, segment)) {
        Py_DECREF(line);
        return NULL;
    }
    return (PyObject *)line;
}

static void line_dealloc(struct line *line) {
    PyTypeObject *type = Py_TYPE((PyObject *)line);
    if (line->last_unwritten) forget_unwritten(line);
    if (line->memory.obj) PyBuffer_Release(&line->memory);
    freefunc deallocate = (freefunc)PyType_GetSlot(type, Py_tp_free);
    deallocate(line);
    Py_DECREF(type);
}

bool line_is_one(PyObject *object) { return PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)line_dealloc; }

static PyObject *get_filled(struct line *line, void *unused) {
    (void)unused;
    return PyLong_FromLongLong(line_filled(line));
}

static PyObject *get_waits(struct line *line, void *unused) {
    (void)unused;
    return PyBool_FromLong(line_is_for_python(line));
}

static PyObject *get_gone(struct line *line, void *unused) {
    (void)unused;
    return PyBool_FromLong(line->gone);
}

static int set_flag(bool *flag, PyObject *value) {
    int truth = value ? PyObject_IsTrue(value) : -1;
    if (truth < 0) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "it cannot be deleted");
        return -1;
    }
    *flag = truth;
    return 0;
}

static int set_gone(struct line *line, PyObject *value, void *unused) {
    (void)unused;
    return set_flag(&line->gone, value);
}

static PyObject *get_crowded(struct line *line, void *unused) {
    (void)unused;
    return PyBool_FromLong(line->crowded);
}

static int set_crowded(struct line *line, PyObject *value, void *unused) {
    (void)unused;
    return set_flag(&line->crowded, value);
}

static PyObject *get_longest(struct line *line, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(line_longest(line));
}

static PyObject *get_has_unwritten(struct line *line, void *unused) {
    (void)unused;
    return PyBool_FromLong(line->first_unwritten != NULL);
}

static PyObject *method_head(struct line *line, PyObject *unused) {
    (void)unused;
    const char *head = (const void *)line_head(line);
    return PyLong_FromSsize_t(head - (const char *)line->memory.buf);
}

static PyObject *method_release(struct line *line, PyObject *unused) {
    (void)unused;
    line->waits = false;
    line_release(line);
    Py_RETURN_NONE;
}

static PyObject *method_claim(struct line *line, PyObject *bytes) {
    struct place place;
    unsigned long long size = PyLong_AsUnsignedLongLong(bytes);
    if (PyErr_Occurred()) return NULL;
    if (!claim(line, size, &place)) Py_RETURN_NONE;
    const char *slot = (const void *)place.slot;
    Py_ssize_t offset = slot - (const char *)line->memory.buf;
    return Py_BuildValue("nKK", offset, (unsigned long long)place.offset, (unsigned long long)place.end);
}

static PyObject *method_wait_for_room(struct line *line, PyObject *unused) {
    (void)unused;
    atomic_store_explicit(&line->header->engine_waits_for_room, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    Py_RETURN_NONE;
}

static PyObject *method_publish(struct line *line, PyObject *unused) {
    (void)unused;
    line_publish(line);
    Py_RETURN_NONE;
}

static PyGetSetDef properties[] = {
    {"filled", (getter)get_filled, NULL, "Requests that were not taken yet; -1 where that cannot be.", NULL},
    {"waits", (getter)get_waits, NULL, "Whether the oldest request is one for Python to take now.", NULL},
    {"gone", (getter)get_gone, (setter)set_gone, "Whether nobody is there to be answered.", NULL},
    {"crowded", (getter)get_crowded, (setter)set_crowded, "Whether Python has answers that wait for room.", NULL},
    {"longest", (getter)get_longest, NULL, "Bytes of an answer that there is room for at some time.", NULL},
    {"has_unwritten", (getter)get_has_unwritten, NULL, "Whether answers wait for room.", NULL},
    {0},
};

static PyMethodDef methods[] = {
    {"head", (PyCFunction)method_head, METH_NOARGS, "Offset of the oldest request's slot."},
    {"release", (PyCFunction)method_release, METH_NOARGS, "Gives the oldest request's slot back."},
    {"claim", (PyCFunction)method_claim, METH_O, "Offset of a slot for an answer; offset and end of its room."},
    {"wait_for_room", (PyCFunction)method_wait_for_room, METH_NOARGS, "Has the bell rung when there is room again."},
    {"publish", (PyCFunction)method_publish, METH_NOARGS, "Shows the frontend what was written."},
    {0},
};

static PyType_Slot line_slots[] = {
    {Py_tp_new, line_new},
    {Py_tp_dealloc, line_dealloc},
    {Py_tp_getset, properties},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec blockdex_line_spec = {
    .name = "blockdex._native.Line",
    .basicsize = sizeof(struct line),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = line_slots,
};
