/* What Python cannot say of numbers in shared memory: in which order others see them. */
#include <stdatomic.h>
#include <stdint.h>

uint64_t load_number(const _Atomic uint64_t *at) { return atomic_load_explicit(at, memory_order_acquire); }
void store_number(_Atomic uint64_t *at, uint64_t number) { atomic_store_explicit(at, number, memory_order_release); }
void store_flag(_Atomic uint32_t *at, uint32_t flag) { atomic_store_explicit(at, flag, memory_order_relaxed); }
uint32_t take_flag(_Atomic uint32_t *at) { return atomic_exchange_explicit(at, 0, memory_order_relaxed); }
void fence(void) { atomic_thread_fence(memory_order_seq_cst); }
