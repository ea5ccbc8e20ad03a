#define MODEL_ITSELF
#include "interleavings.h"

#include <setjmp.h>
#include <stdio.h>
#include <ucontext.h>

enum {
    LOCATIONS = 12,
    STORES = 32,
    CHOICES = 512,
    GRANULE = 64,
    GRANULES = 256,
    BELLS = 16,
    FULL = 11,
    STACK = 1 << 16
};

/* What must have been seen: of each location the place of a store in its order, of each thread how far it was. */
struct view {
    uint8_t seen[LOCATIONS];
    uint16_t clocks[MODEL_THREADS];
};

struct store {
    uint64_t value;
    struct view view; /* what a thread sees that acquires it */
    bool exchanged;   /* the next one in the order took its place at once, and stays behind it */
};

struct location {
    const volatile void *at;
    unsigned count;
    struct store stores[STORES];
};

enum kind { LOAD, STORE, FENCE, BELL, BEGIN };

/* What a thread is about to do: `place` is a location or a bell. */
struct operation {
    enum kind kind;
    uintptr_t place;
};

struct thread {
    struct view current, acquired, released;
    struct operation next;
    bool done, asleep;
    jmp_buf at;
};

struct granule {
    uint16_t written, read[MODEL_THREADS];
    uint8_t writer;
};

static struct thread threads[MODEL_THREADS];
static struct location locations[LOCATIONS];
static unsigned num_locations, running;
static uint8_t sequential[LOCATIONS]; /* what the last sequentially consistent fence had seen */
static struct granule granules[GRANULES];
static unsigned pending[BELLS];
static struct {
    uint16_t taken, of;
} choices[CHOICES];
static unsigned depth, known;
static char *memory, pool[1 << 14];
static size_t memory_bytes, pool_used;
static jmp_buf explorer;
static char stacks[MODEL_THREADS][STACK] __attribute__((aligned(64)));
static ucontext_t contexts[MODEL_THREADS];
static void (*bodies[MODEL_THREADS])(void);
static uint64_t executions;

void model_fail(const char *what) {
    printf("execution %llu: %s\n", (unsigned long long)executions, what);
    exit(1);
}

/* One of so many possibilities: all are tried, one in each execution. */
static unsigned choose(unsigned of) {
    if (of == 1) return 0;
    if (depth == CHOICES) model_fail("too long for the model");
    if (depth == known) {
        choices[known].taken = 0;
        choices[known++].of = (uint16_t)of;
    }
    return choices[depth++].taken;
}

static bool next_execution(void) {
    while (known && choices[known - 1].taken + 1u == choices[known - 1].of) known--;
    if (known) choices[known - 1].taken++;
    return known;
}

static void join(struct view *to, const struct view *from) {
    for (unsigned at = 0; at < LOCATIONS; at++)
        if (from->seen[at] > to->seen[at]) to->seen[at] = from->seen[at];
    for (unsigned at = 0; at < MODEL_THREADS; at++)
        if (from->clocks[at] > to->clocks[at]) to->clocks[at] = from->clocks[at];
}

/* --- Threads --- */

/* Waits until this thread is the one that goes on. */
static void stop_before(struct operation next) {
    struct thread *self = &threads[running];
    self->next = next;
    if (!_setjmp(self->at)) _longjmp(explorer, 1);
    self->current.clocks[running]++;
}

static bool independent(const struct operation *one, const struct operation *other) {
    if (one->kind == FENCE || other->kind == FENCE) return one->kind != other->kind;
    if (one->kind == BEGIN || other->kind == BEGIN) return true;
    if (one->place != other->place) return true;
    return one->kind == LOAD && other->kind == LOAD;
}

static bool may_run(unsigned thread) {
    return !threads[thread].done && (!threads[thread].asleep || pending[threads[thread].next.place]);
}

/* A thread that runs next; MODEL_THREADS where all that could would repeat an execution. `repeats`: threads whose next
 * operation was tried first from a state that is the same but for what cannot matter to it. */
static unsigned pick(bool repeats[MODEL_THREADS]) {
    unsigned candidates[MODEL_THREADS], count = 0;
    for (unsigned thread = 0; thread < MODEL_THREADS; thread++)
        if (may_run(thread) && !repeats[thread]) candidates[count++] = thread;
    if (!count) return MODEL_THREADS;
    unsigned taken = choose(count);
    for (unsigned before = 0; before < taken; before++) repeats[candidates[before]] = true;
    const struct operation *next = &threads[candidates[taken]].next;
    for (unsigned thread = 0; thread < MODEL_THREADS; thread++)
        repeats[thread] &= independent(&threads[thread].next, next);
    return candidates[taken];
}

static void begin(void) {
    unsigned self = running;
    stop_before((struct operation){BEGIN, 0});
    bodies[self]();
    threads[self].done = true;
    _longjmp(explorer, 1);
}

static void start(unsigned thread) {
    running = thread;
    getcontext(&contexts[thread]);
    contexts[thread].uc_stack.ss_sp = stacks[thread];
    contexts[thread].uc_stack.ss_size = STACK;
    makecontext(&contexts[thread], begin, 0);
    if (!_setjmp(explorer)) setcontext(&contexts[thread]);
}

static void execute(void) {
    bool repeats[MODEL_THREADS] = {false};
    for (unsigned thread = 0; thread < MODEL_THREADS; thread++) start(thread);
    for (;;) {
        bool all_done = true, stuck = true;
        for (unsigned thread = 0; thread < MODEL_THREADS; thread++) {
            all_done &= threads[thread].done;
            stuck &= !may_run(thread);
        }
        if (all_done) return;
        if (stuck) model_fail("a side sleeps, and nobody wakes it");
        unsigned thread = pick(repeats);
        if (thread == MODEL_THREADS) return;
        running = thread;
        if (!_setjmp(explorer)) _longjmp(threads[thread].at, 1);
    }
}

uint64_t model_explore(void (*reset)(void), void (*run[MODEL_THREADS])(void), void *plain, size_t bytes) {
    executions = known = 0;
    memory = plain;
    memory_bytes = bytes;
    for (unsigned thread = 0; thread < MODEL_THREADS; thread++) bodies[thread] = run[thread];
    do {
        memset(threads, 0, sizeof threads);
        memset(sequential, 0, sizeof sequential);
        memset(granules, 0, sizeof granules);
        memset(pending, 0, sizeof pending);
        num_locations = depth = 0;
        pool_used = 0;
        reset();
        execute();
        executions++;
    } while (next_execution());
    return executions;
}

/* --- Atomics --- */

static uint64_t value_in(const volatile void *at, size_t bytes) {
    return bytes == 8 ? *(const volatile uint64_t *)at : *(const volatile uint32_t *)at;
}

static unsigned location_of(const volatile void *at, size_t bytes) {
    for (unsigned number = 0; number < num_locations; number++)
        if (locations[number].at == at) return number;
    if (num_locations == LOCATIONS) model_fail("too many locations for the model");
    struct location *new = &locations[num_locations];
    *new = (struct location){.at = at, .count = 1};
    new->stores[0] = (struct store){.value = value_in(at, bytes)};
    return num_locations++;
}

static void move_behind(struct view *view, unsigned location, unsigned place) {
    if (view->seen[location] >= place) view->seen[location]++;
}

/* Makes room in a location's order; whoever has seen what comes later goes on having seen it. */
static struct store *insert(unsigned number, unsigned place) {
    struct location *location = &locations[number];
    if (location->count == STORES) model_fail("too many stores for the model");
    for (unsigned at = location->count++; at > place; at--) location->stores[at] = location->stores[at - 1];
    for (unsigned other = 0; other < num_locations; other++)
        for (unsigned at = 0; at < locations[other].count; at++)
            move_behind(&locations[other].stores[at].view, number, place);
    for (unsigned thread = 0; thread < MODEL_THREADS; thread++) {
        move_behind(&threads[thread].current, number, place);
        move_behind(&threads[thread].acquired, number, place);
        move_behind(&threads[thread].released, number, place);
    }
    if (sequential[number] >= place) sequential[number]++;
    return &location->stores[place];
}

static bool acquires(memory_order order) { return order != memory_order_relaxed && order != memory_order_release; }
static bool releases(memory_order order) { return order != memory_order_relaxed && order != memory_order_acquire; }

static void see(unsigned location, unsigned place, memory_order order) {
    struct thread *self = &threads[running];
    self->current.seen[location] = (uint8_t)place;
    join(&self->acquired, &locations[location].stores[place].view);
    if (acquires(order)) join(&self->current, &locations[location].stores[place].view);
}

/* Writes at a place in the order; `from`: what was read at the same time. */
static void write_at(unsigned location, unsigned place, uint64_t value, memory_order order, const struct store *from) {
    struct thread *self = &threads[running];
    struct store *new = insert(location, place);
    self->current.seen[location] = (uint8_t)place;
    *new = (struct store){.value = value, .view = releases(order) ? self->current : self->released};
    new->view.seen[location] = (uint8_t)place;
    if (from) join(&new->view, &from->view);
}

uint64_t model_load(const volatile void *at, size_t bytes, memory_order order) {
    stop_before((struct operation){LOAD, (uintptr_t)at});
    unsigned number = location_of(at, bytes);
    struct location *location = &locations[number];
    unsigned oldest = threads[running].current.seen[number];
    /* The newest first: what is wrong is then mostly found early. */
    unsigned place = location->count - 1 - choose(location->count - oldest);
    see(number, place, order);
    return location->stores[place].value;
}

void model_store(volatile void *at, size_t bytes, uint64_t value, memory_order order) {
    stop_before((struct operation){STORE, (uintptr_t)at});
    unsigned number = location_of(at, bytes), count = 0, places[STORES];
    const struct location *location = &locations[number];
    for (unsigned place = location->count; place > threads[running].current.seen[number]; place--)
        if (!location->stores[place - 1].exchanged) places[count++] = place;
    write_at(number, places[choose(count)], value, order, NULL);
}

uint64_t model_exchange(volatile void *at, size_t bytes, uint64_t value, memory_order order) {
    stop_before((struct operation){STORE, (uintptr_t)at});
    unsigned number = location_of(at, bytes), count = 0, places[STORES];
    struct location *location = &locations[number];
    for (unsigned place = location->count; place > threads[running].current.seen[number]; place--)
        if (!location->stores[place - 1].exchanged) places[count++] = place - 1;
    unsigned place = places[choose(count)];
    see(number, place, order);
    location->stores[place].exchanged = true;
    const struct store from = location->stores[place];
    write_at(number, place + 1, value, order, &from);
    return from.value;
}

void model_fence(memory_order order) {
    stop_before((struct operation){FENCE, 0});
    struct thread *self = &threads[running];
    if (order != memory_order_seq_cst) model_fail("a fence that the model does not know");
    join(&self->current, &self->acquired);
    for (unsigned at = 0; at < LOCATIONS; at++) {
        if (sequential[at] > self->current.seen[at]) self->current.seen[at] = sequential[at];
        sequential[at] = self->current.seen[at];
    }
    self->released = self->current;
}

/* --- Wake-ups: they order nothing --- */

ssize_t model_send(int bell) {
    stop_before((struct operation){BELL, (uintptr_t)bell});
    if (pending[bell] < FULL) pending[bell]++;
    return 1;
}

ssize_t model_recv(int bell) {
    stop_before((struct operation){BELL, (uintptr_t)bell});
    if (!pending[bell]) return -1;
    pending[bell]--;
    return 1;
}

/* The first file is the bell that is slept on. */
int model_poll(struct pollfd *files, nfds_t count) {
    threads[running].asleep = true;
    stop_before((struct operation){BELL, (uintptr_t)files[0].fd});
    threads[running].asleep = false;
    for (nfds_t at = 0; at < count; at++) files[at].revents = at ? 0 : POLLIN;
    return 1;
}

/* --- Plain memory --- */

static bool is_before(uint16_t clock, unsigned of) { return clock <= threads[running].current.clocks[of]; }

void model_access(const void *at, size_t bytes, bool writes) {
    const char *begin = at;
    if (!bytes || begin < memory || begin >= memory + memory_bytes) return;
    size_t first = (size_t)(begin - memory) / GRANULE, last = (size_t)(begin + bytes - 1 - memory) / GRANULE;
    uint16_t now = threads[running].current.clocks[running];
    if (last >= GRANULES) model_fail("too much memory for the model");
    for (size_t number = first; number <= last; number++) {
        struct granule *granule = &granules[number];
        if (!is_before(granule->written, granule->writer)) model_fail("a data race: written meanwhile");
        if (!writes) {
            granule->read[running] = now;
            continue;
        }
        for (unsigned thread = 0; thread < MODEL_THREADS; thread++)
            if (!is_before(granule->read[thread], thread)) model_fail("a data race: read meanwhile");
        granule->written = now;
        granule->writer = (uint8_t)running;
    }
}

void *model_memcpy(void *to, const void *from, size_t bytes) {
    model_access(from, bytes, false);
    model_access(to, bytes, true);
    return memcpy(to, from, bytes);
}

void *model_memset(void *to, int value, size_t bytes) {
    model_access(to, bytes, true);
    return memset(to, value, bytes);
}

void *model_malloc(size_t bytes) {
    void *taken = pool + pool_used;
    pool_used += (bytes + 15) / 16 * 16;
    if (pool_used > sizeof pool) model_fail("too much memory for the model");
    return taken;
}
