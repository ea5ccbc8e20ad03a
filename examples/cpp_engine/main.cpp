// An inference engine in miniature that keeps its index keys in a blockdex server on the same host: it prefills a few
// sequences, decodes them layer by layer, checks every answer against a selection of its own, and prints how long calls
// took. There is no model: keys and queries are small random integers, whose scores are the same however they are summed.
//
//   cpp_engine SOCKET [SEQUENCES [PROMPT_TOKENS [STEPS]]]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "blockdex_client.h"

constexpr double kTimeout = 10.0; // seconds, of every call

// What the server indexes, as its info tells.
struct Spec {
    uint32_t layers, heads, dim, block_size, topk, init_blocks, local_blocks;
};

// A connection that is closed with its scope, and whose errors are exceptions.
class Client {
   public:
    explicit Client(const char *socket) {
        check(blockdex_connect(&client_, socket, "cpp-engine", kTimeout, &error_));
        std::vector<char> json(1 << 16);
        check(blockdex_get_info(&client_, json.data(), json.size(), kTimeout, &error_));
        spec_ = {number(json, "num_layers"),  number(json, "num_index_heads"),
                 number(json, "head_dim"),    number(json, "block_size"),
                 number(json, "topk"),        number(json, "init_blocks"),
                 number(json, "local_blocks")};
    }
    Client(const Client &) = delete;
    Client &operator=(const Client &) = delete;
    ~Client() { blockdex_disconnect(&client_); }

    const Spec &spec() const { return spec_; }

    void open(const std::vector<uint64_t> &ids) {
        check(blockdex_open_sequences(&client_, ids.data(), nullptr, uint32_t(ids.size()), kTimeout, &error_));
    }
    void close(const std::vector<uint64_t> &ids) {
        check(blockdex_close_sequences(&client_, ids.data(), uint32_t(ids.size()), kTimeout, &error_));
    }
    void append_and_select(const blockdex_tokens &tokens, std::vector<int32_t> &block_ids) {
        check(blockdex_append_and_select(&client_, &tokens, block_ids.data(), block_ids.size(), nullptr, kTimeout,
                                         &error_));
    }

   private:
    void check(bool ok) const {
        if (!ok) throw std::runtime_error(std::string(error_.reason) + ": " + error_.message);
    }
    static uint32_t number(const std::vector<char> &json, const std::string &name) {
        const std::string text(json.data()), key = "\"" + name + "\":";
        const size_t at = text.find(key);
        if (at == std::string::npos) throw std::runtime_error("info: has no " + name);
        return uint32_t(std::stoul(text.substr(at + key.size())));
    }

    blockdex_client client_;
    blockdex_error error_;
    Spec spec_;
};

// Vectors of small integers, which bf16 holds exactly.
class Values {
   public:
    std::vector<float> draw(size_t count) {
        std::vector<float> values(count);
        for (float &value : values) value = float(integers_(random_));
        return values;
    }

   private:
    std::mt19937 random_{7};
    std::uniform_int_distribution<int> integers_{-4, 4};
};

std::vector<uint16_t> to_bf16(const std::vector<float> &values) {
    std::vector<uint16_t> halves(values.size());
    for (size_t at = 0; at < values.size(); at++) {
        uint32_t bits;
        std::memcpy(&bits, &values[at], sizeof bits);
        halves[at] = uint16_t(bits >> 16);
    }
    return halves;
}

// The blocks that a query at the last position of some keys must be answered, by rising id; -1 where there are fewer.
std::vector<int32_t> select_naively(const Spec &spec, const std::vector<float> &keys, size_t length,
                                    const float *query) {
    const size_t blocks = (length + spec.block_size - 1) / spec.block_size;
    std::vector<float> scores(blocks, -std::numeric_limits<float>::infinity());
    for (size_t position = 0; position < length; position++) {
        float dot = 0;
        for (size_t at = 0; at < spec.dim; at++) dot += query[at] * keys[position * spec.dim + at];
        scores[position / spec.block_size] = std::max(scores[position / spec.block_size], dot);
    }
    for (size_t block = 0; block < blocks; block++)
        if (block < spec.init_blocks || block + spec.local_blocks >= blocks)
            scores[block] = std::numeric_limits<float>::infinity();
    std::vector<int32_t> ids(blocks);
    for (size_t block = 0; block < blocks; block++) ids[block] = int32_t(block);
    // Equal scores go to the lower id, which is where a stable sort leaves them.
    std::stable_sort(ids.begin(), ids.end(), [&](int32_t one, int32_t other) { return scores[one] > scores[other]; });
    ids.resize(std::min<size_t>(blocks, spec.topk));
    std::sort(ids.begin(), ids.end());
    ids.resize(spec.topk, -1);
    return ids;
}

class Engine {
   public:
    Engine(Client &client, size_t sequences) : client_(client), spec_(client.spec()) {
        for (size_t at = 0; at < sequences; at++) ids_.push_back(at + 1);
        keys_.assign(spec_.layers, std::vector<std::vector<float>>(sequences));
        client_.open(ids_);
    }
    ~Engine() {
        try {
            client_.close(ids_);
        } catch (const std::exception &) {
            // The server is gone, and the sequences with it.
        }
    }

    // A pass of the model: `tokens` more of every sequence, one call a layer. Returns the seconds of each call.
    std::vector<double> forward(size_t tokens) {
        std::vector<double> seconds;
        for (uint32_t layer = 0; layer < spec_.layers; layer++) seconds.push_back(call(layer, tokens));
        length_ += tokens;
        return seconds;
    }

    size_t checked() const { return checked_; }

   private:
    double call(uint32_t layer, size_t tokens) {
        const size_t total = tokens * ids_.size();
        const std::vector<float> keys = values_.draw(total * spec_.dim);
        const std::vector<float> queries = values_.draw(total * spec_.heads * spec_.dim);
        const std::vector<uint16_t> keys_bf16 = to_bf16(keys), queries_bf16 = to_bf16(queries);
        const std::vector<int64_t> starts(ids_.size(), int64_t(length_)), lengths(ids_.size(), int64_t(tokens));
        std::vector<int32_t> block_ids(total * spec_.heads * spec_.topk);
        blockdex_tokens request = {};
        request.layer = layer;
        request.num_spans = uint32_t(ids_.size());
        request.sequence_ids = ids_.data();
        request.starts = starts.data();
        request.lengths = lengths.data();
        request.keys = keys_bf16.data();
        request.keys_bytes = 2 * keys_bf16.size();
        request.keys_dtype = BLOCKDEX_BF16;
        request.queries = queries_bf16.data();
        request.queries_bytes = 2 * queries_bf16.size();
        request.queries_dtype = BLOCKDEX_BF16;
        request.num_heads = spec_.heads;
        const auto began = std::chrono::steady_clock::now();
        client_.append_and_select(request, block_ids);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
        for (size_t sequence = 0; sequence < ids_.size(); sequence++) {
            std::vector<float> &held = keys_[layer][sequence];
            const auto first = keys.begin() + ptrdiff_t(sequence * tokens * spec_.dim);
            held.insert(held.end(), first, first + ptrdiff_t(tokens * spec_.dim));
            check(layer, sequence, tokens, queries, block_ids);
        }
        return took.count();
    }

    // Of every token and head of a sequence.
    void check(uint32_t layer, size_t sequence, size_t tokens, const std::vector<float> &queries,
               const std::vector<int32_t> &block_ids) {
        for (size_t token = 0; token < tokens; token++)
            for (size_t head = 0; head < spec_.heads; head++) {
                const size_t row = (sequence * tokens + token) * spec_.heads + head;
                const auto expected =
                    select_naively(spec_, keys_[layer][sequence], length_ + token + 1, &queries[row * spec_.dim]);
                if (!std::equal(expected.begin(), expected.end(), &block_ids[row * spec_.topk]))
                    throw std::runtime_error("layer " + std::to_string(layer) + ", sequence " +
                                             std::to_string(ids_[sequence]) + ", position " +
                                             std::to_string(length_ + token) + ": other blocks than its own");
                checked_++;
            }
    }

    Client &client_;
    const Spec spec_;
    Values values_;
    std::vector<uint64_t> ids_;
    std::vector<std::vector<std::vector<float>>> keys_; // of each layer and sequence: [length, dim]
    size_t length_ = 0, checked_ = 0;
};

void print(const char *what, std::vector<double> seconds) {
    std::sort(seconds.begin(), seconds.end());
    std::printf("%s: p50 %.1f us, p99 %.1f us\n", what, 1e6 * seconds[seconds.size() / 2],
                1e6 * seconds[seconds.size() * 99 / 100]);
}

int main(int argc, char **argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: %s SOCKET [SEQUENCES [PROMPT_TOKENS [STEPS]]]\n", argv[0]);
        return 2;
    }
    const auto option = [&](int at, size_t otherwise) { return argc > at ? std::stoul(argv[at]) : otherwise; };
    const size_t sequences = option(2, 4), prompt = option(3, 300), steps = option(4, 32);
    try {
        Client client(argv[1]);
        Engine engine(client, sequences);
        print("prefill, a layer", engine.forward(prompt));
        std::vector<double> calls, passes;
        for (size_t step = 0; step < steps; step++) {
            const std::vector<double> seconds = engine.forward(1);
            calls.insert(calls.end(), seconds.begin(), seconds.end());
            passes.push_back(0);
            for (double each : seconds) passes.back() += each;
        }
        print("decode, a layer", calls);
        print("decode, all layers", passes);
        std::printf("%zu selections checked\n", engine.checked());
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
