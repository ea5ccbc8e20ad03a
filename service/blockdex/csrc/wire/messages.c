#include "wire/messages.h"

#include "wire/protobuf.h"

/* The last one wins. */
static bool read_number(const struct field *field, uint64_t largest, uint32_t *number) {
    *number = (uint32_t)field->value;
    return field->type == VARINT && field->value <= largest;
}

/* Protobuf writes a negative number of an enum as one of 64 bits, and reads the lower half of whatever is written. */
static bool read_enum(const struct field *field, uint32_t *number) {
    *number = (uint32_t)field->value;
    return field->type == VARINT;
}

static void add_number(struct wire_spans *spans, unsigned column, uint64_t value) {
    uint32_t count = spans->counts[column]++;
    if (count < spans->most) spans->columns[column][count] = value;
}

static bool read_varints(struct wire_spans *spans, unsigned column, struct field *field) {
    uint64_t value;
    if (field->type == VARINT) {
        add_number(spans, column, field->value);
        return field->value <= UINT32_MAX;
    }
    if (field->type != BYTES) return false;
    while (field->inside.at < field->inside.end) {
        if (!read_varint(&field->inside, 10, &value) || value > UINT32_MAX) return false;
        add_number(spans, column, value);
    }
    return true;
}

static bool read_fixed64s(struct wire_spans *spans, unsigned column, struct field *field) {
    uint64_t value;
    if (field->type == FIXED64) {
        add_number(spans, column, field->value);
        return true;
    }
    if (field->type != BYTES) return false;
    while (field->inside.at < field->inside.end) {
        if (!read_fixed64(&field->inside, &value)) return false;
        add_number(spans, column, value);
    }
    return true;
}

static bool read_spans(struct wire_request *request, const struct field *message) {
    struct wire_spans *spans = request->spans;
    struct cursor cursor = message->inside;
    struct field field = {0};
    if (message->type != BYTES || request->has_spans) return false;
    request->has_spans = true;
    while (cursor.at < cursor.end) {
        if (!read_field(&cursor, &field)) return false;
        bool good = true;
        switch (field.number) {
            case 1: good = read_fixed64s(spans, SEQUENCE_IDS, &field); break;
            case 2: good = read_varints(spans, STARTS, &field); break;
            case 3: good = read_varints(spans, LENGTHS, &field); break;
            case 4: good = read_fixed64s(spans, REVISIONS, &field); break;
            default: break;
        }
        if (!good) return false;
    }
    return true;
}

/* Of data and region, which exclude each other, the last one counts. */
static bool read_tensor(struct wire_tensor *tensor, const struct field *message) {
    struct cursor cursor = message->inside;
    struct field field = {0};
    if (message->type != BYTES || tensor->present) return false;
    tensor->present = true;
    while (cursor.at < cursor.end) {
        if (!read_field(&cursor, &field)) return false;
        if (field.number == 1 && !read_enum(&field, &tensor->dtype)) return false;
        if (field.number != 2 && field.number != 3) continue;
        if (field.type != BYTES) return false;
        tensor->in_region = field.number == 3;
        tensor->data = tensor->in_region ? NULL : field.inside.at;
        tensor->bytes = tensor->in_region ? 0 : (uint64_t)(field.inside.end - field.inside.at);
    }
    return true;
}

/* Of those that the server does not know, the first is kept. */
static void read_feature(struct wire_request *request, uint64_t value) {
    int32_t feature = (int32_t)(uint32_t)value;
    if ((feature >= 1 && feature <= LAST_FEATURE) || request->has_unknown_feature) return;
    request->has_unknown_feature = true;
    request->unknown_feature = feature;
}

static bool read_features(struct wire_request *request, struct field *field) {
    uint64_t value;
    if (field->type == VARINT) {
        read_feature(request, field->value);
        return true;
    }
    if (field->type != BYTES) return false;
    while (field->inside.at < field->inside.end) {
        if (!read_varint(&field->inside, 10, &value)) return false;
        read_feature(request, value);
    }
    return true;
}

enum role { UNKNOWN, LAYER, SPANS, KEYS, QUERIES, FIRST_HEAD, NUM_HEADS, ORDER, SCORES, WAIT, EPOCH, FEATURES };
enum { LAST_FIELD = 10 };

/* What the fields of each kind are, by their numbers. */
static const uint8_t ROLES[NUM_KINDS][LAST_FIELD + 1] = {
    [APPEND_KEYS] = {UNKNOWN, LAYER, SPANS, KEYS, EPOCH, FEATURES},
    [SELECT_BLOCKS] = {UNKNOWN, LAYER, SPANS, QUERIES, FIRST_HEAD, NUM_HEADS, ORDER, SCORES, WAIT, EPOCH, FEATURES},
    [APPEND_AND_SELECT] = {UNKNOWN, LAYER, SPANS, KEYS, QUERIES, FIRST_HEAD, NUM_HEADS, ORDER, SCORES, EPOCH, FEATURES},
};

static bool read_role(struct wire_request *request, enum role role, struct field *field) {
    switch (role) {
        case LAYER: return read_number(field, UINT32_MAX, &request->layer);
        case SPANS: return read_spans(request, field);
        case KEYS: return read_tensor(&request->keys, field);
        case QUERIES: return read_tensor(&request->queries, field);
        case FIRST_HEAD: return read_number(field, UINT32_MAX, &request->first_head);
        case NUM_HEADS: return read_number(field, UINT32_MAX, &request->num_heads);
        case ORDER: return read_enum(field, &request->order);
        case SCORES: return read_number(field, 1, &request->return_scores);
        case WAIT: return read_number(field, 1, &request->wait_for_keys);
        case EPOCH: request->epoch = field->value; return field->type == FIXED64;
        case FEATURES: return read_features(request, field);
        default: return true;
    }
}

static bool read_request(struct wire_request *request, struct cursor cursor) {
    struct field field = {0};
    while (cursor.at < cursor.end) {
        if (!read_field(&cursor, &field)) return false;
        uint8_t role = field.number <= LAST_FIELD ? ROLES[request->kind][field.number] : UNKNOWN;
        if (!read_role(request, role, &field)) return false;
    }
    return true;
}

bool wire_read(struct wire_request *request, const uint8_t *bytes, size_t size) {
    return read_request(request, (struct cursor){bytes, bytes + size});
}

bool wire_read_streamed(struct wire_request *request, const uint8_t *bytes, size_t size) {
    struct cursor cursor = {bytes, bytes + size};
    struct field field = {0}, body = {0};
    while (cursor.at < cursor.end) {
        if (!read_field(&cursor, &field)) return false;
        switch (field.number) {
            case 1:
                if (field.type != FIXED64) return false;
                request->number = field.value;
                break;
            case 2:
                if (!read_number(&field, UINT32_MAX, &request->timeout_ms)) return false;
                break;
            case 3:
            case 4:
            case 5:
                if (field.type != BYTES || body.number) return false;
                body = field;
                break;
            case 6: return false; /* a cancellation */
            default: break;
        }
    }
    if (!body.number) return false;
    request->kind = body.number - 3;
    return read_request(request, body.inside);
}

/* Dtype (below 128), then the data, with their tags. */
static uint64_t tensor_inside(const struct wire_tensor *tensor) {
    return 2 + 1 + varint_size(tensor->bytes) + tensor->bytes;
}

static uint64_t tensor_size(const struct wire_tensor *tensor) {
    return tensor->data ? 1 + varint_size(tensor_inside(tensor)) + tensor_inside(tensor) : 0;
}

static uint8_t *write_tensor(uint8_t *to, unsigned number, const struct wire_tensor *tensor) {
    if (!tensor->data) return to;
    to = write_varint(write_tag(to, number, BYTES), tensor_inside(tensor));
    to = write_varint(write_tag(to, 1, VARINT), tensor->dtype);
    to = write_varint(write_tag(to, 2, BYTES), tensor->bytes);
    memcpy(to, tensor->data, tensor->bytes);
    return to + tensor->bytes;
}

static uint64_t inside_size(const struct wire_response *response) {
    return tensor_size(&response->block_ids) + tensor_size(&response->scores) + fixed64_size(response->epoch);
}

uint64_t wire_size(const struct wire_response *response) {
    uint64_t inside = inside_size(response);
    return response->streamed ? fixed64_size(response->number) + 1 + varint_size(inside) + inside : inside;
}

void wire_write(const struct wire_response *response, uint8_t *to) {
    if (response->streamed) {
        to = write_fixed64(to, 1, response->number);
        to = write_varint(write_tag(to, 2 + response->kind, BYTES), inside_size(response));
    }
    to = write_tensor(to, 1, &response->block_ids);
    to = write_tensor(to, 2, &response->scores);
    write_fixed64(to, response->kind == APPEND_KEYS ? 1 : 3, response->epoch);
}

static uint64_t varints_inside(const struct wire_spans *spans, unsigned column) {
    uint64_t bytes = 0;
    for (uint32_t at = 0; at < spans->counts[column]; at++) bytes += varint_size(spans->columns[column][at]);
    return bytes;
}

static uint64_t fixed64s_inside(const struct wire_spans *spans, unsigned column) {
    return spans->counts[column] * sizeof(uint64_t);
}

/* Of bytes with their tag and length; those of none are left out. */
static uint64_t packed_size(uint64_t inside) { return inside ? 1 + varint_size(inside) + inside : 0; }

static uint64_t spans_inside(const struct wire_spans *spans) {
    return packed_size(fixed64s_inside(spans, SEQUENCE_IDS)) + packed_size(varints_inside(spans, STARTS)) +
           packed_size(varints_inside(spans, LENGTHS)) + packed_size(fixed64s_inside(spans, REVISIONS));
}

static uint8_t *write_varints(uint8_t *to, unsigned number, const struct wire_spans *spans, unsigned column) {
    if (!spans->counts[column]) return to;
    to = write_varint(write_tag(to, number, BYTES), varints_inside(spans, column));
    for (uint32_t at = 0; at < spans->counts[column]; at++) to = write_varint(to, spans->columns[column][at]);
    return to;
}

static uint8_t *write_fixed64s(uint8_t *to, unsigned number, const struct wire_spans *spans, unsigned column) {
    uint64_t bytes = fixed64s_inside(spans, column);
    if (!bytes) return to;
    to = write_varint(write_tag(to, number, BYTES), bytes);
    memcpy(to, spans->columns[column], bytes);
    return to + bytes;
}

static uint8_t *write_spans(uint8_t *to, unsigned number, const struct wire_spans *spans) {
    to = write_varint(write_tag(to, number, BYTES), spans_inside(spans));
    to = write_fixed64s(to, 1, spans, SEQUENCE_IDS);
    to = write_varints(to, 2, spans, STARTS);
    to = write_varints(to, 3, spans, LENGTHS);
    return write_fixed64s(to, 4, spans, REVISIONS);
}

static uint64_t role_size(const struct wire_request *request, enum role role) {
    switch (role) {
        case LAYER: return number_size(request->layer);
        case SPANS: return packed_size(spans_inside(request->spans));
        case KEYS: return tensor_size(&request->keys);
        case QUERIES: return tensor_size(&request->queries);
        case FIRST_HEAD: return number_size(request->first_head);
        case NUM_HEADS: return number_size(request->num_heads);
        case ORDER: return number_size(request->order);
        case SCORES: return number_size(request->return_scores);
        case WAIT: return number_size(request->wait_for_keys);
        case EPOCH: return fixed64_size(request->epoch);
        case FEATURES: return packed_size(request->num_features);
        default: return 0;
    }
}

static uint8_t *write_role(uint8_t *to, unsigned number, const struct wire_request *request, enum role role) {
    switch (role) {
        case LAYER: return write_number(to, number, request->layer);
        case SPANS: return write_spans(to, number, request->spans);
        case KEYS: return write_tensor(to, number, &request->keys);
        case QUERIES: return write_tensor(to, number, &request->queries);
        case FIRST_HEAD: return write_number(to, number, request->first_head);
        case NUM_HEADS: return write_number(to, number, request->num_heads);
        case ORDER: return write_number(to, number, request->order);
        case SCORES: return write_number(to, number, request->return_scores);
        case WAIT: return write_number(to, number, request->wait_for_keys);
        case EPOCH: return write_fixed64(to, number, request->epoch);
        case FEATURES:
            if (!request->num_features) return to;
            to = write_varint(write_tag(to, number, BYTES), request->num_features);
            memcpy(to, request->features, request->num_features);
            return to + request->num_features;
        default: return to;
    }
}

uint64_t wire_request_size(const struct wire_request *request) {
    uint64_t size = 0;
    for (unsigned number = 1; number <= LAST_FIELD; number++) size += role_size(request, ROLES[request->kind][number]);
    return size;
}

void wire_write_request(const struct wire_request *request, uint8_t *to) {
    for (unsigned number = 1; number <= LAST_FIELD; number++)
        to = write_role(to, number, request, ROLES[request->kind][number]);
}

bool wire_read_response(struct wire_response *response, const uint8_t *bytes, size_t size) {
    struct cursor cursor = {bytes, bytes + size};
    struct field field = {0};
    while (cursor.at < cursor.end) {
        if (!read_field(&cursor, &field)) return false;
        if (field.number == 1 && !read_tensor(&response->block_ids, &field)) return false;
        if (field.number == 2 && !read_tensor(&response->scores, &field)) return false;
    }
    return true;
}

bool wire_find_response(uint32_t kind, const uint8_t *bytes, size_t size, const uint8_t **body, size_t *body_size) {
    struct cursor cursor = {bytes, bytes + size};
    struct field field = {0};
    *body = NULL;
    while (cursor.at < cursor.end) {
        if (!read_field(&cursor, &field)) return false;
        if (field.number == 1 && field.type == FIXED64) continue;
        if (field.number != 2 + kind || field.type != BYTES || *body) return false;
        *body = field.inside.at;
        *body_size = (size_t)(field.inside.end - field.inside.at);
    }
    return *body != NULL;
}
