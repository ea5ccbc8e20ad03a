/* What the core tells of itself; all but its steps in flight can be read from any thread. */
#include "core/core_type.h"

static unsigned long long read_counter(const counter *from) { return atomic_load_explicit(from, memory_order_relaxed); }

PyObject *core_histogram_of(const struct histogram *histogram, uint32_t num_bounds, double unit) {
    PyObject *counts = PyList_New(num_bounds + 1);
    for (uint32_t bucket = 0; counts && bucket <= num_bounds; bucket++)
        if (PyList_SetItem(counts, bucket, PyLong_FromUnsignedLongLong(read_counter(&histogram->counts[bucket]))) < 0)
            Py_CLEAR(counts);
    return counts ? Py_BuildValue("Nd", counts, (double)read_counter(&histogram->total) / unit) : NULL;
}

static PyObject *stages_of(const struct core *core) {
    PyObject *stages = PyList_New(CORE_PHASES * CORE_STAGES);
    for (int at = 0; stages && at < CORE_PHASES * CORE_STAGES; at++) {
        const struct histogram *histogram = &core->stages[at / CORE_STAGES][at % CORE_STAGES];
        PyObject *made = core_histogram_of(histogram, core->num_seconds_bounds, 1e9);
        if (!made || PyList_SetItem(stages, at, made) < 0) Py_CLEAR(stages);
    }
    return stages;
}

PyObject *core_method_counts(struct core *core, PyObject *unused) {
    (void)unused;
    const uint32_t sizes = core->num_size_bounds;
    return Py_BuildValue(
        "{s:N,s:N,s:N,s:N,s:N,s:N,s:N,s:N,s:K,s:K,s:K,s:d,s:d,s:K,s:K,s:K,s:K}", "calls", core_calls_of(core),
        "outcomes", core_outcomes_of(core), "stages", stages_of(core), "step_requests",
        core_histogram_of(&core->step_requests, sizes, 1), "append_requests",
        core_histogram_of(&core->phase_requests[0], sizes, 1), "decode_requests",
        core_histogram_of(&core->phase_requests[1], sizes, 1), "append_sizes",
        core_histogram_of(&core->phase_tokens[0], sizes, 1), "decode_sizes",
        core_histogram_of(&core->phase_tokens[1], sizes, 1), "append_tokens", read_counter(&core->num_tokens[0]),
        "decode_tokens", read_counter(&core->num_tokens[1]), "steps", read_counter(&core->num_steps), "device_seconds",
        1e-9 * (double)read_counter(&core->device_nanoseconds[1]), "device_busy_seconds",
        1e-9 * (double)read_counter(&core->busy_nanoseconds), "cancelled", read_counter(&core->cancelled), "late",
        read_counter(&core->late), "integrity_checks", read_counter(&core->integrity_checks), "integrity_faults",
        read_counter(&core->integrity_faults));
}

PyObject *core_get_in_flight(struct core *core, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(core->in_flight);
}

PyObject *core_get_launched(struct core *core, void *unused) {
    (void)unused;
    return PyFloat_FromDouble(core->in_flight ? 1e-9 * (double)core->steps[core->first].launched : 0);
}

/* Steps that overlap count once, so whoever is busy beside them adds what it measures with this. */
PyObject *core_get_time_beside(struct core *core, void *unused) {
    (void)unused;
    int64_t now = core->in_flight ? core->busy_since : core_now();
    return PyFloat_FromDouble(1e-9 * ((double)now - (double)read_counter(&core->busy_nanoseconds)));
}

PyObject *core_get_looked(struct core *core, void *unused) {
    (void)unused;
    return PyFloat_FromDouble(1e-9 * (double)core->passed);
}

PyObject *core_get_queued(struct core *core, void *unused) {
    (void)unused;
    uint64_t queued = (uint64_t)core->turns.count + core->backlog.count;
    for (size_t number = 0; number < core->num_links; number++) {
        int64_t filled = core->links[number]->gone ? 0 : server_link_filled(core->links[number]);
        queued += filled > 0 ? (uint64_t)filled : 0;
    }
    return PyLong_FromUnsignedLongLong(queued);
}

PyObject *core_get_unanswered(struct core *core, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(core->max_queued - core->num_free);
}

PyObject *core_get_waiting(struct core *core, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(core->waiting.count);
}

PyObject *core_get_steps(struct core *core, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(read_counter(&core->num_steps));
}

PyObject *core_get_contended(struct core *core, void *unused) {
    (void)unused;
    return PyBool_FromLong(turns_contended(&core->turns, core_now()));
}

PyObject *core_method_weight(struct core *core, PyObject *tenant) {
    unsigned long number = PyLong_AsUnsignedLong(tenant);
    if (PyErr_Occurred()) return NULL;
    if (number >= core->turns.capacity || !core->turns.of[number].requests)
        return PyErr_Format(PyExc_KeyError, "core: no request is tenant %lu's", number);
    return PyFloat_FromDouble(core_weight(core, (uint32_t)number));
}
