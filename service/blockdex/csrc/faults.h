/* Faults made on purpose, and a clock that is told the time, at the seams where a machine fails by itself. A process has
 * them where BLOCKDEX_FAULTS is set (see blockdex.faults); elsewhere each seam is one branch that is never taken. */
#ifndef BLOCKDEX_FAULTS_H
#define BLOCKDEX_FAULTS_H

#include "native.h"

#include <stdbool.h>
#include <stdint.h>

/* As `SEAMS` of blockdex.faults. */
enum fault_seam {
    FAULT_ALLOCATION,
    FAULT_LAUNCH,
    FAULT_COPY,
    FAULT_RING_WRITE,
    FAULT_SOCKET,
    FAULT_CLOCK,
    FAULT_SEAMS
};

extern bool faults_armed;

/* Whether a seam is to fail now; said on the standard error. From any thread. */
bool faults_draw(enum fault_seam seam);
static inline bool fault_strikes(enum fault_seam seam) {
    return __builtin_expect(faults_armed, false) && faults_draw(seam);
}

/* The time that the process is told instead of this one. */
int64_t faults_time(int64_t now);

/* Functions of the module. */
PyObject *faults_arm(PyObject *module, PyObject *arguments);
PyObject *faults_strike(PyObject *module, PyObject *seam);
PyObject *faults_hold_clock(PyObject *module, PyObject *seconds);

#endif
