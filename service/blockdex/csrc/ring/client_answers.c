/* What a link receives. */
#include "ring/client.h"

static PyObject *response_of(const struct flight *flight, const struct blockdex_answer *slot, const char *payload) {
    struct wire_response response = {
        .number = flight->number, .kind = flight->rpc % STREAMED, .streamed = flight->rpc >= STREAMED};
    if (!tokens_answer(slot, payload, &response)) {
        PyErr_SetString(PyExc_ValueError, "answer: it is none to its request");
        return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)wire_size(&response));
    if (bytes) wire_write(&response, (uint8_t *)PyBytes_AsString(bytes));
    return bytes;
}

/* An answer as Python gets it: (owner, number, response, rest). The response is that of a request on the short way that
 * was answered well. The rest says what else there is: of such a one that was slow (rpc, received, slot, b""), of all
 * others (rpc, received, slot, payload). */
static PyObject *item_of(struct link *self, const struct flight *flight, const struct blockdex_answer *slot,
                         int64_t at) {
    const char *payload = self->answer_arena + slot->payload_offset;
    double seconds = (double)(at - flight->received) / 1e9;
    bool responds = flight->rpc != LONG_WAY && !slot->code;
    PyObject *response = responds ? response_of(flight, slot, payload) : Py_NewRef(Py_None);
    if (!response) return NULL;
    if (responds && seconds <= self->slow_seconds) {
        times_observe(&self->times, flight->rpc, seconds);
        return Py_BuildValue("OKNO", flight->owner, (unsigned long long)flight->number, response, Py_None);
    }
    if (responds) times_observe(&self->times, flight->rpc, seconds);
    return Py_BuildValue("OKN(iLy#y#)", flight->owner, (unsigned long long)flight->number, response, (int)flight->rpc,
                         (long long)flight->received, (const char *)slot, (Py_ssize_t)sizeof *slot, payload,
                         responds ? (Py_ssize_t)0 : (Py_ssize_t)slot->payload_bytes);
}

/* The flight of an answer; NULL with an error set where the answer is not what the layout says. */
static struct flight *flight_of(const struct link *self, const struct blockdex_answer *slot) {
    struct flight *flight = flights_with(&self->flights, slot->ticket);
    if (!flight) return (void *)PyErr_Format(PyExc_ValueError, "answer: ticket %llu is not in flight", slot->ticket);
    uint64_t room = self->answer_arena_bytes;
    if (slot->payload_bytes > room || slot->payload_offset > room - slot->payload_bytes)
        return (void *)PyErr_Format(PyExc_ValueError, "answer: %llu bytes at %llu are not in an arena of %llu",
                                    slot->payload_bytes, slot->payload_offset, room);
    if (slot->phase < BLOCKDEX_APPEND || slot->phase > BLOCKDEX_SEQUENCE)
        return (void *)PyErr_Format(PyExc_ValueError, "answer: phase must be 1 to 4, got %llu", slot->phase);
    return flight;
}

/* Adds the oldest answer to the list, unless nobody waits for it, and gives its room back. */
static bool take_one(struct link *self, PyObject *list, int64_t at) {
    struct blockdex_answer slot;
    memcpy(&slot, self->answer_slots + self->read % self->num_answer_slots * SLOT_BYTES, sizeof slot);
    struct flight *flight = flight_of(self, &slot);
    if (!flight) return false;
    if (flight->owner) {
        PyObject *item = item_of(self, flight, &slot, at);
        if (!item || PyList_Append(list, item) < 0) {
            Py_XDECREF(item);
            return false;
        }
        Py_DECREF(item); /* which holds the owner, too */
        /* Which somebody whom the collector ended meanwhile may have given up. */
        Py_XDECREF((PyObject *)flights_disown(&self->flights, flight));
    }
    arena_give_back(&self->arena, flight->extent);
    flights_end(&self->flights, flight);
    if (slot.payload_bytes)
        atomic_store_explicit(&self->header->answer_bytes_freed, slot.payload_end, memory_order_release);
    self->read++;
    return true;
}

/* Adds the answers that are there to the list; false with an error set where none could be added. */
static bool take_all(struct link *self, PyObject *list) {
    uint64_t count = link_filled(self);
    int64_t at = link_now();
    if (count) self->active = at;
    if (count > self->num_answer_slots) {
        PyErr_Format(PyExc_ValueError, "ring: %llu slots are said to be filled, there are %u", count,
                     self->num_answer_slots);
        return false;
    }
    while (count && take_one(self, list, at)) count--;
    blockdex_show(&self->header->answers_read, self->read, &self->header->engine_waits_for_room, self->engine_bell);
    if (!count) return true;
    /* What went wrong behind others goes wrong again when the next are taken; these are not lost. */
    if (PyList_Size(list)) PyErr_Clear();
    return !PyErr_Occurred();
}

PyObject *link_take(PyObject *object, PyObject *unused) {
    (void)unused;
    struct link *self = (struct link *)object;
    PyObject *list = PyList_New(0);
    /* Nobody may wait for those that were there; then it looks again. */
    while (list && !PyList_Size(list)) {
        if (!link_filled(self) && (self->spin || link_lie_down(self))) return list;
        atomic_store_explicit(&self->header->client_sleeps, 0, memory_order_relaxed);
        if (!take_all(self, list)) Py_CLEAR(list);
    }
    return list;
}
