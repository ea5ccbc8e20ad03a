#include "client/client.h"
#include "wire/protobuf.h"
#include "wire/messages.h"

/* Of a StreamRequest: its number, its timeout, and the requests by their kinds from there on. */
enum { NUMBER = 1, TIMEOUT_MS, REQUESTS };

PyObject *blockdex_frame(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count) {
    if (count != 4) return PyErr_Format(PyExc_TypeError, "frame takes 4 arguments");
    uint64_t number = PyLong_AsUnsignedLongLong(arguments[1]);
    unsigned kind = (unsigned)PyLong_AsUnsignedLong(arguments[0]);
    uint64_t timeout_ms = PyLong_AsUnsignedLong(arguments[2]);
    const char *request = PyErr_Occurred() ? NULL : PyBytes_AsString(arguments[3]);
    if (!request) return NULL;
    if (kind >= NUM_KINDS) return PyErr_Format(PyExc_ValueError, "kind: there is none of number %u", kind);
    uint64_t bytes = (uint64_t)PyBytes_Size(arguments[3]);
    uint64_t head = fixed64_size(number) + number_size(timeout_ms) + 1 + varint_size(bytes);
    PyObject *frame = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(head + bytes));
    if (!frame) return NULL;
    uint8_t *to = write_fixed64((uint8_t *)PyBytes_AsString(frame), NUMBER, number);
    to = write_number(to, TIMEOUT_MS, timeout_ms);
    to = write_varint(write_tag(to, REQUESTS + kind, BYTES), bytes);
    memcpy(to, request, bytes);
    return frame;
}
