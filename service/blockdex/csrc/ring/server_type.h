/* blockdex._native.ServerLink: a link as Python's engine holds it. */
#ifndef BLOCKDEX_SERVER_TYPE_H
#define BLOCKDEX_SERVER_TYPE_H

#include "native.h"

#include "ring/server.h"

extern PyType_Spec blockdex_line_spec;

/* The link of a Line; NULL with an error set where the object is none. It lives as long as the object. */
struct server_link *server_link_of(PyObject *object);

/* The Line of a link that server_link_of has returned. */
PyObject *server_link_object(struct server_link *link);

#endif
