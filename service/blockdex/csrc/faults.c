#include "faults.h"

#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

static const char *const NAMES[FAULT_SEAMS] = {"allocation", "launch", "copy", "ring_write", "socket", "clock"};

enum { LONGEST_SECONDS = 1000000000 };

bool faults_armed;
static uint64_t thresholds[FAULT_SEAMS]; /* of 2^64 draws, how many fail */
static _Atomic uint64_t drawn;
static _Atomic int64_t held_at;
static _Atomic bool held;
static int64_t leap;

/* The next of a sequence of numbers that a seed begins (splitmix64). */
static uint64_t draw(void) {
    uint64_t word = atomic_fetch_add(&drawn, 0x9e3779b97f4a7c15u) + 0x9e3779b97f4a7c15u;
    word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9u;
    word = (word ^ word >> 27) * 0x94d049bb133111ebu;
    return word ^ word >> 31;
}

bool faults_draw(enum fault_seam seam) {
    if (!thresholds[seam] || draw() >= thresholds[seam]) return false;
    char line[64];
    const int bytes = snprintf(line, sizeof line, "BLOCKDEX_FAULTS: a fault of %s\n", NAMES[seam]);
    (void)!write(STDERR_FILENO, line, (size_t)bytes);
    return true;
}

int64_t faults_time(int64_t now) {
    if (atomic_load(&held)) return atomic_load(&held_at);
    return faults_draw(FAULT_CLOCK) ? now + leap : now;
}

PyObject *faults_arm(PyObject *module, PyObject *arguments) {
    double odds[FAULT_SEAMS], leap_seconds;
    unsigned long long seed;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "Kd(dddddd)", &seed, &leap_seconds, odds, odds + 1, odds + 2, odds + 3, odds + 4,
                          odds + 5))
        return NULL;
    for (int seam = 0; seam < FAULT_SEAMS; seam++)
        if (!(odds[seam] >= 0 && odds[seam] <= 1))
            return PyErr_Format(PyExc_ValueError, "odds: must be 0 to 1, not so those of %s", NAMES[seam]);
    if (!(leap_seconds >= -LONGEST_SECONDS && leap_seconds <= LONGEST_SECONDS))
        return PyErr_Format(PyExc_ValueError, "leap_seconds: at most %d either way", LONGEST_SECONDS);
    for (int seam = 0; seam < FAULT_SEAMS; seam++) thresholds[seam] = (uint64_t)(odds[seam] * 0x1p63) << 1;
    atomic_store(&drawn, seed);
    leap = (int64_t)(leap_seconds * 1e9);
    faults_armed = true;
    Py_RETURN_NONE;
}

PyObject *faults_strike(PyObject *module, PyObject *seam) {
    const long number = PyLong_AsLong(seam);
    (void)module;
    if (number == -1 && PyErr_Occurred()) return NULL;
    if (number < 0 || number >= FAULT_SEAMS) return PyErr_Format(PyExc_ValueError, "faults: seam %ld is none", number);
    return PyBool_FromLong(fault_strikes((enum fault_seam)number));
}

PyObject *faults_hold_clock(PyObject *module, PyObject *seconds) {
    const double at = seconds == Py_None ? 0 : PyFloat_AsDouble(seconds);
    (void)module;
    if (PyErr_Occurred()) return NULL;
    if (!(at >= 0 && at <= LONGEST_SECONDS))
        return PyErr_Format(PyExc_ValueError, "seconds: must be 0 to %d", LONGEST_SECONDS);
    atomic_store(&held_at, (int64_t)(at * 1e9 + 0.5));
    atomic_store(&held, seconds != Py_None);
    faults_armed = true;
    Py_RETURN_NONE;
}
