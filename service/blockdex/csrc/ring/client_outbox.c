/* What a link has taken and not sent yet: requests that wait for room, and long ones, which are copied slice by
 * slice so that whoever runs the link can look after others between two slices. */
#include "ring/client.h"

#include <assert.h>
#include <stdlib.h>

/* Of keys and queries: copying so many bytes takes about a tenth of a millisecond. */
enum { SLICE_BYTES = 1 << 19 };

static uint64_t tensor_bytes(const struct outgoing *outgoing) { return outgoing->keys.bytes + outgoing->queries.bytes; }

/* Takes out what `*at` points to. */
static void unlink_at(struct outbox *outbox, struct outgoing **at) {
    if (outbox->end == &(*at)->next) outbox->end = at;
    (*at)->pending->unsent = NULL;
    *at = (*at)->next;
}

static struct share *share_of(const struct client_link *self, const struct outgoing *outgoing) {
    return &self->shares[outgoing->pending->tenant];
}

static bool is_written(const struct outgoing *outgoing) { return outgoing->written == tensor_bytes(outgoing); }

/* Takes room for a request and writes all of it but its tensors; false while there is none. */
static bool place(struct client_link *self, struct outgoing *outgoing, const struct wire_request *request) {
    struct blockdex_request *slot = &outgoing->slot;
    struct pending *pending = outgoing->pending;
    Py_ssize_t tenant_bytes;
    const char *tenant = PyUnicode_AsUTF8AndSize(outgoing->tenant, &tenant_bytes);
    assert(tenant && (size_t)tenant_bytes == slot->tenant_bytes);
    struct share *own = &self->shares[pending->tenant], *all = &self->shares[0];
    if (!client_link_has_share(self, pending->tenant, own->placed, all->placed, slot->payload_bytes, 1) ||
        !blockdex_arena_take(&self->arena, slot->payload_bytes, &pending->extent))
        return false;
    own->placed += pending->extent.bytes;
    all->placed += pending->extent.bytes;
    slot->payload_offset = pending->extent.offset;
    char *to = self->segment.request_arena + slot->payload_offset;
    if (request) {
        tokens_write_columns(request, tenant, slot, to);
    } else {
        uint64_t at = sequences_columns_at(slot->tenant_bytes);
        memcpy(to, tenant, slot->tenant_bytes);
        if (at < slot->payload_bytes) memcpy(to + at, PyBytes_AsString(outgoing->message), slot->payload_bytes - at);
    }
    outgoing->placed = true;
    return true;
}

/* The same for one that waited for room: the columns that were read from its message are another one's by now. */
static bool place_again(struct client_link *self, struct outgoing *outgoing) {
    uint8_t rpc = outgoing->pending->rpc;
    if (rpc >= SEQUENCE_RPCS) return place(self, outgoing, NULL);
    struct wire_request request = {.spans = &self->columns, .kind = rpc % NUM_KINDS};
    struct refusal refusal;
    const uint8_t *bytes = (const uint8_t *)PyBytes_AsString(outgoing->message);
    size_t size = (size_t)PyBytes_Size(outgoing->message);
    memset(self->columns.counts, 0, sizeof self->columns.counts);
    bool good = (rpc >= STREAMED ? wire_read_streamed : wire_read)(&request, bytes, size) &&
                tokens_fit(&request, &self->bounds, &refusal);
    assert(good);
    (void)good;
    return place(self, outgoing, &request);
}

static void write_some(struct client_link *self, struct outgoing *outgoing, uint64_t *most) {
    char *to = self->segment.request_arena + outgoing->slot.payload_offset;
    uint64_t bytes =
        tokens_write_tensors(&outgoing->keys, &outgoing->queries, &outgoing->slot, to, outgoing->written, *most);
    outgoing->written += bytes;
    *most -= bytes;
}

/* Whether a request of the same owner is to be sent before. */
static bool is_behind_another(const struct client_link *self, const struct outgoing *outgoing) {
    for (struct outgoing *other = self->outbox.first; other && other != outgoing; other = other->next)
        if (other->pending->owner == outgoing->pending->owner) return true;
    return false;
}

/* Whether it was sent. Once one finds no slot, all others wait behind it. */
static bool send_if_ready(struct client_link *self, struct outgoing *outgoing) {
    if (!outgoing->placed || !is_written(outgoing) || self->outbox.no_slot || is_behind_another(self, outgoing))
        return false;
    self->outbox.no_slot = !client_link_publish(self, &outgoing->slot);
    return !self->outbox.no_slot;
}

static int keep(struct client_link *self, const struct outgoing *outgoing) {
    struct outgoing *kept = malloc(sizeof *kept);
    if (!kept) return -1;
    *kept = *outgoing;
    kept->next = NULL;
    Py_INCREF(kept->message);
    Py_INCREF(kept->tenant);
    *self->outbox.end = kept;
    self->outbox.end = &kept->next;
    kept->pending->unsent = kept;
    share_of(self, kept)->unplaced += !kept->placed;
    return QUEUED;
}

int outbox_begin(struct client_link *self, struct outgoing *outgoing, const struct wire_request *request) {
    uint64_t most = SLICE_BYTES;
    if (!share_of(self, outgoing)->unplaced && place(self, outgoing, request) && tensor_bytes(outgoing) <= SLICE_BYTES)
        write_some(self, outgoing, &most);
    if (send_if_ready(self, outgoing)) return SENT;
    return keep(self, outgoing);
}

static void send_cancels(struct client_link *self) {
    struct inflight *table = &self->inflight;
    for (uint32_t at = 0; at < table->capacity && table->cancels_due; at++) {
        struct pending *pending = &table->all[at];
        if (!pending->cancel_due) continue;
        if (!client_link_publish(self, &(struct blockdex_request){.ticket = pending->ticket, .kind = BLOCKDEX_CANCEL}))
            return;
        pending->cancel_due = false;
        table->cancels_due--;
    }
}

int outbox_flush(struct client_link *self) {
    /* What is short passes what is long, and neither keeps the other from its share. */
    uint64_t short_bytes = SLICE_BYTES, long_bytes = SLICE_BYTES;
    struct outgoing *sent = NULL;
    bool more = false;
    self->outbox.flushes++;
    send_cancels(self);
    self->outbox.no_slot = self->inflight.cancels_due;
    for (struct outgoing **at = &self->outbox.first; *at;) {
        struct outgoing *outgoing = *at;
        struct share *share = share_of(self, outgoing);
        if (!outgoing->placed && share->flush != self->outbox.flushes) {
            if (place_again(self, outgoing))
                share->unplaced--;
            else
                share->flush = self->outbox.flushes; /* the others of this tenant wait behind it */
        }
        if (!outgoing->placed) {
            at = &outgoing->next;
            continue;
        }
        write_some(self, outgoing, tensor_bytes(outgoing) > SLICE_BYTES ? &long_bytes : &short_bytes);
        more |= !is_written(outgoing);
        if (!send_if_ready(self, outgoing)) {
            at = &outgoing->next;
            continue;
        }
        unlink_at(&self->outbox, at);
        outgoing->next = sent;
        sent = outgoing;
    }
    for (struct outgoing *next; sent; sent = next) {
        next = sent->next;
        outbox_release(sent);
    }
    if (more) return MORE_TO_COPY;
    return self->outbox.first || self->inflight.cancels_due ? WAITS_FOR_ROOM : NOTHING_LEFT;
}

struct outgoing *outbox_remove(struct client_link *self, struct outgoing *outgoing) {
    struct outgoing **at = &self->outbox.first;
    while (*at != outgoing) at = &(*at)->next;
    unlink_at(&self->outbox, at);
    if (outgoing->placed)
        blockdex_arena_give_back(&self->arena, outgoing->pending->extent);
    else
        share_of(self, outgoing)->unplaced--;
    return outgoing;
}

void outbox_release(struct outgoing *outgoing) {
    PyObject *message = outgoing->message, *tenant = outgoing->tenant;
    free(outgoing);
    Py_DECREF(message);
    Py_DECREF(tenant);
}
