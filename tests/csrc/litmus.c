/* The little programs by which memory models are told apart, in `interleavings.h`: what C11 allows is seen, what it forbids is
 * not. So a test of the ring that finds nothing has looked at machines that reorder. */
#include <stdio.h>

static struct {
    _Alignas(64) _Atomic uint64_t x, y;
} shared;
static _Alignas(64) char plain[4096];
static memory_order storing, loading;
static bool fences, seen;
static uint64_t left, right;

static void reset(void) { shared.x = shared.y = left = right = 0; }

static void fence(void) {
    if (fences) atomic_thread_fence(memory_order_seq_cst);
}

/* Store buffering: may both loads miss the other's store? */
static void store_x_load_y(void) {
    atomic_store_explicit(&shared.x, 1, storing);
    fence();
    left = 1 + atomic_load_explicit(&shared.y, loading);
    seen |= left == 1 && right == 1;
}

static void store_y_load_x(void) {
    atomic_store_explicit(&shared.y, 1, storing);
    fence();
    right = 1 + atomic_load_explicit(&shared.x, loading);
    seen |= left == 1 && right == 1;
}

/* Message passing: may who sees the second store miss the first? */
static void store_both(void) {
    atomic_store_explicit(&shared.x, 1, memory_order_relaxed);
    fence();
    atomic_store_explicit(&shared.y, 1, storing);
}

static void load_both(void) {
    uint64_t y = atomic_load_explicit(&shared.y, loading);
    fence();
    seen |= y && !atomic_load_explicit(&shared.x, memory_order_relaxed);
}

/* Coherence: may who has seen the newer store see the older one afterwards? */
static void store_twice(void) {
    atomic_store_explicit(&shared.x, 1, storing);
    atomic_store_explicit(&shared.x, 2, storing);
}

static void load_twice(void) {
    uint64_t first = atomic_load_explicit(&shared.x, loading), second = atomic_load_explicit(&shared.x, loading);
    seen |= first > second;
}

/* Exchange: may both get what was there first? */
static void take_left(void) {
    left = 1 + atomic_exchange_explicit(&shared.x, 1, memory_order_relaxed);
    seen |= left == 1 && right == 1;
}

static void take_right(void) {
    right = 1 + atomic_exchange_explicit(&shared.x, 1, memory_order_relaxed);
    seen |= left == 1 && right == 1;
}

static void look(const char *name, bool with_fences, memory_order store, memory_order load, void (*one)(void),
                 void (*other)(void)) {
    void (*threads[MODEL_THREADS])(void) = {one, other};
    fences = with_fences;
    storing = store;
    loading = load;
    seen = false;
    model_explore(reset, threads, plain, sizeof plain);
    printf("%s: %s\n", name, seen ? "seen" : "not seen");
}

int main(void) {
    const memory_order relaxed = memory_order_relaxed, release = memory_order_release, acquire = memory_order_acquire;
    look("store buffering", false, release, acquire, store_x_load_y, store_y_load_x);
    look("store buffering, fences", true, relaxed, relaxed, store_x_load_y, store_y_load_x);
    look("message passing", false, relaxed, relaxed, store_both, load_both);
    look("message passing, release", false, release, relaxed, store_both, load_both);
    look("message passing, acquire", false, relaxed, acquire, store_both, load_both);
    look("message passing, both", false, release, acquire, store_both, load_both);
    look("message passing, fences", true, relaxed, relaxed, store_both, load_both);
    look("coherence", false, relaxed, relaxed, store_twice, load_twice);
    look("exchange", false, relaxed, relaxed, take_left, take_right);
    return 0;
}
