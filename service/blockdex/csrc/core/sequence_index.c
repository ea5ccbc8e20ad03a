#include "core/sequence_index.h"

int64_t sequence_index_find(const struct sequence_index *index, uint32_t tenant, uint64_t sequence_id) {
    const uint32_t *entry = pair_index_find(&index->entries, tenant, sequence_id);
    return entry ? (int64_t)*entry : -1;
}

static PyObject *method_open(struct sequence_index *index, PyObject *arguments) {
    const char *name;
    Py_ssize_t bytes;
    unsigned long long sequence_id;
    unsigned int entry;
    if (!PyArg_ParseTuple(arguments, "s#KI", &name, &bytes, &sequence_id, &entry)) return NULL;
    uint32_t tenant = tenants_use(&index->tenants, name, (size_t)bytes);
    if (!tenant) return PyErr_NoMemory();
    const bool there = sequence_index_find(index, tenant, sequence_id) >= 0;
    if (there || !pair_index_set(&index->entries, tenant, sequence_id, entry)) {
        tenants_release(&index->tenants, tenant);
        return there ? PyErr_Format(PyExc_ValueError, "sequence %llu: open already", sequence_id) : PyErr_NoMemory();
    }
    return PyLong_FromUnsignedLong(tenant);
}

static PyObject *method_close(struct sequence_index *index, PyObject *arguments) {
    unsigned int tenant;
    unsigned long long sequence_id;
    if (!PyArg_ParseTuple(arguments, "IK", &tenant, &sequence_id)) return NULL;
    if (sequence_index_find(index, tenant, sequence_id) < 0)
        return PyErr_Format(PyExc_KeyError, "tenant %u, sequence %llu: not open", tenant, sequence_id);
    pair_index_remove(&index->entries, tenant, sequence_id);
    tenants_release(&index->tenants, tenant);
    Py_RETURN_NONE;
}

static PyObject *method_find(struct sequence_index *index, PyObject *arguments) {
    const char *name;
    Py_ssize_t bytes;
    unsigned long long sequence_id;
    if (!PyArg_ParseTuple(arguments, "s#K", &name, &bytes, &sequence_id)) return NULL;
    uint32_t tenant = tenants_use(&index->tenants, name, (size_t)bytes);
    if (!tenant) return PyErr_NoMemory();
    int64_t entry = sequence_index_find(index, tenant, sequence_id);
    tenants_release(&index->tenants, tenant);
    if (entry < 0) Py_RETURN_NONE;
    return PyLong_FromLongLong(entry);
}

static PyObject *method_tenant(struct sequence_index *index, PyObject *argument) {
    unsigned long number = PyLong_AsUnsignedLong(argument);
    if (PyErr_Occurred()) return NULL;
    if (number >= index->tenants.count || !index->tenants.all[number].name)
        return PyErr_Format(PyExc_KeyError, "tenant %lu: there is none", number);
    return PyUnicode_DecodeASCII(index->tenants.all[number].name, (Py_ssize_t)index->tenants.all[number].bytes,
                                 "replace");
}

static Py_ssize_t count(struct sequence_index *index) { return (Py_ssize_t)index->entries.used; }

static void index_dealloc(struct sequence_index *index) {
    PyTypeObject *type = Py_TYPE((PyObject *)index);
    tenants_close(&index->tenants);
    pair_index_free(&index->entries);
    freefunc deallocate = (freefunc)PyType_GetSlot(type, Py_tp_free);
    deallocate(index);
    Py_DECREF(type);
}

bool sequence_index_is_one(PyObject *object) {
    return PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)index_dealloc;
}

static PyMethodDef methods[] = {
    {"open", (PyCFunction)method_open, METH_VARARGS, "Enters a tenant's sequence and its entry; the tenant's number."},
    {"close", (PyCFunction)method_close, METH_VARARGS, "Takes out a sequence, of a tenant's number."},
    {"find", (PyCFunction)method_find, METH_VARARGS, "The entry of a tenant's sequence; None where it is not open."},
    {"tenant", (PyCFunction)method_tenant, METH_O, "The name of a tenant's number."},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, index_dealloc},
    {Py_tp_methods, methods},
    {Py_sq_length, count},
    {0, NULL},
};

PyType_Spec blockdex_sequence_index_spec = {
    .name = "blockdex._native.SequenceIndex",
    .basicsize = sizeof(struct sequence_index),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};
