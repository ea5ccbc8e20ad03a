/* blockdex._native.Link: the front door's side of a ring. */
#ifndef BLOCKDEX_LINK_H
#define BLOCKDEX_LINK_H

#include "native.h"

/* Adds the type to the module; -1 with an error set. */
int add_link(PyObject *module);

#endif
