/* What the files of this folder share: Python's stable ABI, and the parts of the module. */
#ifndef BLOCKDEX_NATIVE_H
#define BLOCKDEX_NATIVE_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#endif
