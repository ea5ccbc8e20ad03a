#include "core/sequence_index.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { FEWEST_TENANTS = 16 };

/* A free number, linked to the next one; 0 without memory. */
static uint32_t take_number(struct sequence_index *index) {
    if (!index->first_free) {
        uint32_t old = index->num_tenants, more = old ? 2 * old : (uint32_t)FEWEST_TENANTS;
        struct tenant *tenants = realloc(index->tenants, more * sizeof *tenants);
        if (!tenants) return 0;
        memset(tenants + old, 0, (more - old) * sizeof *tenants);
        for (uint32_t number = more - 1; number > 0 && number >= old; number--) {
            tenants[number].next = index->first_free;
            index->first_free = number;
        }
        index->tenants = tenants;
        index->num_tenants = more;
    }
    uint32_t number = index->first_free;
    index->first_free = index->tenants[number].next;
    return number;
}

static void give_number_back(struct sequence_index *index, uint32_t number) {
    index->tenants[number] = (struct tenant){.next = index->first_free};
    index->first_free = number;
}

uint32_t sequence_index_use_tenant(struct sequence_index *index, const char *name, size_t bytes) {
    const uint64_t hash = keyed_hash(name, bytes);
    const uint32_t *found = pair_index_find(&index->by_name, hash, bytes);
    const uint32_t first = found ? *found : 0;
    for (uint32_t number = first; number; number = index->tenants[number].next) {
        struct tenant *tenant = &index->tenants[number];
        if (memcmp(tenant->name, name, bytes)) continue;
        tenant->uses++;
        return number;
    }
    char *copy = malloc(bytes + 1); /* none takes no memory, which malloc may say with NULL */
    uint32_t number = copy ? take_number(index) : 0;
    if (number && pair_index_set(&index->by_name, hash, bytes, number)) {
        memcpy(copy, name, bytes);
        index->tenants[number] = (struct tenant){copy, bytes, 1, first};
        return number;
    }
    if (number) give_number_back(index, number);
    free(copy);
    return 0;
}

void sequence_index_release_tenant(struct sequence_index *index, uint32_t number) {
    struct tenant *tenant = &index->tenants[number];
    assert(tenant->uses > 0);
    if (--tenant->uses) return;
    const uint64_t hash = keyed_hash(tenant->name, tenant->bytes);
    const uint32_t first = *pair_index_find(&index->by_name, hash, tenant->bytes);
    if (first == number) {
        if (tenant->next)
            (void)pair_index_set(&index->by_name, hash, tenant->bytes,
                                 tenant->next); /* it is there: no memory needed */
        else
            pair_index_remove(&index->by_name, hash, tenant->bytes);
    } else {
        uint32_t before = first;
        while (index->tenants[before].next != number) before = index->tenants[before].next;
        index->tenants[before].next = tenant->next;
    }
    free(tenant->name);
    give_number_back(index, number);
}

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
    uint32_t tenant = sequence_index_use_tenant(index, name, (size_t)bytes);
    if (!tenant) return PyErr_NoMemory();
    const uint64_t owner = owner_of(tenant, pool);
    const bool there = find(index, owner, id) >= 0;
    if (there || !pair_index_set(&index->entries, owner, id, entry)) {
        sequence_index_release_tenant(index, tenant);
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
    sequence_index_release_tenant(index, tenant);
    Py_RETURN_NONE;
}

static PyObject *method_find(struct sequence_index *index, PyObject *arguments) {
    const char *name;
    Py_ssize_t bytes;
    unsigned long long id;
    int pool = 0;
    if (!PyArg_ParseTuple(arguments, "s#K|p", &name, &bytes, &id, &pool)) return NULL;
    uint32_t tenant = sequence_index_use_tenant(index, name, (size_t)bytes);
    if (!tenant) return PyErr_NoMemory();
    int64_t entry = find(index, owner_of(tenant, pool), id);
    sequence_index_release_tenant(index, tenant);
    if (entry < 0) Py_RETURN_NONE;
    return PyLong_FromLongLong(entry);
}

static PyObject *method_tenant(struct sequence_index *index, PyObject *argument) {
    unsigned long number = PyLong_AsUnsignedLong(argument);
    if (PyErr_Occurred()) return NULL;
    if (number >= index->num_tenants || !index->tenants[number].name)
        return PyErr_Format(PyExc_KeyError, "tenant %lu: there is none", number);
    return PyUnicode_DecodeASCII(index->tenants[number].name, (Py_ssize_t)index->tenants[number].bytes, "replace");
}

static Py_ssize_t count(struct sequence_index *index) { return (Py_ssize_t)(index->entries.used - index->num_pools); }

static PyObject *num_pools(struct sequence_index *index, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(index->num_pools);
}

static void index_dealloc(struct sequence_index *index) {
    PyTypeObject *type = Py_TYPE((PyObject *)index);
    for (uint32_t number = 0; number < index->num_tenants; number++) free(index->tenants[number].name);
    free(index->tenants);
    pair_index_free(&index->by_name);
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
