#include "core/sequence_index.h"

/* Sequences and pools of a tenant differ in the upper half. */
static uint64_t owner_of(uint32_t tenant, bool pool) { return (uint64_t)pool << 32 | tenant; }

static int64_t find(const struct sequence_index *index, uint64_t owner, uint64_t id) {
    const uint32_t *entry = pair_index_find(&index->entries, owner, id);
    return entry ? (int64_t)*entry : -1;
}

int64_t sequence_index_find(const struct sequence_index *index, uint32_t tenant, uint64_t sequence_id) {
    return find(index, owner_of(tenant, false), sequence_id);
}

int64_t sequence_index_find_pool(const struct sequence_index *index, uint32_t tenant, uint64_t pool_id) {
    return find(index, owner_of(tenant, true), pool_id);
}

static PyObject *method_open(struct sequence_index *index, PyObject *arguments) {
    const char *name;
    Py_ssize_t bytes;
    unsigned long long id;
    unsigned int entry;
    int pool = 0;
    if (!PyArg_ParseTuple(arguments, "s#KI|p", &name, &bytes, &id, &entry, &pool)) return NULL;
    uint32_t tenant = tenants_use(&index->tenants, name, (size_t)bytes);
    if (!tenant) return PyErr_NoMemory();
    const uint64_t owner = owner_of(tenant, pool);
    const bool there = find(index, owner, id) >= 0;
    if (there || !pair_index_set(&index->entries, owner, id, entry)) {
        tenants_release(&index->tenants, tenant);
        return there ? PyErr_Format(PyExc_ValueError, "%s %llu: open already", pool ? "pool" : "sequence", id)
                     : PyErr_NoMemory();
    }
    index->num_pools += (uint32_t)pool;
    return PyLong_FromUnsignedLong(tenant);
}

static PyObject *method_close(struct sequence_index *index, PyObject *arguments) {
    unsigned int tenant;
    unsigned long long id;
    int pool = 0;
    if (!PyArg_ParseTuple(arguments, "IK|p", &tenant, &id, &pool)) return NULL;
    if (find(index, owner_of(tenant, pool), id) < 0)
        return PyErr_Format(PyExc_KeyError, "tenant %u, %s %llu: not open", tenant, pool ? "pool" : "sequence", id);
    pair_index_remove(&index->entries, owner_of(tenant, pool), id);
    index->num_pools -= (uint32_t)pool;
    tenants_release(&index->tenants, tenant);
    Py_RETURN_NONE;
}

static PyObject *method_find(struct sequence_index *index, PyObject *arguments) {
    const char *name;
    Py_ssize_t bytes;
    unsigned long long id;
    int pool = 0;
    if (!PyArg_ParseTuple(arguments, "s#K|p", &name, &bytes, &id, &pool)) return NULL;
    uint32_t tenant = tenants_use(&index->tenants, name, (size_t)bytes);
    if (!tenant) return PyErr_NoMemory();
    int64_t entry = find(index, owner_of(tenant, pool), id);
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

static Py_ssize_t count(struct sequence_index *index) { return (Py_ssize_t)(index->entries.used - index->num_pools); }

static PyObject *num_pools(struct sequence_index *index, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(index->num_pools);
}

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
    {"open", (PyCFunction)method_open, METH_VARARGS,
     "Enters a tenant's sequence, or pool, and its entry; the tenant's number."},
    {"close", (PyCFunction)method_close, METH_VARARGS, "Takes out a sequence, or a pool, of a tenant's number."},
    {"find", (PyCFunction)method_find, METH_VARARGS,
     "The entry of a tenant's sequence, or pool; None where it is not open."},
    {"tenant", (PyCFunction)method_tenant, METH_O, "The name of a tenant's number."},
    {0},
};

static PyGetSetDef properties[] = {
    {"num_pools", (getter)num_pools, NULL, "Pools that there are.", NULL},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, index_dealloc},
    {Py_tp_getset, properties},
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
