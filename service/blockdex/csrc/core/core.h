/* The core: every request from the rings is checked, entered, run on the device and answered here.
 *
 * A request is read off its ring once (request.c), checked against the cache and entered (admit.c), staged into a
 * step of the device (launch.c) and answered (answer.c). Python is asked for what takes a decision: pages, forks,
 * eviction, the life of sequences, prefills. One thread runs all of it; only core_notice and the counters are for
 * others. */
#ifndef BLOCKDEX_CORE_H
#define BLOCKDEX_CORE_H

#include "core/pair_index.h"
#include "core/sequence_index.h"
#include "core/turns.h"
#include "ring/server_type.h"

enum { CORE_RUNS = 256, CORE_TOKENS = 512, CORE_STEPS = 2, CORE_COLUMNS = 5, CORE_ASKED = 1024, CORE_SIGNALS = 16 };
/* Why `run` returns before its time is up, a bit each. */
enum { CORE_NOTICED = 1, CORE_FOR_PYTHON = 2, CORE_LATE = 4, CORE_BROKEN = 8, CORE_SET_CELLS = 16 };
/* Calls of clients on this host: what each is, over a link and over a device channel. */
enum { CORE_RPCS = 11, CORE_CALLS = 2 * CORE_RPCS, CORE_OUTCOMES = 512, CORE_REASON_BYTES = 32 };
enum { CORE_PHASES = 4, CORE_STAGES = 4, CORE_BUCKETS = 32 };
/* The canonical code of what is refused since the server ends. */
enum { UNAVAILABLE = 14 };
/* Flags of a run in a step. */
enum { RUN_APPENDS = 1, RUN_SELECTS = 2, RUN_WANTS_SCORES = 4 };
/* Cells of a row of the page tables. */
enum { TABLE_ROW = 64 };

/* What the cache knows of its sequences, an entry each of S, where the cache itself has it. */
struct sequence_columns {
    Py_buffer lengths, revisions;           /* int64, uint64 [L, S] */
    Py_buffer reading;                      /* int32 [L, S]: prefills that are not done */
    Py_buffer held, forked, last_calls;     /* int64, int64, float64 [S] */
    Py_buffer first_rows, reading_sequence; /* int32 [S] */
    Py_buffer cells, holders;               /* int32 [rows * TABLE_ROW], int32 [pages] */
    Py_buffer free_pages;                   /* int64 [1]: how many there are */
    Py_buffer owners;                       /* uint32 [S]: who has an entry's revisions: a row's pool, else itself */
    Py_buffer num_rows, max_blocks;         /* int32 [S]: of a pool; 0 of whatever is none */
    Py_buffer filled;                       /* int64 [S]: of a row, blocks before its first cell without a page */
    Py_buffer page_numbers;                 /* int32 [pages]: of a pool's page, its number there */
    size_t count;
};

/* What of a request lies in the arena, or in a region of its link. */
enum { KEYS, QUERIES, BLOCK_IDS, SCORES, NUM_SOURCES };

/* Where a request is: in one of the core's lists, or in a step, or with Python. */
enum request_state { HAS_COME, IS_QUEUED, IS_WAITING, WITH_PYTHON, IN_STEP, LARGE };

/* A request that was read off its ring; while it is on its way, its link is not given up. Its tensors stay in its
 * client's memory, which can be written to at any time; all else was copied once. */
struct request {
    struct request *previous, *next; /* in a queue of `turns`, in `backlog` or in `waiting` */
    struct server_link *link;
    struct blockdex_request slot;
    enum request_state state;
    uint32_t queue;                                     /* of `turns` */
    uint32_t number, tenant, num_rows, tokens, longest; /* rows: spans, or sequences to open or to close */
    bool cancelled, has_pages, done_already, holds_back;
    bool keeps_tables; /* of its rows */
    bool signalled;    /* its channel is told of its success when the device comes so far */
    uint8_t phase;
    int64_t end, received, taken, launched, finished;
    char *tensors[NUM_SOURCES];          /* where each begins; NULL: in the answers' arena */
    struct region *regions[NUM_SOURCES]; /* where it lies; NULL: in an arena */
    uint64_t *ids, *revisions;
    int64_t *starts, *lengths;
    uint32_t *entries;
    uint8_t *applies;   /* 0 for a row that was appended before */
    uint64_t *page_ids; /* of cells to set: `ids` are their rows, `starts` first blocks and `lengths` counts */
    uint64_t words[];
};

/* Programs of the device, one for each step, for up to so many runs of up to so many tokens, in so many blocks. */
struct replay {
    uint32_t runs, length, width;
    void *programs[CORE_STEPS];
};

/* A request in a step, and where its tokens begin there. */
struct asked {
    struct request *request;
    uint32_t first_token, first_run;
};

/* Rows of a step that requests of different heads share. */
struct group {
    uint32_t first_run, runs, first_token, tokens, layer, tenant;
    uint64_t heads; /* asked for, a bit each */
};

/* Requests that become one step: a row for each of their runs. `cost`: blocks of keys that it reads; `cost_beside`: what
 * Python is asked for, in the same measure. */
struct gathered {
    double cost, cost_beside;
    uint32_t runs, tokens, longest, num_asked, num_groups;
    int64_t end;
    bool full; /* something did not fit */
    int32_t columns[CORE_COLUMNS][CORE_RUNS];
    uint32_t entries[CORE_RUNS];
    struct asked asked[CORE_ASKED];
    struct group groups[CORE_RUNS];
};

/* One launch, and the memory that it reads and writes. */
struct step {
    Py_buffer host, block_ids, scores;
    uint32_t num_asked, num_runs;
    size_t ids, seen_ids;
    uint32_t seen_run, seen_in_run;
    int64_t taken, launched;
    uint32_t first_tokens[CORE_RUNS + 1];
    uint8_t flags[CORE_RUNS];
    struct asked asked[CORE_ASKED];
    double cost;
    bool alone; /* no other step was on its way when it began */
};

/* Counters have one writer, and readers in other threads. */
typedef _Atomic uint64_t counter;

struct histogram {
    counter counts[CORE_BUCKETS];
    counter total; /* nanoseconds, or pieces */
};

/* How often one call of clients had one outcome; of one that went well code is 0, and there is no reason. */
struct outcome {
    uint32_t call, code;
    char reason[CORE_REASON_BYTES];
    counter count;
};

struct core {
    PyObject_HEAD
    /* What it serves. */
    uint32_t layers, heads, head_dim, topk, init_blocks, local_blocks, block_size, longest, max_spans, max_queued;
    float scale;
    bool odd_keys, odd_queries;
    int64_t max_tokens;
    uint64_t max_message_bytes, epoch;
    int64_t longest_queue; /* nanoseconds for which one request of a tenant may wait before others are refused */
    struct sequence_columns sequences;
    struct sequence_index *index;
    /* What is asked. */
    struct server_link **links;
    size_t num_links, turn;
    struct server_link **gone_links; /* dropped, while requests of theirs are on their way */
    size_t num_gone;
    struct request **requests; /* by number; NULL where there is none */
    uint32_t *free_numbers, num_free;
    struct pair_index tickets;
    struct turns turns; /* what has come, and was not looked at */
    struct list backlog, waiting;
    double spent_seconds, spent_cost; /* by the device in steps of late, and what they cost: blocks of keys read */
    uint32_t *for_python, num_for_python, next_for_python; /* numbers of requests, in order of arrival */
    uint32_t *to_trim, num_to_trim;                        /* entries that may have pages to give back */
    struct pair_index held_back;                           /* what requests name that later ones must not overtake */
    bool changed;                                          /* what was held back may get on now */
    bool appended;                                         /* what waits may get on now */
    bool no_more;
    bool no_memory; /* for an answer: nobody knows any more what was told */
    int64_t next_deadline;
    /* What the step that is gathered, and what Python is to run behind it, do to cells [L, S] and entries [S]:
     * stamps. */
    uint64_t serial, *trimmed_in, *appended_in, *read_in, *large_appended_in, *used_in, *tables_set_in;
    int64_t *set_cells; /* places in the page tables that the device is to be told of */
    size_t num_set_cells, most_set_cells;
    /* Where it runs. */
    PyObject *run_step;
    int (*launch)(void *program, void *stream);
    int (*signal)(void *stream, uint64_t address, uint64_t value, unsigned flags);
    void *stream;
    struct replay *replays;
    size_t num_replays;
    struct step steps[CORE_STEPS];
    uint32_t first, in_flight;
    int driver_error; /* of the first call of the driver that failed, and its name */
    const char *driver_call;
    PyThreadState *without_gil;
    /* How it waits. */
    uint32_t num_channels;
    int64_t rung; /* when a channel's request was there last */
    int64_t hold; /* nanoseconds for which one is held for those of other channels that come with it */
    int nudge;
    _Atomic uint32_t noticed;
    int64_t spin, active, looked, passed;
    struct pollfd *bells;
    struct server_link *broken;
    char broken_by[160];
    /* The cache's columns are looked through when nothing is to be done. */
    bool unchecked; /* something was done since */
    size_t checked_entries, checked_pages;
    int32_t *recounted; /* [pages] */
    counter integrity_checks, integrity_faults;
    /* What is told of it. */
    double seconds_bounds[CORE_BUCKETS], size_bounds[CORE_BUCKETS];
    uint32_t num_seconds_bounds, num_size_bounds;
    struct histogram calls[CORE_CALLS];
    struct outcome outcomes[CORE_OUTCOMES];
    _Atomic uint32_t num_outcomes;
    struct histogram stages[CORE_PHASES][CORE_STAGES], step_requests, phase_requests[2], phase_tokens[2];
    counter num_tokens[2], num_steps, cancelled, late;
    counter device_nanoseconds[2], busy_nanoseconds;
    int64_t busy_since;
    char *scratch;
    size_t scratch_bytes;
    struct gathered gathered;
};

static inline double core_weight(const struct core *core, uint32_t tenant) {
    return core->index->tenants.all[tenant].weight;
}

/* Nanoseconds of CLOCK_MONOTONIC: the time of the core, the cache and the scheduler. */
int64_t core_now(void);
static inline void core_add(counter *to, uint64_t more) {
    atomic_store_explicit(to, atomic_load_explicit(to, memory_order_relaxed) + more, memory_order_relaxed);
}
void core_observe(struct histogram *histogram, const double *bounds, uint32_t num_bounds, double value, double unit);

/* request.c: what is in a slot. */

/* Reads the oldest request off a link's ring into `turns`, and releases its slot. Nothing comes of it where it was a
 * cancellation, it was refused, or the link is broken (`core->broken` then says whose). */
void core_read(struct core *core, struct server_link *link, int64_t now);
void core_forget(struct core *core, struct request *request);

/* sources.c: where the tensors of a token request lie. */

/* Finds the regions that a slot names, and checks that its tensors are inside; false: it was refused. */
bool core_find_sources(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now,
                       struct request *request, uint64_t ids_bytes);

/* Keeps the regions of a request while it is on its way. */
void core_use_regions(struct request *request);
void core_leave_regions(struct core *core, struct request *request);

/* Whether a request is about a pool: about its rows' tokens, or its own life. */
static inline bool core_is_of_pool(const struct blockdex_request *slot) {
    return slot->kind >= BLOCKDEX_CREATE_POOL || (slot->kind == BLOCKDEX_TOKENS && slot->sequence_id);
}

/* How errors call what a row of a request names, and the numbers of that by name, which go behind the message. */
struct row_name {
    char words[64], numbers[64];
};
struct row_name core_name_row(const struct blockdex_request *slot, uint64_t id);

/* Whether scores are asked for. */
static inline bool core_is_scored(const struct blockdex_request *slot) {
    return slot->flags & (BLOCKDEX_RETURN_SCORES | BLOCKDEX_RAW_SCORES);
}

/* Whether a tensor has an address of the device. */
bool core_is_on_device(const struct request *request, int number);

/* admit.c: which requests may take effect now. */

/* Takes what may get on now, from those held back and from the rings, into `gathered` and `for_python`.
 * False: no memory is left. */
bool core_gather(struct core *core, int64_t now);

/* Whether there is anything that core_gather would look at: asked again and again while nothing comes. */
bool core_anything_came(const struct core *core);

/* Answers a request whose caller is gone or whose deadline has passed; false where there is nothing against it. */
bool core_drop_if_gone(struct core *core, struct request *request, int64_t now);

/* Does so for all that are held back or wait. */
void core_drop_gone(struct core *core, int64_t now);

/* pools.c: what rows of pools have instead of lengths. Where one of these is false, the request was refused. */

/* The entry that has an entry's revisions. */
static inline uint32_t core_owner(const struct core *core, uint32_t entry) {
    return ((const uint32_t *)core->sequences.owners.buf)[entry];
}

/* The entry of the pool that a request names; -1 where there is none. */
int64_t core_find_pool(const struct core *core, const struct request *request);

/* Finds the entries of rows. */
bool core_find_rows(struct core *core, struct request *request);

/* Whether the rows are as long as the spans take; and whether each block that is written, or whose keys a query sees,
 * has a page. */
bool core_check_room(struct core *core, struct request *request);
bool core_check_pages(struct core *core, struct request *request);

/* Whether cells may be set so; then sets them, which the device is to be told of. */
bool core_check_tables(struct core *core, struct request *request);
void core_set_tables(struct core *core, const struct request *request);

/* Keeps the tables of a request's rows as they are (1), until it lets go of them (-1). */
void core_keep_tables(const struct core *core, struct request *request, int more);

/* Makes page numbers of all block ids of an answer. */
void core_name_pages(const struct core *core, const struct request *request, int32_t *ids);

/* launch.c */

/* Keeps what a call of the driver came to, if it is the first that failed. */
static inline void core_note_driver(struct core *core, const char *call, int error) {
    if (!error || core->driver_error) return;
    core->driver_error = error;
    core->driver_call = call;
}

/* The smallest programs that hold so much; NULL where there are none. */
const struct replay *core_replay(const struct core *core, uint32_t runs, uint32_t longest, int64_t end);

/* Launches what was gathered, without the GIL. False: the driver refused (`driver_error`), or, with the GIL, Python's own
 * step raised. */
bool core_begin(struct core *core, int64_t now);

/* Answers the steps that have ended; false: no memory is left. */
bool core_land(struct core *core, int64_t now);

/* Stands before each `name=value` of an error's metadata, behind its message. */
#define META "\x1f"

/* answer.c: each ends its request, and forgets it. Where there is no memory for the answer, it says so in
 * `no_memory`, and the request stays. */
void core_answer_selection(struct core *core, struct request *request, const struct step *step, uint32_t first_token);
void core_answer(struct core *core, struct request *request, struct blockdex_answer numbers, const void *payload,
                 uint64_t bytes);
void core_refuse(struct core *core, struct request *request, uint16_t code, const char *reason, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
void core_refuse_slot(struct core *core, struct server_link *link, const struct blockdex_request *slot, int64_t now,
                      uint16_t code, const char *reason, const char *format, ...) __attribute__((format(printf, 7, 8)));
void core_publish(struct core *core);

/* Tells the channel of a request that it has succeeded: at once, or, where its memory is the device's, when that comes so
 * far. */
void core_signal(struct core *core, struct request *request);

/* calls.c: counts what a client on this host was answered; nothing of a frontend, which counts its own calls. A refusal's
 * reason begins its payload. */
void core_count_call(struct core *core, const struct server_link *link, const struct blockdex_request *slot,
                     const struct blockdex_answer *answer, const void *payload, int64_t now);

/* Lists of the above: of each call (counts, seconds), and of each outcome (call, code, reason, count). */
PyObject *core_calls_of(const struct core *core);
PyObject *core_outcomes_of(const struct core *core);

/* integrity.c: checks some of the cache's columns against each other; false once all were, since they last changed. */
bool core_check_integrity(struct core *core);

/* loop.c: serves until there is something for Python, or until then; why it returns, -1 for a failure. */
int core_run(struct core *core, int64_t until);

extern PyType_Spec blockdex_core_spec;

#endif
