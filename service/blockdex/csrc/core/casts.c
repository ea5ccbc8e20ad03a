#include "core/casts.h"

#include "blockdex_ring.h"

#include <string.h>

enum { SIGN = 0x8000, INFINITE = 0x7f80, QUIET = 0x0040 };

size_t dtype_bytes(uint8_t dtype) {
    static const size_t bytes[] = {
        [BLOCKDEX_BF16] = 2, [BLOCKDEX_FP16] = 2, [BLOCKDEX_FP32] = 4, [BLOCKDEX_FP8_E4M3] = 1};
    return dtype < sizeof bytes / sizeof *bytes ? bytes[dtype] : 0;
}

static inline uint16_t to_nearest(uint32_t bits) {
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return (uint16_t)(nan ? (bits >> 16 | QUIET) : rounded >> 16);
}

static inline uint16_t to_odd(uint32_t bits) {
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return (uint16_t)(bits >> 16 | (nan ? QUIET : (bits & 0xffff) != 0));
}

/* float32 bits of a number of `exponent_bits` and `fraction_bits`, which float32 holds exactly; infinities and NaN
 * are not told apart from numbers. Both ways are computed and one is chosen, so that the compiler can do many at
 * once. */
static inline uint32_t widened(uint32_t bits, int exponent_bits, int fraction_bits) {
    const uint32_t sign = bits >> (exponent_bits + fraction_bits) << 31;
    const uint32_t magnitude = bits & ((1u << (exponent_bits + fraction_bits)) - 1);
    const uint32_t fraction = bits & ((1u << fraction_bits) - 1);
    const uint32_t bias = 127 - ((1u << (exponent_bits - 1)) - 1);
    const uint32_t normal = (magnitude << (23 - fraction_bits)) + (bias << 23);
    const union {
        uint32_t bits;
        float number;
    } least = {.bits = (bias + 1 - (uint32_t)fraction_bits) << 23},
      subnormal = {.number = (float)(int32_t)fraction * least.number};
    return sign | (magnitude == fraction ? subnormal.bits : normal);
}

static inline uint32_t widened_fp16(uint16_t bits) {
    const uint32_t special = (uint32_t)(bits & SIGN) << 16 | 0x7f800000 | (uint32_t)(bits & 0x3ff) << 13;
    const uint32_t number = widened(bits, 5, 10);
    return (bits & 0x7c00) == 0x7c00 ? special : number;
}

static inline uint16_t bf16_of_e4m3(uint8_t bits) {
    const uint16_t nan = (uint16_t)((bits & 0x80) << 8 | INFINITE | QUIET),
                   number = (uint16_t)(widened(bits, 4, 3) >> 16);
    return (bits & 0x7f) == 0x7f ? nan : number;
}

enum { LINE = 64, AHEAD = 4096 };

/* Whoever wrote the numbers has them in the cache of another processor, and a loop that asks for one line after another
 * waits for each: a page is asked for at once, while the one before is cast. */
static void fetch(const char *from, size_t bytes) {
    for (size_t at = 0; at < bytes; at += LINE) __builtin_prefetch(from + at);
}

static inline size_t smaller(size_t one, size_t other) { return one < other ? one : other; }

/* A loop for each way, so that the compiler can do many numbers at once. */
#define CAST_ALL(type, cast)                                                                            \
    do                                                                                                  \
        for (size_t page = 0, step = AHEAD / sizeof(type); page < count; page += step) {                \
            const size_t end = smaller(page + step, count);                                             \
            fetch((const char *)((const type *)from + end), sizeof(type) * smaller(step, count - end)); \
            for (size_t at = page; at < end; at++) to[at] = cast(((const type *)from)[at]);             \
        }                                                                                               \
    while (0)
#define NEAREST_OF_FP16(bits) to_nearest(widened_fp16(bits))
#define ODD_OF_FP16(bits) to_odd(widened_fp16(bits))

/* On x86-64 a processor with AVX2 takes twice as many at once, and packs them in one instruction. The C library chooses
 * when the module is loaded, before any sanitizer is ready. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
__attribute__((target_clones("avx2", "default")))
#endif
void cast_to_bf16(uint16_t *to, const void *from, uint8_t dtype, size_t count, bool odd) {
    fetch(from, smaller(dtype_bytes(dtype) * count, AHEAD));
    if (dtype == BLOCKDEX_BF16)
        memcpy(to, from, 2 * count);
    else if (dtype == BLOCKDEX_FP8_E4M3)
        CAST_ALL(uint8_t, bf16_of_e4m3);
    else if (dtype == BLOCKDEX_FP16 && odd)
        CAST_ALL(uint16_t, ODD_OF_FP16);
    else if (dtype == BLOCKDEX_FP16)
        CAST_ALL(uint16_t, NEAREST_OF_FP16);
    else if (odd)
        CAST_ALL(uint32_t, to_odd);
    else
        CAST_ALL(uint32_t, to_nearest);
}
