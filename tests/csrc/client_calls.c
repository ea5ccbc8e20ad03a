/* Makes the calls of blockdex_client.h that stdin names, a line each, and prints what they came to, a line each.
 * argv: the socket's path, the tenant, and `regions` where tensors are to lie in one. Lines: `open ID LEASE`, `close ID`, `get ID`, `fork PARENT CHILD LENGTH`,
 * `truncate ID LENGTH`, and `tokens LAYER FLAGS ORDER FIRST_HEAD HEADS KEYS_DTYPE KEYS_BYTES QUERIES_DTYPE
 * QUERIES_BYTES SPANS` with four numbers for each span: id, start, length, revision; behind that line lie the keys and
 * queries. Of pools: `create-pool ID PAGES ROWS BLOCKS`, `set-cells ID ROW FIRST_BLOCK COUNT` and as many page numbers,
 * `close-pool ID`; after `use-pool ID`, which prints nothing, the ids of spans are rows of that pool. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>

#include "blockdex_client.h"

enum { MOST_SPANS = 16, MOST_BYTES = 1 << 16, MOST_IDS = 1 << 12, MOST_LAYERS = 64 };

static const double SECONDS = 10;

static struct blockdex_client client;
static struct blockdex_error error;
static struct blockdex_region region;
static char *shared; /* the region's memory; NULL: none is shared */
static uint64_t used_pool;

/* Where each tensor lies in it. */
enum { KEYS_AT = 64, QUERIES_AT = KEYS_AT + MOST_BYTES, IDS_AT = QUERIES_AT + MOST_BYTES };
enum { SCORES_AT = IDS_AT + 4 * MOST_IDS, REGION_BYTES = SCORES_AT + 4 * MOST_IDS };

static void share_region(void) {
    const int file = memfd_create("region", MFD_ALLOW_SEALING);
    if (blockdex_share_memfd(&client, file, SECONDS, &region, &error) || strcmp(error.reason, "INVALID_REGION"))
        exit(3);
    if (ftruncate(file, REGION_BYTES) || fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK)) exit(2);
    shared = mmap(NULL, REGION_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared == MAP_FAILED || !blockdex_share_memfd(&client, file, SECONDS, &region, &error)) exit(3);
    if (region.bytes != REGION_BYTES) exit(3);
    close(file);
}

/* Has a request read and write the region alone. */
static void move_to_region(struct blockdex_tokens *tokens) {
    memcpy(shared + KEYS_AT, tokens->keys, tokens->keys_bytes);
    memcpy(shared + QUERIES_AT, tokens->queries, tokens->queries_bytes);
    tokens->keys = tokens->queries = NULL;
    if (tokens->keys_bytes) tokens->keys_place = (struct blockdex_place){region.region, KEYS_AT};
    if (tokens->queries_bytes) tokens->queries_place = (struct blockdex_place){region.region, QUERIES_AT};
    if (tokens->queries_bytes) tokens->block_ids_place = (struct blockdex_place){region.region, IDS_AT};
    if (tokens->flags & BLOCKDEX_RETURN_SCORES)
        tokens->scores_place = (struct blockdex_place){region.region, SCORES_AT};
}

static uint64_t number(void) {
    uint64_t read;
    if (scanf("%" SCNu64, &read) != 1) exit(2);
    return read;
}

static void print_error(void) {
    printf("error %u %s %s", error.code, error.reason, error.message);
    for (const char *at = error.message; (at += strlen(at) + 1) < error.message + error.message_bytes;)
        printf("|%s", at);
    puts("");
}

static void print_state(bool answered, const int64_t *lengths, const uint64_t *revisions, uint32_t layers) {
    if (!answered) {
        print_error();
        return;
    }
    printf("state");
    for (uint32_t layer = 0; layer < layers; layer++) printf(" %" PRId64, lengths[layer]);
    for (uint32_t layer = 0; revisions && layer < layers; layer++) printf(" %" PRIu64, revisions[layer]);
    puts("");
}

static void read_bytes(void *to, uint64_t bytes) {
    if (bytes > MOST_BYTES || fread(to, 1, bytes, stdin) != bytes) exit(2);
}

/* A call of one half gets the other one too, which it does not look at. */
static bool call(const struct blockdex_tokens *tokens, int32_t *ids, float *scores) {
    struct blockdex_tokens both = *tokens;
    if (!tokens->keys_dtype) both.keys_dtype = tokens->queries_dtype;
    if (!tokens->queries_dtype) both.queries_dtype = tokens->keys_dtype;
    if (!tokens->queries_dtype) return blockdex_append_keys(&client, &both, SECONDS, &error);
    if (!tokens->keys_dtype) return blockdex_select_blocks(&client, &both, ids, MOST_IDS, scores, SECONDS, &error);
    return blockdex_append_and_select(&client, tokens, ids, MOST_IDS, scores, SECONDS, &error);
}

static void call_tokens(void) {
    static char keys[MOST_BYTES], queries[MOST_BYTES];
    static int32_t ids[MOST_IDS];
    static float scores[MOST_IDS];
    uint64_t sequence_ids[MOST_SPANS], revisions[MOST_SPANS];
    int64_t starts[MOST_SPANS], lengths[MOST_SPANS];
    struct blockdex_tokens tokens = {.sequence_ids = sequence_ids,
                                     .starts = starts,
                                     .lengths = lengths,
                                     .revisions = revisions,
                                     .keys = keys,
                                     .queries = queries};
    tokens.pool_id = used_pool;
    tokens.layer = (uint32_t)number();
    tokens.flags = (uint8_t)number();
    tokens.order = (uint8_t)number();
    tokens.first_head = (uint32_t)number();
    tokens.num_heads = (uint32_t)number();
    tokens.keys_dtype = (uint8_t)number();
    tokens.keys_bytes = number();
    tokens.queries_dtype = (uint8_t)number();
    tokens.queries_bytes = number();
    tokens.num_spans = (uint32_t)number();
    if (tokens.num_spans > MOST_SPANS) exit(2);
    for (uint32_t at = 0; at < tokens.num_spans; at++) {
        sequence_ids[at] = number();
        starts[at] = (int64_t)number();
        lengths[at] = (int64_t)number();
        revisions[at] = number();
    }
    getchar();
    read_bytes(keys, tokens.keys_bytes);
    read_bytes(queries, tokens.queries_bytes);
    for (int at = 0; at < MOST_IDS; at++) ids[at] = INT32_MIN;
    for (int at = 0; at < MOST_IDS; at++) scores[at] = 0;
    if (shared) {
        memcpy(shared + IDS_AT, ids, sizeof ids);
        move_to_region(&tokens);
    }
    if (!call(&tokens, ids, scores)) {
        print_error();
        return;
    }
    if (shared) {
        for (int at = 0; at < MOST_IDS; at++)
            if (ids[at] != INT32_MIN || scores[at] != 0) exit(3);
        memcpy(ids, shared + IDS_AT, sizeof ids);
        memcpy(scores, shared + SCORES_AT, sizeof scores);
    }
    printf("tokens");
    for (int at = 0; at < MOST_IDS && ids[at] != INT32_MIN; at++) printf(" %" PRId32, ids[at]);
    for (int at = 0; at < MOST_IDS && ids[at] != INT32_MIN && tokens.flags & BLOCKDEX_RETURN_SCORES; at++)
        printf(" %.9g", (double)scores[at]);
    puts("");
}

static void call_sequences(const char *what, uint32_t layers) {
    int64_t lengths[MOST_LAYERS];
    uint64_t revisions[MOST_LAYERS];
    const uint64_t id = number();
    if (!strcmp(what, "open")) {
        const uint64_t lease = number();
        print_state(blockdex_open_sequences(&client, &id, &lease, 1, SECONDS, &error), NULL, NULL, 0);
    } else if (!strcmp(what, "close")) {
        print_state(blockdex_close_sequences(&client, &id, 1, SECONDS, &error), NULL, NULL, 0);
    } else if (!strcmp(what, "get")) {
        print_state(blockdex_get_sequence(&client, id, lengths, revisions, layers, SECONDS, &error), lengths, revisions,
                    layers);
    } else if (!strcmp(what, "fork")) {
        const uint64_t child = number(), length = number();
        print_state(blockdex_fork_sequence(&client, id, child, length, lengths, layers, SECONDS, &error), lengths, NULL,
                    layers);
    } else if (!strcmp(what, "truncate")) {
        const uint64_t length = number();
        print_state(blockdex_truncate_sequence(&client, id, length, lengths, layers, SECONDS, &error), lengths, NULL,
                    layers);
    }
}

static void set_cells(uint64_t id) {
    int32_t page_ids[MOST_SPANS];
    const uint32_t row = (uint32_t)number(), first_block = (uint32_t)number(), count = (uint32_t)number();
    const struct blockdex_page_tables tables = {.pool_id = id,
                                                .num_runs = 1,
                                                .num_page_ids = count,
                                                .rows = &row,
                                                .first_blocks = &first_block,
                                                .counts = &count,
                                                .page_ids = page_ids};
    if (count > MOST_SPANS) exit(2);
    for (uint32_t at = 0; at < count; at++)
        if (scanf("%" SCNd32, &page_ids[at]) != 1) exit(2);
    print_state(blockdex_set_page_tables(&client, &tables, SECONDS, &error), NULL, NULL, 0);
}

static void call_pools(const char *what) {
    const uint64_t id = number();
    if (!strcmp(what, "use-pool")) used_pool = id;
    if (!strcmp(what, "set-cells")) set_cells(id);
    if (!strcmp(what, "close-pool")) print_state(blockdex_close_pool(&client, id, SECONDS, &error), NULL, NULL, 0);
    if (strcmp(what, "create-pool")) return;
    const uint32_t pages = (uint32_t)number(), rows = (uint32_t)number(), blocks = (uint32_t)number();
    print_state(blockdex_create_pool(&client, id, pages, rows, blocks, SECONDS, &error), NULL, NULL, 0);
}

/* Of the spec, how many layers there are; the text has no other number of that name. */
static uint32_t ask_layers(void) {
    static char json[BLOCKDEX_LONGEST_TOLD];
    if (!blockdex_get_info(&client, json, sizeof json, SECONDS, &error)) return 0;
    const char *at = strstr(json, "\"num_layers\":");
    return at ? (uint32_t)strtoul(at + strlen("\"num_layers\":"), NULL, 10) : 0;
}

int main(int argc, char **argv) {
    char what[16];
    if (argc < 3) return 2;
    if (!blockdex_connect(&client, argv[1], argv[2], SECONDS, &error)) {
        print_error();
        return 1;
    }
    const uint32_t layers = ask_layers();
    if (!layers || layers > MOST_LAYERS) return 1;
    if (argc > 3) share_region();
    while (scanf("%15s", what) == 1) {
        if (!strcmp(what, "tokens"))
            call_tokens();
        else if (strchr(what, '-'))
            call_pools(what);
        else
            call_sequences(what, layers);
        fflush(stdout);
    }
    if (shared && !blockdex_release_region(&client, region.region, SECONDS, &error)) return 3;
    if (shared && blockdex_release_region(&client, region.region, SECONDS, &error)) return 3;
    blockdex_disconnect(&client);
    return 0;
}
