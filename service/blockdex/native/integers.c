#include "client.h"

#include <stdbool.h>

static bool fits(PyObject *object, long bits) {
    if (!PyLong_CheckExact(object)) return false;
    unsigned long long number = PyLong_AsUnsignedLongLong(object);
    if (number == (unsigned long long)-1 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return bits == 64 || number >> bits == 0;
}

static bool all_fit(PyObject *list, long bits) {
    Py_ssize_t count = PyList_Size(list);
    for (Py_ssize_t at = 0; at < count; at++)
        if (!fits(PyList_GetItem(list, at), bits)) return false;
    return true;
}

PyObject *blockdex_integers(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count) {
    if (count != 2) return PyErr_Format(PyExc_TypeError, "integers takes 2 arguments");
    PyObject *list = arguments[0];
    long bits = PyLong_AsLong(arguments[1]);
    if (bits != 32 && bits != 64) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "bits: 32 or 64");
    if (!PyList_CheckExact(list) || !all_fit(list, bits)) Py_RETURN_NONE;
    /* A column of its own, whatever the caller does with the list meanwhile. */
    return PyList_GetSlice(list, 0, PyList_Size(list));
}
