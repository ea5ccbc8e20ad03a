/* Requests that Python takes from the core, by number, and answers: large requests, the life of sequences, new pages. */
#include "core/core_type.h"

#include <stdlib.h>
#include <string.h>

static PyObject *bytes_of(const void *from, size_t bytes) { return PyBytes_FromStringAndSize(from, (Py_ssize_t)bytes); }

static PyObject *rows_of(const struct request *request) {
    const size_t spans = request->num_rows;
    return Py_BuildValue("NNNNN", bytes_of(request->ids, 8 * spans), bytes_of(request->entries, 4 * spans),
                         bytes_of(request->starts, 8 * spans), bytes_of(request->lengths, 8 * spans),
                         bytes_of(request->applies, spans));
}

/* Where a tensor is: in a region, or None for its link's memory; offset and bytes. None: in the answers' arena. */
static PyObject *tensor_of(const struct request *request, int number, uint64_t bytes) {
    const struct region *region = request->regions[number];
    const char *at = request->tensors[number], *from = region ? region->memory : (const char *)request->link->header;
    if (!at) Py_RETURN_NONE;
    return Py_BuildValue("OKK", region ? (PyObject *)region->owner : Py_None,
                         (unsigned long long)((uintptr_t)at - (uintptr_t)from), (unsigned long long)bytes);
}

static uint64_t ids_bytes(const struct core *core, const struct request *request) {
    return sizeof(int32_t) * (uint64_t)request->tokens * request->slot.num_heads * core->topk;
}

static PyObject *large_of(const struct core *core, const struct request *request) {
    const struct blockdex_request *slot = &request->slot;
    return Py_BuildValue(
        "IsINIOBNBNNNIIBB", request->number, "large", slot->layer, rows_of(request), request->tenant,
        server_link_object(request->link), slot->keys_dtype, tensor_of(request, KEYS, slot->keys_bytes),
        slot->queries_dtype, tensor_of(request, QUERIES, slot->queries_bytes),
        tensor_of(request, BLOCK_IDS, ids_bytes(core, request)), tensor_of(request, SCORES, ids_bytes(core, request)),
        slot->first_head, slot->num_heads, slot->order, slot->flags);
}

static PyObject *sequence_of(const struct core *core, const struct request *request) {
    static const char *const kinds[] = {
        [BLOCKDEX_OPEN] = "open",
        [BLOCKDEX_GET] = "get",
        [BLOCKDEX_FORK] = "fork",
        [BLOCKDEX_TRUNCATE] = "truncate",
        [BLOCKDEX_CLOSE] = "close",
        [BLOCKDEX_CREATE_POOL] = "create_pool",
        [BLOCKDEX_CLOSE_POOL] = "close_pool",
    };
    const struct blockdex_request *slot = &request->slot;
    const struct tenant *tenant = &core->index->tenants.all[request->tenant];
    if (slot->kind == BLOCKDEX_OPEN || slot->kind == BLOCKDEX_CLOSE)
        return Py_BuildValue(
            "Iss#NN", request->number, kinds[slot->kind], tenant->name, (Py_ssize_t)tenant->bytes,
            bytes_of(request->ids, 8 * (size_t)request->num_rows),
            bytes_of(request->starts, slot->kind == BLOCKDEX_OPEN ? 8 * (size_t)request->num_rows : 0));
    if (slot->kind == BLOCKDEX_CREATE_POOL)
        return Py_BuildValue("Iss#KKIK", request->number, kinds[slot->kind], tenant->name, (Py_ssize_t)tenant->bytes,
                             (unsigned long long)slot->sequence_id, (unsigned long long)slot->number, slot->num_spans,
                             (unsigned long long)slot->child_id);
    return Py_BuildValue("Iss#KKK", request->number, kinds[slot->kind], tenant->name, (Py_ssize_t)tenant->bytes,
                         (unsigned long long)slot->sequence_id, (unsigned long long)slot->child_id,
                         (unsigned long long)slot->number);
}

PyObject *core_method_take_cut(struct core *core, PyObject *unused) {
    (void)unused;
    PyObject *entries = bytes_of(core->to_trim, sizeof *core->to_trim * core->num_to_trim);
    if (entries) core->num_to_trim = 0;
    core->unchecked = true;
    return entries;
}

PyObject *core_method_take_set_cells(struct core *core, PyObject *unused) {
    (void)unused;
    PyObject *places = bytes_of(core->set_cells, sizeof *core->set_cells * core->num_set_cells);
    if (places) core->num_set_cells = 0;
    return places;
}

PyObject *core_method_take(struct core *core, PyObject *unused) {
    (void)unused;
    core->unchecked = true;
    while (core->next_for_python < core->num_for_python) {
        struct request *request = core->requests[core->for_python[core->next_for_python++]];
        if (!request) continue;
        if (request->state == LARGE) return large_of(core, request);
        if (request->state == WITH_PYTHON) return sequence_of(core, request);
        return Py_BuildValue("IsIN", request->number, "pages", request->slot.layer, rows_of(request));
    }
    core->next_for_python = core->num_for_python = 0;
    Py_RETURN_NONE;
}

/* The request of a number, `queued`, or handed to Python; NULL with an error set. */
static struct request *request_of(const struct core *core, unsigned int number, bool queued) {
    struct request *request = number < core->max_queued ? core->requests[number] : NULL;
    const bool right =
        request && (queued ? request->state == IS_QUEUED : request->state == WITH_PYTHON || request->state == LARGE);
    if (!right) PyErr_Format(PyExc_ValueError, "core: request %u is not one for Python", number);
    return right ? request : NULL;
}

PyObject *core_method_grant(struct core *core, PyObject *argument) {
    unsigned long number = PyLong_AsUnsignedLong(argument);
    if (PyErr_Occurred()) return NULL;
    struct request *request = request_of(core, (unsigned int)number, true);
    if (!request) return NULL;
    request->has_pages = core->changed = true;
    Py_RETURN_NONE;
}

PyObject *core_method_begin(struct core *core, PyObject *arguments) {
    unsigned int number, phase;
    if (!PyArg_ParseTuple(arguments, "II", &number, &phase)) return NULL;
    struct request *request = request_of(core, number, false);
    if (!request) return NULL;
    if (phase < 1 || phase > CORE_PHASES) return PyErr_Format(PyExc_ValueError, "core: phase %u is none", phase);
    request->phase = (uint8_t)phase;
    request->launched = core_now();
    Py_RETURN_NONE;
}

PyObject *core_method_drop_if_gone(struct core *core, PyObject *argument) {
    unsigned long number = PyLong_AsUnsignedLong(argument);
    if (PyErr_Occurred()) return NULL;
    struct request *request = request_of(core, (unsigned int)number, false);
    if (!request) return NULL;
    struct server_link *link = request->link;
    bool dropped = core_drop_if_gone(core, request, core_now());
    if (dropped) server_link_publish(link);
    return PyBool_FromLong(dropped);
}

PyObject *core_method_name_pages(struct core *core, PyObject *arguments) {
    unsigned int number;
    PyObject *from;
    Py_buffer ids;
    if (!PyArg_ParseTuple(arguments, "IO", &number, &from)) return NULL;
    const struct request *request = request_of(core, number, false);
    if (!request || PyObject_GetBuffer(from, &ids, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) < 0) return NULL;
    const bool right = request->keeps_tables && (uint64_t)ids.len == ids_bytes(core, request);
    if (right)
        core_name_pages(core, request, ids.buf);
    else
        PyErr_Format(PyExc_ValueError, "core: %zd bytes of block ids for request %u, which names no pages", ids.len,
                     number);
    PyBuffer_Release(&ids);
    return right ? Py_NewRef(Py_None) : NULL;
}

/* Writes a part of an answer where it lies, if that is a region; false with an error set. */
static bool write_to_region(const struct core *core, const struct request *request, int number, Py_buffer *part) {
    if (!part->obj || !request->regions[number]) return true;
    if (core_is_on_device(request, number) || (uint64_t)part->len != ids_bytes(core, request)) {
        PyErr_Format(PyExc_ValueError, "core: %zd bytes for request %u, whose region takes %llu", part->len,
                     request->number, (unsigned long long)ids_bytes(core, request));
        return false;
    }
    memcpy(request->tensors[number], part->buf, (size_t)part->len);
    PyBuffer_Release(part);
    return true;
}

/* Both parts one behind the other, the second at a multiple of 64; NULL with an error set. */
static const char *join(struct core *core, const Py_buffer *first, const Py_buffer *second, size_t *bytes) {
    if (!first->obj || !second->obj) {
        const Py_buffer *only = first->obj ? first : second;
        *bytes = only->obj ? (size_t)only->len : 0;
        return *bytes ? only->buf : "";
    }
    const size_t at = (size_t)blockdex_aligned((uint64_t)first->len);
    *bytes = at + (size_t)second->len;
    if (*bytes > core->scratch_bytes) {
        char *wider = realloc(core->scratch, *bytes);
        if (!wider) return (const char *)PyErr_NoMemory();
        core->scratch = wider;
        core->scratch_bytes = *bytes;
    }
    memcpy(core->scratch, first->buf, (size_t)first->len);
    memcpy(core->scratch + at, second->buf, (size_t)second->len);
    return core->scratch;
}

PyObject *core_method_answer(struct core *core, PyObject *arguments) {
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
    if ((second == Py_None || PyObject_GetBuffer(second, &parts[1], PyBUF_C_CONTIGUOUS) == 0) &&
        write_to_region(core, request, BLOCK_IDS, &parts[0]) && write_to_region(core, request, SCORES, &parts[1])) {
        size_t bytes = 0;
        struct server_link *link = request->link;
        const char *payload = join(core, &parts[0], &parts[1], &bytes);
        if (payload) {
            request->finished = core_now();
            core->changed |= request->state == WITH_PYTHON;
            core_answer(core, request, answer, payload, bytes);
            server_link_publish(link);
            done = Py_NewRef(Py_None);
        }
    }
    for (int part = 0; part < 2; part++)
        if (parts[part].obj) PyBuffer_Release(&parts[part]);
    return done;
}

PyObject *core_method_refuse(struct core *core, PyObject *arguments) {
    unsigned int number;
    unsigned short code;
    const char *reason, *message;
    if (!PyArg_ParseTuple(arguments, "IHss", &number, &code, &reason, &message)) return NULL;
    const bool queued =
        number < core->max_queued && core->requests[number] && core->requests[number]->state == IS_QUEUED;
    struct request *request = request_of(core, number, queued);
    if (!request) return NULL;
    struct server_link *link = request->link;
    request->finished = core_now();
    core_refuse(core, request, code, reason, "%s", message);
    server_link_publish(link);
    Py_RETURN_NONE;
}

PyObject *core_method_abandon(struct core *core, PyObject *arguments) {
    unsigned short code;
    const char *reason, *message;
    if (!PyArg_ParseTuple(arguments, "Hss", &code, &reason, &message)) return NULL;
    if (core->in_flight) core_add(&core->busy_nanoseconds, (uint64_t)(core_now() - core->busy_since));
    core->in_flight = 0;
    core->no_memory = false;
    core->num_for_python = core->next_for_python = core->num_to_trim = 0;
    core->num_set_cells = 0;
    for (uint32_t number = 0; number < core->max_queued; number++)
        if (core->requests[number]) core_refuse(core, core->requests[number], code, reason, "%s", message);
    pair_index_clear(&core->held_back);
    core_publish(core);
    if (core->no_memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}
