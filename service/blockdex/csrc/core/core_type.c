/* blockdex._native.Core: how it is made, given up and run, the links that it serves, and all that Python may call. */
#include "core/core_type.h"

#include <stdlib.h>

static PyObject *fail(struct core *core) {
    if (PyErr_Occurred()) return NULL;
    if (!core->driver_error) return PyErr_NoMemory();
    int error = core->driver_error;
    core->driver_error = 0;
    return PyErr_Format(PyExc_RuntimeError, "%s failed: CUDA error %d", core->driver_call, error);
}

static bool is_used(const struct core *core, const struct server_link *link) {
    for (uint32_t number = 0; number < core->max_queued; number++)
        if (core->requests[number] && core->requests[number]->link == link) return true;
    return false;
}

/* Releases the lines that were dropped, once no request of theirs is left. */
static void release_gone(struct core *core) {
    for (size_t number = core->num_gone; number-- > 0;) {
        struct server_link *link = core->gone_links[number];
        if (is_used(core, link)) continue;
        core->gone_links[number] = core->gone_links[--core->num_gone];
        Py_DECREF(server_link_object(link));
    }
}

static PyObject *method_run(struct core *core, PyObject *argument) {
    double seconds = PyFloat_AsDouble(argument);
    if (PyErr_Occurred()) return NULL;
    int64_t until = blockdex_until(core_now(), seconds);
    if (!core->index) return PyErr_Format(PyExc_RuntimeError, "core: set_sequence_columns was not called");
    if (!core->run_step && !core->launch)
        return PyErr_Format(PyExc_RuntimeError, "core: neither set_replays nor set_run_step was called");
    for (int step = 0; step < CORE_STEPS; step++)
        if (!core->steps[step].host.obj)
            return PyErr_Format(PyExc_RuntimeError, "core: set_step was not called for step %d", step);
    release_gone(core);
    core->without_gil = PyEval_SaveThread();
    int why = core_run(core, until);
    /* A step in Python that failed has left the GIL with this thread. */
    if (core->without_gil) PyEval_RestoreThread(core->without_gil);
    return why < 0 ? fail(core) : PyLong_FromLong(why);
}

static PyObject *method_notice(struct core *core, PyObject *unused) {
    (void)unused;
    const uint64_t once = 1;
    atomic_store_explicit(&core->noticed, 1, memory_order_release);
    (void)!write(core->nudge, &once, sizeof once);
    Py_RETURN_NONE;
}

static PyObject *method_try_again(struct core *core, PyObject *unused) {
    (void)unused;
    core->changed = core->appended = core->unchecked = true;
    Py_RETURN_NONE;
}

static PyObject *method_expect_no_more(struct core *core, PyObject *unused) {
    (void)unused;
    core->no_more = core->changed = true;
    Py_RETURN_NONE;
}

static PyObject *method_add(struct core *core, PyObject *link) {
    if (!server_link_of(link)) return NULL;
    struct server_link **links = PyMem_Realloc(core->links, (core->num_links + 1) * sizeof *links);
    if (!links) return PyErr_NoMemory();
    core->links = links;
    struct pollfd *bells = PyMem_Realloc(core->bells, (core->num_links + 2) * sizeof *bells);
    if (!bells) return PyErr_NoMemory();
    core->bells = bells;
    struct server_link *added = core->links[core->num_links++] = server_link_of(Py_NewRef(link));
    added->channel.looked = core->rung = core_now();
    core->num_channels += added->channel.bound > 0;
    Py_RETURN_NONE;
}

/* Drops the requests of a line that are not begun; those that are begun run to their end, and are not answered. */
static void forget_link(struct core *core, struct server_link *link) {
    for (uint32_t number = 0; number < core->max_queued; number++) {
        struct request *request = core->requests[number];
        if (!request || request->link != link) continue;
        request->cancelled = true;
        if (request->state == HAS_COME || (request->state == IS_QUEUED && !request->has_pages) ||
            request->state == IS_WAITING) {
            core_add(&core->cancelled, 1);
            core_forget(core, request);
            continue;
        }
        pair_index_remove(&core->tickets, (uintptr_t)link, request->slot.ticket);
    }
    if (core->broken == link) core->broken = NULL;
}

static PyObject *method_drop(struct core *core, PyObject *link) {
    for (size_t number = 0; number < core->num_links; number++) {
        if (server_link_object(core->links[number]) != link) continue;
        core->links[number]->gone = true;
        core->num_channels -= core->links[number]->channel.bound > 0;
        struct server_link **gone = PyMem_Realloc(core->gone_links, (core->num_gone + 1) * sizeof *gone);
        if (!gone) return PyErr_NoMemory();
        core->gone_links = gone;
        gone[core->num_gone++] = core->links[number];
        forget_link(core, core->links[number]);
        core->links[number] = core->links[--core->num_links];
        release_gone(core);
        Py_RETURN_NONE;
    }
    return PyErr_Format(PyExc_ValueError, "core: %R is not one of its links", link);
}

static PyObject *method_take_broken(struct core *core, PyObject *unused) {
    (void)unused;
    if (!core->broken) Py_RETURN_NONE;
    PyObject *broken = Py_BuildValue("Os", server_link_object(core->broken), core->broken_by);
    core->broken->gone = true;
    core->broken = NULL;
    return broken;
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

static bool make_room(struct core *core) {
    const size_t most = core->max_queued;
    core->bells = PyMem_Calloc(1, sizeof *core->bells);
    core->requests = calloc(most, sizeof *core->requests);
    core->free_numbers = calloc(most, sizeof *core->free_numbers);
    core->for_python = calloc(most, sizeof *core->for_python);
    if (!core->bells || !core->requests || !core->free_numbers || !core->for_python) return false;
    while (core->num_free < most) {
        core->free_numbers[core->num_free] = (uint32_t)most - 1 - core->num_free;
        core->num_free++;
    }
    return true;
}

/* Numbers that nothing can be made of are refused: what follows divides by them, and shifts. */
static bool check_sizes(const struct core *core) {
    const uint64_t ids = (uint64_t)core->heads * core->topk, longest = core->longest;
    if (!core->layers || !core->heads || core->heads > 64 || !core->head_dim || !core->topk || !core->block_size ||
        !core->max_spans || !core->max_queued || core->max_queued > 1u << 24 || !core->max_tokens ||
        core->max_tokens > INT32_MAX || longest > CORE_TOKENS || ids > 1u << 24 || core->head_dim > 1u << 16 ||
        core->init_blocks + (uint64_t)core->local_blocks > core->topk) {
        PyErr_Format(
            PyExc_ValueError,
            "core: not sizes of an index: %u layers, %u heads of %u, topk %u of which %u and %u, blocks of %u, "
            "decodes of %u, sequences of %lld, %u spans, %u requests",
            core->layers, core->heads, core->head_dim, core->topk, core->init_blocks, core->local_blocks,
            core->block_size, core->longest, (long long)core->max_tokens, core->max_spans, core->max_queued);
        return false;
    }
    return true;
}

static PyObject *core_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"layers",
                            "heads",
                            "head_dim",
                            "topk",
                            "init_blocks",
                            "local_blocks",
                            "block_size",
                            "longest",
                            "max_sequence_tokens",
                            "max_spans",
                            "max_queued",
                            "max_queue_seconds",
                            "max_message_bytes",
                            "scale",
                            "odd_keys",
                            "odd_queries",
                            "nudge",
                            "spin_seconds",
                            "hold_seconds",
                            "seconds_bounds",
                            "size_bounds",
                            NULL};
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct core *core = (void *)allocate(type, 0);
    if (!core) return NULL;
    unsigned int max_tokens;
    unsigned long long max_message_bytes;
    int odd_keys, odd_queries, nudge;
    double max_queue_seconds, spin_seconds, hold_seconds;
    PyObject *seconds_bounds, *size_bounds;
    if (!PyArg_ParseTupleAndKeywords(
            arguments, keywords, "IIIIIIIIIIIdKfppiddOO", names, &core->layers, &core->heads, &core->head_dim,
            &core->topk, &core->init_blocks, &core->local_blocks, &core->block_size, &core->longest, &max_tokens,
            &core->max_spans, &core->max_queued, &max_queue_seconds, &max_message_bytes, &core->scale, &odd_keys,
            &odd_queries, &nudge, &spin_seconds, &hold_seconds, &seconds_bounds, &size_bounds)) {
        Py_DECREF(core);
        return NULL;
    }
    core->max_tokens = max_tokens;
    core->longest_queue = blockdex_until(0, max_queue_seconds);
    core->max_message_bytes = max_message_bytes;
    core->odd_keys = odd_keys;
    core->odd_queries = odd_queries;
    core->nudge = nudge;
    core->spin = blockdex_until(0, spin_seconds);
    core->hold = blockdex_until(0, hold_seconds);
    core->next_deadline = INT64_MAX;
    if (!check_sizes(core) || !make_room(core) ||
        !read_bounds(seconds_bounds, core->seconds_bounds, &core->num_seconds_bounds) ||
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
    struct sequence_columns *columns = &core->sequences;
    Py_buffer *buffers[] = {
        &columns->lengths,  &columns->revisions,  &columns->reading,          &columns->held,
        &columns->forked,   &columns->last_calls, &columns->first_rows,       &columns->cells,
        &columns->holders,  &columns->free_pages, &columns->reading_sequence, &columns->owners,
        &columns->num_rows, &columns->max_blocks, &columns->filled,           &columns->page_numbers};
    for (uint32_t number = 0; core->requests && number < core->max_queued; number++)
        if (core->requests[number]) core_forget(core, core->requests[number]);
    for (size_t number = 0; number < sizeof buffers / sizeof *buffers; number++) release(buffers[number]);
    for (int step = 0; step < CORE_STEPS; step++) {
        release(&core->steps[step].host);
        release(&core->steps[step].block_ids);
        release(&core->steps[step].scores);
    }
    for (size_t number = 0; number < core->num_links; number++) Py_DECREF(server_link_object(core->links[number]));
    for (size_t number = 0; number < core->num_gone; number++) Py_DECREF(server_link_object(core->gone_links[number]));
    void *const allocated[] = {core->requests, core->free_numbers,      core->for_python, core->appended_in,
                               core->read_in,  core->large_appended_in, core->used_in,    core->trimmed_in,
                               core->to_trim,  core->recounted,         core->scratch,    core->tables_set_in,
                               core->set_cells};
    for (size_t number = 0; number < sizeof allocated / sizeof *allocated; number++) free(allocated[number]);
    turns_close(&core->turns);
    pair_index_free(&core->tickets);
    pair_index_free(&core->held_back);
    Py_XDECREF((PyObject *)core->index);
    Py_XDECREF(core->run_step);
    PyMem_Free(core->links);
    PyMem_Free(core->gone_links);
    PyMem_Free(core->bells);
    PyMem_Free(core->replays);
    freefunc deallocate = (freefunc)PyType_GetSlot(type, Py_tp_free);
    deallocate(core);
    Py_DECREF(type);
}

static PyGetSetDef properties[] = {
    {"steps", (getter)core_get_steps, NULL, "Steps begun so far.", NULL},
    {"in_flight", (getter)core_get_in_flight, NULL, "Steps on their way.", NULL},
    {"launched", (getter)core_get_launched, NULL, "Monotonic seconds of the oldest one's launch.", NULL},
    {"time_beside", (getter)core_get_time_beside, NULL, "Monotonic seconds, less those with steps on their way.", NULL},
    {"looked", (getter)core_get_looked, NULL, "Monotonic seconds of its last look at the rings.", NULL},
    {"queued", (getter)core_get_queued, NULL, "Requests that are not begun; from any thread.", NULL},
    {"contended", (getter)core_get_contended, NULL, "Whether more than one tenant asked for something of late.", NULL},
    {"unanswered", (getter)core_get_unanswered, NULL, "Requests that were taken and not answered.", NULL},
    {"waiting", (getter)core_get_waiting, NULL, "Selections that wait for keys; from any thread.", NULL},
    {0},
};

static PyMethodDef methods[] = {
    {"run", (PyCFunction)method_run, METH_O, "Serves until there is something for Python, or the time is up."},
    {"notice", (PyCFunction)method_notice, METH_NOARGS, "Has `run` return; from any thread."},
    {"try_again", (PyCFunction)method_try_again, METH_NOARGS, "What was held back may get on now."},
    {"expect_no_more", (PyCFunction)method_expect_no_more, METH_NOARGS, "Keys that are waited for come no more."},
    {"add", (PyCFunction)method_add, METH_O, "Serves one more link."},
    {"drop", (PyCFunction)method_drop, METH_O, "Serves a link no more: nothing is written for it."},
    {"take_broken", (PyCFunction)method_take_broken, METH_NOARGS,
     "A link with invalid numbers in its ring, and which; None if there is none."},
    {"set_sequence_columns", (PyCFunction)core_method_set_sequence_columns, METH_VARARGS,
     "Shares the cache's columns."},
    {"set_epoch", (PyCFunction)core_method_set_epoch, METH_O, "The cache's epoch."},
    {"set_step", (PyCFunction)core_method_set_step, METH_VARARGS, "Memory that one of the steps is made in."},
    {"set_replays", (PyCFunction)core_method_set_replays, METH_VARARGS,
     "The device's programs, and what launches them."},
    {"set_run_step", (PyCFunction)core_method_set_run_step, METH_O, "What runs a step, where no program does."},
    {"weight", (PyCFunction)core_method_weight, METH_O, "Weight of a tenant that has requests, by its number."},
    {"take", (PyCFunction)core_method_take, METH_NOARGS, "The next request for Python."},
    {"take_cut", (PyCFunction)core_method_take_cut, METH_NOARGS,
     "Entries of sequences that were cut, and may have pages to give back."},
    {"take_set_cells", (PyCFunction)core_method_take_set_cells, METH_NOARGS,
     "Places in the page tables that were set, of which the device is to be told."},
    {"name_pages", (PyCFunction)core_method_name_pages, METH_VARARGS,
     "Makes page numbers of the block ids of a request."},
    {"grant", (PyCFunction)core_method_grant, METH_O, "A request has the pages that it needs."},
    {"begin", (PyCFunction)core_method_begin, METH_VARARGS,
     "The last kernel of a request was launched, and its phase."},
    {"drop_if_gone", (PyCFunction)core_method_drop_if_gone, METH_O,
     "Answers a request that nobody waits for any more."},
    {"answer", (PyCFunction)core_method_answer, METH_VARARGS, "Answers a request."},
    {"refuse", (PyCFunction)core_method_refuse, METH_VARARGS, "Refuses a request."},
    {"abandon", (PyCFunction)core_method_abandon, METH_VARARGS, "Refuses all requests."},
    {"counts", (PyCFunction)core_method_counts, METH_NOARGS, "What it did so far; from any thread."},
    {0},
};

static PyType_Slot slots[] = {
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
    .slots = slots,
};
