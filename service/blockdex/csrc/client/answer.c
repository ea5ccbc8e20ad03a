/* Block ids and scores out of an answer's bytes. */
#include "client/token_request.h"

enum { FP32 = 3, INT32 = 5 };

static PyObject *copied(const struct wire_tensor *tensor) {
    if (!tensor->present) Py_RETURN_NONE;
    return PyByteArray_FromStringAndSize((const char *)tensor->data, (Py_ssize_t)tensor->bytes);
}

static bool is_of(const struct wire_tensor *tensor, uint32_t dtype) {
    return !tensor->present || tensor->dtype == dtype;
}

PyObject *read_selection(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    (void)module;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "read_selection: 3 arguments, got %zd", count);
    unsigned long kind = PyLong_AsUnsignedLong(arguments[0]);
    int streamed = PyErr_Occurred() ? -1 : PyObject_IsTrue(arguments[1]);
    const char *bytes = streamed < 0 ? NULL : PyBytes_AsString(arguments[2]);
    if (!bytes) return NULL;
    if (kind >= NUM_KINDS) return PyErr_Format(PyExc_ValueError, "kind: there is none of number %lu", kind);
    struct wire_response response = {.kind = (uint32_t)kind, .streamed = streamed};
    if (!wire_response_read(&response, (const uint8_t *)bytes, (size_t)PyBytes_Size(arguments[2])) ||
        !is_of(&response.block_ids, INT32) || !is_of(&response.scores, FP32))
        Py_RETURN_NONE;
    return Py_BuildValue("NN", copied(&response.block_ids), copied(&response.scores));
}
