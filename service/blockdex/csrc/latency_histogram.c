#include "latency_histogram.h"

#include <stdlib.h>
#include <string.h>

bool times_open(struct times *times, unsigned rpcs, PyObject *bounds) {
    Py_ssize_t count = PyTuple_Size(bounds);
    if (count < 0) return false;
    times->rpcs = rpcs;
    times->num_bounds = (size_t)count;
    times->bounds = calloc(times->num_bounds + 1, sizeof *times->bounds);
    times->totals = calloc(rpcs, sizeof *times->totals);
    times->counts = calloc(rpcs * (times->num_bounds + 1), sizeof *times->counts);
    if (!times->bounds || !times->totals || !times->counts) return false;
    for (Py_ssize_t at = 0; at < count; at++) times->bounds[at] = PyFloat_AsDouble(PyTuple_GetItem(bounds, at));
    return !PyErr_Occurred();
}

void times_close(struct times *times) {
    free(times->bounds);
    free(times->totals);
    free(times->counts);
    *times = (struct times){0};
}

void times_observe(struct times *times, unsigned rpc, double seconds) {
    size_t low = 0, high = times->num_bounds;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (times->bounds[middle] < seconds)
            low = middle + 1;
        else
            high = middle;
    }
    times->counts[rpc * (times->num_bounds + 1) + low]++;
    times->totals[rpc] += seconds;
}

static PyObject *counts_of(const struct times *times, unsigned rpc) {
    const uint64_t *counts = times->counts + rpc * (times->num_bounds + 1);
    PyObject *list = PyList_New(0);
    for (size_t at = 0; list && at <= times->num_bounds; at++) {
        PyObject *count = PyLong_FromUnsignedLongLong(counts[at]);
        if (!count || PyList_Append(list, count) < 0) Py_CLEAR(list);
        Py_XDECREF(count);
    }
    return list;
}

PyObject *times_take(struct times *times) {
    PyObject *list = PyList_New(0);
    for (unsigned rpc = 0; list && rpc < times->rpcs; rpc++) {
        PyObject *counts = counts_of(times, rpc);
        PyObject *item = counts ? Py_BuildValue("Nd", counts, times->totals[rpc]) : NULL;
        if (!item || PyList_Append(list, item) < 0) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    if (list && times->rpcs) {
        memset(times->counts, 0, times->rpcs * (times->num_bounds + 1) * sizeof *times->counts);
        memset(times->totals, 0, times->rpcs * sizeof *times->totals);
    }
    return list;
}
