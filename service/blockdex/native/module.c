/* blockdex._native: what a request passes on its short way, without Python in between.
 *
 * The short way takes what is plainly right and asked all the time. Whatever else comes is left, untouched, to the
 * Python beside it, which says what is wrong with it.
 */
#include "link.h"
#include "native.h"

static int fill(PyObject *module) { return add_link(module); }

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "blockdex._native",
    .m_doc = "What a request passes on its short way, without Python in between.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
