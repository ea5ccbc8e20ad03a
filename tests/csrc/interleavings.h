/* Every interleaving of two threads of real C code, in every order in which C11 lets them see each other's stores.
 *
 * Included before all else (`-include`), it puts itself in the place of the atomics, the wake-up sockets and memcpy. Threads
 * are coroutines that stop before every such operation. What a load may return is decided by views, as in the operational
 * models of C11 without load buffering: any store that is not older, in the order of its location, than what the thread
 * must have seen. So it is weaker than x86's store buffers, and as weak as what ARM does here. A store may take any place
 * in its location's order behind what its thread has seen. Plain memory is checked for data races.
 */
#ifndef BLOCKDEX_INTERLEAVINGS_H
#define BLOCKDEX_INTERLEAVINGS_H

#include <poll.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MODEL_CLIENT, MODEL_ENGINE, MODEL_THREADS };

/* Runs both threads in every way there is, after `reset` each time; ends the process with a message where a check fails,
 * where all threads sleep, or where plain memory in [memory, memory + bytes) is raced for. Returns the executions. */
uint64_t model_explore(void (*reset)(void), void (*threads[MODEL_THREADS])(void), void *memory, size_t bytes);

/* Ends the process: the execution at hand has led to something that must not be. */
void model_fail(const char *what);

/* A plain access that no macro below sees. */
void model_access(const void *at, size_t bytes, bool writes);

uint64_t model_load(const volatile void *at, size_t bytes, memory_order order);
void model_store(volatile void *at, size_t bytes, uint64_t value, memory_order order);
uint64_t model_exchange(volatile void *at, size_t bytes, uint64_t value, memory_order order);
void model_fence(memory_order order);
ssize_t model_send(int bell);
ssize_t model_recv(int bell);
int model_poll(struct pollfd *files, nfds_t count);
void *model_memcpy(void *to, const void *from, size_t bytes);
void *model_memset(void *to, int value, size_t bytes);
void *model_malloc(size_t bytes);

#ifndef MODEL_ITSELF
#undef atomic_load_explicit
#undef atomic_store_explicit
#undef atomic_exchange_explicit
#undef atomic_thread_fence
#define atomic_load_explicit(at, order) model_load(at, sizeof *(at), order)
#define atomic_store_explicit(at, value, order) model_store(at, sizeof *(at), value, order)
#define atomic_exchange_explicit(at, value, order) model_exchange(at, sizeof *(at), value, order)
#define atomic_thread_fence(order) model_fence(order)
#define send(bell, bytes, size, flags) model_send(bell)
#define recv(bell, to, size, flags) ((void)(to), model_recv(bell))
#define poll(files, count, milliseconds) ((void)(milliseconds), model_poll(files, count))
#define memcpy model_memcpy
#define memset model_memset
#define malloc model_malloc
#define free(memory) ((void)(memory))
#endif

#endif
