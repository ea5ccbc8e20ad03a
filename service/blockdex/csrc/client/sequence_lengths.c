/* What the client knows of one sequence, by layer, and what an append does to it: blockdex/client/ledger.py says what it
 * means, and does the same in Python. */
#include <stdbool.h>
#include <stdint.h>

#include "client/client.h"

enum { LENGTHS, WRITES, IN_FLIGHT, IN_A_ROW, NUM_MEMBERS };
enum { UNKNOWN = -1 };

/* `numbers` has `count` of each member. */
typedef struct {
    PyObject_HEAD
    Py_ssize_t count;
    int64_t *numbers;
} Layers;

static int64_t *member(Layers *self, int which) { return self->numbers + which * self->count; }

static bool fill(int64_t *numbers, PyObject *list) {
    for (Py_ssize_t at = 0; at < PyList_Size(list); at++) {
        numbers[at] = PyLong_AsLongLong(PyList_GetItem(list, at));
        if (numbers[at] == -1 && PyErr_Occurred()) return false;
    }
    return true;
}

static PyObject *layers_new(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(keywords)) {
    PyObject *lengths;
    if (!PyArg_ParseTuple(arguments, "O!:Layers", &PyList_Type, &lengths)) return NULL;
    Layers *self = (Layers *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) return NULL;
    self->count = PyList_Size(lengths);
    self->numbers = PyMem_Calloc((size_t)self->count * NUM_MEMBERS + 1, sizeof(int64_t));
    if (self->numbers && fill(member(self, LENGTHS), lengths)) return (PyObject *)self;
    Py_DECREF(self);
    return PyErr_Occurred() ? NULL : PyErr_NoMemory();
}

static void layers_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    PyMem_Free(((Layers *)object)->numbers);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static bool has(const Layers *self, Py_ssize_t layer) { return layer >= 0 && layer < self->count; }

/* The layer that a method's first argument names; -1 with an error. */
static Py_ssize_t layer_of(const Layers *self, PyObject *argument) {
    Py_ssize_t layer = PyNumber_AsSsize_t(argument, PyExc_IndexError);
    if (has(self, layer)) return layer;
    if (!PyErr_Occurred()) PyErr_Format(PyExc_IndexError, "layer: there is none of number %zd", layer);
    return -1;
}

static void begin(Layers *self, Py_ssize_t layer, int64_t start, int64_t length) {
    int64_t *now = member(self, LENGTHS) + layer, *in_a_row = member(self, IN_A_ROW) + layer;
    bool alone = member(self, IN_FLIGHT)[layer] == 0;
    *in_a_row = start == *now && (alone || *in_a_row);
    *now = alone || *in_a_row ? length : UNKNOWN;
    member(self, WRITES)[layer]++;
    member(self, IN_FLIGHT)[layer]++;
}

static void lose(Layers *self, Py_ssize_t layer) {
    member(self, LENGTHS)[layer] = UNKNOWN;
    member(self, WRITES)[layer]++;
}

static PyObject *layers_length(PyObject *object, PyObject *number) {
    Py_ssize_t layer = layer_of((Layers *)object, number);
    return layer < 0 ? NULL : PyLong_FromLongLong(member((Layers *)object, LENGTHS)[layer]);
}

static PyObject *layers_put(PyObject *object, PyObject *arguments) {
    long long layer, length;
    Layers *self = (Layers *)object;
    if (!PyArg_ParseTuple(arguments, "LL:put", &layer, &length)) return NULL;
    if (!has(self, layer)) return PyErr_Format(PyExc_IndexError, "layer: there is none of number %lld", layer);
    member(self, LENGTHS)[layer] = length;
    Py_RETURN_NONE;
}

static PyObject *layers_begin(PyObject *object, PyObject *arguments) {
    long long layer, start, length;
    Layers *self = (Layers *)object;
    if (!PyArg_ParseTuple(arguments, "LLL:begin", &layer, &start, &length)) return NULL;
    if (!has(self, layer)) return PyErr_Format(PyExc_IndexError, "layer: there is none of number %lld", layer);
    long long before = member(self, LENGTHS)[layer];
    begin(self, layer, start, length);
    return Py_BuildValue("LL", before, (long long)member(self, WRITES)[layer]);
}

static PyObject *layers_end(PyObject *object, PyObject *number) {
    Py_ssize_t layer = layer_of((Layers *)object, number);
    if (layer < 0) return NULL;
    member((Layers *)object, IN_FLIGHT)[layer]--;
    Py_RETURN_NONE;
}

static PyObject *layers_undo(PyObject *object, PyObject *arguments) {
    long long layer, before, number;
    Layers *self = (Layers *)object;
    if (!PyArg_ParseTuple(arguments, "LLL:undo", &layer, &before, &number)) return NULL;
    if (!has(self, layer)) return PyErr_Format(PyExc_IndexError, "layer: there is none of number %lld", layer);
    if (number == member(self, WRITES)[layer]) {
        member(self, LENGTHS)[layer] = before;
        member(self, WRITES)[layer]--;
    } else
        lose(self, layer);
    Py_RETURN_NONE;
}

static PyObject *layers_lose(PyObject *object, PyObject *number) {
    Py_ssize_t layer = layer_of((Layers *)object, number);
    if (layer < 0) return NULL;
    lose((Layers *)object, layer);
    Py_RETURN_NONE;
}

static PyObject *list_of(const int64_t *numbers, Py_ssize_t count) {
    PyObject *list = PyList_New(count);
    for (Py_ssize_t at = 0; list && at < count; at++) PyList_SetItem(list, at, PyLong_FromLongLong(numbers[at]));
    return list;
}

static PyObject *layers_writes(PyObject *object, PyObject *Py_UNUSED(none)) {
    return list_of(member((Layers *)object, WRITES), ((Layers *)object)->count);
}

static PyObject *layers_in_flight(PyObject *object, PyObject *Py_UNUSED(none)) {
    return list_of(member((Layers *)object, IN_FLIGHT), ((Layers *)object)->count);
}

static PyMethodDef methods[] = {
    {"length", layers_length, METH_O, NULL},
    {"put", layers_put, METH_VARARGS, NULL},
    {"begin", layers_begin, METH_VARARGS, NULL},
    {"end", layers_end, METH_O, NULL},
    {"undo", layers_undo, METH_VARARGS, NULL},
    {"lose", layers_lose, METH_O, NULL},
    {"writes", layers_writes, METH_NOARGS, NULL},
    {"in_flight", layers_in_flight, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, layers_new}, {Py_tp_dealloc, layers_dealloc}, {Py_tp_methods, methods}, {0, NULL}};

PyType_Spec blockdex_layers_spec = {
    .name = "blockdex._native.Layers",
    .basicsize = sizeof(Layers),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

/* --- An append --- */

static bool is_layers(PyObject *object) {
    if (PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)layers_dealloc) return true;
    PyErr_Format(PyExc_TypeError, "a Layers is needed, got %R", object);
    return false;
}

PyObject *blockdex_layers_of(PyObject *sequences, uint64_t id, Py_ssize_t layer) {
    PyObject *key = PyLong_FromUnsignedLongLong(id);
    PyObject *found = key ? PyDict_GetItemWithError(sequences, key) : NULL;
    PyObject *layers = found && is_layers(found) && has((Layers *)found, layer) ? Py_NewRef(found) : NULL;
    Py_XDECREF(key);
    return layers;
}

int64_t blockdex_length_of(PyObject *layers, Py_ssize_t layer) { return member((Layers *)layers, LENGTHS)[layer]; }

PyObject *blockdex_change_of(PyObject *layers, Py_ssize_t layer) {
    long long number = member((Layers *)layers, WRITES)[layer] + 1;
    return Py_BuildValue("OLL", layers, (long long)blockdex_length_of(layers, layer), number);
}

void blockdex_begin(PyObject *layers, Py_ssize_t layer, int64_t start, int64_t length) {
    begin((Layers *)layers, layer, start, length);
}

PyObject *blockdex_end_append(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count) {
    if (count != 2) return PyErr_Format(PyExc_TypeError, "end_append takes 2 arguments");
    Py_ssize_t layer = PyNumber_AsSsize_t(arguments[0], PyExc_IndexError), runs = PyList_Size(arguments[1]);
    for (Py_ssize_t at = 0; !PyErr_Occurred() && at < runs; at++) {
        PyObject *layers = PyTuple_GetItem(PyList_GetItem(arguments[1], at), 0);
        if (layers && is_layers(layers) && has((Layers *)layers, layer)) member((Layers *)layers, IN_FLIGHT)[layer]--;
    }
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}
