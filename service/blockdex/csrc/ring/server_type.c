#include "ring/server_type.h"

struct line_object {
    PyObject_HEAD
    Py_buffer memory;
    struct line line;
};

static bool number_of(PyObject *segment, const char *name, uint64_t *number) {
    PyObject *value = PyObject_GetAttrString(segment, name);
    if (!value) return false;
    *number = PyLong_AsUnsignedLongLong(value);
    Py_DECREF(value);
    return !PyErr_Occurred();
}

/* Sizes are read once, from who made the segment: the other side can write its header at any time. */
static bool layout_of(PyObject *segment, struct segment_layout *layout) {
    return number_of(segment, "request_slots_offset", &layout->requests_at) &&
           number_of(segment, "answer_slots_offset", &layout->answers_at) &&
           number_of(segment, "request_arena_offset", &layout->request_arena_at) &&
           number_of(segment, "answer_arena_offset", &layout->answer_arena_at) &&
           number_of(segment, "request_slots", &layout->request_slots) &&
           number_of(segment, "answer_slots", &layout->answer_slots) &&
           number_of(segment, "request_arena_bytes", &layout->request_arena_bytes) &&
           number_of(segment, "answer_arena_bytes", &layout->answer_arena_bytes);
}

static bool open_line(struct line_object *self, PyObject *segment, int bell, int own_bell) {
    struct segment_layout layout;
    if (!layout_of(segment, &layout)) return false;
    PyObject *memory = PyObject_GetAttrString(segment, "memory");
    if (!memory) return false;
    int got = PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS);
    Py_DECREF(memory);
    if (got < 0) return false;
    if (line_open(&self->line, self->memory.buf, (uint64_t)self->memory.len, &layout, bell, own_bell)) return true;
    PyErr_SetString(PyExc_ValueError, "segment: its parts are not inside its memory");
    return false;
}

static PyObject *line_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"segment", "bell", "own_bell", "tenant", NULL};
    PyObject *segment;
    int bell, own_bell;
    const char *tenant = "";
    Py_ssize_t tenant_bytes = 0;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "Oii|s#:Line", names, &segment, &bell, &own_bell, &tenant,
                                     &tenant_bytes))
        return NULL;
    if (tenant_bytes > (Py_ssize_t)BLOCKDEX_MAX_TENANT_BYTES)
        return PyErr_Format(PyExc_ValueError, "tenant: at most %d bytes, got %zd", BLOCKDEX_MAX_TENANT_BYTES,
                            tenant_bytes);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct line_object *self = (void *)allocate(type, 0);
    if (!self) return NULL;
    if (!open_line(self, segment, bell, own_bell)) {
        Py_DECREF(self);
        return NULL;
    }
    memcpy(self->line.tenant, tenant, (size_t)tenant_bytes);
    self->line.tenant_bytes = (uint16_t)tenant_bytes;
    return (PyObject *)self;
}

static void line_dealloc(struct line_object *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    line_close(&self->line);
    if (self->memory.obj) PyBuffer_Release(&self->memory);
    freefunc deallocate = (freefunc)PyType_GetSlot(type, Py_tp_free);
    deallocate(self);
    Py_DECREF(type);
}

struct line *line_of(PyObject *object) {
    if (PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)line_dealloc)
        return &((struct line_object *)object)->line;
    PyErr_Format(PyExc_TypeError, "a Line is needed, got %R", object);
    return NULL;
}

PyObject *line_object(struct line *line) { return (PyObject *)((char *)line - offsetof(struct line_object, line)); }

static PyObject *get_memory(struct line_object *self, void *unused) {
    (void)unused;
    return PyMemoryView_FromObject(self->memory.obj);
}

static PyObject *get_filled(struct line_object *self, void *unused) {
    (void)unused;
    return PyLong_FromLongLong(line_filled(&self->line));
}

static PyObject *get_waits(struct line_object *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(line_is_for_python(&self->line));
}

static PyObject *get_gone(struct line_object *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(self->line.gone);
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

static int set_gone(struct line_object *self, PyObject *value, void *unused) {
    (void)unused;
    return set_flag(&self->line.gone, value);
}

static PyObject *get_crowded(struct line_object *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(self->line.crowded);
}

static int set_crowded(struct line_object *self, PyObject *value, void *unused) {
    (void)unused;
    return set_flag(&self->line.crowded, value);
}

static PyObject *get_longest(struct line_object *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(line_longest(&self->line));
}

static PyObject *get_has_unwritten(struct line_object *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(self->line.first_unwritten != NULL);
}

static PyObject *method_head(struct line_object *self, PyObject *unused) {
    (void)unused;
    const char *head = (const void *)line_head(&self->line);
    return PyLong_FromSsize_t(head - (const char *)self->memory.buf);
}

static PyObject *method_release(struct line_object *self, PyObject *unused) {
    (void)unused;
    struct line *line = &self->line;
    if (line_filled(line) < 1) return PyErr_Format(PyExc_ValueError, "release: no request is there");
    line->waits = false;
    line_release(line);
    Py_RETURN_NONE;
}

static PyObject *method_claim(struct line_object *self, PyObject *bytes) {
    struct claim claim;
    unsigned long long size = PyLong_AsUnsignedLongLong(bytes);
    if (PyErr_Occurred()) return NULL;
    if (!line_claim(&self->line, size, &claim)) Py_RETURN_NONE;
    const char *slot = (const void *)claim.slot;
    Py_ssize_t offset = slot - (const char *)self->memory.buf;
    return Py_BuildValue("nKK", offset, (unsigned long long)claim.offset, (unsigned long long)claim.end);
}

static PyObject *method_wait_for_room(struct line_object *self, PyObject *unused) {
    (void)unused;
    line_wait_for_room(&self->line);
    Py_RETURN_NONE;
}

static PyObject *method_publish(struct line_object *self, PyObject *unused) {
    (void)unused;
    line_publish(&self->line);
    Py_RETURN_NONE;
}

static PyGetSetDef properties[] = {
    {"memory", (getter)get_memory, NULL, "The segment's bytes.", NULL},
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
    .basicsize = sizeof(struct line_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = line_slots,
};
