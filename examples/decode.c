/* Decodes with a compiled language model, without Python:
 *
 *     irc compile demo --target cpu -o demo.irca
 *     cc -O2 -I demo.irca examples/decode.c demo.irca/program.avx2.so -Wl,-rpath,$PWD/demo.irca -o decode
 *     ./decode demo.irca/weights.bin 16 100 200 300        # 16 new tokens after the prompt 100 200 300
 *
 * The program is a step over a contiguous key-value cache (the default): tokens[B, S], positions[B, S] and
 * logit_indices[B, R] in front of the caches, logits[B, R, V] out; caches are written in place.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "program.h"

int main(int argc, char **argv) {
    if (argc < 4) return fprintf(stderr, "usage: decode weights.bin new_tokens token...\n"), 2;
    const int count = argc - 3, wanted = atoi(argv[2]), file = open(argv[1], O_RDONLY);
    const void *weights = mmap(NULL, IRC_WEIGHT_BYTES, PROT_READ, MAP_SHARED, file, 0);
    if (file < 0 || weights == MAP_FAILED) return perror(argv[1]), 1;

    int64_t *tokens = calloc(count, 8), *positions = calloc(count, 8), last = count - 1;
    for (int i = 0; i < count; ++i) tokens[i] = atoll(argv[3 + i]), positions[i] = i;
    int64_t sizes[3] = {1, count, 1}; /* B, S, R */
    void *inputs[IRC_NUM_INPUTS] = {tokens, positions, &last}, *outputs[IRC_NUM_OUTPUTS] = {0};
    for (int i = 3; i < IRC_NUM_INPUTS; ++i) inputs[i] = calloc(irc_input_bytes(i, sizes), 1);
    const int64_t vocabulary = irc_output_bytes(0, sizes) / sizeof(float);
    float *logits = outputs[0] = malloc(vocabulary * sizeof(float));
    void *pool = irc_pool_create(2), *arena = aligned_alloc(64, (irc_arena_bytes(sizes, 2) + 64) / 64 * 64);

    for (int made = 0; made < wanted; ++made) {
        irc_run(pool, sizes, inputs, outputs, weights, arena);
        int64_t best = 0;
        for (int64_t v = 1; v < vocabulary; ++v) best = logits[v] > logits[best] ? v : best;
        printf("%lld%c", (long long)best, made + 1 == wanted ? '\n' : ' ');
        /* From now on one token a step, behind all others. */
        tokens[0] = best, positions[0] = count + made, last = 0, sizes[1] = 1;
    }
    irc_pool_destroy(pool);
    return 0;
}
