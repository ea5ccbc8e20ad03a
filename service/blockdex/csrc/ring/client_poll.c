/* How a link waits: it looks for answers before it sleeps. */
#include "ring/client.h"

#include "cpu_relax.h"

#include <sched.h>
#include <sys/epoll.h>

/* Each look at an epoll is a system call; those at the ring are as good as free. */
enum { LOOKS_BETWEEN = 16 };

/* Giving the core up takes longer only if somebody has taken it. */
enum { LONGEST_YIELD_NANOSECONDS = 20000 };

/* Whether answers are there, or events of the epoll. */
static bool look(const struct client_link *self, int epoll) {
    struct epoll_event event;
    for (int look = 0; look < LOOKS_BETWEEN; look++) {
        if (client_link_filled(self)) return true;
        cpu_relax();
    }
    return epoll_wait(epoll, &event, 1, 0) != 0;
}

/* Whether any come until then; not if another thread wants this core meanwhile. */
static bool look_until(const struct client_link *self, int epoll, int64_t until) {
    for (int64_t at = blockdex_now(), before = at; at < until && at - before < LONGEST_YIELD_NANOSECONDS;
         at = blockdex_now()) {
        if (look(self, epoll)) return true;
        before = blockdex_now();
        sched_yield();
    }
    return false;
}

PyObject *client_link_await_alone(PyObject *object, PyObject *arguments) {
    struct client_link *self = (struct client_link *)object;
    int epoll;
    double seconds;
    if (!PyArg_ParseTuple(arguments, "id:await_alone", &epoll, &seconds)) return NULL;
    if (self->inflight.waiting == 1 && self->spin && !self->closed) {
        /* Nobody is to ring for what is looked for. */
        atomic_store_explicit(&self->segment.header->client_sleeps, 0, memory_order_relaxed);
        Py_BEGIN_ALLOW_THREADS;
        for (int64_t until = blockdex_until(blockdex_now(), seconds); blockdex_now() < until && !look(self, epoll);)
            continue;
        Py_END_ALLOW_THREADS;
    }
    return PyBool_FromLong(client_link_filled(self) != 0);
}

PyObject *client_link_may_sleep(PyObject *object, PyObject *arguments) {
    struct client_link *self = (struct client_link *)object;
    int epoll;
    double seconds;
    if (!PyArg_ParseTuple(arguments, "id:may_sleep", &epoll, &seconds)) return NULL;
    int64_t at = blockdex_now(), until = self->active + self->spin, wanted = blockdex_until(at, seconds);
    if (wanted < until) until = wanted;
    if (at < until) {
        bool comes;
        atomic_store_explicit(&self->segment.header->client_sleeps, 0, memory_order_relaxed);
        Py_BEGIN_ALLOW_THREADS;
        comes = look_until(self, epoll, until);
        Py_END_ALLOW_THREADS;
        if (comes) Py_RETURN_FALSE;
    }
    return PyBool_FromLong(client_link_lie_down(self));
}
