/* The operations, written once over the vectors of a lanes_*.h that is included before; CAPABILITY names the table. */

/* What stands before a loop over vectors. Of one lane: its turns do not depend on each other, although registers may be
 * the same, so a compiler may make vectors of them. Of many: four turns at once, as the loop itself would cost a third.
 */
#if defined(LANES_OF_ONE) && defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(LANES_OF_ONE) && defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#elif defined(LANES_OF_ONE) && defined(_MSC_VER)
#define INDEPENDENT __pragma(loop(ivdep))
#elif defined(__clang__)
#define INDEPENDENT _Pragma("clang loop unroll_count(4)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC unroll 4")
#else
#define INDEPENDENT
#endif

/* As many float64 as there are lanes of float32. */
typedef struct {
    Doubles low, high;
} Pair;

static inline Pair p_read(const void *from)
{
    Pair pair;
    pair.low = d_read(from);
    pair.high = FLOAT_LANES > 1 ? d_read((const double *)from + DOUBLE_LANES) : pair.low;
    return pair;
}

static inline void p_write(void *to, Pair pair)
{
    d_write(to, pair.low);
    if (FLOAT_LANES > 1)
        d_write((double *)to + DOUBLE_LANES, pair.high);
}

static inline Pair p_from_f(Floats a)
{
    Pair pair;
    pair.low = d_low(a);
    pair.high = FLOAT_LANES > 1 ? d_high(a) : pair.low;
    return pair;
}

static inline Floats f_from_p(Pair pair) { return f_from_d(pair.low, pair.high); }
static inline Floats f_from_f(Floats a) { return a; }
static inline Pair p_from_p(Pair a) { return a; }

/* ---- Stored types: how values are read, made, written, and looked at for NaN and infinities. ---- */

static inline Integers look_double(Integers seen, Pair a)
{
    Integers found = i_most(seen, i_exponents(a.low));
    return FLOAT_LANES > 1 ? i_most(found, i_exponents(a.high)) : found;
}
static inline int found_double(Integers seen) { return i_reaches(seen, 0x7ff00000u); }

static inline Integers look_float(Integers seen, Floats a)
{
    return i_most(seen, i_and(i_from_f(a), i_all(0x7fffffffu)));
}
static inline int found_float(Integers seen) { return i_reaches(seen, 0x7f800000u); }

static inline Shorts look_half(Shorts seen, Shorts a) { return h_most(seen, h_and(a, h_all(0x7fff))); }
static inline int found_half(Shorts seen) { return h_reaches(seen, 0x7c00); }
static inline int found_brain(Shorts seen) { return h_reaches(seen, 0x7f80); }
static inline Shorts look_byte(Shorts seen, Shorts a) { return h_most(seen, h_and(a, h_all(0x7f))); }
static inline int found_e4m3(Shorts seen) { return h_reaches(seen, 0x7f); }
static inline int found_e5m2(Shorts seen) { return h_reaches(seen, 0x7c); }

static inline Floats f_from_brain(Shorts a) { return f_from_i(i_left(i_from_h(a), 16)); }

/* To nearest even; NaN becomes the pattern of ones, as in torch. */
static inline Shorts brain_from_f(Floats a)
{
    Integers bits = i_from_f(a), magnitude = i_and(bits, i_all(0x7fffffffu));
    Integers odd = i_and(i_right(bits, 16), i_all(1));
    Integers rounded = i_right(i_add(bits, i_add(odd, i_all(0x7fffu))), 16);
    return h_from_i(i_choose_less(i_all(0x7f800000u), magnitude, i_all(0xffffu), rounded));
}

/* Below the eighth pattern lie denormals, multiples of 2^-9: a number with their bits behind 2^-6, less 2^-6. */
static inline Floats f_from_e4m3(Shorts a)
{
    Integers bits = i_from_h(a), magnitude = i_and(bits, i_all(0x7f)), sign = i_left(i_and(bits, i_all(0x80)), 24);
    Integers moved = i_left(magnitude, 20);
    Integers normal = i_add(moved, i_all(120u << 23));
    Floats small = f_sub(f_from_i(i_add(moved, i_all(121u << 23))), f_all(0x1p-6f));
    Integers found = i_choose_less(magnitude, i_all(8), i_from_f(small), normal);
    found = i_choose_less(i_all(0x7e), magnitude, i_all(0x7ff00000u), found);
    return f_from_i(i_or(found, sign));
}

/* To nearest even; what is too large becomes the largest, 448, NaN stays NaN, as in torch. */
static inline Shorts e4m3_from_f(Floats a)
{
    Integers bits = i_from_f(a), magnitude = i_and(bits, i_all(0x7fffffffu));
    Integers sign = i_and(i_right(bits, 24), i_all(0x80));
    Floats shifted = f_add(f_from_i(magnitude), f_all(0x1p14f)); /* its unit in the last place is 2^-9 */
    Integers small = i_sub(i_from_f(shifted), i_all(141u << 23));
    Integers odd = i_and(i_right(magnitude, 20), i_all(1));
    Integers normal = i_right(i_add(i_sub(magnitude, i_all(120u << 23)), i_add(odd, i_all(0x7ffffu))), 20);
    Integers found = i_choose_less(magnitude, i_all(121u << 23), small, normal);
    found = i_choose_less(magnitude, i_all(0x43e00001u), found, i_all(0x7e));
    found = i_choose_less(i_all(0x7f800000u), magnitude, i_all(0x7f), found);
    return h_from_i(i_or(found, sign));
}

/* The upper byte of a float16. */
static inline Floats f_from_e5m2(Shorts a) { return f_from_half(h_left(a, 8)); }

static inline Shorts e5m2_from_f(Floats a)
{
    Integers bits = i_from_f(a), magnitude = i_and(bits, i_all(0x7fffffffu));
    Integers sign = i_and(i_right(bits, 24), i_all(0x80));
    Floats shifted = f_add(f_from_i(magnitude), f_all(0x1p7f)); /* its unit in the last place is 2^-16 */
    Integers small = i_sub(i_from_f(shifted), i_all(134u << 23));
    Integers odd = i_and(i_right(magnitude, 21), i_all(1));
    Integers normal = i_right(i_add(i_sub(magnitude, i_all(112u << 23)), i_add(odd, i_all(0xfffffu))), 21);
    Integers found = i_choose_less(magnitude, i_all(113u << 23), small, normal);
    found = i_choose_less(magnitude, i_all(0x47800000u), found, i_all(0x7c));
    found = i_choose_less(i_all(0x7f800000u), magnitude, i_all(0x7f), found);
    return h_from_i(i_or(found, sign));
}

/* From float64 torch rounds to float32 first, so that is what these do. */
static inline Pair p_from_half(Shorts a) { return p_from_f(f_from_half(a)); }
static inline Pair p_from_brain(Shorts a) { return p_from_f(f_from_brain(a)); }
static inline Pair p_from_e4m3(Shorts a) { return p_from_f(f_from_e4m3(a)); }
static inline Pair p_from_e5m2(Shorts a) { return p_from_f(f_from_e5m2(a)); }
static inline Shorts half_from_p(Pair a) { return half_from_f(f_from_p(a)); }
static inline Shorts brain_from_p(Pair a) { return brain_from_f(f_from_p(a)); }
static inline Shorts e4m3_from_p(Pair a) { return e4m3_from_f(f_from_p(a)); }
static inline Shorts e5m2_from_p(Pair a) { return e5m2_from_f(f_from_p(a)); }

/* Stored types: name of their encoded values, its C type, bytes, how to read, write and look, what was seen. */
#define FOR_EACH_STORED(ONE)                                                                                           \
    ONE(F64, p, Pair, 8, p_read, p_write, look_double, found_double, Integers, i_all(0))                               \
    ONE(F32, f, Floats, 4, f_read, f_write, look_float, found_float, Integers, i_all(0))                               \
    ONE(F16, half, Shorts, 2, h_read, h_write, look_half, found_half, Shorts, h_all(0))                                \
    ONE(BF16, brain, Shorts, 2, h_read, h_write, look_half, found_brain, Shorts, h_all(0))                             \
    ONE(F8_E4M3, e4m3, Shorts, 1, h_read_bytes, h_write_bytes, look_byte, found_e4m3, Shorts, h_all(0))                \
    ONE(F8_E5M2, e5m2, Shorts, 1, h_read_bytes, h_write_bytes, look_byte, found_e5m2, Shorts, h_all(0))

/* A block's end that fills no whole vector is copied to one, with zeros behind it. */
#define DEFINE_LOAD(TYPE, K, LANE, letter, Encoded, size, read, look, found, Seen, nothing)                            \
    static int load_##TYPE##_##K(const struct work *work, size_t count)                                                \
    {                                                                                                                  \
        const uint8_t *from = work->a;                                                                                 \
        LANE *out = work->out;                                                                                         \
        Seen seen = nothing;                                                                                           \
        size_t whole = count - count % FLOAT_LANES;                                                                    \
        INDEPENDENT                                                                                                    \
        for (size_t i = 0; i < whole; i += FLOAT_LANES) {                                                              \
            Encoded value = read(from + size * i);                                                                     \
            seen = look(seen, value);                                                                                  \
            K##_write(out + i, K##_from_##letter(value));                                                              \
        }                                                                                                              \
        if (whole < count) {                                                                                           \
            uint8_t rest[8 * LANES] = {0};                                                                             \
            memcpy(rest, from + size * whole, size * (count - whole));                                                 \
            Encoded value = read(rest);                                                                                \
            seen = look(seen, value);                                                                                  \
            K##_write(out + whole, K##_from_##letter(value));                                                          \
        }                                                                                                              \
        return found(seen);                                                                                            \
    }

#define DEFINE_STORE(TYPE, K, LANE, letter, Encoded, size, write, look, found, Seen, nothing)                          \
    static int store_##TYPE##_##K(const struct work *work, size_t count)                                               \
    {                                                                                                                  \
        const LANE *from = work->a;                                                                                    \
        uint8_t *out = work->out;                                                                                      \
        Seen seen = nothing;                                                                                           \
        const size_t whole = count - count % FLOAT_LANES, step = work->fixed & NUMBER_A ? 0 : 1;                       \
        INDEPENDENT                                                                                                    \
        for (size_t i = 0; i < whole; i += FLOAT_LANES) {                                                              \
            Encoded value = letter##_from_##K(K##_read(from + step * i));                                              \
            seen = look(seen, value);                                                                                  \
            write(out + size * i, value);                                                                              \
        }                                                                                                              \
        if (whole < count) {                                                                                           \
            LANE last[LANES] = {0};                                                                                    \
            uint8_t rest[8 * LANES];                                                                                   \
            memcpy(last, from + step * whole, sizeof(LANE) * (count - whole));                                         \
            Encoded value = letter##_from_##K(K##_read(last));                                                         \
            seen = look(seen, value);                                                                                  \
            write(rest, value);                                                                                        \
            memcpy(out + size * whole, rest, size * (count - whole));                                                  \
        }                                                                                                              \
        return found(seen);                                                                                            \
    }

#define DEFINE_ROUND(TYPE, K, LANE, letter)                                                                            \
    static int round_##TYPE##_##K(const struct work *work, size_t count)                                               \
    {                                                                                                                  \
        const LANE *from = work->a;                                                                                    \
        LANE *out = work->out;                                                                                         \
        const size_t step = work->fixed & NUMBER_A ? 0 : 1;                                                            \
        INDEPENDENT                                                                                                    \
        for (size_t i = 0; i < count; i += FLOAT_LANES)                                                                \
            K##_write(out + i, K##_from_##letter(letter##_from_##K(K##_read(from + step * i))));                       \
        return 0;                                                                                                      \
    }

#define DEFINE_FINITE(TYPE, Encoded, size, read, look, found, Seen, nothing)                                           \
    static int finite_##TYPE(const uint8_t *from, size_t count)                                                        \
    {                                                                                                                  \
        Seen seen = nothing;                                                                                           \
        size_t whole = count - count % FLOAT_LANES;                                                                    \
        INDEPENDENT                                                                                                    \
        for (size_t i = 0; i < whole; i += FLOAT_LANES)                                                                \
            seen = look(seen, read(from + size * i));                                                                  \
        if (whole < count) {                                                                                           \
            uint8_t rest[8 * LANES] = {0};                                                                             \
            memcpy(rest, from + size * whole, size * (count - whole));                                                 \
            seen = look(seen, read(rest));                                                                             \
        }                                                                                                              \
        return !found(seen);                                                                                           \
    }

#define DEFINE_STORED(TYPE, letter, Encoded, size, read, write, look, found, Seen, nothing)                            \
    DEFINE_LOAD(TYPE, f, float, letter, Encoded, size, read, look, found, Seen, nothing)                               \
    DEFINE_LOAD(TYPE, p, double, letter, Encoded, size, read, look, found, Seen, nothing)                              \
    DEFINE_STORE(TYPE, f, float, letter, Encoded, size, write, look, found, Seen, nothing)                             \
    DEFINE_STORE(TYPE, p, double, letter, Encoded, size, write, look, found, Seen, nothing)                            \
    DEFINE_ROUND(TYPE, f, float, letter)                                                                               \
    DEFINE_ROUND(TYPE, p, double, letter)                                                                              \
    DEFINE_FINITE(TYPE, Encoded, size, read, look, found, Seen, nothing)

FOR_EACH_STORED(DEFINE_STORED)

/* ---- Arithmetic. ---- */

static inline Floats f_gt(Floats a, Floats b) { return f_lt(b, a); }
static inline Doubles d_gt(Doubles a, Doubles b) { return d_lt(b, a); }
static inline Floats f_ge(Floats a, Floats b) { return f_le(b, a); }
static inline Doubles d_ge(Doubles a, Doubles b) { return d_le(b, a); }
static inline Floats f_copy(Floats a) { return a; }
static inline Doubles d_copy(Doubles a) { return a; }
static inline Floats f_sign(Floats a) { return f_sub(f_lt(f_all(0.0f), a), f_lt(a, f_all(0.0f))); }
static inline Doubles d_sign(Doubles a) { return d_sub(d_lt(d_all(0.0), a), d_lt(a, d_all(0.0))); }

static inline Floats f_logical_not(Floats a) { return f_eq(a, f_all(0.0f)); }
static inline Doubles d_logical_not(Doubles a) { return d_eq(a, d_all(0.0)); }
static inline Floats f_logical_and(Floats a, Floats b) { return f_choose(a, f_ne(b, f_all(0.0f)), f_all(0.0f)); }
static inline Doubles d_logical_and(Doubles a, Doubles b) { return d_choose(a, d_ne(b, d_all(0.0)), d_all(0.0)); }
static inline Floats f_logical_or(Floats a, Floats b) { return f_choose(a, f_all(1.0f), f_ne(b, f_all(0.0f))); }
static inline Doubles d_logical_or(Doubles a, Doubles b) { return d_choose(a, d_all(1.0), d_ne(b, d_all(0.0))); }
static inline Floats f_logical_xor(Floats a, Floats b)
{
    return f_choose(a, f_logical_not(b), f_ne(b, f_all(0.0f)));
}
static inline Doubles d_logical_xor(Doubles a, Doubles b)
{
    return d_choose(a, d_logical_not(b), d_ne(b, d_all(0.0)));
}

static inline Floats f_select(Floats a, Floats b, Floats c) { return f_choose(c, a, b); }
static inline Doubles d_select(Doubles a, Doubles b, Doubles c) { return d_choose(c, a, b); }

/* torch's vectorised lerp: from the nearer end, and the product is not rounded. */
static inline Floats f_lerp(Floats a, Floats b, Floats weight)
{
    Floats size = f_abs(weight), half = f_all(0.5f);
    Floats factor = f_choose_less(size, half, weight, f_sub(weight, f_all(1.0f)));
    return f_fma(factor, f_sub(b, a), f_choose_less(size, half, a, b));
}
static inline Doubles d_lerp(Doubles a, Doubles b, Doubles weight)
{
    Doubles size = d_abs(weight), half = d_all(0.5);
    Doubles factor = d_choose_less(size, half, weight, d_sub(weight, d_all(1.0)));
    return d_fma(factor, d_sub(b, a), d_choose_less(size, half, a, b));
}

#define LOOP(K, LANES_OF_KIND, expression)                                                                             \
    INDEPENDENT                                                                                                        \
    for (size_t i = 0; i < count; i += LANES_OF_KIND)                                                                  \
        K##_write(out + i, expression);                                                                                \
    break;

#define DEFINE_UNARY(name, K, LANE, Vector, LANES_OF_KIND)                                                             \
    static int name##_##K(const struct work *work, size_t count)                                                       \
    {                                                                                                                  \
        const LANE *a = work->a;                                                                                       \
        LANE *out = work->out;                                                                                         \
        const Vector first = K##_read(a);                                                                              \
        switch (work->fixed & NUMBER_A) {                                                                              \
        case 0:                                                                                                        \
            LOOP(K, LANES_OF_KIND, K##_##name(K##_read(a + i)))                                                        \
        default:                                                                                                       \
            LOOP(K, LANES_OF_KIND, K##_##name(first))                                                                  \
        }                                                                                                              \
        return 0;                                                                                                      \
    }

#define DEFINE_BINARY(name, K, LANE, Vector, LANES_OF_KIND)                                                            \
    static int name##_##K(const struct work *work, size_t count)                                                       \
    {                                                                                                                  \
        const LANE *a = work->a, *b = work->b;                                                                         \
        LANE *out = work->out;                                                                                         \
        const Vector first = K##_read(a), second = K##_read(b);                                                        \
        switch (work->fixed & (NUMBER_A | NUMBER_B)) {                                                                 \
        case 0:                                                                                                        \
            LOOP(K, LANES_OF_KIND, K##_##name(K##_read(a + i), K##_read(b + i)))                                       \
        case NUMBER_A:                                                                                                 \
            LOOP(K, LANES_OF_KIND, K##_##name(first, K##_read(b + i)))                                                 \
        case NUMBER_B:                                                                                                 \
            LOOP(K, LANES_OF_KIND, K##_##name(K##_read(a + i), second))                                                \
        default:                                                                                                       \
            LOOP(K, LANES_OF_KIND, K##_##name(first, second))                                                          \
        }                                                                                                              \
        return 0;                                                                                                      \
    }

#define DEFINE_TERNARY(name, K, LANE, Vector, LANES_OF_KIND)                                                           \
    static int name##_##K(const struct work *work, size_t count)                                                       \
    {                                                                                                                  \
        const LANE *a = work->a, *b = work->b, *c = work->c;                                                           \
        LANE *out = work->out;                                                                                         \
        const Vector first = K##_read(a), second = K##_read(b), third = K##_read(c);                                   \
        switch (work->fixed & (NUMBER_A | NUMBER_B | NUMBER_C)) {                                                      \
        case 0:                                                                                                        \
            LOOP(K, LANES_OF_KIND, K##_##name(K##_read(a + i), K##_read(b + i), K##_read(c + i)))                      \
        case NUMBER_A:                                                                                                 \
            LOOP(K, LANES_OF_KIND, K##_##name(first, K##_read(b + i), K##_read(c + i)))                                \
        case NUMBER_B:                                                                                                 \
            LOOP(K, LANES_OF_KIND, K##_##name(K##_read(a + i), second, K##_read(c + i)))                               \
        case NUMBER_A | NUMBER_B:                                                                                      \
            LOOP(K, LANES_OF_KIND, K##_##name(first, second, K##_read(c + i)))                                         \
        case NUMBER_C:                                                                                                 \
            LOOP(K, LANES_OF_KIND, K##_##name(K##_read(a + i), K##_read(b + i), third))                                \
        case NUMBER_A | NUMBER_C:                                                                                      \
            LOOP(K, LANES_OF_KIND, K##_##name(first, K##_read(b + i), third))                                          \
        case NUMBER_B | NUMBER_C:                                                                                      \
            LOOP(K, LANES_OF_KIND, K##_##name(K##_read(a + i), second, third))                                         \
        default:                                                                                                       \
            LOOP(K, LANES_OF_KIND, K##_##name(first, second, third))                                                   \
        }                                                                                                              \
        return 0;                                                                                                      \
    }

#define FOR_EACH_UNARY(ONE) ONE(copy) ONE(neg) ONE(abs) ONE(sqrt) ONE(sign) ONE(logical_not)
#define FOR_EACH_BINARY(ONE)                                                                                           \
    ONE(add) ONE(sub) ONE(mul) ONE(div) ONE(minimum) ONE(maximum) ONE(lt) ONE(le) ONE(gt) ONE(ge) ONE(eq) ONE(ne)      \
    ONE(logical_and) ONE(logical_or) ONE(logical_xor)
#define FOR_EACH_TERNARY(ONE) ONE(fma) ONE(lerp) ONE(select)

#define BOTH_KINDS(DEFINE, name)                                                                                       \
    DEFINE(name, f, float, Floats, FLOAT_LANES)                                                                        \
    DEFINE(name, d, double, Doubles, DOUBLE_LANES)
#define UNARY(name) BOTH_KINDS(DEFINE_UNARY, name)
#define BINARY(name) BOTH_KINDS(DEFINE_BINARY, name)
#define TERNARY(name) BOTH_KINDS(DEFINE_TERNARY, name)
FOR_EACH_UNARY(UNARY)
FOR_EACH_BINARY(BINARY)
FOR_EACH_TERNARY(TERNARY)

/* From the end, so that a register may be widened in place: what is written lies behind what is still to be read. */
static int widen_d(const struct work *work, size_t count)
{
    const float *a = work->a;
    double *out = work->out;
    const size_t step = work->fixed & NUMBER_A ? 0 : 1;
    for (size_t i = (count + FLOAT_LANES - 1) / FLOAT_LANES * FLOAT_LANES; i > 0;) {
        i -= FLOAT_LANES;
        p_write(out + i, p_from_f(f_read(a + step * i)));
    }
    return 0;
}

static int narrow_f(const struct work *work, size_t count)
{
    const double *a = work->a;
    float *out = work->out;
    const size_t step = work->fixed & NUMBER_A ? 0 : 1;
    for (size_t i = 0; i < count; i += FLOAT_LANES)
        f_write(out + i, f_from_p(p_read(a + step * i)));
    return 0;
}

#include "reductions.h"

/* ---- The table. ---- */

#define ARITHMETIC_ACTION(name) [OP_##name] = {name##_f, name##_d},
#define LOAD_ACTION(TYPE, ...) [STORED_##TYPE] = {load_##TYPE##_f, load_##TYPE##_p},
#define STORE_ACTION(TYPE, ...) [STORED_##TYPE] = {store_##TYPE##_f, store_##TYPE##_p},
#define ROUND_ACTION(TYPE, ...) [STORED_##TYPE] = {round_##TYPE##_f, round_##TYPE##_p},
#define FINITE_ACTION(TYPE, ...) [STORED_##TYPE] = finite_##TYPE,
#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define JOINED_OF(a, b) a##b
#define JOINED(a, b) JOINED_OF(a, b)

const struct capability JOINED(capability_, CAPABILITY) = {
    .name = TEXT(CAPABILITY),
    .actions =
        {
            FOR_EACH_UNARY(ARITHMETIC_ACTION) FOR_EACH_BINARY(ARITHMETIC_ACTION) FOR_EACH_TERNARY(ARITHMETIC_ACTION)
            [OP_widen] = {NULL, widen_d},
            [OP_narrow] = {narrow_f, NULL},
            [OP_reduce_sum] = {reduce_add_f, reduce_add_d},
            [OP_reduce_product] = {reduce_product_f, NULL},
            [OP_reduce_maximum] = {reduce_maximum_f, reduce_maximum_d},
            [OP_reduce_minimum] = {reduce_minimum_f, reduce_minimum_d},
            [OP_histogram_upper] = {histogram_upper, NULL},
            [OP_histogram_window] = {histogram_window, NULL},
        },
    .loads = {FOR_EACH_STORED(LOAD_ACTION)},
    .stores = {FOR_EACH_STORED(STORE_ACTION)},
    .rounds = {FOR_EACH_STORED(ROUND_ACTION)},
    .finite = {FOR_EACH_STORED(FINITE_ACTION)},
    .weigh = weigh_words,
};
