#include <stdatomic.h>
#include <stdbool.h>

#include "client/client.h"
#include "cpu_relax.h"
#include "core/core.h"

/* Passes the interpreter's lock from a thread that has put something somewhere to the one that waits for it: neither
 * sleeps, and nobody has to be woken. */
typedef struct {
    PyObject_HEAD
    atomic_bool waits, offered;
} Baton;

/* Whoever waits is there at once, unless it has no core. */
static const int64_t LONGEST_OFFER = 50000;

static PyObject *baton_wait(PyObject *object, PyObject *seconds) {
    Baton *self = (Baton *)object;
    double most = PyFloat_AsDouble(seconds);
    if (PyErr_Occurred()) return NULL;
    int64_t until = core_now() + (int64_t)(1e9 * most);
    atomic_store(&self->waits, true);
    Py_BEGIN_ALLOW_THREADS;
    while (!atomic_load_explicit(&self->offered, memory_order_acquire) && core_now() < until) cpu_relax();
    Py_END_ALLOW_THREADS;
    atomic_store(&self->waits, false);
    return PyBool_FromLong(atomic_exchange(&self->offered, false));
}

static PyObject *baton_pass(PyObject *object, PyObject *Py_UNUSED(none)) {
    Baton *self = (Baton *)object;
    if (!atomic_load(&self->waits)) Py_RETURN_FALSE;
    int64_t until = core_now() + LONGEST_OFFER;
    atomic_store_explicit(&self->offered, true, memory_order_release);
    Py_BEGIN_ALLOW_THREADS;
    while (atomic_load_explicit(&self->waits, memory_order_acquire) && core_now() < until) cpu_relax();
    Py_END_ALLOW_THREADS;
    return PyBool_FromLong(!atomic_load(&self->waits));
}

static void baton_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"wait", baton_wait, METH_O, NULL},
    {"pass_on", baton_pass, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {{Py_tp_dealloc, baton_dealloc}, {Py_tp_methods, methods}, {0, NULL}};

PyType_Spec blockdex_baton_spec = {
    .name = "blockdex._native.Baton",
    .basicsize = sizeof(Baton),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};
