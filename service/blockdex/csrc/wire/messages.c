#include "wire/messages.h"

#include "wire/protobuf.h"

/* Of a StreamRequest: its last field that is a request. */
enum { LAST_REQUEST = 15 };

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
            case 5:
                good = field.type == FIXED64;
                request->pool_id = field.value;
                break;
            default: break;
        }
        if (!good) return false;
    }
    return true;
}

static bool read_tensor(struct wire_tensor *tensor, const struct field *message) {
    struct cursor cursor = message->inside;
    struct field field = {0};
    if (message->type != BYTES || tensor->present) return false;
    tensor->present = true;
    while (cursor.at < cursor.end) {
        if (!read_field(&cursor, &field)) return false;
        if (field.number == 1 && !read_enum(&field, &tensor->dtype)) return false;
        if (field.number == 2) {
            if (field.type != BYTES) return false;
            tensor->data = field.inside.at;
            tensor->bytes = (uint64_t)(field.inside.end - field.inside.at);
        }
    }
    return true;
}

static bool is_feature(uint64_t value) { return value >= 1 && value <= LAST_FEATURE; }

static bool read_features(struct field *field) {
    uint64_t value;
    if (field->type == VARINT) return is_feature(field->value);
    if (field->type != BYTES) return false;
    while (field->inside.at < field->inside.end)
        if (!read_varint(&field->inside, 10, &value) || !is_feature(value)) return false;
    return true;
}

static bool read_header(struct wire_request *request, const struct field *message) {
    struct cursor cursor = message->inside;
    struct field field = {0};
    if (message->type != BYTES || request->has_header) return false;
    request->has_header = true;
    while (cursor.at < cursor.end) {
        if (!read_field(&cursor, &field)) return false;
        switch (field.number) {
            case 1:
                if (field.type != FIXED64) return false;
                request->epoch = field.value;
                break;
            case 2:
                if (!read_features(&field)) return false;
                break;
            case 3: return false; /* a model by name */
            case 4:
                if (field.type != FIXED64) return false;
                break;
            default: break;
        }
    }
    return true;
}

/* The fields of the requests on tokens, by their numbers, which all three share. */
enum { HEADER = 1, LAYER, SPANS, KEYS, QUERIES, FIRST_HEAD, NUM_HEADS, ORDER, SCORES, WAIT, ROLLBACK, IDS = 15 };

enum {
    APPENDING = 1 << KEYS | 1 << ROLLBACK,
    SELECTING = 1 << QUERIES | 1 << FIRST_HEAD | 1 << NUM_HEADS | 1 << ORDER | 1 << SCORES | 1 << IDS,
};

/* Which of them a kind has besides the first three. */
static const uint32_t FIELDS[NUM_KINDS] = {
    [APPEND_KEYS] = APPENDING, [SELECT_BLOCKS] = SELECTING | 1 << WAIT, [APPEND_AND_SELECT] = APPENDING | SELECTING};

static bool read_part(struct wire_request *request, struct field *field) {
    switch (field->number) {
        case HEADER: return read_header(request, field);
        case LAYER: return read_number(field, UINT32_MAX, &request->layer);
        case SPANS: return read_spans(request, field);
        default: break;
    }
    if (field->number > IDS || !(FIELDS[request->kind] >> field->number & 1)) return true;
    switch (field->number) {
        case KEYS: return read_tensor(&request->keys, field);
        case QUERIES: return read_tensor(&request->queries, field);
        case FIRST_HEAD: return read_number(field, UINT32_MAX, &request->first_head);
        case NUM_HEADS: return read_number(field, UINT32_MAX, &request->num_heads);
        case ORDER: return read_enum(field, &request->order);
        case SCORES: return read_enum(field, &request->scores);
        case WAIT: return read_number(field, 1, &request->wait_for_keys);
        case IDS: return read_enum(field, &request->ids);
        default: return read_number(field, 1, &request->rollback);
    }
}

static bool read_request(struct wire_request *request, struct cursor cursor) {
    struct field field = {0};
    while (cursor.at < cursor.end) {
        if (!read_field(&cursor, &field)) return false;
        if (!read_part(request, &field)) return false;
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
            default:
                /* Any other request, which is protobuf's. */
                if (field.number > 5 && field.number <= LAST_REQUEST) return false;
                break;
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

/* --- A request as bytes --- */

/* What it uses of the features, as numbers below 128. */
static uint32_t features_of(const struct wire_request *request, uint8_t features[LAST_FEATURE]) {
    uint32_t count = 0;
    if (request->first_head || request->num_heads) features[count++] = HEAD_RANGES;
    if (request->spans->counts[REVISIONS]) features[count++] = REVISION_CHECKS;
    if (request->wait_for_keys) features[count++] = WAITING_FOR_KEYS;
    if (request->scores == SCALED_SCORES || (request->order && !request->scores)) features[count++] = SCORES_AND_ORDER;
    if (request->rollback) features[count++] = ROLLBACKS;
    if (request->scores == RAW_SCORES) features[count++] = RAW_SCORE_FORMAT;
    if (request->pool_id || request->ids) features[count++] = POOLS;
    return count;
}

static uint64_t packed_size(uint64_t inside) { return inside ? 1 + varint_size(inside) + inside : 0; }

static uint64_t varints_inside(const struct wire_spans *spans, unsigned column) {
    uint64_t size = 0;
    for (uint32_t at = 0; at < spans->counts[column]; at++) size += varint_size(spans->columns[column][at]);
    return size;
}

static uint64_t fixed64s_inside(const struct wire_spans *spans, unsigned column) {
    return UINT64_C(8) * spans->counts[column];
}

static uint64_t spans_inside(const struct wire_request *request) {
    const struct wire_spans *spans = request->spans;
    return fixed64_size(request->pool_id) + packed_size(fixed64s_inside(spans, SEQUENCE_IDS)) +
           packed_size(varints_inside(spans, STARTS)) + packed_size(varints_inside(spans, LENGTHS)) +
           packed_size(fixed64s_inside(spans, REVISIONS));
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

static uint8_t *write_spans(uint8_t *to, const struct wire_request *request) {
    const struct wire_spans *spans = request->spans;
    to = write_varint(write_tag(to, SPANS, BYTES), spans_inside(request));
    to = write_fixed64s(to, 1, spans, SEQUENCE_IDS);
    to = write_varints(to, 2, spans, STARTS);
    to = write_varints(to, 3, spans, LENGTHS);
    to = write_fixed64s(to, 4, spans, REVISIONS);
    return write_fixed64(to, 5, request->pool_id);
}

static uint64_t header_inside(const struct wire_request *request) {
    uint8_t features[LAST_FEATURE];
    return fixed64_size(request->epoch) + packed_size(features_of(request, features));
}

static uint8_t *write_header(uint8_t *to, const struct wire_request *request) {
    uint8_t features[LAST_FEATURE];
    uint32_t count = features_of(request, features);
    to = write_varint(write_tag(to, HEADER, BYTES), header_inside(request));
    to = write_fixed64(to, 1, request->epoch);
    if (!count) return to;
    to = write_varint(write_tag(to, 2, BYTES), count);
    memcpy(to, features, count);
    return to + count;
}

/* With its tag; a message that says nothing is written all the same, as it is in `write_header` and `write_spans`. */
static uint64_t message_size(uint64_t inside) { return 1 + varint_size(inside) + inside; }

static uint64_t request_inside(const struct wire_request *request) {
    return message_size(header_inside(request)) + number_size(request->layer) + message_size(spans_inside(request)) +
           tensor_size(&request->keys) + tensor_size(&request->queries) + number_size(request->first_head) +
           number_size(request->num_heads) + number_size(request->order) + number_size(request->scores) +
           number_size(request->wait_for_keys) + number_size(request->rollback) + number_size(request->ids);
}

uint64_t wire_request_size(const struct wire_request *request, bool streamed) {
    uint64_t inside = request_inside(request);
    return streamed ? fixed64_size(request->number) + number_size(request->timeout_ms) + message_size(inside) : inside;
}

void wire_request_write(const struct wire_request *request, bool streamed, uint8_t *to) {
    if (streamed) {
        to = write_number(write_fixed64(to, 1, request->number), 2, request->timeout_ms);
        to = write_varint(write_tag(to, 3 + request->kind, BYTES), request_inside(request));
    }
    to = write_number(write_header(to, request), LAYER, request->layer);
    to = write_tensor(write_spans(to, request), KEYS, &request->keys);
    to = write_tensor(to, QUERIES, &request->queries);
    to = write_number(write_number(to, FIRST_HEAD, request->first_head), NUM_HEADS, request->num_heads);
    to = write_number(write_number(to, ORDER, request->order), SCORES, request->scores);
    to = write_number(write_number(to, WAIT, request->wait_for_keys), ROLLBACK, request->rollback);
    write_number(to, IDS, request->ids);
}

/* --- A response --- */

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
        to = write_varint(write_tag(to, 3 + response->kind, BYTES), inside_size(response));
    }
    to = write_fixed64(to, 1, response->epoch);
    to = write_tensor(to, 2, &response->block_ids);
    write_tensor(to, 3, &response->scores);
}

static bool read_response(struct wire_response *response, struct cursor cursor) {
    struct field field = {0};
    while (cursor.at < cursor.end) {
        if (!read_field(&cursor, &field)) return false;
        switch (field.number) {
            case 1:
                if (field.type != FIXED64) return false;
                response->epoch = field.value;
                break;
            case 2:
                if (!read_tensor(&response->block_ids, &field)) return false;
                break;
            case 3:
                if (!read_tensor(&response->scores, &field)) return false;
                break;
            default: break;
        }
    }
    return true;
}

bool wire_response_read(struct wire_response *response, const uint8_t *bytes, size_t size) {
    struct cursor cursor = {bytes, bytes + size};
    struct field field = {0}, body = {0};
    if (!response->streamed) return read_response(response, cursor);
    while (cursor.at < cursor.end) {
        if (!read_field(&cursor, &field)) return false;
        if (field.number == 1) {
            if (field.type != FIXED64) return false;
            response->number = field.value;
        } else {
            /* What else a frame may hold, an error say, is protobuf's. */
            if (field.number != 3 + response->kind || field.type != BYTES || body.number) return false;
            body = field;
        }
    }
    return body.number && read_response(response, body.inside);
}
