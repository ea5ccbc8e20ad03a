/* Seconds of Python as the nanoseconds that clocks and deadlines are counted in. */
#ifndef BLOCKDEX_RING_CLOCK_H
#define BLOCKDEX_RING_CLOCK_H

#include <stdint.h>

/* At most 1e9 seconds, so that sums with a time of the clock do not overflow; 0 where they are negative or NaN. */
static inline int64_t clock_nanoseconds(double seconds) {
    if (!(seconds > 0)) return 0;
    return (int64_t)(1e9 * (seconds < 1e9 ? seconds : 1e9));
}

#endif
