/* What a link sends: requests as they came off the wire, those that Python writes, and those that are given up. */
#include "ring/client.h"

enum { MAX_TENANT_BYTES = 256 };

/* The next free slot; NULL while the engine has not emptied one. */
static struct blockdex_request *free_slot(const struct link *self) {
    uint64_t taken = self->written - atomic_load_explicit(&self->header->requests_read, memory_order_acquire);
    if (taken >= self->num_request_slots) return NULL;
    return (void *)(self->request_slots + self->written % self->num_request_slots * SLOT_BYTES);
}

static void publish(struct link *self) {
    self->active = link_now();
    blockdex_show(&self->header->requests_written, self->written, &self->header->engine_sleeps, self->engine_bell);
}

/* Metadata carries nothing but printable ASCII. */
static bool is_tenant(const char *tenant, Py_ssize_t bytes) {
    if (bytes < 1 || bytes > MAX_TENANT_BYTES) return false;
    for (Py_ssize_t at = 0; at < bytes; at++)
        if (tenant[at] < ' ' || tenant[at] > '~') return false;
    return true;
}

/* What `send` is asked. */
struct asked {
    PyObject *owner;
    const char *tenant;
    Py_ssize_t tenant_bytes;
    double timeout;
    unsigned rpc;
};

/* Reads and checks a request, and writes it into the ring if it is right and there is room; else changes nothing. */
static bool send_short(struct link *self, const struct asked *asked, const char *bytes, size_t size) {
    struct wire_request request = {.spans = &self->scratch.spans, .kind = asked->rpc};
    struct blockdex_request *slot = free_slot(self), described;
    struct extent extent;
    bool streamed = asked->rpc == STREAMED;
    if (!slot || !self->scratch.places || flights_full(&self->flights) || self->flights.waiting >= self->max_waiting)
        return false;
    memset(self->scratch.spans.counts, 0, sizeof self->scratch.spans.counts);
    if (!(streamed ? wire_read_streamed : wire_read)(&request, (const uint8_t *)bytes, size)) return false;
    if (!tokens_check(&request, &self->bounds, &self->scratch)) return false;
    double timeout = request.timeout_ms ? request.timeout_ms / 1e3 : asked->timeout;
    if (!(timeout >= 0 && timeout < 1e9) || flights_of(&self->flights, asked->owner, request.number)) return false;
    tokens_describe(&request, (size_t)asked->tenant_bytes, &described);
    if (!arena_take(&self->arena, described.payload_bytes, &extent)) return false;
    uint8_t rpc = (uint8_t)(request.kind + (streamed ? STREAMED : 0));
    struct flight *flight = flights_begin(&self->flights, Py_NewRef(asked->owner), request.number, rpc);
    flight->extent = extent;
    flight->received = link_now();
    tokens_carry(&request, asked->tenant, &described, self->request_arena + extent.offset);
    described.ticket = flight->ticket;
    described.received = flight->received;
    described.deadline = flight->received + (int64_t)(timeout * 1e9);
    described.payload_offset = extent.offset;
    memcpy(slot, &described, sizeof described);
    self->written++;
    publish(self);
    return true;
}

PyObject *link_send(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
    if (count != 5) return PyErr_Format(PyExc_TypeError, "send: 5 arguments, got %zd", count);
    struct asked asked = {.owner = arguments[0]};
    char *bytes;
    Py_ssize_t size;
    unsigned long rpc = PyLong_AsUnsignedLong(arguments[1]);
    asked.tenant = PyUnicode_AsUTF8AndSize(arguments[2], &asked.tenant_bytes);
    if (!asked.tenant) return NULL;
    asked.timeout = PyFloat_AsDouble(arguments[3]);
    if (PyErr_Occurred() || PyBytes_AsStringAndSize(arguments[4], &bytes, &size) < 0) return NULL;
    if (rpc > STREAMED) return PyErr_Format(PyExc_ValueError, "send: rpc must be at most %d, got %lu", STREAMED, rpc);
    asked.rpc = (unsigned)rpc;
    if (!is_tenant(asked.tenant, asked.tenant_bytes)) Py_RETURN_FALSE;
    return PyBool_FromLong(send_short((struct link *)object, &asked, bytes, (size_t)size));
}

PyObject *link_claim(PyObject *object, PyObject *arguments) {
    struct link *self = (struct link *)object;
    PyObject *owner;
    unsigned long long bytes;
    struct extent extent;
    if (!PyArg_ParseTuple(arguments, "OK:claim", &owner, &bytes)) return NULL;
    struct blockdex_request *slot = free_slot(self);
    if (!slot || flights_full(&self->flights) || !arena_take(&self->arena, bytes, &extent)) Py_RETURN_NONE;
    struct flight *flight = flights_begin(&self->flights, Py_NewRef(owner), 0, LONG_WAY);
    flight->extent = extent;
    self->written++;
    unsigned long long at = (unsigned long long)((char *)slot - (char *)self->header);
    return Py_BuildValue("KKK", (unsigned long long)flight->ticket, at, (unsigned long long)extent.offset);
}

PyObject *link_publish(PyObject *object, PyObject *unused) {
    (void)unused;
    publish((struct link *)object);
    Py_RETURN_NONE;
}

PyObject *link_cancel(PyObject *object, PyObject *ticket) {
    struct link *self = (struct link *)object;
    uint64_t number = PyLong_AsUnsignedLongLong(ticket);
    if (PyErr_Occurred()) return NULL;
    struct flight *flight = flights_with(&self->flights, number);
    if (!flight) Py_RETURN_TRUE; /* answered meanwhile */
    struct blockdex_request *slot = free_slot(self);
    if (!slot) Py_RETURN_FALSE;
    *slot = (struct blockdex_request){.ticket = number, .kind = BLOCKDEX_CANCEL};
    self->written++;
    publish(self);
    /* Last: what an owner does when it goes must find everything in order. */
    Py_XDECREF((PyObject *)flights_disown(&self->flights, flight));
    Py_RETURN_TRUE;
}

/* Takes a flight from its owner: (owner, number, rpc, received, ticket). */
static PyObject *given_up(struct link *self, struct flight *flight) {
    PyObject *owner = flights_disown(&self->flights, flight);
    return Py_BuildValue("NKiLK", owner, (unsigned long long)flight->number, (int)flight->rpc,
                         (long long)flight->received, (unsigned long long)flight->ticket);
}

PyObject *link_awaits(PyObject *object, PyObject *arguments) {
    PyObject *owner;
    unsigned long long number;
    if (!PyArg_ParseTuple(arguments, "OK:awaits", &owner, &number)) return NULL;
    return PyBool_FromLong(flights_of(&((struct link *)object)->flights, owner, number) != NULL);
}

PyObject *link_give_up(PyObject *object, PyObject *arguments) {
    struct link *self = (struct link *)object;
    PyObject *owner;
    unsigned long long number;
    if (!PyArg_ParseTuple(arguments, "OK:give_up", &owner, &number)) return NULL;
    struct flight *flight = flights_of(&self->flights, owner, number);
    if (!flight) Py_RETURN_NONE;
    return given_up(self, flight);
}

PyObject *link_give_up_all(PyObject *object, PyObject *owner) {
    struct link *self = (struct link *)object;
    PyObject *list = PyList_New(0);
    if (!list) return NULL;
    for (uint32_t at = 0; at < self->flights.capacity && self->flights.on_short_way; at++) {
        struct flight *flight = &self->flights.all[at];
        if (!flight->owner || flight->rpc == LONG_WAY || (owner != Py_None && flight->owner != owner)) continue;
        PyObject *item = given_up(self, flight);
        if (!item || PyList_Append(list, item) < 0) {
            Py_XDECREF(item);
            Py_DECREF(list);
            return NULL;
        }
        Py_DECREF(item);
    }
    return list;
}
