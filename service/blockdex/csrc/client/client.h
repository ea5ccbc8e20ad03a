/* The client's side: data calls as bytes, and what is in the bytes of their answers. */
#ifndef BLOCKDEX_CLIENT_H
#define BLOCKDEX_CLIENT_H

#include <stdint.h>

#include "native.h"

/* The `Layers` of a sequence, where it is known and has such a layer; else NULL, an error being set or not. */
PyObject *blockdex_layers_of(PyObject *sequences, uint64_t id, Py_ssize_t layer);

/* How long a layer is; below 0 where that is unknown. */
int64_t blockdex_length_of(PyObject *layers, Py_ssize_t layer);

/* What the next write changes: the `Layers`, how long the layer is before it, and the number that it will have. */
PyObject *blockdex_change_of(PyObject *layers, Py_ssize_t layer);

/* Begins a write from `start` that makes a layer so long. */
void blockdex_begin(PyObject *layers, Py_ssize_t layer, int64_t start, int64_t length);

extern PyType_Spec blockdex_baton_spec, blockdex_layers_spec, blockdex_writer_spec;

PyObject *blockdex_find_response(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *blockdex_read_selection(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *blockdex_end_append(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *blockdex_frame(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

#endif
