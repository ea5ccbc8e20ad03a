#include "link.h"

#include <sched.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <time.h>

#include "arena.h"
#include "blockdex_ring.h"
#include "flights.h"
#include "tokens.h"
#include "wire.h"

enum { SLOT_BYTES = 128, HEADER_BYTES = 4096, MAX_TENANT_BYTES = 256 };

/* RPCs by number: the kinds of token requests, and the same over a stream. */
enum { STREAMED = NUM_KINDS, NUM_RPCS = 2 * NUM_KINDS };

/* Times of one RPC's answers: `counts[i]` were at most the i-th bound, the last one above them all. */
struct times {
    uint64_t *counts;
    double total;
};

/* What the header says is copied when the link begins: nobody changes it under our feet. */
typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    struct blockdex_header *header;
    char *request_slots, *request_arena;
    const char *answer_slots, *answer_arena;
    uint64_t answer_arena_bytes, written, read;
    int64_t spin, active;
    uint32_t num_request_slots, num_answer_slots;
    int engine_bell;
    struct arena arena;
    struct flights flights;
    struct bounds bounds;
    struct scratch scratch;
    uint32_t max_waiting;
    double slow_seconds, *time_bounds;
    size_t num_time_bounds;
    struct times times[NUM_RPCS];
} Link;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* --- Its beginning and its end --- */

static bool is_inside(const Link *self, uint64_t offset, uint64_t bytes) {
    uint64_t size = (uint64_t)self->memory.len;
    return offset % 64 == 0 && offset >= HEADER_BYTES && offset <= size && bytes <= size - offset;
}

static bool is_slots(const Link *self, uint64_t offset, uint32_t slots) {
    return slots && !(slots & (slots - 1)) && slots <= 1u << 24 &&
           is_inside(self, offset, (uint64_t)slots * SLOT_BYTES);
}

static bool read_header(Link *self) {
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
    Link *self = (Link *)allocate(type, 0);
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

static void forget_bounds(Link *self) {
    scratch_close(&self->scratch);
    for (unsigned rpc = 0; rpc < NUM_RPCS; rpc++) {
        free(self->times[rpc].counts);
        self->times[rpc] = (struct times){NULL, 0.0};
    }
    free(self->time_bounds);
    self->time_bounds = NULL;
}

static int link_traverse(PyObject *object, visitproc visit, void *arg) {
    Link *self = (Link *)object;
    Py_VISIT(Py_TYPE(object));
    for (uint32_t at = 0; at < self->flights.capacity; at++) Py_VISIT((PyObject *)self->flights.all[at].owner);
    return 0;
}

static int link_clear(PyObject *object) {
    Link *self = (Link *)object;
    for (uint32_t at = 0; at < self->flights.capacity; at++)
        Py_XDECREF((PyObject *)flights_disown(&self->flights, &self->flights.all[at]));
    return 0;
}

static void link_dealloc(PyObject *object) {
    Link *self = (Link *)object;
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

static bool read_time_bounds(Link *self, PyObject *sequence) {
    Py_ssize_t count = PyTuple_Size(sequence);
    if (count < 0) return false;
    self->num_time_bounds = (size_t)count;
    self->time_bounds = calloc((size_t)count + 1, sizeof *self->time_bounds);
    if (!self->time_bounds) return false;
    for (Py_ssize_t at = 0; at < count; at++) self->time_bounds[at] = PyFloat_AsDouble(PyTuple_GetItem(sequence, at));
    for (unsigned rpc = 0; rpc < NUM_RPCS; rpc++) {
        self->times[rpc].counts = calloc((size_t)count + 1, sizeof(uint64_t));
        if (!self->times[rpc].counts) return false;
    }
    return !PyErr_Occurred();
}

PyDoc_STRVAR(open_short_way_doc, "Takes requests on the short way from now on, within these bounds.");

static PyObject *link_open_short_way(PyObject *object, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"num_layers",        "num_heads",   "head_dim",     "max_sequence_tokens", "max_spans",
                            "max_message_bytes", "max_waiting", "slow_seconds", "time_bounds",         NULL};
    Link *self = (Link *)object;
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
    uint64_t salt = (uint64_t)now() * UINT64_C(0x9e3779b97f4a7c15) ^ (uint64_t)(uintptr_t)self;
    if (!scratch_open(&self->scratch, (uint32_t)bounds.max_spans, salt) || !read_time_bounds(self, time_bounds)) {
        forget_bounds(self);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    self->bounds = bounds;
    self->max_waiting = max_waiting;
    self->slow_seconds = slow_seconds;
    Py_RETURN_NONE;
}

/* --- Requests --- */

/* The next free slot; NULL while the engine has not emptied one. */
static struct blockdex_request *free_slot(const Link *self) {
    uint64_t taken = self->written - atomic_load_explicit(&self->header->requests_read, memory_order_acquire);
    if (taken >= self->num_request_slots) return NULL;
    return (void *)(self->request_slots + self->written % self->num_request_slots * SLOT_BYTES);
}

static void publish(Link *self) {
    self->active = now();
    atomic_store_explicit(&self->header->requests_written, self->written, memory_order_release);
    blockdex_ring_bell(&self->header->engine_sleeps, self->engine_bell);
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
static bool send_short(Link *self, const struct asked *asked, const char *bytes, size_t size) {
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
    flight->received = now();
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

PyDoc_STRVAR(send_doc, "Sends a request as it came off the wire; False where it is not for the short way.");

static PyObject *link_send(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
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
    return PyBool_FromLong(send_short((Link *)object, &asked, bytes, (size_t)size));
}

PyDoc_STRVAR(claim_doc,
             "A ticket, a slot and room for a request that Python writes; None while there is none of them.");

static PyObject *link_claim(PyObject *object, PyObject *arguments) {
    Link *self = (Link *)object;
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

PyDoc_STRVAR(publish_doc, "Shows the engine what was claimed.");

static PyObject *link_publish(PyObject *object, PyObject *unused) {
    (void)unused;
    publish((Link *)object);
    Py_RETURN_NONE;
}

/* --- Requests that are given up --- */

PyDoc_STRVAR(cancel_doc, "Tells the engine that nobody waits for a request; False while no slot is free.");

static PyObject *link_cancel(PyObject *object, PyObject *ticket) {
    Link *self = (Link *)object;
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
static PyObject *given_up(Link *self, struct flight *flight) {
    PyObject *owner = flights_disown(&self->flights, flight);
    return Py_BuildValue("NKiLK", owner, (unsigned long long)flight->number, (int)flight->rpc,
                         (long long)flight->received, (unsigned long long)flight->ticket);
}

PyDoc_STRVAR(awaits_doc, "Whether somebody's request of that number is on the short way.");

static PyObject *link_awaits(PyObject *object, PyObject *arguments) {
    PyObject *owner;
    unsigned long long number;
    if (!PyArg_ParseTuple(arguments, "OK:awaits", &owner, &number)) return NULL;
    return PyBool_FromLong(flights_of(&((Link *)object)->flights, owner, number) != NULL);
}

PyDoc_STRVAR(give_up_doc, "Takes a request on the short way from who asked; None where there is none.");

static PyObject *link_give_up(PyObject *object, PyObject *arguments) {
    Link *self = (Link *)object;
    PyObject *owner;
    unsigned long long number;
    if (!PyArg_ParseTuple(arguments, "OK:give_up", &owner, &number)) return NULL;
    struct flight *flight = flights_of(&self->flights, owner, number);
    if (!flight) Py_RETURN_NONE;
    return given_up(self, flight);
}

PyDoc_STRVAR(give_up_all_doc, "Takes all requests on the short way from who asked, or from everybody.");

static PyObject *link_give_up_all(PyObject *object, PyObject *owner) {
    Link *self = (Link *)object;
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

/* --- Answers --- */

static uint64_t filled(const Link *self) {
    return atomic_load_explicit(&self->header->answers_written, memory_order_acquire) - self->read;
}

/* Says that this side sleeps, and looks once more. */
static bool lie_down(Link *self) {
    atomic_store_explicit(&self->header->door_sleeps, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    return !filled(self);
}

static void observe(Link *self, unsigned rpc, double seconds) {
    size_t low = 0, high = self->num_time_bounds;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (self->time_bounds[middle] < seconds)
            low = middle + 1;
        else
            high = middle;
    }
    self->times[rpc].counts[low]++;
    self->times[rpc].total += seconds;
}

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
static PyObject *item_of(Link *self, const struct flight *flight, const struct blockdex_answer *slot, int64_t at) {
    const char *payload = self->answer_arena + slot->payload_offset;
    double seconds = (double)(at - flight->received) / 1e9;
    bool responds = flight->rpc != LONG_WAY && !slot->code;
    PyObject *response = responds ? response_of(flight, slot, payload) : Py_NewRef(Py_None);
    if (!response) return NULL;
    if (responds && seconds <= self->slow_seconds) {
        observe(self, flight->rpc, seconds);
        return Py_BuildValue("OKNO", flight->owner, (unsigned long long)flight->number, response, Py_None);
    }
    if (responds) observe(self, flight->rpc, seconds);
    return Py_BuildValue("OKN(iLy#y#)", flight->owner, (unsigned long long)flight->number, response, (int)flight->rpc,
                         (long long)flight->received, (const char *)slot, (Py_ssize_t)sizeof *slot, payload,
                         responds ? (Py_ssize_t)0 : (Py_ssize_t)slot->payload_bytes);
}

/* The flight of an answer; NULL with an error set where the answer is not what the layout says. */
static struct flight *flight_of(const Link *self, const struct blockdex_answer *slot) {
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
static bool take_one(Link *self, PyObject *list, int64_t at) {
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
        Py_DECREF((PyObject *)flights_disown(&self->flights, flight));
    }
    arena_give_back(&self->arena, flight->extent);
    flights_end(&self->flights, flight);
    if (slot.payload_bytes)
        atomic_store_explicit(&self->header->answer_bytes_freed, slot.payload_end, memory_order_release);
    self->read++;
    return true;
}

/* Adds the answers that are there to the list; false with an error set where none could be added. */
static bool take_all(Link *self, PyObject *list) {
    uint64_t count = filled(self);
    int64_t at = now();
    if (count) self->active = at;
    if (count > self->num_answer_slots) {
        PyErr_Format(PyExc_ValueError, "ring: %llu slots are said to be filled, there are %u", count,
                     self->num_answer_slots);
        return false;
    }
    while (count && take_one(self, list, at)) count--;
    atomic_store_explicit(&self->header->answers_read, self->read, memory_order_release);
    blockdex_ring_bell(&self->header->engine_waits_for_room, self->engine_bell);
    if (!count) return true;
    /* What went wrong behind others goes wrong again when the next are taken; these are not lost. */
    if (PyList_Size(list)) PyErr_Clear();
    return !PyErr_Occurred();
}

PyDoc_STRVAR(take_doc, "The answers that are there; without any, the bell rings when some come, unless it spins.");

static PyObject *link_take(PyObject *object, PyObject *unused) {
    (void)unused;
    Link *self = (Link *)object;
    PyObject *list = PyList_New(0);
    /* Nobody may wait for those that were there; then it looks again. */
    while (list && !PyList_Size(list)) {
        if (!filled(self) && (self->spin || lie_down(self))) return list;
        atomic_store_explicit(&self->header->door_sleeps, 0, memory_order_relaxed);
        if (!take_all(self, list)) Py_CLEAR(list);
    }
    return list;
}

/* Each look at an epoll is a system call; those at the ring are as good as free. */
enum { LOOKS_BETWEEN = 16 };

/* Giving the core up takes longer only if somebody has taken it. */
enum { LONGEST_YIELD_NANOSECONDS = 20000 };

/* Whether answers are there, or events of the epoll. */
static bool look(const Link *self, int epoll) {
    struct epoll_event event;
    for (int look = 0; look < LOOKS_BETWEEN; look++) {
        if (filled(self)) return true;
        __builtin_ia32_pause();
    }
    return epoll_wait(epoll, &event, 1, 0) != 0;
}

/* Whether any come until then; not if another thread wants this core meanwhile. */
static bool look_until(const Link *self, int epoll, int64_t until) {
    for (int64_t at = now(), before = at; at < until && at - before < LONGEST_YIELD_NANOSECONDS; at = now()) {
        if (look(self, epoll)) return true;
        before = now();
        sched_yield();
    }
    return false;
}

PyDoc_STRVAR(await_alone_doc, "Waits a moment for the only request in flight, if it spins; whether there are answers.");

static PyObject *link_await_alone(PyObject *object, PyObject *arguments) {
    Link *self = (Link *)object;
    int epoll;
    double seconds;
    if (!PyArg_ParseTuple(arguments, "id:await_alone", &epoll, &seconds)) return NULL;
    if (self->flights.waiting == 1 && self->spin) {
        /* Nobody is to ring for what is looked for. */
        atomic_store_explicit(&self->header->door_sleeps, 0, memory_order_relaxed);
        Py_BEGIN_ALLOW_THREADS;
        for (int64_t until = now() + (int64_t)(1e9 * seconds); now() < until && !look(self, epoll);) continue;
        Py_END_ALLOW_THREADS;
    }
    return PyBool_FromLong(filled(self) != 0);
}

PyDoc_STRVAR(may_sleep_doc, "Looks for answers, or events of an epoll, as long as it spins; whether there are none.");

static PyObject *link_may_sleep(PyObject *object, PyObject *arguments) {
    Link *self = (Link *)object;
    int epoll;
    double seconds;
    if (!PyArg_ParseTuple(arguments, "id:may_sleep", &epoll, &seconds)) return NULL;
    int64_t at = now(), until = self->active + self->spin;
    if (seconds < 1 && at + (int64_t)(1e9 * seconds) < until) until = at + (int64_t)(1e9 * seconds);
    if (at < until) {
        bool comes;
        atomic_store_explicit(&self->header->door_sleeps, 0, memory_order_relaxed);
        Py_BEGIN_ALLOW_THREADS;
        comes = look_until(self, epoll, until);
        Py_END_ALLOW_THREADS;
        if (comes) Py_RETURN_FALSE;
    }
    return PyBool_FromLong(lie_down(self));
}

PyDoc_STRVAR(take_times_doc, "What was timed since the last call: for every RPC its counts and their sum in seconds.");

static PyObject *link_take_times(PyObject *object, PyObject *unused) {
    (void)unused;
    Link *self = (Link *)object;
    PyObject *list = PyList_New(0);
    for (unsigned rpc = 0; list && self->time_bounds && rpc < NUM_RPCS; rpc++) {
        struct times *times = &self->times[rpc];
        PyObject *counts = PyList_New(0);
        for (size_t at = 0; counts && at <= self->num_time_bounds; at++) {
            PyObject *count = PyLong_FromUnsignedLongLong(times->counts[at]);
            if (!count || PyList_Append(counts, count) < 0) Py_CLEAR(counts);
            Py_XDECREF(count);
        }
        PyObject *item = counts ? Py_BuildValue("Nd", counts, times->total) : NULL;
        if (!item || PyList_Append(list, item) < 0) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    for (unsigned rpc = 0; list && self->time_bounds && rpc < NUM_RPCS; rpc++) {
        memset(self->times[rpc].counts, 0, (self->num_time_bounds + 1) * sizeof(uint64_t));
        self->times[rpc].total = 0.0;
    }
    return list;
}

/* --- The type --- */

static PyObject *link_waiting(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(((Link *)object)->flights.waiting);
}

static PyObject *link_on_short_way(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(((Link *)object)->flights.on_short_way);
}

static PyObject *link_answered(PyObject *object, void *unused) {
    (void)unused;
    return PyBool_FromLong(filled((Link *)object) != 0);
}

static PyMethodDef methods[] = {
    {"open_short_way", (PyCFunction)(void (*)(void))link_open_short_way, METH_VARARGS | METH_KEYWORDS,
     open_short_way_doc},
    {"send", (PyCFunction)(void (*)(void))link_send, METH_FASTCALL, send_doc},
    {"claim", link_claim, METH_VARARGS, claim_doc},
    {"publish", link_publish, METH_NOARGS, publish_doc},
    {"cancel", link_cancel, METH_O, cancel_doc},
    {"awaits", link_awaits, METH_VARARGS, awaits_doc},
    {"give_up", link_give_up, METH_VARARGS, give_up_doc},
    {"give_up_all", link_give_up_all, METH_O, give_up_all_doc},
    {"take", link_take, METH_NOARGS, take_doc},
    {"await_alone", link_await_alone, METH_VARARGS, await_alone_doc},
    {"may_sleep", link_may_sleep, METH_VARARGS, may_sleep_doc},
    {"take_times", link_take_times, METH_NOARGS, take_times_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"waiting", link_waiting, NULL, "Requests that somebody waits for.", NULL},
    {"answered", link_answered, NULL, "Whether there are answers to take.", NULL},
    {"on_short_way", link_on_short_way, NULL, "Those of them that took the short way.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "The front door's side of a ring, on one thread."},
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
    .basicsize = sizeof(Link),
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
