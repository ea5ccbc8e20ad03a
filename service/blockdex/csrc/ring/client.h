/* blockdex._native.ClientLink: the frontend's side of a ring. */
#ifndef BLOCKDEX_CLIENT_LINK_H
#define BLOCKDEX_CLIENT_LINK_H

#include "native.h"

#include "blockdex_arena.h"
#include "blockdex_ring.h"
#include "latency_histogram.h"
#include "tenants.h"
#include "ring/inflight.h"
#include "wire/messages.h"
#include "wire/request_codec.h"

/* RPCs by number: the kinds of token requests, the same over a stream, and from there on requests about sequences. */
enum { STREAMED = NUM_KINDS, SEQUENCE_RPCS = 2 * NUM_KINDS };

/* What `send` and `send_sequence` return, and `flush`. */
enum { SENT, QUEUED, UNUSUAL };
enum { NOTHING_LEFT, MORE_TO_COPY, WAITS_FOR_ROOM };

/* A request that is not all in the ring yet. `slot` describes it; once it is `placed` it has its extent of the
 * arena, with tenant and columns in it, and `written` bytes of its tensors. `message` of one about sequences is the
 * columns that it carries. */
struct outgoing {
    struct outgoing *next;
    struct pending *pending;
    PyObject *message, *tenant;
    struct wire_tensor keys, queries;
    uint64_t written;
    struct blockdex_request slot;
    bool placed;
};

/* Where the columns of a request about sequences begin: behind the tenant, as docs/ring.md says. */
static inline uint64_t sequences_columns_at(uint64_t tenant_bytes) { return (tenant_bytes + 7) / 8 * 8; }

/* In the order of their arrival; the `unplaced` ones wait for room, behind all others of their tenants. `no_slot`: some
 * wait for a slot. */
struct outbox {
    struct outgoing *first, **end;
    uint64_t flushes;
    bool no_slot;
};

/* What the requests of one tenant take that are not answered, those that were given up included: how many they are, what
 * they carry, and what of that is in the arena. `unplaced` of them wait for room; in the last flush there was none for them
 * where `flush` is that one. */
struct share {
    uint32_t requests, unplaced;
    uint64_t bytes, placed, flush;
};

struct client_link {
    PyObject_HEAD
    Py_buffer memory;
    struct blockdex_segment segment;
    uint64_t written, read;
    int64_t spin, active;
    int engine_bell;
    bool closed, taking;
    struct blockdex_arena arena;
    struct inflight inflight;
    struct outbox outbox;
    struct tenants tenants;
    struct share *shares; /* by the tenant's number; 0: of all of them */
    uint32_t num_shares;
    struct bounds bounds;
    struct wire_spans columns;
    uint32_t max_waiting;
    double tell_seconds;
    struct times times;
};

/* Answers that are there. */
static inline uint64_t client_link_filled(const struct client_link *self) {
    return atomic_load_explicit(&self->segment.header->answers_written, memory_order_acquire) - self->read;
}

/* Says that this side sleeps, and looks once more: whether there are no answers. */
static inline bool client_link_lie_down(struct client_link *self) {
    return blockdex_may_sleep(&self->segment.header->client_sleeps, &self->segment.header->answers_written, self->read);
}

/* Shows the engine one more slot; false while none is free, or the link is closed. */
bool client_link_publish(struct client_link *self, const struct blockdex_request *slot);

/* Sends a request at once if there is room and nothing of its owner's before it, or keeps it in the outbox, with
 * references of its own to message and tenant: SENT or QUEUED, -1 without memory, with an error set and nothing
 * changed. */
int outbox_begin(struct client_link *self, struct outgoing *outgoing, const struct wire_request *request);

/* Sends what there is room for, in order, and copies a slice of what is long: NOTHING_LEFT and so on. */
int outbox_flush(struct client_link *self);

/* Whether a tenant, which is used, may have so much more of the arena, or of so many times as much, of which all of them
 * have `all`. Whoever has nothing may have anything. */
static inline bool client_link_has_share(const struct client_link *self, uint32_t tenant, uint64_t own, uint64_t all,
                                         uint64_t bytes, uint64_t times) {
    const double left = (double)(times * self->segment.request_arena_bytes) - (double)all;
    return !own || tenants_may_have(self->tenants.all[tenant].weight, (double)(own + bytes), left);
}

/* A request is answered, or was never sent: it takes nothing any more. It must have no owner. */
void client_link_end(struct client_link *self, struct pending *pending);

/* Takes a request out, which was not sent; it is to be released, last of all. */
struct outgoing *outbox_remove(struct client_link *self, struct outgoing *outgoing);
void outbox_release(struct outgoing *outgoing);

/* Methods of requests. */
PyObject *client_link_send(PyObject *object, PyObject *const *arguments, Py_ssize_t count);
PyObject *client_link_send_sequence(PyObject *object, PyObject *arguments);
PyObject *client_link_flush(PyObject *object, PyObject *unused);
PyObject *client_link_may_begin(PyObject *object, PyObject *arguments);
PyObject *client_link_overdue(PyObject *object, PyObject *seconds);
PyObject *client_link_give_up(PyObject *object, PyObject *arguments);
PyObject *client_link_give_up_all(PyObject *object, PyObject *owner);

/* Methods of answers. */
PyObject *client_link_take(PyObject *object, PyObject *unused);

/* Methods of waiting for them. */
PyObject *client_link_await_alone(PyObject *object, PyObject *arguments);
PyObject *client_link_may_sleep(PyObject *object, PyObject *arguments);

/* Adds the type to the module; -1 with an error set. */
int add_link(PyObject *module);

#endif
