#include "core/core.h"
#include "cpu_relax.h"

#include <stdlib.h>
#include <time.h>

static const int64_t LATE_AFTER = 1000000; /* nanoseconds; then the device is asked whether it has failed */

int64_t core_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static bool anyone_waits(const struct core *core) {
    for (size_t number = 0; number < core->num_lines; number++)
        if (line_is_for_python(core->lines[number])) return true;
    return false;
}

static bool anyone_has_room_again(const struct core *core) {
    for (size_t number = 0; number < core->num_lines; number++)
        if (!core->lines[number]->gone && line_has_room_again(core->lines[number])) return true;
    return false;
}

/* Until a frontend or another thread rings, or until then. */
static void sleep_until(struct core *core, int64_t now, int64_t until) {
    nfds_t bells = 1;
    uint64_t rung;
    bool idle = true;
    core->bells[0] = (struct pollfd){core->nudge, POLLIN, 0};
    for (size_t number = 0; number < core->num_lines; number++) {
        struct line *line = core->lines[number];
        if (line->gone) continue;
        idle &= line_lie_down(line);
        core->bells[bells++] = (struct pollfd){line->own_bell, POLLIN, 0};
    }
    if (idle && !atomic_load_explicit(&core->noticed, memory_order_acquire)) {
        int64_t milliseconds = until == INT64_MAX ? -1 : (until - now + 999999) / 1000000;
        poll(core->bells, bells, milliseconds > INT32_MAX ? INT32_MAX : (int)milliseconds);
        if (core->bells[0].revents) (void)!read(core->nudge, &rung, sizeof rung);
        for (nfds_t bell = 1; bell < bells; bell++)
            if (core->bells[bell].revents) blockdex_silence(core->bells[bell].fd);
    }
    for (size_t number = 0; number < core->num_lines; number++)
        if (!core->lines[number]->gone) line_get_up(core->lines[number]);
}

static bool is_late(struct core *core, int64_t now) {
    int64_t since = core->steps[core->first].launched;
    if (core->looked > since) since = core->looked;
    if (now - since < LATE_AFTER) return false;
    core->looked = now;
    return true;
}

/* One look at everything; -1: it failed. */
static int pass(struct core *core, int64_t now) {
    int why = anyone_has_room_again(core) ? CORE_ROOM : 0;
    if (!core_land(core, now)) return -1;
    if (core->in_flight < CORE_STEPS) {
        core_gather(core, now);
        if (core->gathered.runs && !core_begin(core, now)) return -1;
    }
    if (anyone_waits(core)) why |= CORE_FOR_PYTHON;
    if (core->in_flight && is_late(core, now)) why |= CORE_LATE;
    if (atomic_exchange_explicit(&core->noticed, 0, memory_order_acq_rel)) why |= CORE_NOTICED;
    return why;
}

static int run(struct core *core, int64_t until) {
    for (;;) {
        int64_t now = core_now();
        int why = pass(core, now);
        if (why || now >= until) return why;
        if (!core->in_flight && now >= core->active + core->spin)
            sleep_until(core, now, until);
        else
            cpu_relax();
    }
}

static PyObject *fail(struct core *core) {
    if (PyErr_Occurred()) return NULL;
    if (!core->launch_error) return PyErr_NoMemory();
    int error = core->launch_error;
    core->launch_error = 0;
    return PyErr_Format(PyExc_RuntimeError, "device: it takes no step, CUDA error %d", error);
}

/* So many seconds from now; at once where that is no time. */
static int64_t time_after(double seconds) {
    if (seconds >= 1e9) return INT64_MAX;
    return core_now() + (seconds > 0 ? (int64_t)(1e9 * seconds) : 0);
}

static PyObject *method_run(struct core *core, PyObject *argument) {
    double seconds = PyFloat_AsDouble(argument);
    if (PyErr_Occurred()) return NULL;
    int64_t until = time_after(seconds);
    if (core->books.columns == 0) return PyErr_Format(PyExc_RuntimeError, "core: it has no books");
    core->without_gil = PyEval_SaveThread();
    int why = run(core, until);
    /* A step in Python that failed has left the GIL with this thread. */
    if (core->without_gil) PyEval_RestoreThread(core->without_gil);
    return why < 0 ? fail(core) : PyLong_FromLong(why);
}

static PyObject *method_drain(struct core *core, PyObject *argument) {
    double seconds = PyFloat_AsDouble(argument);
    if (PyErr_Occurred()) return NULL;
    const int64_t until = time_after(seconds);
    bool landed = true;
    Py_BEGIN_ALLOW_THREADS;
    for (int64_t now = core_now(); landed && core->in_flight && now < until; now = core_now())
        landed = core_land(core, now);
    Py_END_ALLOW_THREADS;
    return landed ? PyBool_FromLong(!core->in_flight) : PyErr_NoMemory();
}

static PyObject *method_notice(struct core *core, PyObject *unused) {
    (void)unused;
    const uint64_t once = 1;
    atomic_store_explicit(&core->noticed, 1, memory_order_release);
    (void)!write(core->nudge, &once, sizeof once);
    Py_RETURN_NONE;
}

static PyObject *method_touch(struct core *core, PyObject *unused) {
    (void)unused;
    core->active = core_now();
    Py_RETURN_NONE;
}

static PyObject *method_add(struct core *core, PyObject *line) {
    if (!line_of(line)) return NULL;
    struct line **lines = PyMem_Realloc(core->lines, (core->num_lines + 1) * sizeof *lines);
    if (!lines) return PyErr_NoMemory();
    core->lines = lines;
    struct pollfd *bells = PyMem_Realloc(core->bells, (core->num_lines + 2) * sizeof *bells);
    if (!bells) return PyErr_NoMemory();
    core->bells = bells;
    core->lines[core->num_lines++] = line_of(Py_NewRef(line));
    Py_RETURN_NONE;
}

static void forget_line(struct step *step, const struct line *line) {
    for (uint32_t number = 0; number < step->num_asked; number++)
        if (step->asked[number].line == line) step->asked[number].line = NULL;
}

static PyObject *method_drop(struct core *core, PyObject *line) {
    for (size_t number = 0; number < core->num_lines; number++) {
        if (line_object(core->lines[number]) != line) continue;
        core->lines[number]->gone = true;
        for (uint32_t step = 0; step < CORE_STEPS; step++) forget_line(&core->steps[step], core->lines[number]);
        core->lines[number] = core->lines[--core->num_lines];
        Py_DECREF(line);
        Py_RETURN_NONE;
    }
    return PyErr_Format(PyExc_ValueError, "core: %R is not one of its lines", line);
}

/* Takes a buffer of exactly so many bytes, instead of the one that was there. */
static bool take_buffer(PyObject *from, Py_buffer *to, const char *name, size_t bytes) {
    Py_buffer taken;
    if (PyObject_GetBuffer(from, &taken, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) < 0) return false;
    if ((size_t)taken.len != bytes) {
        PyErr_Format(PyExc_ValueError, "core: %s has %zd bytes, %zu are needed", name, taken.len, bytes);
        PyBuffer_Release(&taken);
        return false;
    }
    if (to->obj) PyBuffer_Release(to);
    *to = taken;
    return true;
}

static PyObject *method_set_books(struct core *core, PyObject *arguments) {
    PyObject *lengths, *revisions, *held, *forked, *last_calls, *first_rows, *generations, *blocked;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOO", &lengths, &revisions, &held, &forked, &last_calls, &first_rows,
                          &generations, &blocked))
        return NULL;
    struct books *books = &core->books;
    Py_ssize_t length = PyObject_Length(blocked);
    if (length < 0) return NULL;
    const size_t columns = (size_t)length, cells = columns * core->layers;
    books->columns = 0;
    if (!take_buffer(lengths, &books->lengths, "lengths", 8 * cells) ||
        !take_buffer(revisions, &books->revisions, "revisions", 8 * cells) ||
        !take_buffer(held, &books->held, "held", 8 * columns) ||
        !take_buffer(forked, &books->forked, "forked", 8 * columns) ||
        !take_buffer(last_calls, &books->last_calls, "last_calls", 8 * columns) ||
        !take_buffer(first_rows, &books->first_rows, "first_rows", 4 * columns) ||
        !take_buffer(generations, &books->generations, "generations", 4 * columns) ||
        !take_buffer(blocked, &books->blocked, "blocked", columns))
        return NULL;
    if (!sequence_index_reset(&core->places, columns)) return PyErr_NoMemory();
    books->columns = columns;
    Py_RETURN_NONE;
}

static PyObject *method_set_epoch(struct core *core, PyObject *epoch) {
    unsigned long long number = PyLong_AsUnsignedLongLong(epoch);
    if (PyErr_Occurred()) return NULL;
    core->epoch = number;
    Py_RETURN_NONE;
}

static PyObject *method_learn(struct core *core, PyObject *arguments) {
    const char *tenant;
    Py_ssize_t tenant_bytes;
    Py_buffer ids, columns;
    if (!PyArg_ParseTuple(arguments, "s#y*y*", &tenant, &tenant_bytes, &ids, &columns)) return NULL;
    size_t count = (size_t)ids.len / 8;
    bool fits = ids.len == columns.len, learnt = true;
    for (size_t row = 0; fits && learnt && row < count; row++) {
        uint64_t id = ((const uint64_t *)ids.buf)[row], column = ((const uint64_t *)columns.buf)[row];
        fits = column < core->books.columns;
        if (fits)
            learnt = sequence_index_learn(&core->places, tenant, (size_t)tenant_bytes, id, (uint32_t)column,
                                          ((const uint32_t *)core->books.generations.buf)[column]);
    }
    PyBuffer_Release(&ids);
    PyBuffer_Release(&columns);
    if (!fits) return PyErr_Format(PyExc_ValueError, "core: a column for each sequence is needed, of those there are");
    if (!learnt) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *method_set_step(struct core *core, PyObject *arguments) {
    unsigned int number;
    PyObject *host, *block_ids;
    if (!PyArg_ParseTuple(arguments, "IOO", &number, &host, &block_ids)) return NULL;
    if (number >= CORE_STEPS || core->in_flight)
        return PyErr_Format(PyExc_ValueError, "core: step %u of %d, %u in flight", number, CORE_STEPS, core->in_flight);
    const size_t most = CORE_TOKENS * (size_t)core->head_dim;
    struct step *step = &core->steps[number];
    if (!take_buffer(host, &step->host, "host", 16 * CORE_RUNS + 2 * most * (1 + core->heads)) ||
        !take_buffer(block_ids, &step->block_ids, "block_ids", 4 * CORE_TOKENS * (size_t)core->heads * core->topk))
        return NULL;
    Py_RETURN_NONE;
}

/* One of the device's programs: runs, length, width, and its address for each step. */
static bool read_replay(PyObject *from, struct replay *to) {
    unsigned long long programs[CORE_STEPS];
    if (!PyArg_ParseTuple(from, "IIIKK", &to->runs, &to->length, &to->width, &programs[0], &programs[1])) return false;
    if (!to->runs || to->runs > CORE_RUNS || !to->length || to->runs * (uint64_t)to->length > CORE_TOKENS) {
        PyErr_Format(PyExc_ValueError, "core: no room for %u runs of %u tokens", to->runs, to->length);
        return false;
    }
    for (int step = 0; step < CORE_STEPS; step++) to->programs[step] = (void *)(uintptr_t)programs[step];
    return true;
}

static PyObject *method_set_replays(struct core *core, PyObject *arguments) {
    PyObject *from;
    unsigned long long launch, stream;
    if (!PyArg_ParseTuple(arguments, "OKK", &from, &launch, &stream)) return NULL;
    Py_ssize_t count = PyList_Size(from);
    if (count < 0) return NULL;
    struct replay *replays = PyMem_Calloc((size_t)count + 1, sizeof *replays);
    if (!replays) return PyErr_NoMemory();
    for (Py_ssize_t number = 0; number < count; number++) {
        if (read_replay(PyList_GetItem(from, number), &replays[number])) continue;
        PyMem_Free(replays);
        return NULL;
    }
    PyMem_Free(core->replays);
    core->replays = replays;
    core->num_replays = (size_t)count;
    core->launch = (int (*)(void *, void *))(uintptr_t)launch;
    core->stream = (void *)(uintptr_t)stream;
    Py_CLEAR(core->run_step);
    Py_RETURN_NONE;
}

static PyObject *method_set_run_step(struct core *core, PyObject *run_step) {
    PyObject *before = core->run_step;
    core->run_step = Py_NewRef(run_step);
    Py_XDECREF(before);
    Py_RETURN_NONE;
}

static PyObject *method_abandon(struct core *core, PyObject *arguments) {
    unsigned short code, reason_bytes;
    const char *text;
    Py_ssize_t bytes;
    if (!PyArg_ParseTuple(arguments, "HHy#", &code, &reason_bytes, &text, &bytes)) return NULL;
    if (!core_abandon(core, code, text, (size_t)bytes, reason_bytes)) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *histogram_of(const struct histogram *histogram, uint32_t num_bounds) {
    PyObject *counts = PyList_New(num_bounds + 1);
    for (uint32_t bucket = 0; counts && bucket <= num_bounds; bucket++)
        if (PyList_SetItem(counts, bucket, PyLong_FromUnsignedLongLong(histogram->counts[bucket])) < 0)
            Py_CLEAR(counts);
    return counts ? Py_BuildValue("Nd", counts, histogram->total) : NULL;
}

static PyObject *method_counts(struct core *core, PyObject *unused) {
    (void)unused;
    PyObject *stages = PyList_New(CORE_STAGES);
    for (int stage = 0; stages && stage < CORE_STAGES; stage++) {
        PyObject *histogram = histogram_of(&core->stages[stage], core->num_seconds_bounds);
        if (!histogram || PyList_SetItem(stages, stage, histogram) < 0) Py_CLEAR(stages);
    }
    if (!stages) return NULL;
    return Py_BuildValue("NNNKKdd", stages, histogram_of(&core->requests, core->num_size_bounds),
                         histogram_of(&core->tokens, core->num_size_bounds), (unsigned long long)core->num_steps,
                         (unsigned long long)core->num_tokens, core->device_seconds, core->device_busy_seconds);
}

static PyObject *get_in_flight(struct core *core, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(core->in_flight);
}

static PyObject *get_launched(struct core *core, void *unused) {
    (void)unused;
    return PyFloat_FromDouble(core->in_flight ? 1e-9 * (double)core->steps[core->first].launched : 0);
}

/* Steps that overlap count once, so whoever is busy beside them adds what it measures with this. */
static PyObject *get_time_beside(struct core *core, void *unused) {
    (void)unused;
    int64_t now = core->in_flight ? core->busy_since : core_now();
    return PyFloat_FromDouble(1e-9 * (double)now - core->device_busy_seconds);
}

static bool read_bounds(PyObject *from, double *to, uint32_t *count) {
    Py_ssize_t length = PyTuple_Size(from);
    if (length < 0) return false;
    if (length >= CORE_BUCKETS) {
        PyErr_Format(PyExc_ValueError, "core: at most %d bounds, got %zd", CORE_BUCKETS - 1, length);
        return false;
    }
    for (Py_ssize_t bound = 0; bound < length; bound++) to[bound] = PyFloat_AsDouble(PyTuple_GetItem(from, bound));
    *count = (uint32_t)length;
    return !PyErr_Occurred();
}

static PyObject *core_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"layers",
                            "heads",
                            "head_dim",
                            "topk",
                            "block_size",
                            "longest",
                            "max_sequence_tokens",
                            "max_spans",
                            "max_message_bytes",
                            "nudge",
                            "spin_seconds",
                            "seconds_bounds",
                            "size_bounds",
                            NULL};
    unsigned int layers, heads, head_dim, topk, block_size, longest, max_sequence_tokens, max_spans;
    unsigned long long max_message_bytes;
    int nudge;
    double spin_seconds;
    PyObject *seconds_bounds, *size_bounds;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "IIIIIIIIKidOO", names, &layers, &heads, &head_dim, &topk,
                                     &block_size, &longest, &max_sequence_tokens, &max_spans, &max_message_bytes,
                                     &nudge, &spin_seconds, &seconds_bounds, &size_bounds))
        return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct core *core = (void *)allocate(type, 0);
    if (!core) return NULL;
    core->layers = layers;
    core->heads = heads;
    core->head_dim = head_dim;
    core->topk = topk;
    core->block_size = block_size;
    core->longest = longest;
    core->max_tokens = max_sequence_tokens;
    core->max_spans = max_spans < CORE_RUNS ? max_spans : CORE_RUNS;
    core->max_message_bytes = max_message_bytes;
    core->nudge = nudge;
    core->spin = (int64_t)(1e9 * spin_seconds);
    core->bells = PyMem_Calloc(1, sizeof *core->bells);
    if (!core->bells || !read_bounds(seconds_bounds, core->seconds_bounds, &core->num_seconds_bounds) ||
        !read_bounds(size_bounds, core->size_bounds, &core->num_size_bounds)) {
        Py_DECREF(core);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    return (PyObject *)core;
}

static void release(Py_buffer *buffer) {
    if (buffer->obj) PyBuffer_Release(buffer);
}

static void core_dealloc(struct core *core) {
    PyTypeObject *type = Py_TYPE((PyObject *)core);
    struct books *books = &core->books;
    Py_buffer *buffers[] = {&books->lengths,    &books->revisions,  &books->held,        &books->forked,
                            &books->last_calls, &books->first_rows, &books->generations, &books->blocked};
    for (size_t number = 0; number < sizeof buffers / sizeof *buffers; number++) release(buffers[number]);
    for (int step = 0; step < CORE_STEPS; step++) {
        release(&core->steps[step].host);
        release(&core->steps[step].block_ids);
    }
    for (size_t number = 0; number < core->num_lines; number++) Py_DECREF(line_object(core->lines[number]));
    sequence_index_free(&core->places);
    Py_XDECREF(core->run_step);
    PyMem_Free(core->lines);
    PyMem_Free(core->bells);
    PyMem_Free(core->replays);
    freefunc deallocate = (freefunc)PyType_GetSlot(type, Py_tp_free);
    deallocate(core);
    Py_DECREF(type);
}

static PyObject *get_steps(struct core *core, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(core->num_steps);
}

static PyGetSetDef properties[] = {
    {"steps", (getter)get_steps, NULL, "Steps begun so far.", NULL},
    {"in_flight", (getter)get_in_flight, NULL, "Steps on their way.", NULL},
    {"launched", (getter)get_launched, NULL, "Monotonic seconds of the oldest one's launch.", NULL},
    {"time_beside", (getter)get_time_beside, NULL, "Monotonic seconds, less those with steps on their way.", NULL},
    {0},
};

static PyMethodDef methods[] = {
    {"run", (PyCFunction)method_run, METH_O, "Serves until there is something for Python, or the time is up."},
    {"notice", (PyCFunction)method_notice, METH_NOARGS, "Has `run` return; from any thread."},
    {"drain", (PyCFunction)method_drain, METH_O, "Answers what is on its way, begins nothing; whether all has ended."},
    {"touch", (PyCFunction)method_touch, METH_NOARGS, "Something came or went: it spins for a while."},
    {"add", (PyCFunction)method_add, METH_O, "Serves one more line."},
    {"drop", (PyCFunction)method_drop, METH_O, "Serves a line no more: nothing is written for it."},
    {"set_books", (PyCFunction)method_set_books, METH_VARARGS, "Shares the cache's columns; forgets whose they are."},
    {"set_epoch", (PyCFunction)method_set_epoch, METH_O, "The cache's epoch."},
    {"learn", (PyCFunction)method_learn, METH_VARARGS, "Takes note of the columns of a tenant's sequences."},
    {"set_step", (PyCFunction)method_set_step, METH_VARARGS, "Memory that one of the steps is made in."},
    {"set_replays", (PyCFunction)method_set_replays, METH_VARARGS, "The device's programs, and what launches them."},
    {"set_run_step", (PyCFunction)method_set_run_step, METH_O, "What runs a step, where no program does."},
    {"abandon", (PyCFunction)method_abandon, METH_VARARGS, "Answers what is on its way with an error."},
    {"counts", (PyCFunction)method_counts, METH_NOARGS, "What it did so far."},
    {0},
};

static PyType_Slot core_slots[] = {
    {Py_tp_new, core_new},
    {Py_tp_dealloc, core_dealloc},
    {Py_tp_getset, properties},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec blockdex_core_spec = {
    .name = "blockdex._native.Core",
    .basicsize = sizeof(struct core),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = core_slots,
};
