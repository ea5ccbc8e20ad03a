#include "core/casts.h"

#include "blockdex_ring.h"

#include <string.h>

enum { SIGN = 0x8000, INFINITE = 0x7f80, QUIET = 0x0040 };

size_t dtype_bytes(uint8_t dtype) {
    static const size_t bytes[] = {
        [BLOCKDEX_BF16] = 2, [BLOCKDEX_FP16] = 2, [BLOCKDEX_FP32] = 4, [BLOCKDEX_FP8_E4M3] = 1};
    return dtype < sizeof bytes / sizeof *bytes ? bytes[dtype] : 0;
}

static uint16_t to_nearest(uint32_t bits) {
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return (uint16_t)(nan ? (bits >> 16 | QUIET) : rounded >> 16);
}

static uint16_t to_odd(uint32_t bits) {
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return (uint16_t)(bits >> 16 | (nan ? QUIET : (bits & 0xffff) != 0));
}

/* float32 bits of a number of `exponent_bits` and `fraction_bits`, which float32 holds exactly. */
static uint32_t widened(uint32_t bits, int exponent_bits, int fraction_bits) {
    const uint32_t sign = bits >> (exponent_bits + fraction_bits) << 31;
    const uint32_t exponent = bits >> fraction_bits & ((1u << exponent_bits) - 1);
    const uint32_t fraction = bits & ((1u << fraction_bits) - 1);
    const uint32_t bias = 127 - ((1u << (exponent_bits - 1)) - 1);
    if (exponent) return sign | (exponent + bias) << 23 | fraction << (23 - fraction_bits);
    float number = (float)fraction / (float)(1u << fraction_bits); /* times the least normal number, below */
    uint32_t wide;
    memcpy(&wide, &number, sizeof wide);
    return fraction ? sign | (wide - ((126u - bias) << 23)) : sign;
}

static uint32_t widened_fp16(uint16_t bits) {
    if ((bits & 0x7c00) == 0x7c00) return (uint32_t)(bits & SIGN) << 16 | 0x7f800000 | (uint32_t)(bits & 0x3ff) << 13;
    return widened(bits, 5, 10);
}

static uint16_t bf16_of_e4m3(uint8_t bits) {
    if ((bits & 0x7f) == 0x7f) return (uint16_t)((bits & 0x80) << 8 | INFINITE | QUIET);
    return (uint16_t)(widened(bits, 4, 3) >> 16);
}

void cast_to_bf16(uint16_t *to, const void *from, uint8_t dtype, size_t count, bool odd) {
    switch (dtype) {
        case BLOCKDEX_BF16: memcpy(to, from, 2 * count); return;
        case BLOCKDEX_FP8_E4M3:
            for (size_t at = 0; at < count; at++) to[at] = bf16_of_e4m3(((const uint8_t *)from)[at]);
            return;
        case BLOCKDEX_FP16:
            for (size_t at = 0; at < count; at++) {
                uint32_t wide = widened_fp16(((const uint16_t *)from)[at]);
                to[at] = odd ? to_odd(wide) : to_nearest(wide);
            }
            return;
        default:
            if (odd)
                for (size_t at = 0; at < count; at++) to[at] = to_odd(((const uint32_t *)from)[at]);
            else
                for (size_t at = 0; at < count; at++) to[at] = to_nearest(((const uint32_t *)from)[at]);
    }
}
