/* The core as Python sees it. Every method that takes a request takes its number, and checks where that request is. */
#include "core/core.h"

#include <stdlib.h>

static PyObject *fail(struct core *core) {
    if (PyErr_Occurred()) return NULL;
    if (!core->launch_error) return PyErr_NoMemory();
    int error = core->launch_error;
    core->launch_error = 0;
    return PyErr_Format(PyExc_RuntimeError, "cuGraphLaunch failed: CUDA error %d", error);
}

static bool is_used(const struct core *core, const struct line *line) {
    for (uint32_t number = 0; number < core->max_queued; number++)
        if (core->requests[number] && core->requests[number]->line == line) return true;
    return false;
}

/* Gives up the lines that were dropped and that no request is of any more. */
static void release_gone(struct core *core) {
    for (size_t number = core->num_gone; number-- > 0;) {
        struct line *line = core->gone_lines[number];
        if (is_used(core, line)) continue;
        core->gone_lines[number] = core->gone_lines[--core->num_gone];
        Py_DECREF(line_object(line));
    }
}

/* So many seconds from now on; at once where that is no time. */
static int64_t time_after(double seconds) {
    if (seconds >= 1e9) return INT64_MAX;
    return core_now() + (seconds > 0 ? (int64_t)(1e9 * seconds) : 0);
}

static PyObject *method_run(struct core *core, PyObject *argument) {
    double seconds = PyFloat_AsDouble(argument);
    if (PyErr_Occurred()) return NULL;
    int64_t until = time_after(seconds);
    if (!core->index) return PyErr_Format(PyExc_RuntimeError, "core: it has no columns of a cache");
    if (!core->run_step && !core->launch) return PyErr_Format(PyExc_RuntimeError, "core: nothing runs its steps");
    for (int step = 0; step < CORE_STEPS; step++)
        if (!core->steps[step].host.obj) return PyErr_Format(PyExc_RuntimeError, "core: step %d has no memory", step);
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

/* Nothing is answered there any more. What is not yet begun is forgotten; what is, goes on for nobody. */
static void forget_line(struct core *core, struct line *line) {
    for (uint32_t number = 0; number < core->max_queued; number++) {
        struct request *request = core->requests[number];
        if (!request || request->line != line) continue;
        request->cancelled = true;
        if ((request->place == IS_QUEUED && !request->has_pages) || request->place == IS_WAITING) {
            core_add(&core->cancelled, 1);
            core_forget(core, request);
            continue;
        }
        pair_index_remove(&core->tickets, (uintptr_t)line, request->slot.ticket);
    }
    if (core->broken == line) core->broken = NULL;
}

static PyObject *method_drop(struct core *core, PyObject *line) {
    for (size_t number = 0; number < core->num_lines; number++) {
        if (line_object(core->lines[number]) != line) continue;
        core->lines[number]->gone = true;
        struct line **gone = PyMem_Realloc(core->gone_lines, (core->num_gone + 1) * sizeof *gone);
        if (!gone) return PyErr_NoMemory();
        core->gone_lines = gone;
        gone[core->num_gone++] = core->lines[number];
        forget_line(core, core->lines[number]);
        core->lines[number] = core->lines[--core->num_lines];
        release_gone(core);
        Py_RETURN_NONE;
    }
    return PyErr_Format(PyExc_ValueError, "core: %R is not one of its lines", line);
}

static PyObject *method_take_broken(struct core *core, PyObject *unused) {
    (void)unused;
    if (!core->broken) Py_RETURN_NONE;
    PyObject *broken = Py_BuildValue("Os", line_object(core->broken), core->broken_by);
    core->broken->gone = true;
    core->broken = NULL;
    return broken;
}

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

/* Stamps of cells or columns, all of no step; false without memory. */
static bool renew(uint64_t **stamps, size_t count) {
    uint64_t *fresh = calloc(count + 1, sizeof *fresh);
    if (!fresh) return false;
    free(*stamps);
    *stamps = fresh;
    return true;
}

static bool renew_stamps(struct core *core, size_t columns) {
    const size_t cells = columns * core->layers;
    int32_t *recounted = calloc((size_t)core->columns.holders.len / 4 + 1, sizeof *recounted);
    if (!recounted) return false;
    uint32_t *to_trim = realloc(core->to_trim, (columns + 1) * sizeof *to_trim);
    free(core->recounted);
    core->recounted = recounted;
    if (!to_trim) return false;
    core->to_trim = to_trim;
    core->unchecked = true;
    return renew(&core->appended_in, cells) && renew(&core->read_in, cells) && renew(&core->bulk_appended_in, cells) &&
           renew(&core->used_in, columns) && renew(&core->trimmed_in, columns);
}

static PyObject *method_set_columns(struct core *core, PyObject *arguments) {
    PyObject *index, *lengths, *revisions, *reading, *held, *forked, *last_calls, *first_rows, *reading_sequence,
        *cells, *holders, *free_pages;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOOOOOO", &index, &lengths, &revisions, &reading, &held, &forked,
                          &last_calls, &first_rows, &reading_sequence, &cells, &holders, &free_pages))
        return NULL;
    struct columns *columns = &core->columns;
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
        !take_buffer(free_pages, &columns->free_pages, "free_pages", 8, 0))
        return NULL;
    columns->count = count;
    if (!renew_stamps(core, count)) return PyErr_NoMemory();
    core->index = (struct sequence_index *)Py_NewRef(index);
    Py_RETURN_NONE;
}

static PyObject *method_set_epoch(struct core *core, PyObject *epoch) {
    unsigned long long number = PyLong_AsUnsignedLongLong(epoch);
    if (PyErr_Occurred()) return NULL;
    core->epoch = number;
    Py_RETURN_NONE;
}

static PyObject *method_set_step(struct core *core, PyObject *arguments) {
    unsigned int number;
    PyObject *host, *block_ids, *scores;
    if (!PyArg_ParseTuple(arguments, "IOOO", &number, &host, &block_ids, &scores)) return NULL;
    if (number >= CORE_STEPS || core->in_flight)
        return PyErr_Format(PyExc_ValueError, "core: step %u of %d, %u in flight", number, CORE_STEPS, core->in_flight);
    const size_t keys = (sizeof(int32_t) * CORE_COLUMNS * CORE_RUNS + 15) / 16 * 16;
    const size_t most = CORE_TOKENS * (size_t)core->head_dim, ids = 4 * CORE_TOKENS * (size_t)core->heads * core->topk;
    struct step *step = &core->steps[number];
    if (!take_buffer(host, &step->host, "host", keys + 2 * most * (1 + core->heads), 0) ||
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

static PyObject *method_set_replays(struct core *core, PyObject *arguments) {
    PyObject *from;
    unsigned long long launch, stream;
    if (!PyArg_ParseTuple(arguments, "OKK", &from, &launch, &stream)) return NULL;
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

static PyObject *bytes_of(const void *from, size_t bytes) { return PyBytes_FromStringAndSize(from, (Py_ssize_t)bytes); }

static PyObject *columns_of_request(const struct request *request) {
    const size_t spans = request->num_rows;
    return Py_BuildValue("NNNNN", bytes_of(request->ids, 8 * spans), bytes_of(request->columns, 4 * spans),
                         bytes_of(request->starts, 8 * spans), bytes_of(request->lengths, 8 * spans),
                         bytes_of(request->applies, spans));
}

/* Where a tensor is in its link's memory: offset and bytes. */
static PyObject *place_of_tensor(const struct request *request, const char *from, uint64_t bytes) {
    return Py_BuildValue("nK", (Py_ssize_t)(from - (const char *)request->line->header), (unsigned long long)bytes);
}

static PyObject *bulk_of(const struct request *request) {
    const struct blockdex_request *slot = &request->slot;
    return Py_BuildValue("IsINIOBNBNIIBB", request->number, "bulk", slot->layer, columns_of_request(request),
                         request->tenant, line_object(request->line), slot->keys_dtype,
                         place_of_tensor(request, request->keys, slot->keys_bytes), slot->queries_dtype,
                         place_of_tensor(request, request->queries, slot->queries_bytes), slot->first_head,
                         slot->num_heads, slot->order, slot->flags);
}

static PyObject *sequence_of(const struct core *core, const struct request *request) {
    static const char *const kinds[] = {
        [BLOCKDEX_OPEN] = "open",         [BLOCKDEX_GET] = "get",     [BLOCKDEX_FORK] = "fork",
        [BLOCKDEX_TRUNCATE] = "truncate", [BLOCKDEX_CLOSE] = "close",
    };
    const struct blockdex_request *slot = &request->slot;
    const struct tenant *tenant = &core->index->tenants[request->tenant];
    if (slot->kind == BLOCKDEX_OPEN || slot->kind == BLOCKDEX_CLOSE)
        return Py_BuildValue(
            "Iss#NN", request->number, kinds[slot->kind], tenant->name, (Py_ssize_t)tenant->bytes,
            bytes_of(request->ids, 8 * (size_t)request->num_rows),
            bytes_of(request->starts, slot->kind == BLOCKDEX_OPEN ? 8 * (size_t)request->num_rows : 0));
    return Py_BuildValue("Iss#KKK", request->number, kinds[slot->kind], tenant->name, (Py_ssize_t)tenant->bytes,
                         (unsigned long long)slot->sequence_id, (unsigned long long)slot->child_id,
                         (unsigned long long)slot->number);
}

static PyObject *method_take_cut(struct core *core, PyObject *unused) {
    (void)unused;
    PyObject *columns = bytes_of(core->to_trim, sizeof *core->to_trim * core->num_to_trim);
    if (columns) core->num_to_trim = 0;
    core->unchecked = true;
    return columns;
}

static PyObject *method_take(struct core *core, PyObject *unused) {
    (void)unused;
    core->unchecked = true;
    while (core->next_for_python < core->num_for_python) {
        struct request *request = core->requests[core->for_python[core->next_for_python++]];
        if (!request) continue;
        if (request->place == BULK) return bulk_of(request);
        if (request->place == WITH_PYTHON) return sequence_of(core, request);
        return Py_BuildValue("IsIN", request->number, "pages", request->slot.layer, columns_of_request(request));
    }
    core->next_for_python = core->num_for_python = 0;
    Py_RETURN_NONE;
}

/* The request of a number, in one of those places; NULL with an error set. */
static struct request *request_of(const struct core *core, unsigned int number, bool queued) {
    struct request *request = number < core->max_queued ? core->requests[number] : NULL;
    const bool right =
        request && (queued ? request->place == IS_QUEUED : request->place == WITH_PYTHON || request->place == BULK);
    if (!right) PyErr_Format(PyExc_ValueError, "core: request %u is not one for Python", number);
    return right ? request : NULL;
}

static PyObject *method_grant(struct core *core, PyObject *argument) {
    unsigned long number = PyLong_AsUnsignedLong(argument);
    if (PyErr_Occurred()) return NULL;
    struct request *request = request_of(core, (unsigned int)number, true);
    if (!request) return NULL;
    request->has_pages = core->changed = true;
    Py_RETURN_NONE;
}

static PyObject *method_begin(struct core *core, PyObject *arguments) {
    unsigned int number, phase;
    if (!PyArg_ParseTuple(arguments, "II", &number, &phase)) return NULL;
    struct request *request = request_of(core, number, false);
    if (!request) return NULL;
    if (phase < 1 || phase > CORE_PHASES) return PyErr_Format(PyExc_ValueError, "core: phase %u is none", phase);
    request->phase = (uint8_t)phase;
    request->launched = core_now();
    Py_RETURN_NONE;
}

static PyObject *method_drop_if_gone(struct core *core, PyObject *argument) {
    unsigned long number = PyLong_AsUnsignedLong(argument);
    if (PyErr_Occurred()) return NULL;
    struct request *request = request_of(core, (unsigned int)number, false);
    if (!request) return NULL;
    struct line *line = request->line;
    bool dropped = core_drop_if_gone(core, request, core_now());
    if (dropped) line_publish(line);
    return PyBool_FromLong(dropped);
}

/* Both parts one behind the other, the second at a multiple of 64; NULL with an error set. */
static char *join(struct core *core, const Py_buffer *first, const Py_buffer *second, size_t *bytes) {
    const size_t at = second->obj ? (size_t)blockdex_aligned((uint64_t)first->len) : (size_t)first->len;
    *bytes = at + (second->obj ? (size_t)second->len : 0);
    if (*bytes > core->scratch_bytes) {
        char *wider = realloc(core->scratch, *bytes);
        if (!wider) return (char *)PyErr_NoMemory();
        core->scratch = wider;
        core->scratch_bytes = *bytes;
    }
    if (first->len) memcpy(core->scratch, first->buf, (size_t)first->len);
    if (second->obj) memcpy(core->scratch + at, second->buf, (size_t)second->len);
    return core->scratch;
}

static PyObject *method_answer(struct core *core, PyObject *arguments) {
    unsigned int number;
    struct blockdex_answer answer = {0};
    Py_buffer parts[2] = {{0}, {0}};
    PyObject *first, *second, *done = NULL;
    if (!PyArg_ParseTuple(arguments, "IIIIIIOO", &number, &answer.flags, &answer.num_tokens, &answer.num_heads,
                          &answer.topk, &answer.num_layers, &first, &second))
        return NULL;
    struct request *request = request_of(core, number, false);
    if (!request) return NULL;
    if (first != Py_None && PyObject_GetBuffer(first, &parts[0], PyBUF_C_CONTIGUOUS) < 0) return NULL;
    if (second == Py_None || PyObject_GetBuffer(second, &parts[1], PyBUF_C_CONTIGUOUS) == 0) {
        size_t bytes = 0;
        struct line *line = request->line;
        const char *payload = parts[0].obj ? join(core, &parts[0], &parts[1], &bytes) : "";
        if (payload) {
            request->finished = core_now();
            core->changed |= request->place == WITH_PYTHON;
            core_answer(core, request, answer, payload, bytes);
            line_publish(line);
            done = Py_NewRef(Py_None);
        }
    }
    for (int part = 0; part < 2; part++)
        if (parts[part].obj) PyBuffer_Release(&parts[part]);
    return done;
}

static PyObject *method_refuse(struct core *core, PyObject *arguments) {
    unsigned int number;
    unsigned short code;
    const char *reason, *message;
    if (!PyArg_ParseTuple(arguments, "IHss", &number, &code, &reason, &message)) return NULL;
    const bool queued =
        number < core->max_queued && core->requests[number] && core->requests[number]->place == IS_QUEUED;
    struct request *request = request_of(core, number, queued);
    if (!request) return NULL;
    struct line *line = request->line;
    request->finished = core_now();
    core_refuse(core, request, code, reason, "%s", message);
    line_publish(line);
    Py_RETURN_NONE;
}

static PyObject *method_abandon(struct core *core, PyObject *arguments) {
    unsigned short code;
    const char *reason, *message;
    if (!PyArg_ParseTuple(arguments, "Hss", &code, &reason, &message)) return NULL;
    if (core->in_flight) core_add(&core->busy_nanoseconds, (uint64_t)(core_now() - core->busy_since));
    core->in_flight = 0;
    core->no_memory = false;
    core->num_for_python = core->next_for_python = core->num_to_trim = 0;
    for (uint32_t number = 0; number < core->max_queued; number++)
        if (core->requests[number]) core_refuse(core, core->requests[number], code, reason, "%s", message);
    pair_index_clear(&core->held_back);
    core_publish(core);
    if (core->no_memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static unsigned long long read_counter(const counter *from) { return atomic_load_explicit(from, memory_order_relaxed); }

static PyObject *histogram_of(const struct histogram *histogram, uint32_t num_bounds, double unit) {
    PyObject *counts = PyList_New(num_bounds + 1);
    for (uint32_t bucket = 0; counts && bucket <= num_bounds; bucket++)
        if (PyList_SetItem(counts, bucket, PyLong_FromUnsignedLongLong(read_counter(&histogram->counts[bucket]))) < 0)
            Py_CLEAR(counts);
    return counts ? Py_BuildValue("Nd", counts, (double)read_counter(&histogram->total) / unit) : NULL;
}

static PyObject *stages_of(const struct core *core) {
    PyObject *stages = PyList_New(CORE_PHASES * CORE_STAGES);
    for (int at = 0; stages && at < CORE_PHASES * CORE_STAGES; at++) {
        const struct histogram *histogram = &core->stages[at / CORE_STAGES][at % CORE_STAGES];
        PyObject *made = histogram_of(histogram, core->num_seconds_bounds, 1e9);
        if (!made || PyList_SetItem(stages, at, made) < 0) Py_CLEAR(stages);
    }
    return stages;
}

static PyObject *method_counts(struct core *core, PyObject *unused) {
    (void)unused;
    const uint32_t sizes = core->num_size_bounds;
    return Py_BuildValue(
        "{s:N,s:N,s:N,s:N,s:N,s:N,s:K,s:K,s:K,s:d,s:d,s:K,s:K,s:K,s:K}", "stages", stages_of(core), "step_requests",
        histogram_of(&core->step_requests, sizes, 1), "append_requests",
        histogram_of(&core->phase_requests[0], sizes, 1), "decode_requests",
        histogram_of(&core->phase_requests[1], sizes, 1), "append_sizes",
        histogram_of(&core->phase_tokens[0], sizes, 1), "decode_sizes", histogram_of(&core->phase_tokens[1], sizes, 1),
        "append_tokens", read_counter(&core->num_tokens[0]), "decode_tokens", read_counter(&core->num_tokens[1]),
        "steps", read_counter(&core->num_steps), "device_seconds",
        1e-9 * (double)read_counter(&core->device_nanoseconds[1]), "device_busy_seconds",
        1e-9 * (double)read_counter(&core->busy_nanoseconds), "cancelled", read_counter(&core->cancelled), "late",
        read_counter(&core->late), "integrity_checks", read_counter(&core->integrity_checks), "integrity_faults",
        read_counter(&core->integrity_faults));
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
    return PyFloat_FromDouble(1e-9 * ((double)now - (double)read_counter(&core->busy_nanoseconds)));
}

static PyObject *get_looked(struct core *core, void *unused) {
    (void)unused;
    return PyFloat_FromDouble(1e-9 * (double)core->passed);
}

static PyObject *get_queued(struct core *core, void *unused) {
    (void)unused;
    uint64_t queued = core->backlog.count;
    for (size_t number = 0; number < core->num_lines; number++) {
        int64_t filled = core->lines[number]->gone ? 0 : line_filled(core->lines[number]);
        queued += filled > 0 ? (uint64_t)filled : 0;
    }
    return PyLong_FromUnsignedLongLong(queued);
}

static PyObject *get_waiting(struct core *core, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(core->waiting.count);
}

static PyObject *get_steps(struct core *core, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(read_counter(&core->num_steps));
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
                            "max_message_bytes",
                            "scale",
                            "odd_keys",
                            "odd_queries",
                            "nudge",
                            "spin_seconds",
                            "seconds_bounds",
                            "size_bounds",
                            NULL};
    struct core read = {0};
    unsigned int max_tokens;
    unsigned long long max_message_bytes;
    int odd_keys, odd_queries, nudge;
    double spin_seconds;
    PyObject *seconds_bounds, *size_bounds;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "IIIIIIIIIIIKfppidOO", names, &read.layers, &read.heads,
                                     &read.head_dim, &read.topk, &read.init_blocks, &read.local_blocks,
                                     &read.block_size, &read.longest, &max_tokens, &read.max_spans, &read.max_queued,
                                     &max_message_bytes, &read.scale, &odd_keys, &odd_queries, &nudge, &spin_seconds,
                                     &seconds_bounds, &size_bounds))
        return NULL;
    read.max_tokens = max_tokens;
    if (!check_sizes(&read)) return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct core *core = (void *)allocate(type, 0);
    if (!core) return NULL;
    core->layers = read.layers;
    core->heads = read.heads;
    core->head_dim = read.head_dim;
    core->topk = read.topk;
    core->init_blocks = read.init_blocks;
    core->local_blocks = read.local_blocks;
    core->block_size = read.block_size;
    core->longest = read.longest;
    core->max_tokens = max_tokens;
    core->max_spans = read.max_spans;
    core->max_queued = read.max_queued;
    core->max_message_bytes = max_message_bytes;
    core->scale = read.scale;
    core->odd_keys = odd_keys;
    core->odd_queries = odd_queries;
    core->nudge = nudge;
    core->spin = (int64_t)(1e9 * spin_seconds);
    core->next_deadline = INT64_MAX;
    if (!make_room(core) || !read_bounds(seconds_bounds, core->seconds_bounds, &core->num_seconds_bounds) ||
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
    struct columns *columns = &core->columns;
    Py_buffer *buffers[] = {&columns->lengths, &columns->revisions,  &columns->reading,         &columns->held,
                            &columns->forked,  &columns->last_calls, &columns->first_rows,      &columns->cells,
                            &columns->holders, &columns->free_pages, &columns->reading_sequence};
    for (uint32_t number = 0; core->requests && number < core->max_queued; number++)
        if (core->requests[number]) core_forget(core, core->requests[number]);
    for (size_t number = 0; number < sizeof buffers / sizeof *buffers; number++) release(buffers[number]);
    for (int step = 0; step < CORE_STEPS; step++) {
        release(&core->steps[step].host);
        release(&core->steps[step].block_ids);
        release(&core->steps[step].scores);
    }
    for (size_t number = 0; number < core->num_lines; number++) Py_DECREF(line_object(core->lines[number]));
    for (size_t number = 0; number < core->num_gone; number++) Py_DECREF(line_object(core->gone_lines[number]));
    void *const allocated[] = {core->requests, core->free_numbers,     core->for_python, core->appended_in,
                               core->read_in,  core->bulk_appended_in, core->used_in,    core->trimmed_in,
                               core->to_trim,  core->recounted,        core->scratch};
    for (size_t number = 0; number < sizeof allocated / sizeof *allocated; number++) free(allocated[number]);
    pair_index_free(&core->tickets);
    pair_index_free(&core->held_back);
    Py_XDECREF((PyObject *)core->index);
    Py_XDECREF(core->run_step);
    PyMem_Free(core->lines);
    PyMem_Free(core->gone_lines);
    PyMem_Free(core->bells);
    PyMem_Free(core->replays);
    freefunc deallocate = (freefunc)PyType_GetSlot(type, Py_tp_free);
    deallocate(core);
    Py_DECREF(type);
}

static PyGetSetDef properties[] = {
    {"steps", (getter)get_steps, NULL, "Steps begun so far.", NULL},
    {"in_flight", (getter)get_in_flight, NULL, "Steps on their way.", NULL},
    {"launched", (getter)get_launched, NULL, "Monotonic seconds of the oldest one's launch.", NULL},
    {"time_beside", (getter)get_time_beside, NULL, "Monotonic seconds, less those with steps on their way.", NULL},
    {"looked", (getter)get_looked, NULL, "Monotonic seconds of its last look at the rings.", NULL},
    {"queued", (getter)get_queued, NULL, "Requests that are not begun; from any thread.", NULL},
    {"waiting", (getter)get_waiting, NULL, "Selections that wait for keys; from any thread.", NULL},
    {0},
};

static PyMethodDef methods[] = {
    {"run", (PyCFunction)method_run, METH_O, "Serves until there is something for Python, or the time is up."},
    {"notice", (PyCFunction)method_notice, METH_NOARGS, "Has `run` return; from any thread."},
    {"try_again", (PyCFunction)method_try_again, METH_NOARGS, "What was held back may get on now."},
    {"expect_no_more", (PyCFunction)method_expect_no_more, METH_NOARGS, "Keys that are waited for come no more."},
    {"add", (PyCFunction)method_add, METH_O, "Serves one more line."},
    {"drop", (PyCFunction)method_drop, METH_O, "Serves a line no more: nothing is written for it."},
    {"take_broken", (PyCFunction)method_take_broken, METH_NOARGS, "A line that wrote what cannot be, and what."},
    {"set_columns", (PyCFunction)method_set_columns, METH_VARARGS, "Shares the cache's columns."},
    {"set_epoch", (PyCFunction)method_set_epoch, METH_O, "The cache's epoch."},
    {"set_step", (PyCFunction)method_set_step, METH_VARARGS, "Memory that one of the steps is made in."},
    {"set_replays", (PyCFunction)method_set_replays, METH_VARARGS, "The device's programs, and what launches them."},
    {"set_run_step", (PyCFunction)method_set_run_step, METH_O, "What runs a step, where no program does."},
    {"take", (PyCFunction)method_take, METH_NOARGS, "The next request for Python."},
    {"take_cut", (PyCFunction)method_take_cut, METH_NOARGS, "Columns that were cut, and may have pages to give back."},
    {"grant", (PyCFunction)method_grant, METH_O, "A request has the pages that it needs."},
    {"begin", (PyCFunction)method_begin, METH_VARARGS, "The last kernel of a request was launched, and its phase."},
    {"drop_if_gone", (PyCFunction)method_drop_if_gone, METH_O, "Answers a request that nobody waits for any more."},
    {"answer", (PyCFunction)method_answer, METH_VARARGS, "Answers a request."},
    {"refuse", (PyCFunction)method_refuse, METH_VARARGS, "Refuses a request."},
    {"abandon", (PyCFunction)method_abandon, METH_VARARGS, "Refuses all requests."},
    {"counts", (PyCFunction)method_counts, METH_NOARGS, "What it did so far; from any thread."},
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
