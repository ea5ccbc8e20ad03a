/* The engine's short way: decodes that go on in place, from the ring to the device and back. */
#ifndef BLOCKDEX_LANE_H
#define BLOCKDEX_LANE_H

#include "ring/server_type.h"
#include "core/sequence_index.h"

enum { CORE_RUNS = 256, CORE_TOKENS = 512, CORE_STEPS = 2, CORE_MARKS = 1024 };
/* Why `run` returns, but for the time's being up. */
enum { CORE_NOTICED = 1, CORE_FOR_PYTHON = 2, CORE_LATE = 4, CORE_ROOM = 8 };
enum { CORE_STAGES = 4, CORE_BUCKETS = 32 };

/* What the cache knows of its sequences, by column of S, where the cache itself has it. */
struct books {
    Py_buffer lengths, revisions;                   /* [L, S] */
    Py_buffer held, forked, last_calls, first_rows; /* [S] */
    Py_buffer generations, blocked;                 /* [S] */
    size_t columns;
};

/* Programs of the device, one for each step, for up to so many runs of up to so many tokens, in so many blocks. */
struct replay {
    uint32_t runs, length, width;
    void *programs[CORE_STEPS];
};

/* What one request of a step is answered. */
struct asked {
    struct line *line; /* NULL: nobody is there any more, or it is answered already */
    uint64_t ticket;
    uint32_t tokens;
    int64_t received;
};

/* One launch, and the memory that it reads and writes. */
struct step {
    Py_buffer host, block_ids;
    bool in_flight;
    uint32_t num_asked;
    size_t ids, seen_ids;
    int64_t taken, launched;
    struct asked asked[CORE_RUNS];
};

/* Requests that become one step: a row for each of their runs. */
struct gathered {
    uint32_t runs, tokens, longest, num_asked;
    int64_t end;
    int32_t layers[CORE_RUNS], starts[CORE_RUNS], lengths[CORE_RUNS], rows[CORE_RUNS];
    struct asked asked[CORE_RUNS];
    const char *keys[CORE_RUNS], *queries[CORE_RUNS];
    uint64_t marks[CORE_MARKS];
};

struct histogram {
    uint64_t counts[CORE_BUCKETS];
    double total;
};

struct core {
    PyObject_HEAD
    /* What it serves. */
    uint32_t layers, heads, head_dim, topk, block_size, longest, max_spans;
    int64_t max_tokens;
    uint64_t max_message_bytes, epoch;
    struct books books;
    struct sequence_index places;
    /* Who asks. */
    struct line **lines;
    size_t num_lines, turn;
    /* Where it runs. */
    PyObject *run_step;
    int (*launch)(void *program, void *stream);
    void *stream;
    struct replay *replays;
    size_t num_replays;
    struct step steps[CORE_STEPS];
    uint32_t first, in_flight;
    int launch_error;
    PyThreadState *without_gil;
    /* How it waits. */
    int nudge;
    _Atomic uint32_t noticed;
    int64_t spin, active, looked;
    struct pollfd *bells;
    /* What is told of it. */
    double seconds_bounds[CORE_BUCKETS], size_bounds[CORE_BUCKETS];
    uint32_t num_seconds_bounds, num_size_bounds;
    struct histogram stages[CORE_STAGES], requests, tokens;
    uint64_t num_tokens, num_steps;
    double device_seconds, device_busy_seconds;
    int64_t busy_since;
    struct gathered gathered;
};

/* Nanoseconds of CLOCK_MONOTONIC. */
int64_t core_now(void);

/* Takes what is plainly right at the head of every line into `gathered`; what is not has its line wait. */
void core_gather(struct core *core, int64_t now);

/* Whether there is a request that core_gather would look at: asked again and again while nothing comes. */
bool core_anything_came(const struct core *core);

/* The smallest programs that hold so much; NULL where there are none. */
const struct replay *core_replay(const struct core *core, uint32_t runs, uint32_t longest, int64_t end);

/* Begins what was gathered, without the GIL. False: the device takes no step, or, with the GIL, Python's own has failed. */
bool core_begin(struct core *core, int64_t now);

/* Answers the steps that have ended; false: no memory is left. */
bool core_land(struct core *core, int64_t now);

/* Answers what is on its way and not yet answered with an error, and forgets it; false: no memory is left. */
bool core_abandon(struct core *core, uint16_t code, const char *text, size_t bytes, uint16_t reason_bytes);

extern PyType_Spec blockdex_core_spec;

#endif
