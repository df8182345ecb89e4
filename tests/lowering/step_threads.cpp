// A saved program's step on four threads, for the thread sanitizer: argv[1] is weights.bin. Built with the program's own
// source and header; sizes are B, S, R, and input 1 holds positions.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "program.h"

using Bytes = std::vector<unsigned char>;

static void* aligned(Bytes& memory, int64_t bytes) {
    memory.assign(static_cast<size_t>(bytes) + 64, 0);
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - at % 64) % 64;
}

static void step(void* pool, const void* weights, std::vector<Bytes>& caches, int64_t batch, int64_t length,
                 int64_t position) {
    const int64_t sizes[IRC_NUM_SIZES] = {batch, length, length};
    std::vector<Bytes> memory(IRC_NUM_INPUTS + IRC_NUM_OUTPUTS + 1);
    void *inputs[IRC_NUM_INPUTS], *outputs[IRC_NUM_OUTPUTS];
    for (int i = 0; i < IRC_NUM_INPUTS; ++i) {
        const int64_t bytes = irc_input_bytes(i, sizes);
        inputs[i] = i < 3 ? aligned(memory[i], bytes) : aligned(caches[i - 3], bytes);
    }
    for (int64_t i = 0; i < batch * length; ++i) static_cast<int64_t*>(inputs[1])[i] = position + i % length;
    for (int i = 0; i < IRC_NUM_OUTPUTS; ++i)
        outputs[i] = aligned(memory[IRC_NUM_INPUTS + i], irc_output_bytes(i, sizes));
    irc_run(pool, sizes, inputs, outputs, weights, aligned(memory.back(), irc_arena_bytes(sizes, 4)));
}

int main(int, char** argv) {
    std::FILE* file = std::fopen(argv[1], "rb");
    Bytes storage;
    void* weights = aligned(storage, IRC_WEIGHT_BYTES);
    if (file == nullptr || std::fread(weights, 1, IRC_WEIGHT_BYTES, file) != IRC_WEIGHT_BYTES) return 3;
    std::fclose(file);
    void* pool = irc_pool_create(4);
    std::vector<Bytes> caches(IRC_NUM_INPUTS);
    step(pool, weights, caches, 1, 7, 0);
    for (int64_t i = 0; i < 4; ++i) step(pool, weights, caches, 1, 1, 7 + i);
    step(pool, weights, caches, 2, 3, 11);
    irc_pool_destroy(pool);
    return 0;
}
