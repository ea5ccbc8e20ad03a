/* Clients of a server's ring in C, each a process of its own: they decode the same token of their sequences again and
 * again, layer by layer, check every answer bit by bit, and print as JSON how long that took.
 *
 *   client SOCKET FOLDER FIRST_ID CLIENTS RANKS LAYERS SEQUENCES TOKENS STEPS REGION
 *
 * FOLDER/ID.bin has what is asked of the sequences from ID on, as decode.py writes it. With RANKS above 1 each client
 * has a part of the heads of the same sequences: the first one appends, the others wait for its keys, and all meet before
 * each layer. Else the next client's sequences begin 1000 further. With REGION 1 keys, queries and block ids lie in
 * memory that is shared with the server. */
/* memfd_create */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "blockdex_client.h"

enum { HEADS = 4, DIM = 128, TOPK = 16, MAX_SEQUENCES = 64 };
static const double TIMEOUT = 10;
static const int64_t MEETING = 20000000000;

struct work {
    const char *socket, *folder;
    uint64_t first_id;
    uint32_t clients, ranks, layers, sequences;
    int64_t tokens;
    uint32_t steps, region;
};

/* Of all clients; microseconds of their calls, and of their steps, follow one another. */
struct shared {
    _Atomic uint64_t met;
    _Atomic bool failed;
    uint64_t revision;
    _Atomic int64_t began[256], ended[256];
    float calls[];
};

/* What a client asks, all layers one behind the other, and behind that the last answer. */
struct tensors {
    char *memory;
    size_t keys, queries, ids, bytes; /* bytes of a layer's, and of everything */
    uint32_t heads;
};

#define CHECK(good, ...)                                                \
    do {                                                                \
        if (!(good)) {                                                  \
            fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(1); \
        }                                                               \
    } while (0)

static size_t layer_bytes(const struct tensors *tensors) { return tensors->keys + tensors->queries + tensors->ids; }
static char *keys_of(const struct tensors *tensors, uint32_t layer) {
    return tensors->memory + layer * layer_bytes(tensors);
}
static char *queries_of(const struct tensors *tensors, uint32_t layer) {
    return keys_of(tensors, layer) + tensors->keys;
}
static char *expected_of(const struct tensors *tensors, uint32_t layer) {
    return queries_of(tensors, layer) + tensors->queries;
}
static char *answer_of(const struct tensors *tensors, uint32_t layers) { return keys_of(tensors, layers); }

/* Reads the rows of some heads out of rows of all heads. */
static void read_heads(FILE *file, char *to, size_t rows, size_t row_bytes, uint32_t first, uint32_t heads) {
    char all[HEADS * DIM * 2];
    for (size_t row = 0; row < rows; row++, to += heads * row_bytes) {
        CHECK(fread(all, row_bytes, HEADS, file) == HEADS, "the file has fewer rows");
        memcpy(to, all + first * row_bytes, heads * row_bytes);
    }
}

/* Memory of a memfd, and in it what a client asks. */
static int read_tensors(const struct work *work, uint64_t first_id, uint32_t first_head, struct tensors *tensors) {
    char path[4096];
    const uint32_t sequences = work->sequences, heads = tensors->heads = HEADS / work->ranks;
    tensors->keys = (size_t)sequences * DIM * 2;
    tensors->queries = (size_t)sequences * heads * DIM * 2;
    tensors->ids = (size_t)sequences * heads * TOPK * 4;
    tensors->bytes = work->layers * layer_bytes(tensors) + tensors->ids;
    const int memory = memfd_create("blockdex-colocated", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(memory >= 0 && !ftruncate(memory, (off_t)tensors->bytes) && !fcntl(memory, F_ADD_SEALS, F_SEAL_SHRINK),
          "no memory");
    tensors->memory = mmap(NULL, tensors->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    CHECK(tensors->memory != MAP_FAILED, "no memory");
    snprintf(path, sizeof path, "%s/%llu.bin", work->folder, (unsigned long long)first_id);
    FILE *file = fopen(path, "rb");
    CHECK(file, "%s: cannot be read", path);
    for (uint32_t layer = 0; layer < work->layers; layer++) {
        CHECK(fread(keys_of(tensors, layer), tensors->keys, 1, file) == 1, "%s: has fewer layers", path);
        read_heads(file, queries_of(tensors, layer), sequences, DIM * 2, first_head, heads);
        read_heads(file, expected_of(tensors, layer), sequences, TOPK * 4, first_head, heads);
    }
    fclose(file);
    return memory;
}

/* Waits until all clients have come here as often as this one. */
static void meet(const struct work *work, struct shared *shared, uint64_t *meetings) {
    const uint64_t all = ++*meetings * work->clients;
    const int64_t until = blockdex_now() + MEETING;
    atomic_fetch_add(&shared->met, 1);
    for (uint32_t look = 0; atomic_load_explicit(&shared->met, memory_order_acquire) < all; look++) {
        blockdex_relax();
        if (look % 256) continue;
        CHECK(!atomic_load(&shared->failed) && blockdex_now() < until, "another client has not come");
        sched_yield();
    }
}

/* One client, and what it asks of its sequences: of a rank a part of their heads. */
struct engine {
    const struct work *work;
    uint32_t rank;
    struct tensors tensors;
    struct blockdex_client client;
    struct blockdex_region region;
    uint64_t ids[MAX_SEQUENCES], revisions[MAX_SEQUENCES];
    int64_t starts[MAX_SEQUENCES], lengths[MAX_SEQUENCES];
};

static void open_engine(struct engine *engine, const struct work *work, uint32_t number) {
    const bool is_rank = work->ranks > 1;
    const uint64_t first_id = work->first_id + (is_rank ? 0 : 1000 * (uint64_t)number);
    struct blockdex_error error;
    memset(engine, 0, sizeof *engine);
    engine->work = work;
    engine->rank = is_rank ? number : 0;
    const int memory = read_tensors(work, first_id, engine->rank * (HEADS / work->ranks), &engine->tensors);
    for (uint32_t row = 0; row < work->sequences; row++) {
        engine->ids[row] = first_id + row;
        engine->starts[row] = work->tokens;
        engine->lengths[row] = 1;
    }
    CHECK(blockdex_connect(&engine->client, work->socket, "colocated", TIMEOUT, &error), "%s", error.message);
    if (!work->region) return;
    CHECK(blockdex_share_memfd(&engine->client, memory, TIMEOUT, &engine->region, &error), "%s", error.message);
}

static struct blockdex_place place_of(const struct engine *engine, const char *tensor) {
    return (struct blockdex_place){engine->region.region, (uint64_t)(tensor - engine->tensors.memory)};
}

static struct blockdex_tokens request_of(const struct engine *engine, uint32_t layer) {
    const struct tensors *tensors = &engine->tensors;
    struct blockdex_tokens tokens = {
        .layer = layer,
        .num_spans = engine->work->sequences,
        .sequence_ids = engine->ids,
        .starts = engine->starts,
        .lengths = engine->lengths,
        .revisions = engine->work->ranks > 1 ? engine->revisions : NULL,
        .queries = queries_of(tensors, layer),
        .queries_bytes = tensors->queries,
        .queries_dtype = BLOCKDEX_BF16,
        .first_head = engine->rank * tensors->heads,
        .num_heads = tensors->heads,
        .flags = engine->rank ? BLOCKDEX_WAIT_FOR_KEYS : BLOCKDEX_ROLLBACK,
    };
    if (!engine->rank) {
        tokens.keys = keys_of(tensors, layer);
        tokens.keys_bytes = tensors->keys;
        tokens.keys_dtype = BLOCKDEX_BF16;
    }
    if (engine->region.region) {
        if (!engine->rank) tokens.keys_place = place_of(engine, keys_of(tensors, layer));
        tokens.queries_place = place_of(engine, queries_of(tensors, layer));
        tokens.block_ids_place = place_of(engine, answer_of(tensors, engine->work->layers));
    }
    return tokens;
}

/* Microseconds of a call, whose answer is checked. */
static float call(struct engine *engine, uint32_t layer) {
    const struct tensors *tensors = &engine->tensors;
    const struct blockdex_tokens tokens = request_of(engine, layer);
    struct blockdex_error error;
    int32_t *answer = (int32_t *)(void *)answer_of(tensors, engine->work->layers);
    memset(answer, 0xfe, tensors->ids);
    const int64_t called = blockdex_now();
    CHECK(blockdex_call_tokens(&engine->client, &tokens, answer, tensors->ids / 4, NULL, TIMEOUT, &error), "%s",
          error.message);
    const int64_t answered = blockdex_now();
    CHECK(!memcmp(answer, expected_of(tensors, layer), tensors->ids),
          "layer %u: block ids differ from a plain selection's", layer);
    return (float)(answered - called) / 1e3f;
}

static void run_client(const struct work *work, struct shared *shared, uint32_t number) {
    const bool is_rank = work->ranks > 1;
    const uint32_t warm_up = work->steps / 5 + 2;
    struct engine engine;
    uint64_t meetings = 0;
    open_engine(&engine, work, number);
    for (uint32_t step = 0; step < warm_up + work->steps; step++) {
        const uint64_t row = (uint64_t)number * work->steps + (step < warm_up ? 0 : step - warm_up);
        float *took = shared->calls + row * (work->layers + 1);
        for (uint32_t at = 0; at < work->sequences; at++) engine.revisions[at] = shared->revision + step;
        if (is_rank || step == warm_up) meet(work, shared, &meetings);
        const int64_t begun = blockdex_now();
        if (step == warm_up) atomic_store(&shared->began[number], begun);
        for (uint32_t layer = 0; layer < work->layers; layer++) {
            took[layer] = call(&engine, layer);
            if (is_rank) meet(work, shared, &meetings);
        }
        took[work->layers] = (float)(blockdex_now() - begun) / 1e3f;
    }
    atomic_store(&shared->ended[number], blockdex_now());
    blockdex_disconnect(&engine.client);
}

static int by_size(const void *one, const void *other) {
    const float a = *(const float *)one, b = *(const float *)other;
    return (a > b) - (a < b);
}

/* Median and 99th percentile of numbers, which may be moved. */
static void print_percentiles(const char *format, float *numbers, size_t count, double unit) {
    qsort(numbers, count, sizeof *numbers, by_size);
    printf(format, unit * numbers[count / 2], unit * numbers[count * 99 / 100]);
}

static void print_all(const struct work *work, const struct shared *shared) {
    const size_t steps = (size_t)work->clients * work->steps, calls = steps * work->layers;
    float *of_calls = malloc(sizeof(float) * calls), *of_steps = malloc(sizeof(float) * steps);
    CHECK(of_calls && of_steps, "no memory");
    for (size_t step = 0; step < steps; step++) {
        const float *row = shared->calls + step * (work->layers + 1);
        memcpy(of_calls + step * work->layers, row, sizeof(float) * work->layers);
        of_steps[step] = row[work->layers];
    }
    int64_t began = shared->began[0], ended = shared->ended[0];
    for (uint32_t number = 1; number < work->clients; number++) {
        if (shared->began[number] < began) began = shared->began[number];
        if (shared->ended[number] > ended) ended = shared->ended[number];
    }
    print_percentiles("{\"call_p50_us\": %.3f, \"call_p99_us\": %.3f, ", of_calls, calls, 1);
    print_percentiles("\"step_p50_ms\": %.4f, \"step_p99_ms\": %.4f, ", of_steps, steps, 1e-3);
    printf("\"calls_per_second\": %.1f}\n", (double)calls / (1e-9 * (double)(ended - began)));
}

int main(int argc, char **argv) {
    CHECK(argc == 11, "usage: %s SOCKET FOLDER FIRST_ID CLIENTS RANKS LAYERS SEQUENCES TOKENS STEPS REGION", argv[0]);
    uint64_t numbers[8];
    for (int at = 0; at < 8; at++) numbers[at] = strtoull(argv[3 + at], NULL, 10);
    const struct work work = {.socket = argv[1],
                              .folder = argv[2],
                              .first_id = numbers[0],
                              .clients = (uint32_t)numbers[1],
                              .ranks = (uint32_t)numbers[2],
                              .layers = (uint32_t)numbers[3],
                              .sequences = (uint32_t)numbers[4],
                              .tokens = (int64_t)numbers[5],
                              .steps = (uint32_t)numbers[6],
                              .region = (uint32_t)numbers[7]};
    CHECK(work.clients && work.clients <= 256 && work.sequences && work.sequences <= MAX_SEQUENCES && work.ranks &&
              HEADS % work.ranks == 0 && (work.ranks == 1 || work.clients == work.ranks),
          "these numbers cannot be");
    const size_t floats = (size_t)work.clients * work.steps * (work.layers + 1);
    struct shared *shared =
        mmap(NULL, sizeof *shared + sizeof(float) * floats, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED, "no memory");
    shared->revision = (uint64_t)blockdex_now();
    for (uint32_t number = 0; number < work.clients; number++) {
        const pid_t child = fork();
        CHECK(child >= 0, "no process");
        if (child) continue;
        run_client(&work, shared, number);
        exit(0);
    }
    int status;
    while (wait(&status) > 0)
        if (status) atomic_store(&shared->failed, true);
    CHECK(!shared->failed, "a client has failed");
    print_all(&work, shared);
    return 0;
}
