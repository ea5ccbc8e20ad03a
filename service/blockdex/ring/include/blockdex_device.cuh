/* A device channel of blockdex for CUDA C++: requests that a kernel writes, and answers that one awaits.
 *
 * docs/ring.md, "Device channels", says what lies where. A host opens the channel; then, on one stream,
 *
 *   blockdex_ring_kernel<<<blocks, 256, 0, stream>>>(channel, call);          copies keys and queries in, and asks
 *   blockdex_wait_kernel<<<1, 256, 0, stream>>>(channel, answer, tokens, width, bound);   waits, and copies ids out
 *
 * Both can be captured in a CUDA graph and replayed: what `call` points to is read at the replay. A kernel of one's own
 * calls blockdex_ring or blockdex_wait, with all of its threads.
 */
#ifndef BLOCKDEX_DEVICE_CUH
#define BLOCKDEX_DEVICE_CUH

typedef unsigned long long blockdex_u64;

/* Offsets in the segment's header and in the channel's memory. */
enum {
    BLOCKDEX_AT_REQUESTS_WRITTEN = 128,
    BLOCKDEX_AT_ANSWERS_WRITTEN = 384,
    BLOCKDEX_AT_ANSWERS_READ = 512,
    BLOCKDEX_AT_CHANNEL_ERROR = 1152,
    BLOCKDEX_AT_SLOTS = 4096,
    BLOCKDEX_DEVICE_SLOT_BYTES = 256,
    BLOCKDEX_AT_ANSWERED = 0,
    BLOCKDEX_AT_WRITTEN = 128,
    BLOCKDEX_AT_ERROR = 136,
    BLOCKDEX_AT_ARRIVED = 140,
    BLOCKDEX_AT_REGION = 144
};

/* Why a channel is dead. */
enum {
    BLOCKDEX_TIMED_OUT = 1,
    BLOCKDEX_REFUSED,
    BLOCKDEX_UNANSWERED,
    BLOCKDEX_ENGINE_GONE,
    BLOCKDEX_CLOSED,
    BLOCKDEX_INVALID_LENGTHS
};

/* Where a channel is: its memory on this GPU, its segment as this GPU finds it, and the offsets of their parts. */
struct blockdex_channel {
    char *memory, *segment;
    blockdex_u64 columns_at, token_places, keys, queries, block_ids, scores;
    unsigned slots;
};

/* A request. Keys [rows, row_tokens, D], queries [rows, row_tokens, H, D], of the dtypes that `kind` says; the bytes of a
 * token of either, 0 for none. `wants_scores`: as the flags in `kind` say. `ids` to `revisions` have a number a row, a row of length 0 is padding; `replays` is one number, added to
 * each revision; both may be NULL. `kind`, `layer`, `heads`, `pool`: words 1, 5, 6 and 7 of the slot. `own_keys`, `own_queries`:
 * their offset in the channel's memory where they lie there, or -1. */
struct blockdex_call {
    const void *keys, *queries;
    const long long *ids, *starts, *lengths, *revisions, *replays;
    blockdex_u64 kind, layer, heads, pool;
    long long own_keys, own_queries;
    unsigned key_bytes, query_bytes, wants_scores;
    int rows, row_tokens;
};

/* Where an answer goes: [tokens, H * topk]; `scores` NULL for none. */
struct blockdex_selection {
    int *block_ids;
    float *scores;
};

static __device__ inline blockdex_u64 blockdex_now() {
    blockdex_u64 time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

static __device__ inline blockdex_u64 blockdex_load_acquire(const char *at) {
    blockdex_u64 number;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(number) : "l"(at) : "memory");
    return number;
}

static __device__ inline void blockdex_store_release(char *at, blockdex_u64 number) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(number) : "memory");
}

static __device__ inline void blockdex_die(const struct blockdex_channel &channel, unsigned error) {
    *(volatile unsigned *)(channel.memory + BLOCKDEX_AT_ERROR) = error;
    *(volatile unsigned *)(channel.segment + BLOCKDEX_AT_CHANNEL_ERROR) = error;
}

/* Copies a token, word by word, with the threads of a block. */
static __device__ inline void blockdex_copy(char *to, const char *from, unsigned bytes) {
    for (unsigned word = threadIdx.x; word < bytes / 4; word += blockDim.x)
        ((unsigned *)to)[word] = ((const unsigned *)from)[word];
}

/* One thread: columns of the rows that are there, and the slot before them. */
static __device__ inline void blockdex_write_request(const struct blockdex_channel &channel,
                                                     const struct blockdex_call &call, blockdex_u64 number,
                                                     bool packed) {
    blockdex_u64 count = 0, tokens = 0, place = 0;
    for (int row = 0; row < call.rows; row++) count += call.lengths[row] > 0;
    long long *column = (long long *)(channel.segment + channel.columns_at);
    for (int row = 0; row < call.rows; row++) {
        if (!call.lengths[row]) continue;
        tokens += call.lengths[row];
        column[place] = call.ids[row];
        column[count + place] = call.starts[row];
        column[2 * count + place] = call.lengths[row];
        column[3 * count + place] = (call.revisions ? call.revisions[row] : 0) + (call.replays ? call.replays[0] : 0);
        place++;
    }
    volatile blockdex_u64 *word = (volatile blockdex_u64 *)(channel.segment + BLOCKDEX_AT_SLOTS +
                                                            (number - 1) % channel.slots * BLOCKDEX_DEVICE_SLOT_BYTES);
    const blockdex_u64 region = *(const unsigned *)(channel.memory + BLOCKDEX_AT_REGION);
    const blockdex_u64 appends = call.key_bytes != 0, selects = call.query_bytes != 0;
    word[0] = number;
    word[1] = call.kind;
    word[5] = call.layer | count << 32;
    word[6] = call.heads;
    word[7] = call.pool;
    word[11] = (32 * count + 63) / 64 * 64;
    word[12] = call.key_bytes * tokens;
    word[13] = call.query_bytes * tokens;
    word[14] = region * appends | region * selects << 32;
    word[15] = region * selects | (call.wants_scores ? region << 32 : 0);
    word[16] = appends * (packed && call.own_keys >= 0 ? (blockdex_u64)call.own_keys : channel.keys);
    word[17] = selects * (packed && call.own_queries >= 0 ? (blockdex_u64)call.own_queries : channel.queries);
    word[18] = selects * channel.block_ids;
    word[19] = call.wants_scores ? channel.scores : 0;
}

/* Copies keys and queries into the channel's memory, packed, writes the request, and shows it to the core. */
static __device__ inline void blockdex_ring(const struct blockdex_channel &channel, const struct blockdex_call &call) {
    char *memory = channel.memory;
    const blockdex_u64 written = *(volatile blockdex_u64 *)(memory + BLOCKDEX_AT_WRITTEN);
    const bool answered = blockdex_load_acquire(memory + BLOCKDEX_AT_ANSWERED) == written;
    bool valid = true, packed = true;
    long long tokens = 0;
    if (*(volatile unsigned *)(memory + BLOCKDEX_AT_ERROR)) return;
    for (int row = 0; row < call.rows; row++) {
        const long long length = call.lengths[row];
        valid &= length >= 0 && length <= call.row_tokens;
        packed &= !length || tokens == (long long)row * call.row_tokens;
        tokens += length;
    }
    if (!answered || !valid) {
        if (!threadIdx.x) blockdex_die(channel, answered ? BLOCKDEX_INVALID_LENGTHS : BLOCKDEX_UNANSWERED);
        return;
    }
    long long first = 0;
    for (int row = 0; row < call.rows; first += call.lengths[row++]) {
        for (int in_row = 0; in_row < call.row_tokens; in_row++) {
            const blockdex_u64 from = (blockdex_u64)row * call.row_tokens + in_row, to = first + in_row;
            const bool live = in_row < call.lengths[row];
            if (from % gridDim.x != blockIdx.x) continue;
            if (!threadIdx.x) ((int *)(memory + channel.token_places))[from] = live ? (int)to : -1;
            if (live && call.key_bytes && !(packed && call.own_keys >= 0))
                blockdex_copy(memory + channel.keys + to * call.key_bytes,
                              (const char *)call.keys + from * call.key_bytes, call.key_bytes);
            if (live && call.query_bytes && !(packed && call.own_queries >= 0))
                blockdex_copy(memory + channel.queries + to * call.query_bytes,
                              (const char *)call.queries + from * call.query_bytes, call.query_bytes);
        }
    }
    __syncthreads();
    if (threadIdx.x) return;
    __threadfence();
    unsigned *arrived = (unsigned *)(memory + BLOCKDEX_AT_ARRIVED);
    if (atomicAdd(arrived, 1) != gridDim.x - 1) return;
    __threadfence();
    *arrived = 0;
    if (!tokens) return; /* nothing to ask */
    blockdex_write_request(channel, call, written + 1, packed);
    *(volatile blockdex_u64 *)(memory + BLOCKDEX_AT_WRITTEN) = written + 1;
    __threadfence_system();
    blockdex_store_release(channel.segment + BLOCKDEX_AT_REQUESTS_WRITTEN, written + 1);
}

/* One thread: why the channel is dead, or 0 once the last request is answered. */
static __device__ inline unsigned blockdex_await(const struct blockdex_channel &channel, blockdex_u64 bound) {
    const char *segment = channel.segment;
    const blockdex_u64 number = *(volatile blockdex_u64 *)(channel.memory + BLOCKDEX_AT_WRITTEN);
    const blockdex_u64 begin = blockdex_now();
    blockdex_u64 looked = begin;
    unsigned error = *(volatile unsigned *)(channel.memory + BLOCKDEX_AT_ERROR);
    if (error) return error;
    while (!error && blockdex_load_acquire(channel.memory + BLOCKDEX_AT_ANSWERED) != number) {
        const blockdex_u64 now = blockdex_now();
        if (now - looked <= 20000) continue;
        looked = now;
        const bool refused = blockdex_load_acquire(segment + BLOCKDEX_AT_ANSWERS_WRITTEN) !=
                             blockdex_load_acquire(segment + BLOCKDEX_AT_ANSWERS_READ);
        error = (unsigned)blockdex_load_acquire(segment + BLOCKDEX_AT_CHANNEL_ERROR);
        if (!error && refused) error = BLOCKDEX_REFUSED;
        if (!error && now - begin > bound) error = BLOCKDEX_TIMED_OUT;
    }
    if (error) blockdex_die(channel, error);
    return error;
}

/* Waits until the last request is answered, with the threads of one block, and copies its answer [tokens, width] out:
 * for padding, and after an error, ids of -1 and scores of -inf. `bound` is in nanoseconds. */
static __device__ inline void blockdex_wait(const struct blockdex_channel &channel,
                                            const struct blockdex_selection &answer, int tokens, int width,
                                            blockdex_u64 bound) {
    __shared__ unsigned error;
    if (!threadIdx.x) error = blockdex_await(channel, bound);
    __syncthreads();
    const volatile int *places = (const volatile int *)(channel.memory + channel.token_places);
    const volatile int *ids = (const volatile int *)(channel.memory + channel.block_ids);
    const volatile float *scores = (const volatile float *)(channel.memory + channel.scores);
    for (int at = threadIdx.x; at < tokens * width; at += blockDim.x) {
        const int place = error ? -1 : places[at / width];
        const blockdex_u64 from = (blockdex_u64)(place < 0 ? 0 : place) * width + at % width;
        answer.block_ids[at] = place < 0 ? -1 : ids[from];
        if (answer.scores) answer.scores[at] = place < 0 ? __int_as_float(0xff800000) : scores[from];
    }
}

extern "C" __global__ void blockdex_ring_kernel(struct blockdex_channel channel, struct blockdex_call call) {
    blockdex_ring(channel, call);
}

extern "C" __global__ void blockdex_wait_kernel(struct blockdex_channel channel, struct blockdex_selection answer,
                                                int tokens, int width, blockdex_u64 bound) {
    blockdex_wait(channel, answer, tokens, width, bound);
}

#endif
