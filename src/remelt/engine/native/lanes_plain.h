/* Vectors of one lane: plain C, for any machine. What a compiler can do with these loops, it does. */
#include <float.h>
#include <math.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "this machine computes in wider numbers than it was asked for: results would be rounded twice"
#endif

#define LANES_OF_ONE 1
enum { FLOAT_LANES = 1, DOUBLE_LANES = 1 };

typedef float Floats;
typedef double Doubles;
typedef uint32_t Integers;
typedef uint32_t Shorts; /* 16 bits of use; 32 in store */

static inline uint32_t bits_of_float(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
static inline float float_of_bits(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
static inline uint64_t bits_of_double(double x) { uint64_t y; memcpy(&y, &x, 8); return y; }
static inline double double_of_bits(uint64_t x) { double y; memcpy(&y, &x, 8); return y; }

static inline Floats f_read(const void *from) { float x; memcpy(&x, from, 4); return x; }
static inline void f_write(void *to, Floats x) { memcpy(to, &x, 4); }
static inline Floats f_all(float x) { return x; }
static inline Floats f_add(Floats a, Floats b) { return a + b; }
static inline Floats f_sub(Floats a, Floats b) { return a - b; }
static inline Floats f_mul(Floats a, Floats b) { return a * b; }
static inline Floats f_div(Floats a, Floats b) { return a / b; }
static inline Floats f_fma(Floats a, Floats b, Floats c) { return fmaf(a, b, c); }
static inline Floats f_sqrt(Floats a) { return sqrtf(a); }
static inline Floats f_neg(Floats a) { return float_of_bits(bits_of_float(a) ^ 0x80000000u); }
static inline Floats f_abs(Floats a) { return float_of_bits(bits_of_float(a) & 0x7fffffffu); }
static inline Floats f_minimum(Floats a, Floats b)
{
    float least = a < b ? a : b;
    return (a != a) | (b != b) ? float_of_bits(0xffffffffu) : least;
}
static inline Floats f_maximum(Floats a, Floats b)
{
    float most = a > b ? a : b;
    return (a != a) | (b != b) ? float_of_bits(0xffffffffu) : most;
}
static inline Floats f_lt(Floats a, Floats b) { return a < b ? 1.0f : 0.0f; }
static inline Floats f_le(Floats a, Floats b) { return a <= b ? 1.0f : 0.0f; }
static inline Floats f_eq(Floats a, Floats b) { return a == b ? 1.0f : 0.0f; }
static inline Floats f_ne(Floats a, Floats b) { return a != b ? 1.0f : 0.0f; }
static inline Floats f_choose(Floats condition, Floats a, Floats b) { return condition != 0.0f ? a : b; }
static inline Floats f_choose_less(Floats x, Floats y, Floats a, Floats b) { return x < y ? a : b; }

static inline Doubles d_read(const void *from) { double x; memcpy(&x, from, 8); return x; }
static inline void d_write(void *to, Doubles x) { memcpy(to, &x, 8); }
static inline Doubles d_all(double x) { return x; }
static inline Doubles d_add(Doubles a, Doubles b) { return a + b; }
static inline Doubles d_sub(Doubles a, Doubles b) { return a - b; }
static inline Doubles d_mul(Doubles a, Doubles b) { return a * b; }
static inline Doubles d_div(Doubles a, Doubles b) { return a / b; }
static inline Doubles d_fma(Doubles a, Doubles b, Doubles c) { return fma(a, b, c); }
static inline Doubles d_sqrt(Doubles a) { return sqrt(a); }
static inline Doubles d_neg(Doubles a) { return double_of_bits(bits_of_double(a) ^ 0x8000000000000000u); }
static inline Doubles d_abs(Doubles a) { return double_of_bits(bits_of_double(a) & 0x7fffffffffffffffu); }
static inline Doubles d_minimum(Doubles a, Doubles b)
{
    double least = a < b ? a : b;
    return (a != a) | (b != b) ? double_of_bits(~(uint64_t)0) : least;
}
static inline Doubles d_maximum(Doubles a, Doubles b)
{
    double most = a > b ? a : b;
    return (a != a) | (b != b) ? double_of_bits(~(uint64_t)0) : most;
}
static inline Doubles d_lt(Doubles a, Doubles b) { return a < b ? 1.0 : 0.0; }
static inline Doubles d_le(Doubles a, Doubles b) { return a <= b ? 1.0 : 0.0; }
static inline Doubles d_eq(Doubles a, Doubles b) { return a == b ? 1.0 : 0.0; }
static inline Doubles d_ne(Doubles a, Doubles b) { return a != b ? 1.0 : 0.0; }
static inline Doubles d_choose(Doubles condition, Doubles a, Doubles b) { return condition != 0.0 ? a : b; }
static inline Doubles d_choose_less(Doubles x, Doubles y, Doubles a, Doubles b) { return x < y ? a : b; }

static inline Doubles d_read_floats(const void *from) { return (double)f_read(from); }
static inline Doubles d_low(Floats a) { return (double)a; }
static inline Doubles d_high(Floats a) { return (double)a; }
static inline Floats f_from_d(Doubles low, Doubles high) { (void)high; return (float)low; }

static inline Integers i_all(uint32_t x) { return x; }
static inline Integers i_and(Integers a, Integers b) { return a & b; }
static inline Integers i_or(Integers a, Integers b) { return a | b; }
static inline Integers i_add(Integers a, Integers b) { return a + b; }
static inline Integers i_sub(Integers a, Integers b) { return a - b; }
#define i_left(a, by) ((a) << (by))
#define i_right(a, by) ((a) >> (by))
static inline Integers i_most(Integers a, Integers b) { return (int32_t)a > (int32_t)b ? a : b; }
static inline Integers i_choose_less(Integers x, Integers y, Integers a, Integers b)
{
    return (int32_t)x < (int32_t)y ? a : b;
}
static inline int i_reaches(Integers a, uint32_t limit) { return (int32_t)a >= (int32_t)limit; }
/* What lies below an end is kept; whether it does. */
static inline size_t i_keep_below(uint32_t *kept, Integers a, uint32_t end)
{
    *kept = a;
    return a < end;
}
static inline Integers i_from_f(Floats a) { return bits_of_float(a); }
static inline Floats f_from_i(Integers a) { return float_of_bits(a); }
static inline Integers i_exponents(Doubles a) { return (uint32_t)(bits_of_double(a) >> 32) & 0x7ff00000u; }

static inline Shorts h_all(uint16_t x) { return x; }
static inline Shorts h_read(const void *from) { uint16_t x; memcpy(&x, from, 2); return x; }
static inline void h_write(void *to, Shorts a) { uint16_t x = (uint16_t)a; memcpy(to, &x, 2); }
static inline Shorts h_read_bytes(const void *from) { uint8_t x; memcpy(&x, from, 1); return x; }
static inline void h_write_bytes(void *to, Shorts a) { uint8_t x = (uint8_t)a; memcpy(to, &x, 1); }
static inline Shorts h_from_i(Integers a) { return a & 0xffffu; }
static inline Integers i_from_h(Shorts a) { return a; }
static inline Shorts h_and(Shorts a, Shorts b) { return a & b; }
static inline Shorts h_most(Shorts a, Shorts b) { return a > b ? a : b; }
#define h_left(a, by) (((a) << (by)) & 0xffffu)
static inline int h_reaches(Shorts a, uint16_t limit) { return a >= limit; }

/* float16 by integers: what the processor's own conversions give, NaN made quiet included. */
static inline Floats f_from_half(Shorts a)
{
    uint32_t magnitude = (a & 0x7fffu) << 13, sign = (a & 0x8000u) << 16;
    uint32_t normal = magnitude + (112u << 23);
    uint32_t small = bits_of_float(float_of_bits(magnitude + (113u << 23)) - 0x1p-14f);
    uint32_t special = (magnitude + (224u << 23)) | (magnitude > 0x0f800000u ? 0x400000u : 0u);
    uint32_t found = magnitude < 0x00800000u ? small : normal;
    return float_of_bits(sign | (magnitude >= 0x0f800000u ? special : found));
}

static inline Shorts half_from_f(Floats a)
{
    uint32_t bits = bits_of_float(a), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t small = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x1ffu) : 0x7c00u;
    uint32_t found = magnitude < 0x38800000u ? small : normal;
    return sign | (magnitude >= 0x477ff000u ? special : found);
}

static inline uint64_t weigh_words(const uint8_t *words, const uint64_t *places, size_t count)
{
    uint64_t total = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t word;
        memcpy(&word, words + 8 * i, 8);
        total += word * places[i];
    }
    return total;
}
