#include "wire.h"

#include "protobuf.h"

/* The last one wins. */
static bool read_number(const struct field *field, uint64_t largest, uint32_t *number) {
    *number = (uint32_t)field->value;
    return field->type == VARINT && field->value <= largest;
}

static bool add_number(struct wire_spans *spans, unsigned column, uint64_t value) {
    uint32_t count = spans->counts[column];
    if (count == spans->most) return false;
    spans->columns[column][count] = value;
    spans->counts[column]++;
    return true;
}

static bool read_varints(struct wire_spans *spans, unsigned column, struct field *field) {
    uint64_t value;
    if (field->type == VARINT) return field->value <= UINT32_MAX && add_number(spans, column, field->value);
    if (field->type != BYTES) return false;
    while (field->inside.at < field->inside.end)
        if (!read_varint(&field->inside, 10, &value) || value > UINT32_MAX || !add_number(spans, column, value))
            return false;
    return true;
}

static bool read_fixed64s(struct wire_spans *spans, unsigned column, struct field *field) {
    uint64_t value;
    if (field->type == FIXED64) return add_number(spans, column, field->value);
    if (field->type != BYTES) return false;
    while (field->inside.at < field->inside.end)
        if (!read_fixed64(&field->inside, &value) || !add_number(spans, column, value)) return false;
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

/* One that names a region has no data, and is not taken. */
static bool read_tensor(struct wire_tensor *tensor, const struct field *message) {
    struct cursor cursor = message->inside;
    struct field field = {0};
    if (message->type != BYTES || tensor->data) return false;
    while (cursor.at < cursor.end) {
        if (!read_field(&cursor, &field)) return false;
        if (field.number == 1 && !read_number(&field, UINT32_MAX, &tensor->dtype)) return false;
        if (field.number == 2) {
            if (field.type != BYTES) return false;
            tensor->data = field.inside.at;
            tensor->bytes = (uint64_t)(field.inside.end - field.inside.at);
        }
        if (field.number == 3) return false;
    }
    return tensor->data != NULL;
}

enum { LAST_FEATURE = 4 };

static bool is_feature(uint64_t value) { return value >= 1 && value <= LAST_FEATURE; }

static bool read_features(struct field *field) {
    uint64_t value;
    if (field->type == VARINT) return is_feature(field->value);
    if (field->type != BYTES) return false;
    while (field->inside.at < field->inside.end)
        if (!read_varint(&field->inside, 10, &value) || !is_feature(value)) return false;
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
        case ORDER: return read_number(field, UINT32_MAX, &request->order);
        case SCORES: return read_number(field, 1, &request->return_scores);
        case WAIT: return read_number(field, 1, &request->wait_for_keys);
        case EPOCH: request->epoch = field->value; return field->type == FIXED64;
        case FEATURES: return read_features(field);
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
