/* Vectors of 16 float32 or 8 float64: AVX-512 with its parts F, BW, DQ and VL. */
#include <immintrin.h>
#include <string.h>

enum { FLOAT_LANES = 16, DOUBLE_LANES = 8 };

typedef __m512 Floats;
typedef __m512d Doubles;
typedef __m512i Integers;
typedef __m256i Shorts;

static inline Floats f_read(const void *from) { return _mm512_loadu_ps(from); }
static inline void f_write(void *to, Floats x) { _mm512_storeu_ps(to, x); }
static inline Floats f_all(float x) { return _mm512_set1_ps(x); }
static inline Floats f_add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats f_sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
static inline Floats f_mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats f_div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
static inline Floats f_fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats f_sqrt(Floats a) { return _mm512_sqrt_ps(a); }
static inline Floats f_neg(Floats a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
static inline Floats f_abs(Floats a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
static inline Floats f_spread(Floats found, Floats a, Floats b) /* NaN where one of both is */
{
    const Floats nothing = _mm512_castsi512_ps(_mm512_set1_epi32(-1));
    return _mm512_mask_mov_ps(found, _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), nothing);
}
static inline Floats f_minimum(Floats a, Floats b) { return f_spread(_mm512_min_ps(a, b), a, b); }
static inline Floats f_maximum(Floats a, Floats b) { return f_spread(_mm512_max_ps(a, b), a, b); }
static inline Floats f_truth(__mmask16 mask) { return _mm512_maskz_mov_ps(mask, _mm512_set1_ps(1.0f)); }
static inline Floats f_lt(Floats a, Floats b) { return f_truth(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)); }
static inline Floats f_le(Floats a, Floats b) { return f_truth(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ)); }
static inline Floats f_eq(Floats a, Floats b) { return f_truth(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ)); }
static inline Floats f_ne(Floats a, Floats b) { return f_truth(_mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ)); }
static inline Floats f_choose(Floats condition, Floats a, Floats b)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(condition, _mm512_setzero_ps(), _CMP_NEQ_UQ), b, a);
}
static inline Floats f_choose_less(Floats x, Floats y, Floats a, Floats b)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
}

static inline Doubles d_read(const void *from) { return _mm512_loadu_pd(from); }
static inline void d_write(void *to, Doubles x) { _mm512_storeu_pd(to, x); }
static inline Doubles d_all(double x) { return _mm512_set1_pd(x); }
static inline Doubles d_add(Doubles a, Doubles b) { return _mm512_add_pd(a, b); }
static inline Doubles d_sub(Doubles a, Doubles b) { return _mm512_sub_pd(a, b); }
static inline Doubles d_mul(Doubles a, Doubles b) { return _mm512_mul_pd(a, b); }
static inline Doubles d_div(Doubles a, Doubles b) { return _mm512_div_pd(a, b); }
static inline Doubles d_fma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
static inline Doubles d_sqrt(Doubles a) { return _mm512_sqrt_pd(a); }
static inline Doubles d_neg(Doubles a) { return _mm512_xor_pd(a, _mm512_set1_pd(-0.0)); }
static inline Doubles d_abs(Doubles a) { return _mm512_andnot_pd(_mm512_set1_pd(-0.0), a); }
static inline Doubles d_spread(Doubles found, Doubles a, Doubles b)
{
    const Doubles nothing = _mm512_castsi512_pd(_mm512_set1_epi64(-1));
    return _mm512_mask_mov_pd(found, _mm512_cmp_pd_mask(a, b, _CMP_UNORD_Q), nothing);
}
static inline Doubles d_minimum(Doubles a, Doubles b) { return d_spread(_mm512_min_pd(a, b), a, b); }
static inline Doubles d_maximum(Doubles a, Doubles b) { return d_spread(_mm512_max_pd(a, b), a, b); }
static inline Doubles d_truth(__mmask8 mask) { return _mm512_maskz_mov_pd(mask, _mm512_set1_pd(1.0)); }
static inline Doubles d_lt(Doubles a, Doubles b) { return d_truth(_mm512_cmp_pd_mask(a, b, _CMP_LT_OQ)); }
static inline Doubles d_le(Doubles a, Doubles b) { return d_truth(_mm512_cmp_pd_mask(a, b, _CMP_LE_OQ)); }
static inline Doubles d_eq(Doubles a, Doubles b) { return d_truth(_mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ)); }
static inline Doubles d_ne(Doubles a, Doubles b) { return d_truth(_mm512_cmp_pd_mask(a, b, _CMP_NEQ_UQ)); }
static inline Doubles d_choose(Doubles condition, Doubles a, Doubles b)
{
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(condition, _mm512_setzero_pd(), _CMP_NEQ_UQ), b, a);
}
static inline Doubles d_choose_less(Doubles x, Doubles y, Doubles a, Doubles b)
{
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(x, y, _CMP_LT_OQ), b, a);
}

static inline Doubles d_read_floats(const void *from) { return _mm512_cvtps_pd(_mm256_loadu_ps((const float *)from)); }
static inline Doubles d_low(Floats a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }
static inline Doubles d_high(Floats a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }
static inline Floats f_from_d(Doubles low, Doubles high)
{
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}

static inline Integers i_all(uint32_t x) { return _mm512_set1_epi32((int)x); }
static inline Integers i_and(Integers a, Integers b) { return _mm512_and_si512(a, b); }
static inline Integers i_or(Integers a, Integers b) { return _mm512_or_si512(a, b); }
static inline Integers i_add(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
static inline Integers i_sub(Integers a, Integers b) { return _mm512_sub_epi32(a, b); }
#define i_left(a, by) _mm512_slli_epi32((a), (by))
#define i_right(a, by) _mm512_srli_epi32((a), (by))
static inline Integers i_most(Integers a, Integers b) { return _mm512_max_epi32(a, b); }
static inline Integers i_choose_less(Integers x, Integers y, Integers a, Integers b)
{
    return _mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(x, y), b, a);
}
static inline int i_reaches(Integers a, uint32_t limit)
{
    return _mm512_cmpge_epi32_mask(a, _mm512_set1_epi32((int)limit)) != 0;
}
/* Those below an end, which is a power of two, one after the other; there is room for a whole vector. How many. */
static inline size_t i_keep_below(uint32_t *kept, Integers a, uint32_t end)
{
    const __mmask16 below = _mm512_cmplt_epu32_mask(a, _mm512_set1_epi32((int)end));
    _mm512_storeu_si512(kept, _mm512_maskz_compress_epi32(below, a));
    return (size_t)_mm_popcnt_u32(below);
}
static inline Integers i_from_f(Floats a) { return _mm512_castps_si512(a); }
static inline Floats f_from_i(Integers a) { return _mm512_castsi512_ps(a); }
static inline Integers i_exponents(Doubles a)
{
    return _mm512_and_si512(_mm512_castpd_si512(a), _mm512_set1_epi64(0x7ff0000000000000));
}

static inline Shorts h_all(uint16_t x) { return _mm256_set1_epi16((short)x); }
static inline Shorts h_read(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline void h_write(void *to, Shorts a) { _mm256_storeu_si256((__m256i *)to, a); }
static inline Shorts h_read_bytes(const void *from)
{
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from));
}
static inline void h_write_bytes(void *to, Shorts a) { _mm_storeu_si128((__m128i *)to, _mm256_cvtepi16_epi8(a)); }
static inline Shorts h_from_i(Integers a) { return _mm512_cvtepi32_epi16(a); }
static inline Integers i_from_h(Shorts a) { return _mm512_cvtepu16_epi32(a); }
static inline Shorts h_and(Shorts a, Shorts b) { return _mm256_and_si256(a, b); }
static inline Shorts h_most(Shorts a, Shorts b) { return _mm256_max_epi16(a, b); }
#define h_left(a, by) _mm256_slli_epi16((a), (by))
static inline int h_reaches(Shorts a, uint16_t limit)
{
    return _mm256_cmpge_epi16_mask(a, _mm256_set1_epi16((short)limit)) != 0;
}

static inline Floats f_from_half(Shorts a) { return _mm512_cvtph_ps(a); }
static inline Shorts half_from_f(Floats a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }

static inline uint64_t weigh_words(const uint8_t *words, const uint64_t *places, size_t count)
{
    __m512i first = _mm512_setzero_si512(), second = first;
    uint64_t lanes[8], total = 0;
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m512i a = _mm512_loadu_si512(words + 8 * i), b = _mm512_loadu_si512(words + 8 * i + 64);
        first = _mm512_add_epi64(first, _mm512_mullo_epi64(a, _mm512_loadu_si512(places + i)));
        second = _mm512_add_epi64(second, _mm512_mullo_epi64(b, _mm512_loadu_si512(places + i + 8)));
    }
    _mm512_storeu_si512(lanes, _mm512_add_epi64(first, second));
    for (int lane = 0; lane < 8; lane++)
        total += lanes[lane];
    for (; i < count; i++) {
        uint64_t word;
        memcpy(&word, words + 8 * i, 8);
        total += word * places[i];
    }
    return total;
}
