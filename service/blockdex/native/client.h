/* The client's side: data calls as bytes, and what is in the bytes of their answers. */
#ifndef BLOCKDEX_CLIENT_H
#define BLOCKDEX_CLIENT_H

#include "native.h"

extern PyType_Spec blockdex_layers_spec, blockdex_writer_spec;

PyObject *blockdex_integers(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *blockdex_find_response(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *blockdex_read_selection(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *blockdex_begin_append(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *blockdex_end_append(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *blockdex_frame(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

#endif
