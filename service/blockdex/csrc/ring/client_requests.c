/* What a link sends: token requests as they came off the wire, requests about sequences, and what is given up. */
#include "faults.h"
#include "ring/client.h"

#include <stdlib.h>

/* All that is in flight is of so many times the bytes of the arena at most. */
enum { MAX_TENANT_BYTES = 256, IN_ARENA_OR_WAITING = 2 };

bool client_link_publish(struct client_link *self, const struct blockdex_request *slot) {
    uint64_t taken = self->written - atomic_load_explicit(&self->segment.header->requests_read, memory_order_acquire);
    if (self->closed || taken >= self->segment.num_request_slots) return false;
    memcpy(self->segment.request_slots + self->written % self->segment.num_request_slots * BLOCKDEX_SLOT_BYTES, slot,
           sizeof *slot);
    if (fault_strikes(FAULT_RING_WRITE))
        memset(self->segment.request_slots + self->written % self->segment.num_request_slots * BLOCKDEX_SLOT_BYTES,
               0xff, sizeof *slot);
    self->written++;
    self->active = blockdex_now();
    blockdex_show(&self->segment.header->requests_written, self->written, &self->segment.header->engine_sleeps,
                  self->engine_bell);
    return true;
}

/* Who sends, and what they say of a request beside its message. */
struct sender {
    PyObject *owner, *tenant;
    Py_ssize_t tenant_bytes;
    uint64_t number;
    double timeout;
    uint8_t rpc;
};

/* Metadata carries nothing but printable ASCII; whoever calls has refused what else a caller may say. */
static bool read_tenant(struct sender *sender) {
    const char *tenant = PyUnicode_AsUTF8AndSize(sender->tenant, &sender->tenant_bytes);
    if (!tenant) return false;
    bool good = sender->tenant_bytes >= 1 && sender->tenant_bytes <= MAX_TENANT_BYTES;
    for (Py_ssize_t at = 0; good && at < sender->tenant_bytes; at++) good = tenant[at] >= ' ' && tenant[at] <= '~';
    if (!good) PyErr_SetString(PyExc_ValueError, "tenant: must be 1 to 256 printable ASCII characters");
    return good;
}

static struct share *share_of(const struct client_link *self, uint32_t tenant) { return &self->shares[tenant]; }

/* Whether a tenant may have one more request in flight, of so many bytes, where all of them together may have so many times
 * the arena: what has no room there waits. */
static bool has_share(const struct client_link *self, uint32_t tenant, uint64_t bytes, uint64_t times) {
    const struct share *own = share_of(self, tenant);
    const double left = (double)self->max_waiting - self->inflight.waiting;
    return client_link_has_share(self, tenant, own->bytes, share_of(self, 0)->bytes, bytes, times) &&
           tenants_may_have(self->tenants.all[tenant].weight, own->requests, left);
}

PyObject *client_link_may_begin(PyObject *object, PyObject *arguments) {
    const struct client_link *self = (struct client_link *)object;
    const char *name;
    Py_ssize_t size;
    unsigned long long bytes;
    if (!PyArg_ParseTuple(arguments, "s#K:may_begin", &name, &size, &bytes)) return NULL;
    const uint32_t tenant = tenants_find(&self->tenants, name, (size_t)size);
    return PyBool_FromLong(!tenant || has_share(self, tenant, bytes, 1));
}

/* Whether one more request may be in flight. */
static bool may_begin(const struct client_link *self, const struct sender *sender, uint32_t tenant, uint64_t bytes,
                      struct refusal *refusal) {
    const struct inflight *table = &self->inflight;
    if (inflight_of(table, sender->owner, sender->number))
        return refuse(refusal, INVALID_ARGUMENT, "DUPLICATE_REQUEST_ID", "request_id: %llu is in flight already",
                      (unsigned long long)sender->number);
    if (table->waiting >= self->max_waiting)
        return refuse(refusal, RESOURCE_EXHAUSTED, "OVERLOADED", "queue: at most %u requests may wait, %u do",
                      self->max_waiting, table->waiting);
    if (inflight_full(table))
        return refuse(refusal, RESOURCE_EXHAUSTED, "OVERLOADED",
                      "queue: %u requests are unanswered, those that were given up included", table->capacity);
    const struct share *own = share_of(self, tenant);
    return has_share(self, tenant, bytes, IN_ARENA_OR_WAITING) ||
           refuse(refusal, RESOURCE_EXHAUSTED, "OVERLOADED",
                  "queue: the tenant's share of it is used up: %u requests, %llu bytes", own->requests,
                  (unsigned long long)own->bytes);
}

/* A tenant's number, and room for its share; 0 without memory. */
static uint32_t use_tenant(struct client_link *self, const struct sender *sender) {
    const char *name = PyUnicode_AsUTF8AndSize(sender->tenant, NULL);
    const uint32_t tenant = name ? tenants_use(&self->tenants, name, (size_t)sender->tenant_bytes) : 0;
    if (!tenant || self->num_shares == self->tenants.count) return tenant;
    struct share *shares = realloc(self->shares, self->tenants.count * sizeof *shares);
    if (!shares) {
        tenants_release(&self->tenants, tenant);
        return 0;
    }
    memset(shares + self->num_shares, 0, (self->tenants.count - self->num_shares) * sizeof *shares);
    self->shares = shares;
    self->num_shares = self->tenants.count;
    return tenant;
}

void client_link_end(struct client_link *self, struct pending *pending) {
    const uint32_t tenant = pending->tenant;
    share_of(self, tenant)->requests--;
    share_of(self, tenant)->bytes -= pending->bytes;
    share_of(self, 0)->bytes -= pending->bytes;
    share_of(self, tenant)->placed -= pending->extent.bytes;
    share_of(self, 0)->placed -= pending->extent.bytes;
    inflight_end(&self->inflight, pending);
    tenants_release(&self->tenants, tenant);
}

static PyObject *refused(const struct sender *sender, const struct refusal *refusal) {
    return Py_BuildValue("(iKiss)", (int)sender->rpc, (unsigned long long)sender->number, (int)refusal->code,
                         refusal->reason, refusal->message);
}

/* Enters a request into the table and sends it, or keeps it until there is room. */
static PyObject *begin(struct client_link *self, const struct sender *sender, struct outgoing *outgoing,
                       const struct wire_request *request) {
    struct refusal refusal;
    const uint64_t bytes = outgoing->slot.payload_bytes;
    const uint32_t tenant = use_tenant(self, sender);
    if (!tenant) return PyErr_NoMemory();
    if (!may_begin(self, sender, tenant, bytes, &refusal)) {
        tenants_release(&self->tenants, tenant);
        return refused(sender, &refusal);
    }
    struct pending *pending = inflight_begin(&self->inflight, Py_NewRef(sender->owner), sender->number, sender->rpc);
    pending->tenant = tenant;
    pending->bytes = bytes;
    share_of(self, tenant)->requests++;
    share_of(self, tenant)->bytes += bytes;
    share_of(self, 0)->bytes += bytes;
    pending->received = blockdex_now();
    pending->layer = outgoing->slot.layer;
    pending->num_spans = request ? outgoing->slot.num_spans : 0;
    pending->num_tokens = request ? tokens_count(request) : 0;
    outgoing->pending = pending;
    outgoing->tenant = sender->tenant;
    outgoing->slot.ticket = pending->ticket;
    outgoing->slot.received = pending->received;
    outgoing->slot.deadline = blockdex_until(pending->received, sender->timeout);
    int became = outbox_begin(self, outgoing, request);
    if (became >= 0) return PyLong_FromLong(became);
    if (outgoing->placed) blockdex_arena_give_back(&self->arena, pending->extent);
    PyObject *owner = inflight_disown(&self->inflight, pending);
    client_link_end(self, pending);
    Py_DECREF(owner);
    return PyErr_NoMemory();
}

PyObject *client_link_send(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
    struct client_link *self = (struct client_link *)object;
    struct wire_request request = {.spans = &self->columns};
    struct refusal refusal;
    char *bytes;
    Py_ssize_t size;
    if (count != 5) return PyErr_Format(PyExc_TypeError, "send: 5 arguments, got %zd", count);
    struct sender sender = {.owner = arguments[0], .tenant = arguments[2]};
    struct outgoing outgoing = {.message = arguments[4]};
    unsigned long rpc = PyLong_AsUnsignedLong(arguments[1]);
    sender.timeout = PyErr_Occurred() ? 0 : PyFloat_AsDouble(arguments[3]);
    if (PyErr_Occurred() || PyBytes_AsStringAndSize(arguments[4], &bytes, &size) < 0 || !read_tenant(&sender))
        return NULL;
    if (rpc > STREAMED) return PyErr_Format(PyExc_ValueError, "send: rpc must be at most %d, got %lu", STREAMED, rpc);
    bool streamed = rpc == STREAMED;
    if (!streamed) request.kind = (uint32_t)rpc;
    memset(self->columns.counts, 0, sizeof self->columns.counts);
    if (!(streamed ? wire_read_streamed : wire_read)(&request, (const uint8_t *)bytes, (size_t)size))
        return PyLong_FromLong(UNUSUAL);
    sender.number = request.number;
    sender.rpc = (uint8_t)(request.kind + (streamed ? STREAMED : 0));
    if (request.timeout_ms) sender.timeout = request.timeout_ms / 1e3;
    if (!tokens_fit(&request, &self->bounds, &refusal)) return refused(&sender, &refusal);
    tokens_describe(&request, (size_t)sender.tenant_bytes, &outgoing.slot);
    outgoing.keys = request.keys;
    outgoing.queries = request.queries;
    return begin(self, &sender, &outgoing, &request);
}

PyObject *client_link_send_sequence(PyObject *object, PyObject *arguments) {
    struct sender sender;
    struct outgoing outgoing = {.written = 0};
    struct blockdex_request *slot = &outgoing.slot;
    unsigned long long owned, epoch, sequence_id, child_id, number;
    if (!PyArg_ParseTuple(arguments, "OKbO!dHKKKKIO!:send_sequence", &sender.owner, &owned, &sender.rpc,
                          &PyUnicode_Type, &sender.tenant, &sender.timeout, &slot->kind, &epoch, &sequence_id,
                          &child_id, &number, &slot->num_spans, &PyBytes_Type, &outgoing.message) ||
        !read_tenant(&sender))
        return NULL;
    if (sender.rpc < SEQUENCE_RPCS || !blockdex_is_lifecycle(slot->kind))
        return PyErr_Format(PyExc_ValueError, "send_sequence: RPC %d and kind %d are none of a sequence", sender.rpc,
                            slot->kind);
    uint64_t bytes = (uint64_t)PyBytes_Size(outgoing.message);
    sender.number = owned;
    slot->tenant_bytes = (uint16_t)sender.tenant_bytes;
    bool has_columns = blockdex_num_columns(slot->kind);
    slot->payload_bytes = has_columns ? sequences_columns_at(slot->tenant_bytes) + bytes : slot->tenant_bytes;
    slot->epoch = epoch;
    slot->sequence_id = sequence_id;
    slot->child_id = child_id;
    slot->number = number;
    return begin((struct client_link *)object, &sender, &outgoing, NULL);
}

PyObject *client_link_flush(PyObject *object, PyObject *unused) {
    (void)unused;
    return PyLong_FromLong(outbox_flush((struct client_link *)object));
}

/* Takes a request from its owner, so that nobody is told of its answer: (owner, number, rpc, received, layer, spans,
 * tokens, bytes of its payload, or 0 where it was sent). Nothing is in between when another's code may run. */
static PyObject *given_up(struct client_link *self, struct pending *pending) {
    const struct pending was = *pending;
    struct outgoing *unsent = was.unsent;
    unsigned long long unsent_bytes = unsent ? unsent->slot.payload_bytes : 0;
    if (unsent) outbox_remove(self, unsent);
    PyObject *owner = inflight_disown(&self->inflight, pending);
    if (unsent) {
        client_link_end(self, pending);
        outbox_release(unsent);
    } else if (!client_link_publish(self, &(struct blockdex_request){.ticket = was.ticket, .kind = BLOCKDEX_CANCEL})) {
        pending->cancel_due = true;
        self->inflight.cancels_due++;
    }
    return Py_BuildValue("(NKiLIIKK)", owner, (unsigned long long)was.number, (int)was.rpc, (long long)was.received,
                         was.layer, was.num_spans, (unsigned long long)was.num_tokens, unsent_bytes);
}

PyObject *client_link_give_up(PyObject *object, PyObject *arguments) {
    struct client_link *self = (struct client_link *)object;
    PyObject *owner;
    unsigned long long number;
    if (!PyArg_ParseTuple(arguments, "OK:give_up", &owner, &number)) return NULL;
    struct pending *pending = inflight_of(&self->inflight, owner, number);
    if (!pending) Py_RETURN_NONE;
    return given_up(self, pending);
}

/* Whether it has waited since then for room, and not for its turn or its copy. */
static bool waits_for_room(const struct client_link *self, const struct pending *pending, int64_t since) {
    uint64_t taken = self->written - atomic_load_explicit(&self->segment.header->requests_read, memory_order_acquire);
    return pending->unsent && pending->received < since &&
           (!pending->unsent->placed || taken >= self->segment.num_request_slots);
}

/* Gives up those of an owner, or of everybody, or of those only the ones that have waited for room since then. */
static PyObject *give_up_some(struct client_link *self, PyObject *owner, int64_t since) {
    PyObject *list = PyList_New(0);
    for (uint32_t at = 0; list && at < self->inflight.capacity && self->inflight.waiting; at++) {
        struct pending *pending = &self->inflight.all[at];
        if (!pending->owner || (owner != Py_None && pending->owner != owner)) continue;
        if (since && !waits_for_room(self, pending, since)) continue;
        PyObject *item = given_up(self, pending);
        if (!item || PyList_Append(list, item) < 0) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

PyObject *client_link_give_up_all(PyObject *object, PyObject *owner) {
    return give_up_some((struct client_link *)object, owner, 0);
}

PyObject *client_link_overdue(PyObject *object, PyObject *seconds) {
    double patience = PyFloat_AsDouble(seconds);
    if (PyErr_Occurred()) return NULL;
    return give_up_some((struct client_link *)object, Py_None, blockdex_now() - blockdex_until(0, patience));
}
