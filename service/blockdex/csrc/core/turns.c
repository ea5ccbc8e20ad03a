#include "core/core.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { FEWEST = 16 };
/* Nanoseconds for which a tenant counts as one that asks: who waits for each answer has some time to think. */
static const int64_t RECENT = 1000000000;

void list_append(struct list *list, struct request *request) {
    request->previous = list->last;
    request->next = NULL;
    *(list->last ? &list->last->next : &list->first) = request;
    list->last = request;
    atomic_fetch_add_explicit(&list->count, 1, memory_order_relaxed);
}

void list_prepend(struct list *list, struct request *request) {
    request->next = list->first;
    request->previous = NULL;
    *(list->first ? &list->first->previous : &list->last) = request;
    list->first = request;
    atomic_fetch_add_explicit(&list->count, 1, memory_order_relaxed);
}

void list_remove(struct list *list, struct request *request) {
    *(request->previous ? &request->previous->next : &list->first) = request->next;
    *(request->next ? &request->next->previous : &list->last) = request->previous;
    request->previous = request->next = NULL;
    uint32_t before = atomic_fetch_sub_explicit(&list->count, 1, memory_order_relaxed);
    assert(before > 0);
    (void)before;
}

/* An array with room for a number more than it had, zeros behind what was there; NULL without memory. */
static void *grown(void *array, uint32_t *capacity, uint32_t number, size_t item) {
    uint32_t more = *capacity ? *capacity : (uint32_t)FEWEST;
    while (more <= number) more *= 2;
    char *larger = realloc(array, more * item);
    if (!larger) return NULL;
    memset(larger + *capacity * item, 0, (more - *capacity) * item);
    *capacity = more;
    return larger;
}

bool turns_reserve(struct turns *turns, uint32_t tenant) {
    if (tenant < turns->capacity) return true;
    struct turn *of = grown(turns->of, &turns->capacity, tenant, sizeof *of);
    if (of) turns->of = of;
    return of;
}

void turns_close(struct turns *turns) {
    free(turns->of);
    free(turns->queues);
    pair_index_free(&turns->by_link);
}

static struct circle *turn_at(struct turns *turns, uint32_t number) { return &turns->of[number].circle; }
static struct circle *queue_at(struct turns *turns, uint32_t number) { return &turns->queues[number].circle; }

/* Puts a number into a circle behind all others, or takes it out. */
static void join(struct turns *turns, struct circle *(*at)(struct turns *, uint32_t), uint32_t *first, uint32_t *count,
                 uint32_t number) {
    if (!(*count)++) *first = number;
    struct circle *own = at(turns, number), *next = at(turns, *first);
    const uint32_t last = *count > 1 ? next->before : number;
    at(turns, last)->after = number;
    next->before = number;
    *own = (struct circle){.before = last, .after = *first};
}

static void leave(struct turns *turns, struct circle *(*at)(struct turns *, uint32_t), uint32_t *first, uint32_t *count,
                  uint32_t number) {
    const struct circle own = *at(turns, number);
    at(turns, own.before)->after = own.after;
    at(turns, own.after)->before = own.before;
    if (*first == number) *first = own.after;
    (*count)--;
}

/* A queue of no request yet; 0 without memory. */
static uint32_t new_queue(struct turns *turns) {
    if (!turns->free_queue) {
        const uint32_t old = turns->num_queues ? turns->num_queues : 1;
        struct queue *queues = grown(turns->queues, &turns->num_queues, turns->num_queues, sizeof *queues);
        if (!queues) return 0;
        turns->queues = queues;
        for (uint32_t number = turns->num_queues - 1; number >= old; number--) {
            queues[number].next_free = turns->free_queue;
            turns->free_queue = number;
        }
    }
    const uint32_t number = turns->free_queue;
    turns->free_queue = turns->queues[number].next_free;
    return number;
}

static void free_queue(struct turns *turns, uint32_t number) {
    turns->queues[number].next_free = turns->free_queue;
    turns->free_queue = number;
}

/* The queue of a request's tenant and link; 0 without memory. */
static uint32_t queue_of(struct turns *turns, const struct request *request, int64_t now) {
    const uint32_t *found = pair_index_find(&turns->by_link, (uintptr_t)request->link, request->tenant);
    if (found) return *found;
    const uint32_t number = new_queue(turns);
    if (!number) return 0;
    if (!pair_index_set(&turns->by_link, (uintptr_t)request->link, request->tenant, number)) {
        free_queue(turns, number);
        return 0;
    }
    struct turn *turn = &turns->of[request->tenant];
    if (!turn->num_queues) {
        turn->left = 0;
        join(turns, turn_at, &turns->first, &turns->tenants, request->tenant);
    }
    join(turns, queue_at, &turn->first_queue, &turn->num_queues, number);
    turns->queues[number].since = now;
    return number;
}

bool turns_append(struct turns *turns, struct request *request, int64_t now) {
    request->queue = queue_of(turns, request, now);
    if (!request->queue) return false;
    list_append(&turns->queues[request->queue].list, request);
    atomic_fetch_add_explicit(&turns->count, 1, memory_order_relaxed);
    return true;
}

void turns_remove(struct turns *turns, struct request *request) {
    struct queue *queue = &turns->queues[request->queue];
    struct turn *turn = &turns->of[request->tenant];
    list_remove(&queue->list, request);
    atomic_fetch_sub_explicit(&turns->count, 1, memory_order_relaxed);
    if (queue->list.first) return;
    pair_index_remove(&turns->by_link, (uintptr_t)request->link, request->tenant);
    leave(turns, queue_at, &turn->first_queue, &turn->num_queues, request->queue);
    free_queue(turns, request->queue);
    if (!turn->num_queues) leave(turns, turn_at, &turns->first, &turns->tenants, request->tenant);
}

struct request *turns_take(struct turns *turns, uint32_t tenant) {
    struct request *request = turns->queues[turns->of[tenant].first_queue].list.first;
    turns_remove(turns, request);
    return request;
}

int64_t turns_waited(const struct turns *turns, const struct request *like, int64_t now) {
    const uint32_t *found = pair_index_find(&turns->by_link, (uintptr_t)like->link, like->tenant);
    if (!found) return 0;
    const struct queue *queue = &turns->queues[*found];
    const int64_t received = queue->list.first->received;
    return now - (received > queue->since ? received : queue->since);
}

void turns_pass(struct turns *turns) {
    struct turn *turn = &turns->of[turns->first];
    turn->first_queue = turns->queues[turn->first_queue].circle.after;
    turns->first = turn->circle.after;
}

void turns_note(struct turns *turns, uint32_t tenant, int64_t now) {
    if (turns->recent[0].tenant != tenant) turns->recent[1] = turns->recent[0];
    turns->recent[0].tenant = tenant;
    turns->recent[0].at = now;
}

bool turns_contended(const struct turns *turns, int64_t now) {
    return turns->recent[1].tenant && now - turns->recent[1].at < RECENT;
}
