/* The check of a program: after it, no instruction reaches outside of what a call brings. */
#include "language.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const size_t stored_sizes[STORED_TYPES] = {8, 4, 2, 2, 1, 1};

#define NAME(name, operands) #name,
const char *const operation_names[OPERATION_COUNT] = {OPERATIONS(NAME)};
#undef NAME

#define OPERANDS(name, operands) operands,
const unsigned char operand_counts[OPERATION_COUNT] = {OPERATIONS(OPERANDS)};
#undef OPERANDS

enum { UNDEFINED = KINDS };

/* What the check knows at one instruction. */
struct check {
    struct program *program;
    uint8_t *kinds;        /* of what each register holds so far */
    uint8_t *accumulated;  /* accumulators that have their instruction */
    size_t *counted;       /* how many counts each histogram has; 0 before its instruction */
    size_t place;
    char *message;
    size_t room;
};

static int refuse(const struct check *check, const char *format, ...)
{
    const struct instruction *it = &check->program->instructions[check->place];
    const char *name = it->operation < OPERATION_COUNT ? operation_names[it->operation] : "unknown";
    int length = snprintf(check->message, check->room, "instruction %zu (%s) ", check->place, name);
    if (length >= 0 && (size_t)length < check->room) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(check->message + length, check->room - (size_t)length, format, arguments);
        va_end(arguments);
    }
    return -1;
}

static int check_operand(const struct check *check, char letter, uint16_t index, int is_number, unsigned kind)
{
    const struct program *program = check->program;
    if (is_number) {
        if (index >= program->numbers)
            return refuse(check, "takes number %u as %c, but there are %zu", index, letter, program->numbers);
        return 0;
    }
    if (index >= program->registers)
        return refuse(check, "takes register %u as %c, but there are %zu", index, letter, program->registers);
    if (check->kinds[index] == UNDEFINED)
        return refuse(check, "takes register %u as %c before anything is in it", index, letter);
    if (check->kinds[index] != kind)
        return refuse(check, "takes register %u as %c, but that holds the other kind", index, letter);
    return 0;
}

static int check_operands(const struct check *check, unsigned kind)
{
    const struct instruction *it = &check->program->instructions[check->place];
    unsigned count = operand_counts[it->operation];
    if (count > 0 && check_operand(check, 'a', it->a, it->flags & NUMBER_A, kind) < 0)
        return -1;
    if (count > 1 && check_operand(check, 'b', it->b, it->flags & NUMBER_B, kind) < 0)
        return -1;
    if (count > 2 && check_operand(check, 'c', it->c, it->flags & NUMBER_C, kind) < 0)
        return -1;
    return 0;
}

static int check_stored(const struct check *check)
{
    const struct instruction *it = &check->program->instructions[check->place];
    if (it->extra >= STORED_TYPES)
        return refuse(check, "has stored type %u, but there are %d", it->extra, STORED_TYPES);
    return 0;
}

static int check_load(const struct check *check)
{
    struct program *program = check->program;
    const struct instruction *it = &program->instructions[check->place];
    if (check_stored(check) < 0)
        return -1;
    if (it->a >= program->inputs)
        return refuse(check, "reads input %u, but there are %zu", it->a, program->inputs);
    size_t *size = &program->input_sizes[it->a];
    if (*size && *size != stored_sizes[it->extra])
        return refuse(check, "reads input %u in elements of another size than before", it->a);
    *size = stored_sizes[it->extra];
    program->loads++;
    return 0;
}

static int check_store(const struct check *check)
{
    struct program *program = check->program;
    const struct instruction *it = &program->instructions[check->place];
    if (check_stored(check) < 0 || check_operands(check, it->kind) < 0)
        return -1;
    if (it->out >= program->outputs)
        return refuse(check, "writes output %u, but there are %zu", it->out, program->outputs);
    if (program->output_sizes[it->out])
        return refuse(check, "writes output %u a second time", it->out);
    program->output_sizes[it->out] = stored_sizes[it->extra];
    if (it->flags & WITH_CHECKSUM) {
        program->with_checksums = 1;
        if (program->checksum_step < 8 / stored_sizes[it->extra])
            program->checksum_step = 8 / stored_sizes[it->extra];
    }
    program->stores++;
    return 0;
}

static int check_reduction(const struct check *check)
{
    const struct program *program = check->program;
    const struct instruction *it = &program->instructions[check->place];
    if (check_operands(check, it->kind) < 0)
        return -1;
    if (it->out >= program->accumulators)
        return refuse(check, "adds to accumulator %u, but there are %zu", it->out, program->accumulators);
    if (it->operation == OP_reduce_product && (it->kind != SINGLE || it->flags & (NUMBER_A | NUMBER_B)))
        return refuse(check, "adds up products of float32 registers only");
    if (check->accumulated[it->out])
        return refuse(check, "adds to accumulator %u, which has another instruction", it->out);
    check->accumulated[it->out] = 1;
    return 0;
}

static int check_histogram(const struct check *check)
{
    const struct program *program = check->program;
    const struct instruction *it = &program->instructions[check->place];
    if (it->kind != SINGLE)
        return refuse(check, "counts patterns of float32 only");
    if (it->flags != (it->operation == OP_histogram_window ? NUMBER_B : 0))
        return refuse(check, "counts a register's values, and begins its window at a number");
    if (check_operands(check, SINGLE) < 0)
        return -1;
    if (it->out >= program->histograms)
        return refuse(check, "counts into histogram %u, but there are %zu", it->out, program->histograms);
    if (check->counted[it->out])
        return refuse(check, "counts into histogram %u, which has another instruction", it->out);
    if (it->operation == OP_histogram_window && it->extra > MOST_BINS)
        return refuse(check, "has 2 to the power of %u bins, but %d is the most", it->extra, MOST_BINS);
    check->counted[it->out] = it->operation == OP_histogram_window ? ((size_t)1 << it->extra) + 1 : UPPER_BINS;
    return 0;
}

static int check_instruction(const struct check *check)
{
    const struct program *program = check->program;
    const struct instruction *it = &program->instructions[check->place];
    unsigned from = it->kind;
    if (it->operation >= OPERATION_COUNT)
        return refuse(check, "has code %u, but there are %d", it->operation, OPERATION_COUNT);
    if (it->kind >= KINDS)
        return refuse(check, "has kind %u, but there are %d", it->kind, KINDS);
    if (it->flags & ~(NUMBER_A | NUMBER_B | NUMBER_C | WITH_CHECKSUM))
        return refuse(check, "has flags %u, of which some are unknown", it->flags);
    switch (it->operation) {
    case OP_store:
        return check_store(check);
    case OP_reduce_sum:
    case OP_reduce_product:
    case OP_reduce_maximum:
    case OP_reduce_minimum:
        return check_reduction(check);
    case OP_histogram_upper:
    case OP_histogram_window:
        return check_histogram(check);
    case OP_load:
        if (check_load(check) < 0)
            return -1;
        break;
    case OP_widen:
        if (it->kind != DOUBLE)
            return refuse(check, "makes float64: its kind is 1");
        from = SINGLE;
        break;
    case OP_narrow:
        if (it->kind != SINGLE)
            return refuse(check, "makes float32: its kind is 0");
        from = DOUBLE;
        break;
    case OP_round:
        if (check_stored(check) < 0)
            return -1;
        break;
    default:
        break;
    }
    if (check_operands(check, from) < 0)
        return -1;
    if (it->out >= program->registers)
        return refuse(check, "writes register %u, but there are %zu", it->out, program->registers);
    check->kinds[it->out] = (uint8_t)it->kind;
    return 0;
}

static int check_all(struct check *check)
{
    struct program *program = check->program;
    for (check->place = 0; check->place < program->length; check->place++) {
        if (check_instruction(check) < 0)
            return -1;
        if (program->instructions[check->place].kind == DOUBLE)
            program->element = 8;
    }
    for (size_t place = 0; place < program->outputs; place++)
        if (program->output_sizes[place] == 0) {
            snprintf(check->message, check->room, "nothing is stored to output %zu", place);
            return -1;
        }
    for (size_t place = 0; place < program->accumulators; place++)
        if (!check->accumulated[place]) {
            snprintf(check->message, check->room, "nothing is added to accumulator %zu", place);
            return -1;
        }
    for (size_t place = 0; place < program->histograms; place++) {
        if (!check->counted[place]) {
            snprintf(check->message, check->room, "nothing is counted into histogram %zu", place);
            return -1;
        }
        program->histogram_begins[place + 1] = program->histogram_begins[place] + check->counted[place];
    }
    return 0;
}

int program_check(struct program *program, char *message, size_t room)
{
    struct check check = {program, NULL, NULL, NULL, 0, message, room};
    int result = -1;
    program->loads = program->stores = 0;
    program->element = 4;
    program->with_checksums = 0;
    program->checksum_step = 1;
    program->input_sizes = calloc(program->inputs + 1, sizeof(size_t));
    program->output_sizes = calloc(program->outputs + 1, sizeof(size_t));
    program->histogram_begins = calloc(program->histograms + 1, sizeof(size_t));
    check.kinds = malloc(program->registers + 1);
    check.accumulated = calloc(program->accumulators + 1, 1);
    check.counted = calloc(program->histograms + 1, sizeof(size_t));
    if (program->input_sizes && program->output_sizes && program->histogram_begins && check.kinds &&
        check.accumulated && check.counted) {
        memset(check.kinds, UNDEFINED, program->registers + 1);
        result = check_all(&check);
    } else {
        snprintf(message, room, "there is no memory for the check of the program");
    }
    free(check.kinds);
    free(check.accumulated);
    free(check.counted);
    return result;
}

void program_clear(struct program *program)
{
    free(program->input_sizes);
    free(program->output_sizes);
    free(program->histogram_begins);
    free(program->instructions);
    program->input_sizes = program->output_sizes = program->histogram_begins = NULL;
    program->instructions = NULL;
}
