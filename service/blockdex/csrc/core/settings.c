/* What the core is told before it runs: the cache's columns, the memory of its steps and what runs them. */
#include "core/core_type.h"

#include <stdlib.h>

/* Takes a buffer of exactly so many bytes, or of any multiple of an item, instead of the one that was there. */
static bool take_buffer(PyObject *from, Py_buffer *to, const char *name, size_t bytes, size_t item) {
    Py_buffer taken;
    if (PyObject_GetBuffer(from, &taken, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) < 0) return false;
    if (item ? taken.len < (Py_ssize_t)item || (size_t)taken.len % item : (size_t)taken.len != bytes) {
        PyErr_Format(PyExc_ValueError, "core: %s has %zd bytes, %zu are needed", name, taken.len, item ? item : bytes);
        PyBuffer_Release(&taken);
        return false;
    }
    if (to->obj) PyBuffer_Release(to);
    *to = taken;
    return true;
}

/* Stamps of cells or entries, all of no step; false without memory. */
static bool renew(uint64_t **stamps, size_t count) {
    uint64_t *fresh = calloc(count + 1, sizeof *fresh);
    if (!fresh) return false;
    free(*stamps);
    *stamps = fresh;
    return true;
}

static bool renew_stamps(struct core *core, size_t entries) {
    const size_t cells = entries * core->layers;
    int32_t *recounted = calloc((size_t)core->sequences.holders.len / 4 + 1, sizeof *recounted);
    if (!recounted) return false;
    uint32_t *to_trim = realloc(core->to_trim, (entries + 1) * sizeof *to_trim);
    free(core->recounted);
    core->recounted = recounted;
    if (!to_trim) return false;
    core->to_trim = to_trim;
    core->unchecked = true;
    return renew(&core->appended_in, cells) && renew(&core->read_in, cells) && renew(&core->large_appended_in, cells) &&
           renew(&core->used_in, entries) && renew(&core->trimmed_in, entries) && renew(&core->tables_set_in, entries);
}

PyObject *core_method_set_sequence_columns(struct core *core, PyObject *arguments) {
    PyObject *index, *lengths, *revisions, *reading, *held, *forked, *last_calls, *first_rows, *reading_sequence,
        *cells, *holders, *free_pages, *owners, *num_rows, *max_blocks, *filled, *page_numbers;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOOOOOOOOOOO", &index, &lengths, &revisions, &reading, &held, &forked,
                          &last_calls, &first_rows, &reading_sequence, &cells, &holders, &free_pages, &owners,
                          &num_rows, &max_blocks, &filled, &page_numbers))
        return NULL;
    struct sequence_columns *columns = &core->sequences;
    if (!sequence_index_is_one(index))
        return PyErr_Format(PyExc_TypeError, "core: a SequenceIndex is needed, got %R", index);
    if ((PyObject *)core->index != index && core->num_free != core->max_queued)
        return PyErr_Format(PyExc_ValueError, "core: %u requests are of another cache",
                            core->max_queued - core->num_free);
    const Py_ssize_t length = PyObject_Length(held);
    if (length < 0) return NULL;
    const size_t count = (size_t)length, cell_count = count * core->layers;
    Py_CLEAR(core->index);
    if (!take_buffer(lengths, &columns->lengths, "lengths", 8 * cell_count, 0) ||
        !take_buffer(revisions, &columns->revisions, "revisions", 8 * cell_count, 0) ||
        !take_buffer(reading, &columns->reading, "reading", 4 * cell_count, 0) ||
        !take_buffer(held, &columns->held, "held", 8 * count, 0) ||
        !take_buffer(forked, &columns->forked, "forked", 8 * count, 0) ||
        !take_buffer(last_calls, &columns->last_calls, "last_calls", 8 * count, 0) ||
        !take_buffer(first_rows, &columns->first_rows, "first_rows", 4 * count, 0) ||
        !take_buffer(reading_sequence, &columns->reading_sequence, "reading_sequence", 4 * count, 0) ||
        !take_buffer(cells, &columns->cells, "cells", 0, 4 * TABLE_ROW) ||
        !take_buffer(holders, &columns->holders, "holders", 0, 4) ||
        !take_buffer(free_pages, &columns->free_pages, "free_pages", 8, 0) ||
        !take_buffer(owners, &columns->owners, "owners", 4 * count, 0) ||
        !take_buffer(num_rows, &columns->num_rows, "num_rows", 4 * count, 0) ||
        !take_buffer(max_blocks, &columns->max_blocks, "max_blocks", 4 * count, 0) ||
        !take_buffer(filled, &columns->filled, "filled", 8 * count, 0) ||
        !take_buffer(page_numbers, &columns->page_numbers, "page_numbers", (size_t)columns->holders.len, 0))
        return NULL;
    columns->count = count;
    if (!renew_stamps(core, count)) return PyErr_NoMemory();
    core->index = (struct sequence_index *)Py_NewRef(index);
    Py_RETURN_NONE;
}

PyObject *core_method_set_epoch(struct core *core, PyObject *epoch) {
    unsigned long long number = PyLong_AsUnsignedLongLong(epoch);
    if (PyErr_Occurred()) return NULL;
    core->epoch = number;
    Py_RETURN_NONE;
}

PyObject *core_method_set_step(struct core *core, PyObject *arguments) {
    unsigned int number;
    PyObject *host, *block_ids, *scores;
    if (!PyArg_ParseTuple(arguments, "IOOO", &number, &host, &block_ids, &scores)) return NULL;
    if (number >= CORE_STEPS || core->in_flight)
        return PyErr_Format(PyExc_ValueError, "core: step %u of %d, %u in flight", number, CORE_STEPS, core->in_flight);
    const size_t keys = (sizeof(int32_t) * CORE_COLUMNS * CORE_RUNS + 15) / 16 * 16;
    const size_t most = CORE_TOKENS * (size_t)core->head_dim;
    const size_t addresses = sizeof(uint64_t) * (CORE_TOKENS * (1 + 2 * (size_t)core->heads) + 2 * CORE_SIGNALS);
    const size_t ids = 4 * CORE_TOKENS * (size_t)core->heads * core->topk;
    struct step *step = &core->steps[number];
    if (!take_buffer(host, &step->host, "host", keys + 2 * most * (1 + core->heads) + addresses, 0) ||
        !take_buffer(block_ids, &step->block_ids, "block_ids", ids, 0) ||
        !take_buffer(scores, &step->scores, "scores", ids, 0))
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

PyObject *core_method_set_replays(struct core *core, PyObject *arguments) {
    PyObject *from;
    unsigned long long launch, stream, signal = 0;
    if (!PyArg_ParseTuple(arguments, "OKK|K", &from, &launch, &stream, &signal)) return NULL;
    Py_ssize_t count = PyList_Size(from);
    if (count < 0) return NULL;
    struct replay *replays = PyMem_Calloc((size_t)count + 1, sizeof *replays);
    if (!replays) return PyErr_NoMemory();
    for (Py_ssize_t number = 0; number < count; number++) {
        PyObject *replay = PyList_GetItem(from, number);
        if (PyTuple_Check(replay) && read_replay(replay, &replays[number])) continue;
        if (!PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "core: a tuple is needed for a program, got %R", replay);
        PyMem_Free(replays);
        return NULL;
    }
    PyMem_Free(core->replays);
    core->replays = replays;
    core->num_replays = (size_t)count;
    core->launch = (int (*)(void *, void *))(uintptr_t)launch;
    core->signal = (int (*)(void *, uint64_t, uint64_t, unsigned))(uintptr_t)signal;
    core->stream = (void *)(uintptr_t)stream;
    Py_CLEAR(core->run_step);
    Py_RETURN_NONE;
}

PyObject *core_method_set_run_step(struct core *core, PyObject *run_step) {
    PyObject *before = core->run_step;
    core->run_step = Py_NewRef(run_step);
    Py_XDECREF(before);
    Py_RETURN_NONE;
}
