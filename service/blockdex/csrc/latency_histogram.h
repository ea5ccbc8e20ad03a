/* How long answers took: a histogram for each RPC. */
#ifndef BLOCKDEX_TIMES_H
#define BLOCKDEX_TIMES_H

#include "native.h"

#include <stdbool.h>

/* `counts` is [rpcs, num_bounds + 1]: of one RPC's answers `counts[i]` took at most the i-th bound, the last more
 * than any. `totals` is [rpcs], in seconds. All are NULL while nothing is timed. */
struct times {
    unsigned rpcs;
    size_t num_bounds;
    double *bounds, *totals;
    uint64_t *counts;
};

/* Times so many RPCs from now on, by a tuple of rising bounds in seconds; false without memory, or with an error
 * set. */
bool times_open(struct times *times, unsigned rpcs, PyObject *bounds);
void times_close(struct times *times);

void times_observe(struct times *times, unsigned rpc, double seconds);

/* What was timed since the last call: a list of (counts, total) for every RPC, which is empty while nothing is
 * timed. */
PyObject *times_take(struct times *times);

#endif
