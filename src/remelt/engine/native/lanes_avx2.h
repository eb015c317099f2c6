/* Vectors of 8 float32 or 4 float64: AVX2, FMA and F16C. */
#include <immintrin.h>
#include <string.h>

enum { FLOAT_LANES = 8, DOUBLE_LANES = 4 };

typedef __m256 Floats;
typedef __m256d Doubles;
typedef __m256i Integers;
typedef __m128i Shorts;

static inline Floats f_read(const void *from) { return _mm256_loadu_ps((const float *)from); }
static inline void f_write(void *to, Floats x) { _mm256_storeu_ps((float *)to, x); }
static inline Floats f_all(float x) { return _mm256_set1_ps(x); }
static inline Floats f_add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats f_sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
static inline Floats f_mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats f_div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
static inline Floats f_fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats f_sqrt(Floats a) { return _mm256_sqrt_ps(a); }
static inline Floats f_neg(Floats a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
static inline Floats f_abs(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline Floats f_minimum(Floats a, Floats b)
{
    return _mm256_or_ps(_mm256_min_ps(a, b), _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
}
static inline Floats f_maximum(Floats a, Floats b)
{
    return _mm256_or_ps(_mm256_max_ps(a, b), _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
}
static inline Floats f_truth(Floats mask) { return _mm256_and_ps(mask, _mm256_set1_ps(1.0f)); }
static inline Floats f_lt(Floats a, Floats b) { return f_truth(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
static inline Floats f_le(Floats a, Floats b) { return f_truth(_mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
static inline Floats f_eq(Floats a, Floats b) { return f_truth(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
static inline Floats f_ne(Floats a, Floats b) { return f_truth(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)); }
static inline Floats f_choose(Floats condition, Floats a, Floats b)
{
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(condition, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
static inline Floats f_choose_less(Floats x, Floats y, Floats a, Floats b)
{
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
}

static inline Doubles d_read(const void *from) { return _mm256_loadu_pd((const double *)from); }
static inline void d_write(void *to, Doubles x) { _mm256_storeu_pd((double *)to, x); }
static inline Doubles d_all(double x) { return _mm256_set1_pd(x); }
static inline Doubles d_add(Doubles a, Doubles b) { return _mm256_add_pd(a, b); }
static inline Doubles d_sub(Doubles a, Doubles b) { return _mm256_sub_pd(a, b); }
static inline Doubles d_mul(Doubles a, Doubles b) { return _mm256_mul_pd(a, b); }
static inline Doubles d_div(Doubles a, Doubles b) { return _mm256_div_pd(a, b); }
static inline Doubles d_fma(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
static inline Doubles d_sqrt(Doubles a) { return _mm256_sqrt_pd(a); }
static inline Doubles d_neg(Doubles a) { return _mm256_xor_pd(a, _mm256_set1_pd(-0.0)); }
static inline Doubles d_abs(Doubles a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }
static inline Doubles d_minimum(Doubles a, Doubles b)
{
    return _mm256_or_pd(_mm256_min_pd(a, b), _mm256_cmp_pd(a, b, _CMP_UNORD_Q));
}
static inline Doubles d_maximum(Doubles a, Doubles b)
{
    return _mm256_or_pd(_mm256_max_pd(a, b), _mm256_cmp_pd(a, b, _CMP_UNORD_Q));
}
static inline Doubles d_truth(Doubles mask) { return _mm256_and_pd(mask, _mm256_set1_pd(1.0)); }
static inline Doubles d_lt(Doubles a, Doubles b) { return d_truth(_mm256_cmp_pd(a, b, _CMP_LT_OQ)); }
static inline Doubles d_le(Doubles a, Doubles b) { return d_truth(_mm256_cmp_pd(a, b, _CMP_LE_OQ)); }
static inline Doubles d_eq(Doubles a, Doubles b) { return d_truth(_mm256_cmp_pd(a, b, _CMP_EQ_OQ)); }
static inline Doubles d_ne(Doubles a, Doubles b) { return d_truth(_mm256_cmp_pd(a, b, _CMP_NEQ_UQ)); }
static inline Doubles d_choose(Doubles condition, Doubles a, Doubles b)
{
    return _mm256_blendv_pd(b, a, _mm256_cmp_pd(condition, _mm256_setzero_pd(), _CMP_NEQ_UQ));
}
static inline Doubles d_choose_less(Doubles x, Doubles y, Doubles a, Doubles b)
{
    return _mm256_blendv_pd(b, a, _mm256_cmp_pd(x, y, _CMP_LT_OQ));
}

static inline Doubles d_read_floats(const void *from) { return _mm256_cvtps_pd(_mm_loadu_ps((const float *)from)); }
static inline Doubles d_low(Floats a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a)); }
static inline Doubles d_high(Floats a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)); }
static inline Floats f_from_d(Doubles low, Doubles high)
{
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(low)), _mm256_cvtpd_ps(high), 1);
}

static inline Integers i_all(uint32_t x) { return _mm256_set1_epi32((int)x); }
static inline Integers i_and(Integers a, Integers b) { return _mm256_and_si256(a, b); }
static inline Integers i_or(Integers a, Integers b) { return _mm256_or_si256(a, b); }
static inline Integers i_add(Integers a, Integers b) { return _mm256_add_epi32(a, b); }
static inline Integers i_sub(Integers a, Integers b) { return _mm256_sub_epi32(a, b); }
#define i_left(a, by) _mm256_slli_epi32((a), (by))
#define i_right(a, by) _mm256_srli_epi32((a), (by))
static inline Integers i_most(Integers a, Integers b) { return _mm256_max_epi32(a, b); }
static inline Integers i_choose_less(Integers x, Integers y, Integers a, Integers b)
{
    return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi32(y, x));
}
static inline int i_reaches(Integers a, uint32_t limit)
{
    return _mm256_movemask_epi8(_mm256_cmpgt_epi32(a, _mm256_set1_epi32((int)limit - 1))) != 0;
}
/* Those below an end, which is a power of two, one after the other; there is room for a whole vector. How many. */
static inline size_t i_keep_below(uint32_t *kept, Integers a, uint32_t end)
{
    const __m256i high = _mm256_and_si256(a, _mm256_set1_epi32((int)-end));
    unsigned below = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(high, _mm256_setzero_si256())));
    uint32_t lanes[8];
    size_t count = 0;
    if (!below)
        return 0;
    _mm256_storeu_si256((__m256i *)lanes, a);
    for (unsigned lane = 0; lane < 8; lane++) {
        kept[count] = lanes[lane];
        count += below >> lane & 1;
    }
    return count;
}
static inline Integers i_from_f(Floats a) { return _mm256_castps_si256(a); }
static inline Floats f_from_i(Integers a) { return _mm256_castsi256_ps(a); }
static inline Integers i_exponents(Doubles a)
{
    return _mm256_and_si256(_mm256_castpd_si256(a), _mm256_set1_epi64x(0x7ff0000000000000));
}

static inline Shorts h_all(uint16_t x) { return _mm_set1_epi16((short)x); }
static inline Shorts h_read(const void *from) { return _mm_loadu_si128((const __m128i *)from); }
static inline void h_write(void *to, Shorts a) { _mm_storeu_si128((__m128i *)to, a); }
static inline Shorts h_read_bytes(const void *from)
{
    return _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)from));
}
static inline void h_write_bytes(void *to, Shorts a) { _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(a, a)); }
static inline Shorts h_from_i(Integers a)
{
    return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}
static inline Integers i_from_h(Shorts a) { return _mm256_cvtepu16_epi32(a); }
static inline Shorts h_and(Shorts a, Shorts b) { return _mm_and_si128(a, b); }
static inline Shorts h_most(Shorts a, Shorts b) { return _mm_max_epi16(a, b); }
#define h_left(a, by) _mm_slli_epi16((a), (by))
static inline int h_reaches(Shorts a, uint16_t limit)
{
    return _mm_movemask_epi8(_mm_cmpgt_epi16(a, _mm_set1_epi16((short)(limit - 1)))) != 0;
}

static inline Floats f_from_half(Shorts a) { return _mm256_cvtph_ps(a); }
static inline Shorts half_from_f(Floats a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }

/* The low 64 bits of products: there is no such instruction, so halves are multiplied. */
static inline __m256i times_words(__m256i a, __m256i b)
{
    __m256i cross = _mm256_mullo_epi32(a, _mm256_shuffle_epi32(b, 0xb1));
    __m256i upper = _mm256_add_epi32(_mm256_slli_epi64(cross, 32), cross);
    upper = _mm256_and_si256(upper, _mm256_set1_epi64x((long long)0xffffffff00000000u));
    return _mm256_add_epi64(_mm256_mul_epu32(a, b), upper);
}

static inline uint64_t weigh_words(const uint8_t *words, const uint64_t *places, size_t count)
{
    __m256i first = _mm256_setzero_si256(), second = first;
    uint64_t lanes[4], total;
    size_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m256i *from = (const __m256i *)(words + 8 * i), *by = (const __m256i *)(places + i);
        first = _mm256_add_epi64(first, times_words(_mm256_loadu_si256(from), _mm256_loadu_si256(by)));
        second = _mm256_add_epi64(second, times_words(_mm256_loadu_si256(from + 1), _mm256_loadu_si256(by + 1)));
    }
    _mm256_storeu_si256((__m256i *)lanes, _mm256_add_epi64(first, second));
    total = lanes[0] + lanes[1] + lanes[2] + lanes[3];
    for (; i < count; i++) {
        uint64_t word;
        memcpy(&word, words + 8 * i, 8);
        total += word * places[i];
    }
    return total;
}
