/* Runs checked programs, block by block, and adds up checksums. */
#include "stages.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if REMELT_X86
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

uint64_t checksum_places[PIECE];

/* ---- What this machine has. ---- */

#if REMELT_X86
static void ask_processor(unsigned leaf, unsigned found[4])
{
#if defined(_MSC_VER)
    int values[4];
    __cpuidex(values, (int)leaf, 0);
    for (int i = 0; i < 4; i++)
        found[i] = (unsigned)values[i];
#else
    if (!__get_cpuid_count(leaf, 0, &found[0], &found[1], &found[2], &found[3]))
        found[0] = found[1] = found[2] = found[3] = 0;
#endif
}

/* The registers that the operating system saves. */
static uint64_t saved_registers(void)
{
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
#endif
}

static int has_all(unsigned found, unsigned wanted) { return (found & wanted) == wanted; }

static void find_vectors(int *avx2, int *avx512)
{
    unsigned basic[4], extended[4];
    const unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
    *avx2 = *avx512 = 0;
    ask_processor(1, basic);
    if (!has_all(basic[2], fma | osxsave | avx | f16c))
        return;
    ask_processor(7, extended);
    uint64_t saved = saved_registers();
    *avx2 = (saved & 0x6) == 0x6 && has_all(extended[1], 1u << 5);
    *avx512 = *avx2 && (saved & 0xe6) == 0xe6 && has_all(extended[1], f | dq | bw | vl);
}
#endif

const struct capability *capability_at(int place)
{
    const struct capability *found[3];
    int count = 0;
#if REMELT_X86
    int avx2, avx512;
    find_vectors(&avx2, &avx512);
    if (avx512)
        found[count++] = &capability_avx512;
    if (avx2)
        found[count++] = &capability_avx2;
#endif
    found[count++] = &capability_plain;
    return place < count ? found[place] : NULL;
}

/* ---- Checksums: see core/checksum.py. ---- */

static uint64_t piece_multiplier(uint64_t piece)
{
    uint64_t z = (piece + 1) * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return (z ^ (z >> 31)) | 1;
}

uint64_t checksum_bytes(const uint8_t *bytes, size_t length, uint64_t word, const struct capability *capability)
{
    uint64_t total = 0;
    size_t left = length / 8;
    while (left > 0) {
        size_t within = (size_t)(word % PIECE), count = PIECE - within < left ? PIECE - within : left;
        total += capability->weigh(bytes, checksum_places + within, count) * piece_multiplier(word / PIECE);
        bytes += 8 * count;
        word += count;
        left -= count;
    }
    if (length % 8) {
        uint64_t last = 0;
        memcpy(&last, bytes, length % 8);
        total += last * checksum_places[word % PIECE] * piece_multiplier(word / PIECE);
    }
    return total;
}

/* ---- Programs. ---- */

/* A number, repeated: as much as the widest vectors read. */
struct repeated {
    double doubles[LANES];
    float floats[LANES];
};

/* One instruction of a call, with its addresses. */
struct step {
    struct work work;
    action run;
    uint8_t operation;
    uint8_t with_checksum;
    size_t size;         /* bytes of a stored element */
    struct stage *stage; /* of the file that a load or store reads or writes, if it is one */
    uint8_t *found;      /* where a load or store tells of NaN and infinities */
    uint64_t *checksum;
};

/* What one call allocates, in one piece. */
struct scratch {
    void *memory;
    struct step *steps;
    struct repeated *numbers;
    double *lanes; /* LANES for each accumulator */
    struct stage *stages; /* one for each input, then for each output; those of memory stay empty */
    uint8_t *registers;
    size_t stride;
};

static size_t aligned(size_t size) { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* The bytes of an input's or output's stage: 0 for memory. */
static size_t stage_room(const struct program *program, const struct call *call, size_t place)
{
    int is_output = place >= program->inputs;
    if (is_output)
        place -= program->inputs;
    if ((is_output ? call->output_parts : call->input_parts)[place].descriptor == NO_FILE)
        return 0;
    size_t size = is_output ? program->output_sizes[place] : program->input_sizes[place];
    size_t most = is_output ? STAGE_BYTES + BLOCK * size : STAGE_ELEMENTS * size;
    return aligned(least(most, call->count * size));
}

static int scratch_allocate(struct scratch *scratch, const struct program *program, const struct call *call)
{
    size_t steps = aligned(program->length * sizeof(struct step));
    size_t numbers = aligned(program->numbers * sizeof(struct repeated));
    size_t lanes = aligned(program->accumulators * LANES * sizeof(double));
    size_t memories = program->inputs + program->outputs;
    size_t stages = aligned(memories * sizeof(struct stage));
    /* Equal places of registers are a power of two apart: a load never waits for a store that only looks like its own. */
    scratch->stride = BLOCK * program->element;
    size_t registers = aligned(program->registers * scratch->stride);
    size_t total = steps + numbers + lanes + stages + registers + ALIGNMENT;
    for (size_t place = 0; place < memories; place++)
        total += stage_room(program, call, place);
    scratch->memory = malloc(total);
    if (!scratch->memory)
        return NO_MEMORY;
    uint8_t *place = scratch->memory;
    place += (ALIGNMENT - (uintptr_t)place % ALIGNMENT) % ALIGNMENT;
    scratch->steps = (struct step *)place;
    scratch->numbers = (struct repeated *)(place += steps);
    scratch->lanes = (double *)(place += numbers);
    scratch->stages = (struct stage *)(place += lanes);
    scratch->registers = place += stages;
    place += registers;
    for (size_t i = 0; i < memories; i++) {
        const struct part *part =
            i < program->inputs ? &call->input_parts[i] : &call->output_parts[i - program->inputs];
        stage_begin(&scratch->stages[i], *part, place);
        place += stage_room(program, call, i);
    }
    return 0;
}

static void repeat_numbers(struct repeated *out, const double *numbers, size_t count)
{
    for (size_t place = 0; place < count; place++)
        for (size_t i = 0; i < LANES; i++) {
            out[place].doubles[i] = numbers[place];
            out[place].floats[i] = (float)numbers[place];
        }
}

static const void *operand(const struct scratch *scratch, uint16_t index, int is_number, unsigned kind)
{
    if (!is_number)
        return scratch->registers + index * scratch->stride;
    const struct repeated *number = &scratch->numbers[index];
    return kind == DOUBLE ? (const void *)number->doubles : (const void *)number->floats;
}

static void set_operands(struct step *step, const struct scratch *scratch, const struct instruction *it)
{
    unsigned kind = it->kind;
    if (it->operation == OP_widen)
        kind = SINGLE;
    if (it->operation == OP_narrow)
        kind = DOUBLE;
    step->work.fixed = it->flags & (NUMBER_A | NUMBER_B | NUMBER_C);
    step->work.a = operand(scratch, it->a, it->flags & NUMBER_A, kind);
    if (operand_counts[it->operation] > 1)
        step->work.b = operand(scratch, it->b, it->flags & NUMBER_B, kind);
    if (operand_counts[it->operation] > 2)
        step->work.c = operand(scratch, it->c, it->flags & NUMBER_C, kind);
}

static struct stage *stage_of(const struct scratch *scratch, size_t place)
{
    struct stage *stage = &scratch->stages[place];
    return stage->part.descriptor == NO_FILE ? NULL : stage;
}

static void prepare_steps(struct scratch *scratch, const struct program *program, const struct call *call,
                          const struct capability *capability)
{
    size_t loads = 0, stores = 0;
    for (size_t place = 0; place < program->length; place++) {
        const struct instruction *it = &program->instructions[place];
        struct step *step = &scratch->steps[place];
        memset(step, 0, sizeof *step);
        step->operation = (uint8_t)it->operation;
        if (it->operation != OP_load)
            set_operands(step, scratch, it);
        step->run = capability->actions[it->operation][it->kind];
        switch (it->operation) {
        case OP_load:
            step->run = capability->loads[it->extra][it->kind];
            step->size = stored_sizes[it->extra];
            step->found = &call->loads[loads++];
            step->work.a = call->inputs[it->a];
            step->stage = stage_of(scratch, it->a);
            step->work.out = scratch->registers + it->out * scratch->stride;
            break;
        case OP_store:
            step->run = capability->stores[it->extra][it->kind];
            step->size = stored_sizes[it->extra];
            step->with_checksum = (it->flags & WITH_CHECKSUM) != 0;
            step->checksum = &call->checksums[stores];
            step->found = &call->stores[stores++];
            step->work.out = call->outputs[it->out];
            step->stage = stage_of(scratch, program->inputs + it->out);
            if (step->stage)
                step->work.out = step->stage->buffer;
            break;
        case OP_reduce_sum:
        case OP_reduce_product:
        case OP_reduce_maximum:
        case OP_reduce_minimum:
            step->work.out = scratch->lanes + it->out * LANES;
            break;
        case OP_histogram_upper:
        case OP_histogram_window:
            step->work.out = call->counts + program->histogram_begins[it->out];
            step->work.bins = it->extra;
            break;
        case OP_round:
            step->run = capability->rounds[it->extra][it->kind];
            step->work.out = scratch->registers + it->out * scratch->stride;
            break;
        default:
            step->work.out = scratch->registers + it->out * scratch->stride;
        }
    }
}

static double nothing_of(uint16_t operation)
{
    return operation == OP_reduce_maximum ? -INFINITY : operation == OP_reduce_minimum ? INFINITY : 0.0;
}

static double combined(uint16_t operation, double a, double b)
{
    if (operation == OP_reduce_sum || operation == OP_reduce_product)
        return a + b;
    if (a != a || b != b)
        return NAN;
    if (operation == OP_reduce_maximum)
        return a > b ? a : b;
    return a < b ? a : b;
}

static void begin_chunk(const struct scratch *scratch, const struct program *program)
{
    for (size_t place = 0; place < program->length; place++) {
        const struct instruction *it = &program->instructions[place];
        for (int i = 0; is_reduction(it->operation) && i < LANES; i++)
            scratch->lanes[it->out * LANES + i] = nothing_of(it->operation);
    }
}

/* The lanes of each accumulator become one number: halves upon halves, so that the shape is always the same. */
static void end_chunk(const struct scratch *scratch, const struct program *program, double *row)
{
    for (size_t place = 0; place < program->length; place++) {
        const struct instruction *it = &program->instructions[place];
        if (!is_reduction(it->operation))
            continue;
        double *lanes = scratch->lanes + it->out * LANES;
        for (int half = LANES / 2; half > 0; half /= 2)
            for (int i = 0; i < half; i++)
                lanes[i] = combined(it->operation, lanes[i], lanes[i + half]);
        row[it->out] = lanes[0] == lanes[0] ? lanes[0] : NAN;
    }
}

/* Reads of each input file what the next blocks load. */
static int fill_stages(const struct scratch *scratch, const struct program *program, struct call *call, size_t done)
{
    size_t count = least(call->count - done, STAGE_ELEMENTS);
    for (size_t place = 0; place < program->inputs; place++) {
        struct stage *stage = stage_of(scratch, place);
        int result = stage ? stage_read(stage, count * program->input_sizes[place], call) : 0;
        if (result < 0)
            return result;
    }
    for (size_t place = 0; place < program->length; place++) {
        struct step *step = &scratch->steps[place];
        if (step->operation == OP_load && step->stage)
            step->work.a = step->stage->buffer;
    }
    return 0;
}

/* Writes what is left of each output file. */
static int empty_stages(const struct scratch *scratch, const struct program *program, struct call *call)
{
    for (size_t place = 0; place < program->outputs; place++) {
        struct stage *stage = stage_of(scratch, program->inputs + place);
        int result = stage ? stage_write(stage, stage->filled, call) : 0;
        if (result < 0)
            return result;
    }
    return 0;
}

static int after_store(struct step *step, struct call *call, size_t size)
{
    struct stage *stage = step->stage;
    step->work.out = (uint8_t *)step->work.out + size;
    if (!stage)
        return 0;
    stage->filled += size;
    if (stage->filled < stage->limit)
        return 0;
    int result = stage_write(stage, stage->limit, call);
    step->work.out = stage->buffer + stage->filled;
    return result;
}

static int run_block(const struct scratch *scratch, const struct program *program, struct call *call, size_t done,
                     size_t count, const struct capability *capability)
{
    struct step *end = scratch->steps + program->length;
    int result = 0;
    for (struct step *step = scratch->steps; step < end && result == 0; step++) {
        int found = step->run(&step->work, count);
        if (step->operation == OP_load) {
            *step->found |= (uint8_t)found;
            step->work.a = (const uint8_t *)step->work.a + step->size * count;
        } else if (step->operation == OP_store) {
            *step->found |= (uint8_t)found;
            if (step->with_checksum) {
                uint64_t word = ((uint64_t)call->start + done) * step->size / 8;
                *step->checksum += checksum_bytes(step->work.out, step->size * count, word, capability);
            }
            result = after_store(step, call, step->size * count);
        }
    }
    return result;
}

int run_program(const struct program *program, struct call *call, const struct capability *capability)
{
    struct scratch scratch;
    int result = scratch_allocate(&scratch, program, call);
    if (result < 0)
        return result;
    repeat_numbers(scratch.numbers, call->numbers, program->numbers);
    prepare_steps(&scratch, program, call, capability);
    for (size_t done = 0; done < call->count && result == 0;) {
        size_t count = least(call->count - done, BLOCK);
        if (done % STAGE_ELEMENTS == 0 && (result = fill_stages(&scratch, program, call, done)) < 0)
            break;
        if (program->accumulators && done % CHUNK == 0)
            begin_chunk(&scratch, program);
        result = run_block(&scratch, program, call, done, count, capability);
        done += count;
        if (program->accumulators && (done % CHUNK == 0 || done == call->count))
            end_chunk(&scratch, program, call->sums + (done - 1) / CHUNK * program->accumulators);
    }
    if (result == 0)
        result = empty_stages(&scratch, program, call);
    free(scratch.memory);
    return result;
}
