#include "ring/server_type.h"

struct server_link_object {
    PyObject_HEAD
    Py_buffer memory;
    struct server_link link;
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

static bool open_line(struct server_link_object *self, PyObject *segment, int bell, int own_bell) {
    struct segment_layout layout;
    if (!layout_of(segment, &layout)) return false;
    PyObject *memory = PyObject_GetAttrString(segment, "memory");
    if (!memory) return false;
    int got = PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS);
    Py_DECREF(memory);
    if (got < 0) return false;
    if (server_link_open(&self->link, self->memory.buf, (uint64_t)self->memory.len, &layout, bell, own_bell))
        return true;
    PyErr_SetString(PyExc_ValueError, "segment: its parts are not inside its memory");
    return false;
}

static PyObject *server_link_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
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
    struct server_link_object *self = (void *)allocate(type, 0);
    if (!self) return NULL;
    if (!open_line(self, segment, bell, own_bell)) {
        Py_DECREF(self);
        return NULL;
    }
    memcpy(self->link.tenant, tenant, (size_t)tenant_bytes);
    self->link.tenant_bytes = (uint16_t)tenant_bytes;
    return (PyObject *)self;
}

static void server_link_dealloc(struct server_link_object *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    server_link_close(&self->link);
    for (size_t entry = 0; entry < MAX_REGIONS; entry++) Py_XDECREF((PyObject *)self->link.regions.table[entry].owner);
    if (self->memory.obj) PyBuffer_Release(&self->memory);
    freefunc deallocate = (freefunc)PyType_GetSlot(type, Py_tp_free);
    deallocate(self);
    Py_DECREF(type);
}

struct server_link *server_link_of(PyObject *object) {
    if (PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)server_link_dealloc)
        return &((struct server_link_object *)object)->link;
    PyErr_Format(PyExc_TypeError, "a Line is needed, got %R", object);
    return NULL;
}

PyObject *server_link_object(struct server_link *link) {
    return (PyObject *)((char *)link - offsetof(struct server_link_object, link));
}

static PyObject *get_memory(struct server_link_object *self, void *unused) {
    (void)unused;
    return PyMemoryView_FromObject(self->memory.obj);
}

static PyObject *get_filled(struct server_link_object *self, void *unused) {
    (void)unused;
    return PyLong_FromLongLong(server_link_filled(&self->link));
}

static PyObject *get_waits(struct server_link_object *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(server_link_is_for_python(&self->link));
}

static PyObject *get_gone(struct server_link_object *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(self->link.gone);
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

static int set_gone(struct server_link_object *self, PyObject *value, void *unused) {
    (void)unused;
    return set_flag(&self->link.gone, value);
}

static PyObject *get_crowded(struct server_link_object *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(self->link.crowded);
}

static int set_crowded(struct server_link_object *self, PyObject *value, void *unused) {
    (void)unused;
    return set_flag(&self->link.crowded, value);
}

static PyObject *get_longest(struct server_link_object *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(server_link_longest(&self->link));
}

static PyObject *get_has_unwritten(struct server_link_object *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(self->link.first_unwritten != NULL);
}

static PyObject *method_head(struct server_link_object *self, PyObject *unused) {
    (void)unused;
    const char *head = (const void *)server_link_head(&self->link);
    return PyLong_FromSsize_t(head - (const char *)self->memory.buf);
}

static PyObject *method_release(struct server_link_object *self, PyObject *unused) {
    (void)unused;
    struct server_link *link = &self->link;
    if (server_link_filled(link) < 1) return PyErr_Format(PyExc_ValueError, "release: no request is there");
    link->waits = false;
    server_link_release(link);
    Py_RETURN_NONE;
}

static PyObject *method_claim(struct server_link_object *self, PyObject *bytes) {
    struct claim claim;
    unsigned long long size = PyLong_AsUnsignedLongLong(bytes);
    if (PyErr_Occurred()) return NULL;
    if (!server_link_claim(&self->link, size, &claim)) Py_RETURN_NONE;
    const char *slot = (const void *)claim.slot;
    Py_ssize_t offset = slot - (const char *)self->memory.buf;
    return Py_BuildValue("nKK", offset, (unsigned long long)claim.offset, (unsigned long long)claim.end);
}

static PyObject *method_wait_for_room(struct server_link_object *self, PyObject *unused) {
    (void)unused;
    server_link_wait_for_room(&self->link);
    Py_RETURN_NONE;
}

static PyObject *method_publish(struct server_link_object *self, PyObject *unused) {
    (void)unused;
    server_link_publish(&self->link);
    Py_RETURN_NONE;
}

static PyObject *method_share(struct server_link_object *self, PyObject *region) {
    uint64_t address, bytes;
    if (!number_of(region, "address", &address) || !number_of(region, "bytes", &bytes)) return NULL;
    PyObject *on_device = PyObject_GetAttrString(region, "on_device");
    int truth = on_device ? PyObject_IsTrue(on_device) : -1;
    Py_XDECREF(on_device);
    if (truth < 0) return NULL;
    struct region *added = regions_add(&self->link.regions, (char *)(uintptr_t)address, bytes, truth, region);
    if (!added) return PyErr_Format(PyExc_ValueError, "regions: a link has at most %d", MAX_REGIONS);
    Py_INCREF(region);
    return PyLong_FromUnsignedLong(added->id);
}

static PyObject *method_make_channel(struct server_link_object *self, PyObject *arguments) {
    PyObject *region;
    double bound_seconds;
    unsigned long long epoch;
    if (!PyArg_ParseTuple(arguments, "OdK", &region, &bound_seconds, &epoch)) return NULL;
    PyObject *number = method_share(self, region);
    if (!number) return NULL;
    const struct region *memory = regions_find(&self->link.regions, (uint32_t)PyLong_AsUnsignedLong(number));
    if (server_link_make_channel(&self->link, memory, (int64_t)(1e9 * bound_seconds), epoch)) return number;
    Py_DECREF(number);
    return PyErr_Format(PyExc_ValueError, "channel: its memory has %llu bytes", (unsigned long long)memory->bytes);
}

static struct region *region_of(struct server_link_object *self, PyObject *id) {
    unsigned long number = PyLong_AsUnsignedLong(id);
    if (PyErr_Occurred()) return NULL;
    struct region *region = number > UINT32_MAX ? NULL : regions_find(&self->link.regions, (uint32_t)number);
    if (!region) PyErr_Format(PyExc_KeyError, "the link has no region %lu", number);
    return region;
}

static PyObject *method_give_back(struct server_link_object *self, PyObject *id) {
    struct region *region = region_of(self, id);
    if (!region) return NULL;
    region->given_back = true;
    if (region->requests) Py_RETURN_FALSE;
    PyObject *owner = region->owner;
    region->in_use = false;
    region->owner = NULL;
    Py_DECREF(owner);
    Py_RETURN_TRUE;
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
    {"share", (PyCFunction)method_share, METH_O, "Enters a region that requests may name; its number."},
    {"make_channel", (PyCFunction)method_make_channel, METH_VARARGS,
     "Makes it a channel with a region as its memory; the region's number."},
    {"give_back", (PyCFunction)method_give_back, METH_O, "Has no request name a region; whether none uses it."},
    {"publish", (PyCFunction)method_publish, METH_NOARGS, "Shows the frontend what was written."},
    {0},
};

static PyType_Slot server_link_slots[] = {
    {Py_tp_new, server_link_new},
    {Py_tp_dealloc, server_link_dealloc},
    {Py_tp_getset, properties},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec blockdex_line_spec = {
    .name = "blockdex._native.ServerLink",
    .basicsize = sizeof(struct server_link_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = server_link_slots,
};
