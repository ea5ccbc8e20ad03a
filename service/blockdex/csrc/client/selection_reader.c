#include "client/client.h"
#include "wire/messages.h"

enum { FP32 = 3, INT32 = 5 };

PyObject *blockdex_find_response(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count) {
    const uint8_t *body;
    size_t size;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "find_response takes 2 arguments");
    unsigned long kind = PyLong_AsUnsignedLong(arguments[0]);
    const char *frame = PyErr_Occurred() ? NULL : PyBytes_AsString(arguments[1]);
    if (!frame) return NULL;
    if (kind >= NUM_KINDS) return PyErr_Format(PyExc_ValueError, "kind: there is none of number %lu", kind);
    if (!wire_find_response((uint32_t)kind, (const uint8_t *)frame, (size_t)PyBytes_Size(arguments[1]), &body, &size))
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize((const char *)body, (Py_ssize_t)size);
}

static bool is_tensor(const struct wire_tensor *tensor, uint32_t dtype, unsigned long long bytes) {
    return tensor->data && tensor->dtype == dtype && tensor->bytes == bytes;
}

static PyObject *copied(const struct wire_tensor *tensor) {
    return PyByteArray_FromStringAndSize((const char *)tensor->data, (Py_ssize_t)tensor->bytes);
}

PyObject *blockdex_read_selection(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count) {
    struct wire_response response = {.streamed = false};
    if (count != 3) return PyErr_Format(PyExc_TypeError, "read_selection takes 3 arguments");
    const char *body = PyBytes_AsString(arguments[0]);
    unsigned long long bytes = body ? PyLong_AsUnsignedLongLong(arguments[1]) : 0;
    int scored = PyErr_Occurred() ? -1 : PyObject_IsTrue(arguments[2]);
    if (scored < 0) return NULL;
    if (!wire_read_response(&response, (const uint8_t *)body, (size_t)PyBytes_Size(arguments[0])) ||
        !is_tensor(&response.block_ids, INT32, bytes) || (scored && !is_tensor(&response.scores, FP32, bytes)))
        Py_RETURN_NONE;
    return Py_BuildValue("NN", copied(&response.block_ids), scored ? copied(&response.scores) : Py_NewRef(Py_None));
}
