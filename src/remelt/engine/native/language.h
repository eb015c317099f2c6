/* The language that the native executor runs, and what its parts say to each other.
 *
 * A program is a straight line of instructions over registers. A register holds BLOCK elements of one kind, float32 or
 * float64; the interpreter takes the tensors block by block and runs every instruction on a block before the next one
 * begins, so that what passes between instructions stays in the first cache.
 */
#ifndef REMELT_LANGUAGE_H
#define REMELT_LANGUAGE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "stored numbers are little endian: the native executor is for machines that are so, too"
#endif

enum {
    BLOCK = 512,             /* elements of a register; divides CHUNK, is a multiple of LANES */
    CHUNK = 1 << 16,         /* elements of a tensor that one row of partial results covers */
    LANES = 16,              /* a sum's element number i is added to lane i % LANES */
    UPPER_BINS = 1 << 15,    /* of a histogram of upper halves: magnitudes have no sign */
    ROW = 1 << 8,            /* a histogram's window begins at a multiple of it, which float32 holds exactly */
    MOST_BINS = 20,          /* the widest window, as a power of two */
    PIECE = 1 << 12,         /* words for which the checksum's numbers of places are drawn */
    ALIGNMENT = 64,          /* bytes; the widest vector */
    MOST_INSTRUCTIONS = 1 << 20
};

#if defined(_WIN32)
#define WITH_FILES 0 /* no positioned reads and writes */
#else
#define WITH_FILES 1
#endif

enum { NO_FILE = -1 };

/* Where bytes of an open file begin; without a file, they lie in memory. */
struct part {
    int descriptor;
    uint64_t offset;
};

enum kind { SINGLE, DOUBLE, KINDS };

enum stored { STORED_F64, STORED_F32, STORED_F16, STORED_BF16, STORED_F8_E4M3, STORED_F8_E5M2, STORED_TYPES };

enum { OPAQUE = STORED_TYPES }; /* a type without NaN and infinities, for inspect() */

/* Operations: name, number of operands. The order is that of the codes. */
#define OPERATIONS(ONE)                                                                                                \
    ONE(load, 0)                                                                                                       \
    ONE(store, 1)                                                                                                      \
    ONE(widen, 1)                                                                                                      \
    ONE(narrow, 1)                                                                                                     \
    ONE(round, 1)                                                                                                      \
    ONE(copy, 1)                                                                                                       \
    ONE(neg, 1)                                                                                                        \
    ONE(abs, 1)                                                                                                        \
    ONE(sqrt, 1)                                                                                                       \
    ONE(sign, 1)                                                                                                       \
    ONE(logical_not, 1)                                                                                                \
    ONE(add, 2)                                                                                                        \
    ONE(sub, 2)                                                                                                        \
    ONE(mul, 2)                                                                                                        \
    ONE(div, 2)                                                                                                        \
    ONE(minimum, 2)                                                                                                    \
    ONE(maximum, 2)                                                                                                    \
    ONE(lt, 2)                                                                                                         \
    ONE(le, 2)                                                                                                         \
    ONE(gt, 2)                                                                                                         \
    ONE(ge, 2)                                                                                                         \
    ONE(eq, 2)                                                                                                         \
    ONE(ne, 2)                                                                                                         \
    ONE(logical_and, 2)                                                                                                \
    ONE(logical_or, 2)                                                                                                 \
    ONE(logical_xor, 2)                                                                                                \
    ONE(fma, 3)                                                                                                        \
    ONE(lerp, 3)                                                                                                       \
    ONE(select, 3)                                                                                                     \
    ONE(reduce_sum, 1)                                                                                                 \
    ONE(reduce_product, 2)                                                                                             \
    ONE(reduce_maximum, 1)                                                                                             \
    ONE(reduce_minimum, 1)                                                                                             \
    ONE(histogram_upper, 1)                                                                                            \
    ONE(histogram_window, 2)

#define ENUMERATOR(name, operands) OP_##name,
enum operation { OPERATIONS(ENUMERATOR) OPERATION_COUNT };
#undef ENUMERATOR

static inline int is_reduction(unsigned operation)
{
    return operation == OP_reduce_sum || operation == OP_reduce_product || operation == OP_reduce_maximum ||
           operation == OP_reduce_minimum;
}

enum flag { NUMBER_A = 1, NUMBER_B = 2, NUMBER_C = 4, WITH_CHECKSUM = 8 };

/* An instruction as it comes: eight numbers of 16 bits. */
struct instruction {
    uint16_t operation, kind, out, a, b, c, flags, extra;
};

/* A program whose every index and type was checked. */
struct program {
    size_t length, registers, numbers, inputs, outputs, accumulators, histograms;
    size_t loads, stores;
    size_t *histogram_begins;       /* where the counts of each histogram begin; after the last, how many there are */
    size_t element;                 /* bytes that a register keeps for an element: 4, or 8 where a float64 occurs */
    size_t *input_sizes;            /* bytes of the elements that are loaded from each input; 0 where none are */
    size_t *output_sizes;           /* the same of those that are stored to each output */
    int with_checksums;
    size_t checksum_step;           /* a call with checksums begins at multiples of it, in elements */
    struct instruction *instructions;
};

/* What run_program returns; of the last two, call.error says why: 0 for a file that ended. */
enum { NO_MEMORY = -1, READING_FAILED = -2, WRITING_FAILED = -3 };

/* One call: where a checked program finds its data. The caller has checked every length. */
struct call {
    size_t count, start;
    const double *numbers;
    const uint8_t *const *inputs;
    uint8_t *const *outputs;
    const struct part *input_parts, *output_parts; /* the files that take the place of memory, if any */
    double *sums;           /* a row of accumulators for each CHUNK */
    uint32_t *counts;       /* of all histograms, to be added to */
    uint8_t *loads;         /* found for each load: 1 where NaN or an infinity was met in the stored values */
    uint8_t *stores;        /* the same for each store's results */
    uint64_t *checksums;    /* found for each store */
    uint64_t reading, writing; /* found: nanoseconds that files took */
    int error;              /* found: the system's number of what failed */
};

/* What one instruction works on in one block. */
struct work {
    void *out;
    const void *a, *b, *c; /* a register, or one vector that repeats a number */
    unsigned fixed;        /* the flags that say which operands are numbers */
    unsigned bins;         /* of a window, as a power of two */
};

/* Runs one instruction on a block; whether NaN or an infinity was met, where it is one that looks. */
typedef int (*action)(const struct work *work, size_t count);

/* What one level of a processor's instruction set brings. */
struct capability {
    const char *name;
    action actions[OPERATION_COUNT][KINDS];
    action loads[STORED_TYPES][KINDS];
    action stores[STORED_TYPES][KINDS];
    action rounds[STORED_TYPES][KINDS];
    int (*finite[STORED_TYPES])(const uint8_t *values, size_t count);
    uint64_t (*weigh)(const uint8_t *words, const uint64_t *places, size_t count);
};

extern const struct capability capability_plain;
#if defined(__x86_64__) || defined(_M_X64)
#define REMELT_X86 1
extern const struct capability capability_avx2;
extern const struct capability capability_avx512;
#else
#define REMELT_X86 0
#endif

/* program.c */
extern const size_t stored_sizes[STORED_TYPES];
extern const char *const operation_names[OPERATION_COUNT];
extern const unsigned char operand_counts[OPERATION_COUNT];
int program_check(struct program *program, char *message, size_t room); /* 0, or -1 and the message */
void program_clear(struct program *program);

/* interpreter.c */
const struct capability *capability_at(int place); /* from the best that this machine has; NULL after the last */
int run_program(const struct program *program, struct call *call, const struct capability *capability);
uint64_t checksum_bytes(const uint8_t *bytes, size_t length, uint64_t word, const struct capability *capability);
extern uint64_t checksum_places[PIECE];

#endif
