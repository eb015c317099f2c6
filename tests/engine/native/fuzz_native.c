/* Random programs on random tensors, for the sanitizers: fuzz_native SEED SECONDS.
 *
 * Each buffer is allocated to the byte, at an odd offset, so that one byte read or written beside it is noticed. All
 * capabilities of the machine must store the same: NaN apart, of which it is not said which.
 */
#define _POSIX_C_SOURCE 200809L
#include "language.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 6, MOST_LINES = 24 };

static uint64_t state;

static uint64_t draw(void)
{
    uint64_t z = state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static size_t below(size_t limit) { return (size_t)(draw() % limit); }

/* Nearly always below a limit, at times the limit itself, at times anything. */
static uint16_t small_or_any(size_t limit)
{
    size_t kind = below(60);
    return (uint16_t)(kind == 0 ? draw() : kind == 1 ? limit : below(limit));
}

static struct instruction any_instruction(void)
{
    struct instruction it;
    it.operation = small_or_any(below(3) ? OPERATION_COUNT : 5);
    it.kind = small_or_any(KINDS);
    it.out = small_or_any(MOST);
    it.a = small_or_any(MOST);
    it.b = small_or_any(MOST);
    it.c = small_or_any(MOST);
    it.flags = below(2) ? 0 : small_or_any(16);
    it.extra = small_or_any(below(8) ? STORED_TYPES : MOST_BINS + 1);
    return it;
}

/* A program that passes the check up to its last line, or a few that do not. */
static int make_program(struct program *program)
{
    char message[200];
    size_t lines = 1 + below(MOST_LINES);
    struct instruction kept[MOST_LINES];
    for (size_t length = 0, tries = 0; tries < 400; tries++) {
        memset(program, 0, sizeof *program);
        program->registers = MOST;
        program->numbers = MOST;
        program->inputs = MOST;
        program->outputs = program->accumulators = 0;
        program->histograms = 0;
        kept[length] = any_instruction();
        program->length = length + 1;
        program->instructions = malloc(program->length * sizeof(struct instruction));
        memcpy(program->instructions, kept, program->length * sizeof(struct instruction));
        for (size_t i = 0; i < program->length; i++) {
            struct instruction *it = &program->instructions[i];
            if (it->operation == OP_store)
                it->out = (uint16_t)program->outputs++;
            if (it->operation >= OP_reduce_sum && it->operation <= OP_reduce_minimum)
                it->out = (uint16_t)program->accumulators++;
            if (it->operation == OP_histogram_upper || it->operation == OP_histogram_window)
                it->out = (uint16_t)program->histograms++;
        }
        int passed = program_check(program, message, sizeof message) == 0;
        if (passed && ++length == lines)
            return 0;
        if (!passed && strlen(message) == 0)
            abort();
        program_clear(program);
    }
    return -1;
}

/* To the byte, behind an odd number of bytes that nobody may touch. */
static uint8_t *exact(size_t size, size_t offset, uint8_t **whole)
{
    *whole = malloc(size + offset + 1);
    return *whole + offset;
}

static void fill(uint8_t *bytes, size_t size)
{
    int calm = below(2) != 0;
    for (size_t i = 0; i < size; i++)
        bytes[i] = (uint8_t)(calm ? 0x30 + draw() % 16 : draw());
}

static double value_of(const uint8_t *bytes, size_t size)
{
    double wide;
    float narrow;
    if (size == 8) {
        memcpy(&wide, bytes, 8);
        return wide;
    }
    memcpy(&narrow, bytes, 4);
    return narrow;
}

/* Equal, or both NaN: only wide types are looked at, the others have their tests. */
static void compare(const uint8_t *a, const uint8_t *b, size_t count, size_t size)
{
    for (size_t i = 0; size >= 4 && i < count; i++) {
        const uint8_t *x = a + i * size, *y = b + i * size;
        if (memcmp(x, y, size) != 0 && !(isnan(value_of(x, size)) && isnan(value_of(y, size)))) {
            printf("capabilities differ at element %zu of %zu: %a and %a\n", i, count, value_of(x, size),
                   value_of(y, size));
            abort();
        }
    }
}

enum { FAR = 1 << 19 };

/* Some bytes in the file, at a place that is as odd as can be. */
static struct part filed(int file, const uint8_t *bytes, size_t size, uint64_t *end)
{
    struct part part = {file, *end + below(FAR)};
    if (bytes && pwrite(file, bytes, size, (off_t)part.offset) != (ssize_t)size)
        abort();
    *end = part.offset + size;
    return part;
}

/* Half of the inputs and outputs lie in a file: the program must not tell the difference. */
static void run_with_files(const struct program *program, struct call call, const struct capability *capability,
                           uint8_t **outputs)
{
    struct part parts[MOST + MOST_LINES];
    uint64_t end = 0;
    FILE *file = tmpfile();
    if (!file)
        abort();
    for (size_t i = 0; i < MOST + program->outputs; i++) {
        size_t size = call.count * (i < MOST ? program->input_sizes[i] : program->output_sizes[i - MOST]);
        parts[i].descriptor = NO_FILE;
        if (below(2))
            parts[i] = filed(fileno(file), i < MOST ? call.inputs[i] : NULL, size, &end);
    }
    call.input_parts = parts;
    call.output_parts = parts + MOST;
    if (run_program(program, &call, capability) < 0)
        abort();
    for (size_t i = 0; i < program->outputs; i++) {
        const struct part *part = &parts[MOST + i];
        size_t size = call.count * program->output_sizes[i];
        if (part->descriptor != NO_FILE &&
            pread(part->descriptor, outputs[i], size, (off_t)part->offset) != (ssize_t)size)
            abort();
    }
    fclose(file);
}

static void run_everywhere(const struct program *program, size_t count)
{
    uint8_t *held[2 * MOST_LINES + MOST], *inputs[MOST], *outputs[MOST_LINES], *first[MOST_LINES];
    uint8_t loads[MOST_LINES], stores[MOST_LINES];
    uint64_t checksums[MOST_LINES];
    struct part in_memory[MOST + MOST_LINES];
    for (size_t i = 0; i < MOST + MOST_LINES; i++)
        in_memory[i].descriptor = NO_FILE;
    double numbers[MOST];
    size_t used = 0, chunks = (count + CHUNK - 1) / CHUNK;
    double *sums = malloc(chunks * program->accumulators * sizeof(double));
    uint32_t *counts = calloc(program->histogram_begins[program->histograms] + 1, sizeof(uint32_t));
    for (size_t i = 0; i < MOST; i++) {
        size_t size = count * program->input_sizes[i];
        inputs[i] = exact(size, below(8), &held[used++]);
        fill(inputs[i], size);
        numbers[i] = below(2) ? (double)below(1000) / 7 - 50 : value_of((uint8_t *)&(uint64_t){draw()}, 8);
    }
    for (size_t i = 0; i < program->outputs; i++)
        first[i] = NULL;
    const struct capability *capability;
    for (int place = 0; (capability = capability_at(place)) != NULL; place++) {
        size_t before = used;
        for (size_t i = 0; i < program->outputs; i++)
            outputs[i] = exact(count * program->output_sizes[i], below(8), &held[used++]);
        memset(loads, 0, sizeof loads);
        memset(stores, 0, sizeof stores);
        memset(checksums, 0, sizeof checksums);
        struct call call = {
            .count = count,
            .start = 8 * below(1000),
            .numbers = numbers,
            .inputs = (const uint8_t *const *)inputs,
            .outputs = outputs,
            .input_parts = in_memory,
            .output_parts = in_memory,
            .sums = sums,
            .counts = counts,
            .loads = loads,
            .stores = stores,
            .checksums = checksums,
        };
        if (below(4) == 0)
            run_with_files(program, call, capability, outputs);
        else if (run_program(program, &call, capability) < 0)
            abort();
        for (size_t i = 0; i < program->outputs; i++) {
            if (first[i])
                compare(first[i], outputs[i], count, program->output_sizes[i]);
            else
                first[i] = outputs[i];
        }
        if (place > 0)
            while (used > before)
                free(held[--used]);
    }
    while (used > 0)
        free(held[--used]);
    free(sums);
    free(counts);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    state = strtoull(argv[1], NULL, 10);
    time_t end = time(NULL) + atol(argv[2]);
    size_t programs = 0, refused = 0;
    for (int i = 0; i < PIECE; i++)
        checksum_places[i] = draw() | 1;
    while (time(NULL) < end) {
        struct program program;
        if (make_program(&program) < 0) {
            refused++;
            continue;
        }
        size_t size = below(40);
        size_t count = size == 0 ? CHUNK + below(CHUNK) : size == 1 ? CHUNK : size < 10 ? below(5000) : below(100);
        run_everywhere(&program, count);
        program_clear(&program);
        programs++;
    }
    printf("%zu programs ran, %zu were given up\n", programs, refused);
    return programs == 0;
}
