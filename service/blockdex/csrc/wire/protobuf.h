/* Protobuf's own encoding: numbers, tags, and bytes with their length before them. */
#ifndef BLOCKDEX_PROTOBUF_H
#define BLOCKDEX_PROTOBUF_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };

struct cursor {
    const uint8_t *at, *end;
};

/* One field: `value` of a number, `inside` of bytes. */
struct field {
    uint32_t number, type;
    uint64_t value;
    struct cursor inside;
};

/* A number of at most `most_bytes`, which may be written longer than it needs. */
static inline bool read_varint(struct cursor *cursor, unsigned most_bytes, uint64_t *value) {
    *value = 0;
    for (unsigned count = 0; count < most_bytes && cursor->at < cursor->end; count++) {
        uint64_t byte = *cursor->at++;
        if (count == 9 && byte > 1) return false;
        *value |= (byte & 0x7f) << (7 * count);
        if (byte < 0x80) return true;
    }
    return false;
}

static inline uint64_t little_endian(const uint8_t *bytes) {
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static inline bool read_fixed64(struct cursor *cursor, uint64_t *value) {
    if (cursor->end - cursor->at < 8) return false;
    *value = little_endian(cursor->at);
    cursor->at += 8;
    return true;
}

static inline bool read_bytes(struct cursor *cursor, struct cursor *inside) {
    uint64_t size;
    if (!read_varint(cursor, 5, &size) || size > (uint64_t)(cursor->end - cursor->at)) return false;
    *inside = (struct cursor){cursor->at, cursor->at + size};
    cursor->at += size;
    return true;
}

static inline bool read_field(struct cursor *cursor, struct field *field) {
    uint64_t tag;
    if (!read_varint(cursor, 5, &tag) || tag > UINT32_MAX || tag < 8) return false;
    field->number = (uint32_t)tag >> 3;
    field->type = tag & 7;
    switch (field->type) {
        case VARINT: return read_varint(cursor, 10, &field->value);
        case FIXED64: return read_fixed64(cursor, &field->value);
        case BYTES: return read_bytes(cursor, &field->inside);
        case FIXED32:
            if (cursor->end - cursor->at < 4) return false;
            cursor->at += 4;
            return true;
        default: return false;
    }
}

static inline unsigned varint_size(uint64_t value) {
    unsigned size = 1;
    for (; value >= 0x80; value >>= 7) size++;
    return size;
}

static inline uint8_t *write_varint(uint8_t *to, uint64_t value) {
    for (; value >= 0x80; value >>= 7) *to++ = (uint8_t)(value | 0x80);
    *to++ = (uint8_t)value;
    return to;
}

static inline uint8_t *write_tag(uint8_t *to, unsigned number, unsigned type) {
    return write_varint(to, number << 3 | type);
}

/* A number that is 0 is left out, as protobuf does. Tags are of fields below 16. */
static inline uint64_t number_size(uint64_t value) { return value ? 1 + varint_size(value) : 0; }

static inline uint8_t *write_number(uint8_t *to, unsigned number, uint64_t value) {
    return value ? write_varint(write_tag(to, number, VARINT), value) : to;
}

static inline uint64_t fixed64_size(uint64_t value) { return value ? 9 : 0; }

static inline uint8_t *write_fixed64(uint8_t *to, unsigned number, uint64_t value) {
    if (!value) return to;
    to = write_tag(to, number, FIXED64);
    memcpy(to, &value, sizeof value);
    return to + sizeof value;
}

#endif
