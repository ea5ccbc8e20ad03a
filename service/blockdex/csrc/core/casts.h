/* Elements of tensors as they come, made bfloat16. */
#ifndef BLOCKDEX_CASTS_H
#define BLOCKDEX_CASTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes of an element of a dtype of the ring; 0 for one that there is not. */
size_t dtype_bytes(uint8_t dtype);

/* Casts `count` elements. What lies between two bfloat16 becomes the nearer one, at a tie the even one; or, if
 * `odd`, the one whose last bit is 1, so that rounding it once more, to fewer bits, gives what rounding once would
 * have given. */
void cast_to_bf16(uint16_t *to, const void *from, uint8_t dtype, size_t count, bool odd);

#endif
