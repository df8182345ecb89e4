/* A saved program's step in a thread whose stack has 64 KB, and nothing below: argv[1] is weights.bin, the others are
 * sizes. Linked with the program's object, so what that keeps for each thread would come out of the stack, too. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "program.h"

enum { STACK = 64 << 10, GUARD = 16 << 20 };

struct Step {
    void *weights, *arena, *pool;
    void *inputs[IRC_NUM_INPUTS], *outputs[IRC_NUM_OUTPUTS];
    int64_t sizes[IRC_NUM_SIZES + 1];
};

static void *allocate(int64_t bytes) {
    void *memory = aligned_alloc(64, (size_t)(bytes + 64) / 64 * 64);
    return memset(memory, 0, (size_t)(bytes + 64) / 64 * 64);
}

static void *run(void *context) {
    struct Step *step = context;
    irc_run(step->pool, step->sizes, step->inputs, step->outputs, step->weights, step->arena);
    return NULL;
}

int main(int argc, char **argv) {
    struct Step step = {0};
    if (argc != 2 + IRC_NUM_SIZES) return 2;
    for (int i = 0; i < IRC_NUM_SIZES; ++i) step.sizes[i] = atoll(argv[2 + i]);
    FILE *file = fopen(argv[1], "rb");
    step.weights = allocate(IRC_WEIGHT_BYTES);
    if (file == NULL || fread(step.weights, 1, IRC_WEIGHT_BYTES, file) != IRC_WEIGHT_BYTES) return 3;
    fclose(file);
    for (int i = 0; i < IRC_NUM_INPUTS; ++i) step.inputs[i] = allocate(irc_input_bytes(i, step.sizes));
    for (int i = 0; i < IRC_NUM_OUTPUTS; ++i) step.outputs[i] = allocate(irc_output_bytes(i, step.sizes));
    step.pool = irc_pool_create(1); /* the caller does all of the work */
    step.arena = allocate(irc_arena_bytes(step.sizes, 1));

    char *memory = mmap(NULL, GUARD + STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    pthread_attr_t attributes;
    pthread_t thread;
    if (memory == MAP_FAILED || mprotect(memory + GUARD, STACK, PROT_READ | PROT_WRITE) != 0) return 4;
    pthread_attr_init(&attributes);
    if (pthread_attr_setstack(&attributes, memory + GUARD, STACK) != 0) return 5;
    if (pthread_create(&thread, &attributes, run, &step) != 0) return 6;
    pthread_join(thread, NULL);
    irc_pool_destroy(step.pool);
    return 0;
}
