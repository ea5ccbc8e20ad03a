/* Which requests are plainly right: they append to the ends of sequences, in pages that these have to themselves, and
 * select for what they append. Nothing can be said against them, and no page has to be found for them. */
#include "core/core.h"

/* What becomes of a request: it is taken; it is for a later step, or for Python. */
enum verdict { TAKEN, LATER, FOR_PYTHON };

/* Where a request's own words are: another process can still change them. */
struct parts {
    const char *tenant;
    size_t tenant_bytes;
    const char *columns, *keys, *queries;
};

static uint64_t aligned_to_8(uint64_t bytes) { return (bytes + 7) / 8 * 8; }

static bool is_of_the_kind(const struct core *core, const struct blockdex_request *request, int64_t now) {
    return request->kind == BLOCKDEX_TOKENS && request->keys_dtype == BLOCKDEX_BF16 &&
           request->queries_dtype == BLOCKDEX_BF16 && request->order == BLOCKDEX_ASCENDING &&
           !(request->flags & ~BLOCKDEX_ROLLBACK) && (!request->epoch || request->epoch == core->epoch) &&
           request->deadline > now && request->layer < core->layers && !line_region_of(request) && request->num_spans &&
           request->num_spans <= core->max_spans &&
           /* One that holds some of the heads shares its read with those that hold the others, in Python's batches. */
           !request->first_head && request->num_heads == core->heads;
}

/* Where in the arena a request's parts are; false where they are not in it. */
static bool find_parts(const struct line *line, const struct blockdex_request *request, struct parts *parts) {
    uint64_t arena = line->request_arena_bytes, offset = request->payload_offset, bytes = request->payload_bytes;
    if (offset % 64 || offset > arena || bytes > arena - offset || request->keys_bytes > bytes ||
        request->queries_bytes > bytes)
        return false;
    uint64_t columns = aligned_to_8(request->tenant_bytes);
    uint64_t keys = blockdex_aligned(columns + 32 * (uint64_t)request->num_spans);
    uint64_t queries = keys + blockdex_aligned(request->keys_bytes);
    if (queries + request->queries_bytes != bytes) return false;
    const char *begin = line->request_arena + offset;
    if (line->tenant_bytes && request->tenant_bytes) return false;
    parts->tenant_bytes = line->tenant_bytes ? line->tenant_bytes : request->tenant_bytes;
    *parts = (struct parts){line->tenant_bytes ? line->tenant : begin, parts->tenant_bytes, begin + columns,
                            begin + keys, begin + queries};
    return true;
}

/* Where a layer of a sequence is marked as named; where it is not, 0 stands there. */
static uint64_t *mark_of(struct gathered *gathered, uint64_t named) {
    size_t at = (size_t)(named * UINT64_C(0x9e3779b97f4a7c15) >> 32);
    for (;; at++) {
        uint64_t *place = &gathered->marks[at % CORE_MARKS];
        if (!*place || *place == named) return place;
    }
}

/* Whether an append needs no page: all that it writes is there, its sequence's alone, and stays in use. */
static bool fits(const struct core *core, uint32_t layer, uint32_t column, int64_t start, int64_t length,
                 uint64_t revision, bool rollback) {
    const struct books *books = &core->books;
    const size_t cell = (size_t)layer * books->columns + column;
    int64_t before = ((const int64_t *)books->lengths.buf)[cell];
    uint64_t known = ((const uint64_t *)books->revisions.buf)[cell];
    int64_t held = ((const int64_t *)books->held.buf)[column];
    int64_t forked = ((const int64_t *)books->forked.buf)[column];
    int64_t size = core->block_size;
    /* The last page may reach further than any sequence. */
    int64_t end = held * size < core->max_tokens ? held * size : core->max_tokens;
    if (start < 0 || start > before || length < 1 || length > core->longest || start + length > end) return false;
    /* A layer that reaches fewer pages than before may have been the one that held them. */
    if (before && (start + length - 1) / size < (before - 1) / size) return false;
    /* What would cut the layer without a word is refused. */
    return start / size >= forked && (revision ? revision > known : rollback || start == before);
}

/* The column of a sequence that nothing holds up; -1 otherwise. */
static int64_t free_column(const struct core *core, uint32_t tenant, uint64_t sequence_id) {
    const struct place_of *place = sequence_index_find(&core->places, tenant, sequence_id);
    const struct books *books = &core->books;
    if (!place || ((const uint32_t *)books->generations.buf)[place->column] != place->generation ||
        ((const uint8_t *)books->blocked.buf)[place->column])
        return -1;
    return place->column;
}

/* Adds a request's rows behind those that are there, which it changes nothing of. Each word of the request is read once,
 * and what was checked is what is taken: another process could change it between the two. */
static enum verdict add_rows(struct core *core, const struct blockdex_request *request, const struct parts *parts,
                             uint64_t revisions[CORE_RUNS], uint32_t columns[CORE_RUNS], struct gathered *to) {
    const uint32_t spans = request->num_spans;
    const volatile uint64_t *words = (const volatile uint64_t *)(const void *)parts->columns;
    int64_t tenant = sequence_index_tenant(&core->places, parts->tenant, parts->tenant_bytes);
    if (tenant < 0) return FOR_PYTHON;
    for (uint32_t row = 0; row < spans; row++) {
        uint64_t sequence_id = words[row], revision = words[3 * spans + row];
        int64_t start = (int64_t)words[spans + row], length = (int64_t)words[2 * spans + row];
        int64_t column = free_column(core, (uint32_t)tenant, sequence_id);
        if (column < 0 ||
            !fits(core, request->layer, (uint32_t)column, start, length, revision, request->flags & BLOCKDEX_ROLLBACK))
            return FOR_PYTHON;
        uint32_t at = to->runs + row;
        to->layers[at] = (int32_t)request->layer;
        to->starts[at] = (int32_t)start;
        to->lengths[at] = (int32_t)length;
        to->rows[at] = ((const int32_t *)core->books.first_rows.buf)[column];
        columns[row] = (uint32_t)column;
        revisions[row] = revision;
    }
    return TAKEN;
}

/* Whether a step that holds a request too, whose rows are there behind the others, can be run. */
static enum verdict fits_in_step(const struct core *core, const struct blockdex_request *request, uint32_t tokens,
                                 uint32_t longest, int64_t end, uint64_t most_answered) {
    const struct gathered *to = &core->gathered;
    /* Keys and queries are as many as the tokens; an answer for which there is never room is Python's to refuse. */
    if (4 * (uint64_t)tokens * core->heads * core->topk > most_answered ||
        request->keys_bytes + request->queries_bytes > core->max_message_bytes ||
        request->keys_bytes != 2 * (uint64_t)tokens * core->head_dim ||
        request->queries_bytes != request->keys_bytes * request->num_heads)
        return FOR_PYTHON;
    longest = longest > to->longest ? longest : to->longest;
    end = end > to->end ? end : to->end;
    bool runs = to->tokens + tokens <= CORE_TOKENS &&
                (core->run_step || core_replay(core, to->runs + request->num_spans, longest, end));
    return runs ? TAKEN : to->runs ? LATER : FOR_PYTHON;
}

/* Enters in the cache's books what the rows of a request append. */
static void enter(struct core *core, const struct blockdex_request *request, const uint64_t revisions[CORE_RUNS],
                  const uint32_t columns[CORE_RUNS], int64_t now) {
    const struct gathered *to = &core->gathered;
    struct books *books = &core->books;
    for (uint32_t row = 0; row < request->num_spans; row++) {
        size_t cell = (size_t)request->layer * books->columns + columns[row];
        uint32_t at = to->runs + row;
        ((int64_t *)books->lengths.buf)[cell] = (int64_t)to->starts[at] + to->lengths[at];
        if (revisions[row]) ((uint64_t *)books->revisions.buf)[cell] = revisions[row];
        ((double *)books->last_calls.buf)[columns[row]] = 1e-9 * (double)now;
    }
}

/* Marks what a request names; where that is named already, undoes it. */
static enum verdict mark_all(struct gathered *to, uint32_t layer, uint32_t spans, const uint32_t columns[CORE_RUNS]) {
    uint64_t *marked[CORE_RUNS];
    for (uint32_t row = 0; row < spans; row++) {
        uint64_t named = ((uint64_t)layer << 32 | columns[row]) + 1;
        marked[row] = mark_of(to, named);
        if (!*marked[row]) {
            *marked[row] = named;
            continue;
        }
        /* The last ones first: whoever was entered before them is found without them. */
        enum verdict verdict = LATER;
        while (row-- > 0) {
            /* Two rows of its own are Python's to refuse. */
            if (*marked[row] == named) verdict = FOR_PYTHON;
            *marked[row] = 0;
        }
        return verdict;
    }
    return TAKEN;
}

static enum verdict consider(struct core *core, struct line *line, int64_t now) {
    const struct blockdex_request request = *(const volatile struct blockdex_request *)line_head(line);
    struct gathered *to = &core->gathered;
    struct parts parts;
    uint64_t revisions[CORE_RUNS];
    uint32_t columns[CORE_RUNS], tokens = 0, longest = 0;
    int64_t end = 0;
    if (!is_of_the_kind(core, &request, now) || !find_parts(line, &request, &parts)) return FOR_PYTHON;
    if (request.num_spans > CORE_RUNS - to->runs) return LATER;
    enum verdict verdict = add_rows(core, &request, &parts, revisions, columns, to);
    if (verdict != TAKEN) return verdict;
    for (uint32_t at = to->runs; at < to->runs + request.num_spans; at++) {
        uint32_t length = (uint32_t)to->lengths[at];
        tokens += length;
        longest = length > longest ? length : longest;
        end = to->starts[at] + to->lengths[at] > end ? to->starts[at] + to->lengths[at] : end;
    }
    verdict = fits_in_step(core, &request, tokens, longest, end, line_longest(line));
    if (verdict == TAKEN) verdict = mark_all(to, request.layer, request.num_spans, columns);
    if (verdict != TAKEN) return verdict;
    enter(core, &request, revisions, columns, now);
    to->keys[to->num_asked] = parts.keys;
    to->queries[to->num_asked] = parts.queries;
    to->asked[to->num_asked++] =
        (struct asked){line, request.ticket, tokens, request.received < now ? request.received : now};
    to->runs += request.num_spans;
    to->tokens += tokens;
    to->longest = longest > to->longest ? longest : to->longest;
    to->end = end > to->end ? end : to->end;
    return TAKEN;
}

static bool is_looked_at(const struct line *line) { return line_is_heard(line) && !line->waits; }

bool core_anything_came(const struct core *core) {
    for (size_t number = 0; number < core->num_lines; number++)
        if (is_looked_at(core->lines[number]) && line_filled(core->lines[number])) return true;
    return false;
}

void core_gather(struct core *core, int64_t now) {
    struct gathered *to = &core->gathered;
    to->runs = to->tokens = to->longest = to->num_asked = 0;
    to->end = 0;
    if (!core_anything_came(core)) return;
    memset(to->marks, 0, sizeof to->marks);
    for (size_t number = 0; number < core->num_lines; number++) {
        struct line *line = core->lines[(core->turn + number) % core->num_lines];
        if (!is_looked_at(line)) continue;
        int64_t filled = line_filled(line);
        for (line->waits = filled < 0; filled > 0; filled--) {
            enum verdict verdict = consider(core, line, now);
            if (verdict == TAKEN) line_release(line);
            line->waits = verdict == FOR_PYTHON;
            if (verdict != TAKEN) break;
        }
    }
    core->turn = (core->turn + 1) % core->num_lines;
}
