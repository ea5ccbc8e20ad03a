#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#include "client.h"

/* A flag that one thread sets and another looks at without pause, for a while.
 *
 * Whoever gives it still holds the interpreter's lock, and lets go of it some microseconds later. Who asks for the lock
 * before that is put to sleep, and has to be woken after all; so the one that spins goes on for a `grace` which follows
 * what it finds: longer where it had to wait for the lock, a little shorter where it had not. */
typedef struct {
    PyObject_HEAD
    atomic_bool given;
    double grace;
} Signal;

static const double LONGEST_GRACE = 50e-6, MORE = 2e-6, LESS = 0.2e-6, NO_WAIT = 2e-6;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static PyObject *signal_give(PyObject *object, PyObject *Py_UNUSED(none)) {
    atomic_store_explicit(&((Signal *)object)->given, true, memory_order_release);
    Py_RETURN_NONE;
}

static PyObject *signal_take_back(PyObject *object, PyObject *Py_UNUSED(none)) {
    atomic_store_explicit(&((Signal *)object)->given, false, memory_order_relaxed);
    Py_RETURN_NONE;
}

static bool is_given(Signal *self) { return atomic_load_explicit(&self->given, memory_order_acquire); }

static void spin_until(double end) {
    while (now() < end) __builtin_ia32_pause();
}

static void follow(Signal *self, bool waited) {
    self->grace += waited ? MORE : -LESS;
    if (self->grace > LONGEST_GRACE) self->grace = LONGEST_GRACE;
    if (self->grace < 0) self->grace = 0;
}

static PyObject *signal_spin(PyObject *object, PyObject *seconds) {
    Signal *self = (Signal *)object;
    double end = PyFloat_AsDouble(seconds) + now(), asked;
    bool given;
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    while (!(given = is_given(self)) && now() < end) __builtin_ia32_pause();
    if (given) spin_until(now() + self->grace);
    asked = now();
    Py_END_ALLOW_THREADS;
    if (given) follow(self, now() - asked > NO_WAIT);
    return PyBool_FromLong(given);
}

static void signal_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"give", signal_give, METH_NOARGS, NULL},
    {"take_back", signal_take_back, METH_NOARGS, NULL},
    {"spin", signal_spin, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {{Py_tp_dealloc, signal_dealloc}, {Py_tp_methods, methods}, {0, NULL}};

PyType_Spec blockdex_signal_spec = {
    .name = "blockdex._native.Signal",
    .basicsize = sizeof(Signal),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};
