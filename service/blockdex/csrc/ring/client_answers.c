/* What a link receives. */
#include "ring/client.h"

/* The response to a token request as it goes over the wire; None for an answer that is no such response. */
static PyObject *response_of(const struct pending *pending, const struct blockdex_answer *slot, const char *payload) {
    struct wire_response response = {
        .number = pending->number, .kind = pending->rpc % NUM_KINDS, .streamed = pending->rpc >= STREAMED};
    if (pending->rpc >= SEQUENCE_RPCS || slot->code) return Py_NewRef(Py_None);
    if (!tokens_answer(slot, payload, &response)) {
        PyErr_SetString(PyExc_ValueError, "answer: it is none to its request");
        return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)wire_size(&response));
    if (bytes) wire_write(&response, (uint8_t *)PyBytes_AsString(bytes));
    return bytes;
}

/* What there is to say of an answer beside its response: (rpc, received, slot, payload, layer, spans, tokens). */
static PyObject *rest_of(const struct pending *pending, const struct blockdex_answer *slot, const char *payload,
                         bool responds) {
    return Py_BuildValue("(iLy#y#IIK)", (int)pending->rpc, (long long)pending->received, (const char *)slot,
                         (Py_ssize_t)sizeof *slot, payload, responds ? (Py_ssize_t)0 : (Py_ssize_t)slot->payload_bytes,
                         pending->layer, pending->num_spans, (unsigned long long)pending->num_tokens);
}

/* An answer as Python gets it: (owner, number, response, rest). The rest of a response is None, unless that took
 * long. */
static PyObject *item_of(const struct client_link *self, PyObject *owner, const struct pending *pending,
                         const struct blockdex_answer *slot, double seconds) {
    const char *payload = self->segment.answer_arena + slot->payload_offset;
    PyObject *response = response_of(pending, slot, payload);
    if (!response) return NULL;
    bool responds = response != Py_None;
    PyObject *rest =
        responds && seconds <= self->tell_seconds ? Py_NewRef(Py_None) : rest_of(pending, slot, payload, responds);
    if (!rest) {
        Py_DECREF(response);
        return NULL;
    }
    return Py_BuildValue("(NKNN)", Py_NewRef(owner), (unsigned long long)pending->number, response, rest);
}

/* The request of an answer; NULL with an error set where the answer is not what the layout says. */
static struct pending *pending_of(const struct client_link *self, const struct blockdex_answer *slot) {
    struct pending *pending = inflight_with(&self->inflight, slot->ticket);
    if (!pending || pending->unsent)
        return (void *)PyErr_Format(PyExc_ValueError, "answer: ticket %llu is not in flight", slot->ticket);
    uint64_t room = self->segment.answer_arena_bytes;
    if (slot->payload_bytes > room || slot->payload_offset > room - slot->payload_bytes)
        return (void *)PyErr_Format(PyExc_ValueError, "answer: %llu bytes at %llu are not in an arena of %llu",
                                    slot->payload_bytes, slot->payload_offset, room);
    if (slot->phase < BLOCKDEX_APPEND || slot->phase > BLOCKDEX_SEQUENCE)
        return (void *)PyErr_Format(PyExc_ValueError, "answer: phase must be 1 to 4, got %llu", slot->phase);
    return pending;
}

/* Adds an answer to the list, unless nobody waits for it. What is made for it may run the collector, and that
 * anybody's code, which may give up this very request: so all is made first, of a copy and with a reference of its
 * own to the owner, and nothing changes before. */
static bool tell(struct client_link *self, PyObject *list, struct pending *pending, const struct blockdex_answer *slot,
                 int64_t at) {
    const struct pending copy = *pending;
    PyObject *owner = Py_XNewRef((PyObject *)copy.owner);
    if (!owner) return true;
    double seconds = (double)(at - copy.received) / 1e9;
    PyObject *item = item_of(self, owner, &copy, slot, seconds);
    bool waits = pending->owner == owner;
    bool told = item && (!waits || PyList_Append(list, item) == 0);
    if (told && waits) {
        if (!slot->code) times_observe(&self->times, copy.rpc, seconds);
        Py_DECREF((PyObject *)inflight_disown(&self->inflight, pending));
    }
    Py_XDECREF(item);
    Py_DECREF(owner);
    return told;
}

/* Takes the oldest answer and gives its room back. */
static bool take_one(struct client_link *self, PyObject *list, int64_t at) {
    struct blockdex_answer slot;
    memcpy(&slot, self->segment.answer_slots + self->read % self->segment.num_answer_slots * BLOCKDEX_SLOT_BYTES,
           sizeof slot);
    struct pending *pending = pending_of(self, &slot);
    if (!pending || !tell(self, list, pending, &slot, at)) return false;
    blockdex_arena_give_back(&self->arena, pending->extent);
    client_link_end(self, pending);
    if (slot.payload_bytes)
        atomic_store_explicit(&self->segment.header->answer_bytes_freed, slot.payload_end, memory_order_release);
    self->read++;
    return true;
}

/* Adds the answers that are there to the list; false with an error set where none could be added. */
static bool take_all(struct client_link *self, PyObject *list) {
    uint64_t count = client_link_filled(self);
    int64_t at = blockdex_now();
    if (count) self->active = at;
    if (count > self->segment.num_answer_slots) {
        PyErr_Format(PyExc_ValueError, "ring: %llu slots are said to be filled, there are %u", count,
                     self->segment.num_answer_slots);
        return false;
    }
    while (count && take_one(self, list, at)) count--;
    blockdex_show(&self->segment.header->answers_read, self->read, &self->segment.header->engine_waits_for_room,
                  self->engine_bell);
    if (!count) return true;
    /* What went wrong behind others goes wrong again when the next are taken; these are not lost. */
    if (PyList_Size(list)) PyErr_Clear();
    return !PyErr_Occurred();
}

PyObject *client_link_take(PyObject *object, PyObject *unused) {
    (void)unused;
    struct client_link *self = (struct client_link *)object;
    PyObject *list = PyList_New(0);
    /* Whoever is run by the collector in the midst of this takes nothing. */
    if (!list || self->taking || self->closed) return list;
    self->taking = true;
    /* Nobody may wait for those that were there; then it looks again. */
    while (list && !PyList_Size(list)) {
        if (!client_link_filled(self) && (self->spin || client_link_lie_down(self))) break;
        atomic_store_explicit(&self->segment.header->client_sleeps, 0, memory_order_relaxed);
        if (!take_all(self, list)) Py_CLEAR(list);
    }
    self->taking = false;
    return list;
}
