/* Integers and words out of what a caller of the client names. */
#include <stdlib.h>

#include "client/token_request.h"

static PyObject *must_be_integers(const char *name, PyObject *value) {
    if (PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s must be integers, got %R", name, value);
    }
    return NULL;
}

/* One integer or several as a list of its own: an int, what has a `tolist` (numpy), or any iterable. */
static PyObject *listed(const char *name, PyObject *value) {
    if (PyLong_Check(value)) {
        PyObject *list = PyList_New(1);
        if (list) PyList_SetItem(list, 0, Py_NewRef(value));
        return list;
    }
    if (PyList_CheckExact(value)) return Py_NewRef(value);
    PyObject *plain = PyObject_CallMethod(value, "tolist", NULL);
    if (!plain) {
        PyErr_Clear();
        PyObject *list = PySequence_List(value);
        return list ? list : must_be_integers(name, value);
    }
    PyObject *list = PyLong_Check(plain) ? listed(name, plain) : PySequence_List(plain);
    Py_DECREF(plain);
    return list ? list : must_be_integers(name, value);
}

struct width {
    const char *name, *reason;
    uint64_t largest;
};

static bool read_integer(PyObject *refuse_with, const struct width *width, PyObject *value, uint64_t *number) {
    PyObject *integer = PyNumber_Index(value);
    if (!integer) {
        must_be_integers(width->name, value);
        return false;
    }
    *number = PyLong_AsUnsignedLongLong(integer);
    bool fits = !(*number == UINT64_MAX && PyErr_Occurred()) && *number <= width->largest;
    if (!fits) {
        PyErr_Clear();
        raise_refusal(refuse_with, INVALID_ARGUMENT, width->reason,
                      PyUnicode_FromFormat("%s must be 0 to %llu, got %S", width->name,
                                           (unsigned long long)width->largest, integer),
                      NULL);
    }
    Py_DECREF(integer);
    return fits;
}

static bool read_number(struct token_request *request, const char *name, const char *reason, PyObject *value,
                        uint32_t *number) {
    uint64_t wide = 0;
    struct width width = {name, reason, UINT32_MAX};
    bool read = read_integer(request->refuse, &width, value, &wide);
    *number = (uint32_t)wide;
    return read;
}

static const struct width WIDTHS[NUM_COLUMNS] = {[SEQUENCE_IDS] = {"sequences", "INVALID_SPANS", UINT64_MAX},
                                                 [STARTS] = {"starts", "INVALID_SPANS", UINT32_MAX},
                                                 [LENGTHS] = {"lengths", "INVALID_SPANS", UINT32_MAX},
                                                 [REVISIONS] = {"revisions", "INVALID_SPANS", UINT64_MAX}};

/* Whatever an integer's own class does meanwhile, the list may change: so its length is asked for again. */
static bool read_column(struct token_request *request, unsigned column, PyObject *list) {
    struct wire_spans *spans = &request->spans;
    if (!list) return true;
    for (Py_ssize_t at = 0; at < PyList_Size(list) && at < (Py_ssize_t)spans->most; at++) {
        PyObject *value = Py_NewRef(PyList_GetItem(list, at));
        bool read = read_integer(request->refuse, &WIDTHS[column], value, &spans->columns[column][at]);
        Py_DECREF(value);
        if (!read) return false;
        spans->counts[column] = (uint32_t)at + 1;
    }
    return true;
}

static bool fill_columns(struct token_request *request, PyObject *const lists[NUM_COLUMNS]) {
    Py_ssize_t most = 1;
    for (unsigned column = 0; column < NUM_COLUMNS; column++)
        if (lists[column] && PyList_Size(lists[column]) > most) most = PyList_Size(lists[column]);
    if (most > UINT32_MAX / 2 || !columns_open(&request->spans, (uint32_t)most)) {
        PyErr_NoMemory();
        return false;
    }
    for (unsigned column = 0; column < NUM_COLUMNS; column++)
        if (!read_column(request, column, lists[column])) return false;
    return true;
}

static bool read_columns(struct token_request *request, const struct arguments *arguments) {
    PyObject *const values[NUM_COLUMNS] = {[SEQUENCE_IDS] = arguments->sequences,
                                           [STARTS] = arguments->starts,
                                           [LENGTHS] = arguments->lengths,
                                           [REVISIONS] = arguments->revisions};
    PyObject *lists[NUM_COLUMNS] = {NULL};
    bool good = true;
    for (unsigned column = 0; good && column < NUM_COLUMNS; column++) {
        if (values[column] == Py_None) continue;
        lists[column] = listed(WIDTHS[column].name, values[column]);
        good = lists[column];
    }
    good = good && fill_columns(request, lists);
    for (unsigned column = 0; column < NUM_COLUMNS; column++) Py_XDECREF(lists[column]);
    request->at_ends = arguments->starts == Py_None;
    return good;
}

static bool read_order(struct token_request *request, PyObject *order) {
    bool by_score = PyUnicode_Check(order) && PyUnicode_CompareWithASCIIString(order, "score") == 0;
    if (by_score || (PyUnicode_Check(order) && PyUnicode_CompareWithASCIIString(order, "ascending") == 0)) {
        request->wire.order = by_score ? BLOCKDEX_SCORE : 0; /* left out, which means ascending */
        return true;
    }
    raise_refusal(request->refuse, INVALID_ARGUMENT, "INVALID_ORDER",
                  PyUnicode_FromFormat("order must be one of ascending, score, got %S", order), NULL);
    return false;
}

static bool read_scores(struct token_request *request, PyObject *scores) {
    bool raw = PyUnicode_Check(scores) && PyUnicode_CompareWithASCIIString(scores, "raw") == 0;
    if (raw || PyBool_Check(scores)) {
        request->wire.scores = raw ? RAW_SCORES : scores == Py_True ? SCALED_SCORES : NO_SCORES;
        return true;
    }
    raise_refusal(request->refuse, INVALID_ARGUMENT, "INVALID_SCORES",
                  PyUnicode_FromFormat("return_scores must be one of False, True, raw, got %S", scores), NULL);
    return false;
}

static bool read_ids(struct token_request *request, PyObject *ids) {
    bool pages = PyUnicode_Check(ids) && PyUnicode_CompareWithASCIIString(ids, "pages") == 0;
    if (pages || (PyUnicode_Check(ids) && PyUnicode_CompareWithASCIIString(ids, "blocks") == 0)) {
        request->wire.ids = pages ? PAGE_NUMBERS : UNSAID_IDS; /* left out, which means blocks */
        return true;
    }
    raise_refusal(request->refuse, INVALID_ARGUMENT, "INVALID_POOL",
                  PyUnicode_FromFormat("ids must be one of blocks, pages, got %S", ids), NULL);
    return false;
}

static bool read_flag(PyObject *value, uint32_t *flag) {
    int set = PyObject_IsTrue(value);
    *flag = set > 0;
    return set >= 0;
}

bool read_arguments(struct token_request *request, const struct arguments *arguments) {
    static const struct width EPOCH = {"epoch", "INVALID_SPANS", UINT64_MAX};
    static const struct width POOL = {"pool_id", "INVALID_POOL", UINT64_MAX};
    struct wire_request *wire = &request->wire;
    if (!read_columns(request, arguments)) return false;
    if (!read_number(request, "layer", "INVALID_LAYER", arguments->layer, &wire->layer)) return false;
    if (arguments->epoch != Py_None && !read_integer(request->refuse, &EPOCH, arguments->epoch, &wire->epoch))
        return false;
    if (!read_integer(request->refuse, &POOL, arguments->pool_id, &wire->pool_id)) return false;
    if (wire->kind != SELECT_BLOCKS && !read_flag(arguments->rollback, &wire->rollback)) return false;
    if (wire->kind == APPEND_KEYS) return true;
    return read_number(request, "first_head", "INVALID_HEADS", arguments->first_head, &wire->first_head) &&
           read_number(request, "num_heads", "INVALID_HEADS", arguments->num_heads, &wire->num_heads) &&
           read_order(request, arguments->order) && read_scores(request, arguments->return_scores) &&
           read_ids(request, arguments->ids) &&
           (wire->kind != SELECT_BLOCKS || read_flag(arguments->wait_for_keys, &wire->wait_for_keys));
}
