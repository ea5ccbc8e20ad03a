/* Tells the core that this thread looks at memory again and again, so that the other thread on it gets on. */
#ifndef BLOCKDEX_CPU_RELAX_H
#define BLOCKDEX_CPU_RELAX_H

static inline void cpu_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield" ::: "memory");
#else
    __asm__ volatile("" ::: "memory");
#endif
}

#endif
