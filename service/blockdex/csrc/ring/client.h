/* blockdex._native.Link: the frontend's side of a ring. */
#ifndef BLOCKDEX_LINK_H
#define BLOCKDEX_LINK_H

#include "native.h"

#include <time.h>

#include "ring/arena.h"
#include "blockdex_ring.h"
#include "ring/inflight.h"
#include "latency_histogram.h"
#include "wire/request_codec.h"
#include "wire/messages.h"

enum { SLOT_BYTES = BLOCKDEX_SLOT_BYTES };

/* RPCs by number: the kinds of token requests, and the same over a stream. */
enum { STREAMED = NUM_KINDS, NUM_RPCS = 2 * NUM_KINDS };

/* What the header says is copied when the link begins: nobody changes it under our feet. */
struct link {
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
    double slow_seconds;
    struct times times;
};

/* Nanoseconds of CLOCK_MONOTONIC. */
static inline int64_t link_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* Answers that are there. */
static inline uint64_t link_filled(const struct link *self) {
    return atomic_load_explicit(&self->header->answers_written, memory_order_acquire) - self->read;
}

/* Says that this side sleeps, and looks once more: whether there are no answers. */
static inline bool link_lie_down(struct link *self) {
    return blockdex_may_sleep(&self->header->client_sleeps, &self->header->answers_written, self->read);
}

/* Methods of requests. */
PyObject *link_send(PyObject *object, PyObject *const *arguments, Py_ssize_t count);
PyObject *link_claim(PyObject *object, PyObject *arguments);
PyObject *link_publish(PyObject *object, PyObject *unused);
PyObject *link_cancel(PyObject *object, PyObject *ticket);
PyObject *link_awaits(PyObject *object, PyObject *arguments);
PyObject *link_give_up(PyObject *object, PyObject *arguments);
PyObject *link_give_up_all(PyObject *object, PyObject *owner);

/* Methods of answers. */
PyObject *link_take(PyObject *object, PyObject *unused);

/* Methods of waiting for them. */
PyObject *link_await_alone(PyObject *object, PyObject *arguments);
PyObject *link_may_sleep(PyObject *object, PyObject *arguments);

/* Adds the type to the module; -1 with an error set. */
int add_link(PyObject *module);

#endif
