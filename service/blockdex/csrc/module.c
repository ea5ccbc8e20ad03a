/* blockdex._native: the way of a request, without Python in between: from a client's arguments to the wire (client/), from
 * the wire to the ring (wire/, ring/), and from the ring to the device and back (core/). */
#include "client/token_request.h"
#include "core/core.h"
#include "faults.h"
#include "ring/client.h"
#include "ring/connection.h"

static bool add_type(PyObject *module, PyType_Spec *spec) {
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (!type) return false;
    int added = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return added == 0;
}

static int fill(PyObject *module) {
    if (!add_type(module, &blockdex_line_spec) || !add_type(module, &blockdex_core_spec) ||
        !add_type(module, &blockdex_sequence_index_spec) || !add_type(module, &blockdex_connection_spec) ||
        !add_type(module, &token_request_spec) || !add_type(module, &request_maker_spec) || add_link(module) < 0)
        return -1;
    return PyModule_AddIntConstant(module, "SENT", SENT) | PyModule_AddIntConstant(module, "QUEUED", QUEUED) |
           PyModule_AddIntConstant(module, "UNUSUAL", UNUSUAL) |
           PyModule_AddIntConstant(module, "NOTHING_LEFT", NOTHING_LEFT) |
           PyModule_AddIntConstant(module, "MORE_TO_COPY", MORE_TO_COPY) |
           PyModule_AddIntConstant(module, "WAITS_FOR_ROOM", WAITS_FOR_ROOM) |
           PyModule_AddIntConstant(module, "NOTICED", CORE_NOTICED) |
           PyModule_AddIntConstant(module, "FOR_PYTHON", CORE_FOR_PYTHON) |
           PyModule_AddIntConstant(module, "SET_CELLS", CORE_SET_CELLS) |
           PyModule_AddIntConstant(module, "LATE", CORE_LATE) | PyModule_AddIntConstant(module, "BROKEN", CORE_BROKEN) |
           PyModule_AddIntConstant(module, "MAX_RUNS", CORE_RUNS) |
           PyModule_AddIntConstant(module, "MAX_TOKENS", CORE_TOKENS) |
           PyModule_AddIntConstant(module, "STEPS", CORE_STEPS) |
           PyModule_AddIntConstant(module, "SIGNALS", CORE_SIGNALS) |
           PyModule_AddIntConstant(module, "MAX_REGIONS", MAX_REGIONS);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};

static PyObject *set_weight(PyObject *module, PyObject *arguments) {
    const char *tenant;
    Py_ssize_t bytes;
    double weight;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "s#d", &tenant, &bytes, &weight)) return NULL;
    if (!(weight > 0 && weight < 1e6))
        return PyErr_Format(PyExc_ValueError, "tenant '%s': its weight must be above 0 and below a million", tenant);
    if (!tenants_set_weight(tenant, (size_t)bytes, weight)) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *now(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyFloat_FromDouble(1e-9 * (double)core_now());
}

static PyMethodDef functions[] = {
    {"now", now, METH_NOARGS, "`time.monotonic` seconds, as the core reads them."},
    {"arm_faults", faults_arm, METH_VARARGS,
     "Has seams fail: a seed, seconds that the clock leaps, odds of each seam."},
    {"fault_strikes", faults_strike, METH_O, "Whether a seam is to fail now, by its number."},
    {"hold_clock", faults_hold_clock, METH_O, "Has `now` stand still there, in seconds; None: has it go on."},
    {"set_weight", set_weight, METH_VARARGS, "What a tenant weighs in this process, instead of 1."},
    {"read_selection", (PyCFunction)(void (*)(void))read_selection, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "blockdex._native",
    .m_doc = "The compiled parts of the ring, of the core behind it and of the wire before it.",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
