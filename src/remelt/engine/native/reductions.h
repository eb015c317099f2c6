/* Sums, extremes and histograms over a tensor, written once over the vectors of a lanes_*.h, as operations.h is. */

/* ---- Reductions: lane i % LANES of the accumulator takes element i; a block's end is filled with nothing. ---- */

#define WHOLE_LANES(K, LANE, combine, read)                                                                            \
    static void combine##_lanes_##K(double *lanes, const LANE *a, size_t step, size_t count)                           \
    {                                                                                                                  \
        Doubles found[LANES / DOUBLE_LANES];                                                                           \
        for (int k = 0; k < LANES / DOUBLE_LANES; k++)                                                                 \
            found[k] = d_read(lanes + k * DOUBLE_LANES);                                                               \
        for (size_t i = 0; i < count; i += LANES)                                                                      \
            for (int k = 0; k < LANES / DOUBLE_LANES; k++)                                                             \
                found[k] = d_##combine(found[k], read(a + step * i + k * DOUBLE_LANES));                               \
        for (int k = 0; k < LANES / DOUBLE_LANES; k++)                                                                 \
            d_write(lanes + k * DOUBLE_LANES, found[k]);                                                               \
    }

#define DEFINE_REDUCTION(K, LANE, combine, nothing, read)                                                              \
    WHOLE_LANES(K, LANE, combine, read)                                                                                \
    static int reduce_##combine##_##K(const struct work *work, size_t count)                                           \
    {                                                                                                                  \
        const LANE *a = work->a;                                                                                       \
        const size_t whole = count - count % LANES, step = work->fixed & NUMBER_A ? 0 : 1;                             \
        combine##_lanes_##K(work->out, a, step, whole);                                                                \
        if (whole < count) {                                                                                           \
            LANE rest[LANES];                                                                                          \
            for (size_t i = 0; i < LANES; i++)                                                                         \
                rest[i] = whole + i < count ? a[step * (whole + i)] : (LANE)(nothing);                                 \
            combine##_lanes_##K(work->out, rest, 1, LANES);                                                            \
        }                                                                                                              \
        return 0;                                                                                                      \
    }

DEFINE_REDUCTION(f, float, add, 0.0, d_read_floats)
DEFINE_REDUCTION(d, double, add, 0.0, d_read)
DEFINE_REDUCTION(f, float, maximum, -INFINITY, d_read_floats)
DEFINE_REDUCTION(d, double, maximum, -INFINITY, d_read)
DEFINE_REDUCTION(f, float, minimum, INFINITY, d_read_floats)
DEFINE_REDUCTION(d, double, minimum, INFINITY, d_read)

/* Sums of products of float32, which float64 holds exactly: fused or not, their bits are the same. */
static void product_lanes(double *lanes, const float *a, const float *b, size_t count)
{
    Doubles found[LANES / DOUBLE_LANES];
    for (int k = 0; k < LANES / DOUBLE_LANES; k++)
        found[k] = d_read(lanes + k * DOUBLE_LANES);
    for (size_t i = 0; i < count; i += LANES)
        for (int k = 0; k < LANES / DOUBLE_LANES; k++) {
            const size_t at = i + (size_t)k * DOUBLE_LANES;
            found[k] = d_fma(d_read_floats(a + at), d_read_floats(b + at), found[k]);
        }
    for (int k = 0; k < LANES / DOUBLE_LANES; k++)
        d_write(lanes + k * DOUBLE_LANES, found[k]);
}

static int reduce_product_f(const struct work *work, size_t count)
{
    const float *a = work->a, *b = work->b;
    const size_t whole = count - count % LANES;
    product_lanes(work->out, a, b, whole);
    if (whole < count) {
        float rest[2][LANES] = {{0}};
        memcpy(rest[0], a + whole, (count - whole) * sizeof(float));
        memcpy(rest[1], b + whole, (count - whole) * sizeof(float));
        product_lanes(work->out, rest[0], rest[1], LANES);
    }
    return 0;
}

static inline uint32_t magnitude_at(const float *a, size_t place)
{
    uint32_t bits;
    memcpy(&bits, a + place, 4);
    return bits & 0x7fffffffu;
}

/* Two magnitudes at a time, as one word: the upper halves of both without another load. */
static int histogram_high(const struct work *work, size_t count)
{
    const float *a = work->a;
    int64_t *bins = work->out;
    const size_t step = work->fixed & NUMBER_A ? 0 : 1;
    size_t i = 0;
    for (; step && i + 4 <= count; i += 4) {
        uint64_t words[2];
        memcpy(words, a + i, sizeof words);
        bins[words[0] >> 16 & 0x7fffu]++;
        bins[words[0] >> 48 & 0x7fffu]++;
        bins[words[1] >> 16 & 0x7fffu]++;
        bins[words[1] >> 48 & 0x7fffu]++;
    }
    for (; i < count; i++)
        bins[magnitude_at(a, step * i) >> 16]++;
    return 0;
}

/* Whether some values of the next vectors have an upper half: then neither their distance from it nor that from its end is negative. */
enum { WITHIN = 2 };

static inline int any_within(const float *a, Integers begin)
{
    Integers all = i_all(0xffffffffu);
    for (int k = 0; k < WITHIN; k++) {
        Integers magnitude = i_and(i_from_f(f_read(a + k * FLOAT_LANES)), i_all(0x7fffffffu));
        Integers distance = i_sub(magnitude, begin);
        all = i_and(all, i_or(distance, i_sub(i_all(0xffffu), distance)));
    }
    return i_reaches(all, 0) != 0;
}

static int histogram_low(const struct work *work, size_t count)
{
    const float *a = work->a;
    int64_t *bins = work->out;
    const float number = *(const float *)work->b;
    const uint32_t high = number >= 0.0f && number < 32768.0f ? (uint32_t)number : BINS;
    const size_t step = work->fixed & NUMBER_A ? 0 : 1, together = WITHIN * FLOAT_LANES;
    if (high == BINS)
        return 0;
    for (size_t begin = 0; begin < count; begin += together) {
        const size_t end = begin + together < count ? begin + together : count;
        if (step && end == begin + together && !any_within(a + begin, i_all(high << 16)))
            continue; /* nearly always: few magnitudes have one upper half */
        for (size_t i = begin; i < end; i++) {
            uint32_t magnitude = magnitude_at(a, step * i);
            if (magnitude >> 16 == high)
                bins[magnitude & 0xffffu]++;
        }
    }
    return 0;
}
