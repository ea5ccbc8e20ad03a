/* What a token request does to the lengths that the client counts: blockdex/client/lengths.py says what they mean. */
#include <stdlib.h>

#include "client/token_request.h"

/* Of one layer, as `Layers` lays them out: side by side, since a call touches all of them. */
struct layer_numbers {
    int64_t length, writes, in_flight, in_a_row;
};
enum { UNKNOWN = -1 };
enum { NOT_FOUND = 5, FAILED_PRECONDITION = 9 };

/* NULL where the sequence has no such layer, which the server says. */
static struct layer_numbers *numbers_at(const struct write *write, uint32_t layer) {
    size_t count = (size_t)write->numbers.len / sizeof(struct layer_numbers);
    return layer < count ? (struct layer_numbers *)write->numbers.buf + layer : NULL;
}

static uint32_t num_spans(const struct token_request *request) {
    const uint32_t *counts = request->spans.counts;
    return counts[LENGTHS] < counts[SEQUENCE_IDS] ? counts[LENGTHS] : counts[SEQUENCE_IDS];
}

static uint64_t *column(const struct token_request *request, unsigned name) { return request->spans.columns[name]; }

static void release(struct write *writes, uint32_t count) {
    for (uint32_t at = 0; at < count; at++) PyBuffer_Release(&writes[at].numbers);
    free(writes);
}

void release_writes(struct token_request *request) {
    struct write *writes = request->writes;
    uint32_t count = request->num_writes;
    /* Whatever is run meanwhile finds none. */
    request->writes = NULL;
    request->num_writes = 0;
    release(writes, count);
}

/* The numbers of a sequence: those that are there, or new ones; NULL with an error. */
static PyObject *find(struct token_request *request, PyObject *sequences, uint32_t span) {
    PyObject *id = PyLong_FromUnsignedLongLong(column(request, SEQUENCE_IDS)[span]);
    PyObject *found = id ? PyObject_GetItem(sequences, id) : NULL;
    if (found == Py_None) {
        Py_DECREF(found);
        found = NULL;
        if (request->at_ends)
            raise_refusal(request->refuse, NOT_FOUND, "UNKNOWN_SEQUENCE",
                          PyUnicode_FromFormat("sequence %S, layer %u: the server has evicted it", id,
                                               (unsigned)request->wire.layer),
                          NULL);
        else
            found = PyObject_CallMethod(sequences, "__missing__", "O", id);
    }
    Py_XDECREF(id);
    return found;
}

/* Holds the numbers of all sequences. Whatever is run meanwhile may change them, so none is looked at. */
static bool hold(struct token_request *request, PyObject *sequences) {
    uint32_t count = num_spans(request), held = 0;
    struct write *writes = calloc(count ? count : 1, sizeof *writes);
    bool good = writes;
    if (!good) PyErr_NoMemory();
    for (; good && held < count; held += good) {
        PyObject *numbers = find(request, sequences, held);
        good = numbers && PyObject_GetBuffer(numbers, &writes[held].numbers, PyBUF_WRITABLE) == 0;
        Py_XDECREF(numbers);
    }
    if (good && request->writes) {
        PyErr_SetString(PyExc_RuntimeError, "request: it has begun already");
        good = false;
    }
    if (!good) {
        release(writes, held);
        return false;
    }
    request->writes = writes;
    request->num_writes = count;
    return true;
}

/* Where starts were left out: they follow from the lengths, and all of these must be known. */
static bool count_starts(struct token_request *request, bool appends) {
    for (uint32_t span = 0; span < request->num_writes; span++) {
        const struct layer_numbers *numbers = numbers_at(&request->writes[span], request->wire.layer);
        if (numbers && numbers->length == UNKNOWN) {
            raise_refusal(request->refuse, FAILED_PRECONDITION, "OUTCOME_UNKNOWN",
                          PyUnicode_FromFormat("sequence %llu, layer %u: its length is not known to this client; ask "
                                               "get_sequence, or name the starts",
                                               (unsigned long long)column(request, SEQUENCE_IDS)[span],
                                               (unsigned)request->wire.layer),
                          NULL);
            return false;
        }
        int64_t length = numbers ? numbers->length : 0, rows = (int64_t)column(request, LENGTHS)[span];
        if (!appends && length < rows) {
            raise_refusal(request->refuse, INVALID_ARGUMENT, "INVALID_SPANS",
                          PyUnicode_FromFormat("sequence %llu, layer %u: its last %lld positions are asked for, its "
                                               "length is %lld",
                                               (unsigned long long)column(request, SEQUENCE_IDS)[span],
                                               (unsigned)request->wire.layer, (long long)rows, (long long)length),
                          NULL);
            return false;
        }
        column(request, STARTS)[span] = (uint64_t)(appends ? length : length - rows);
    }
    request->spans.counts[STARTS] = request->num_writes;
    return true;
}

/* Nothing is allocated here, so that nothing else is run. */
static void begin_write(struct write *write, struct layer_numbers *numbers, int64_t start, int64_t end) {
    bool alone = !numbers->in_flight, in_a_row = start == numbers->length && (alone || numbers->in_a_row);
    write->before = numbers->length;
    write->number = ++numbers->writes;
    numbers->length = alone || in_a_row ? end : UNKNOWN;
    numbers->in_flight++;
    numbers->in_a_row = in_a_row;
}

PyObject *token_request_begin(PyObject *object, PyObject *sequences) {
    struct token_request *request = token_request_of(object);
    if (!request) return NULL;
    if (request->wire.pool_id) Py_RETURN_NONE; /* whose rows have no lengths */
    if (!hold(request, sequences)) return NULL;
    if (request->at_ends && !count_starts(request, true)) {
        release_writes(request);
        return NULL;
    }
    for (uint32_t span = 0; span < request->num_writes; span++) {
        struct write *write = &request->writes[span];
        struct layer_numbers *numbers = numbers_at(write, request->wire.layer);
        int64_t start = (int64_t)column(request, STARTS)[span];
        if (numbers) begin_write(write, numbers, start, start + (int64_t)column(request, LENGTHS)[span]);
    }
    Py_RETURN_NONE;
}

PyObject *token_request_place(PyObject *object, PyObject *sequences) {
    struct token_request *request = token_request_of(object);
    if (!request) return NULL;
    if (!request->at_ends || request->wire.pool_id) Py_RETURN_NONE;
    if (!hold(request, sequences)) return NULL;
    bool placed = count_starts(request, false);
    release_writes(request);
    if (!placed) return NULL;
    Py_RETURN_NONE;
}

PyObject *token_request_end(PyObject *object, PyObject *unused) {
    struct token_request *request = token_request_of(object);
    (void)unused;
    if (!request) return NULL;
    for (uint32_t span = 0; span < request->num_writes; span++) {
        struct layer_numbers *numbers = numbers_at(&request->writes[span], request->wire.layer);
        if (numbers) numbers->in_flight--;
    }
    release_writes(request);
    Py_RETURN_NONE;
}

/* A write that changed nothing leaves all as it was before, unless there was another one since. */
static void fail_write(const struct write *write, struct layer_numbers *numbers, bool changed_nothing) {
    numbers->in_flight--;
    if (changed_nothing && numbers->writes == write->number) {
        numbers->length = write->before;
        numbers->writes--;
    } else {
        numbers->length = UNKNOWN;
        numbers->writes++;
    }
}

PyObject *token_request_fail(PyObject *object, PyObject *changed_nothing) {
    struct token_request *request = token_request_of(object);
    int nothing = request ? PyObject_IsTrue(changed_nothing) : -1;
    if (nothing < 0) return NULL;
    for (uint32_t span = request->num_writes; span-- > 0;) {
        const struct write *write = &request->writes[span];
        struct layer_numbers *numbers = numbers_at(write, request->wire.layer);
        if (numbers) fail_write(write, numbers, nothing);
    }
    release_writes(request);
    Py_RETURN_NONE;
}
