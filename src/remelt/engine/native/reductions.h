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

/* How many magnitudes have each upper half: two at a time, as one word, without another load. */
static int histogram_upper(const struct work *work, size_t count)
{
    const float *a = work->a;
    uint32_t *bins = work->out;
    size_t i = 0;
    for (; i + 4 <= count; i += 4) {
        uint64_t words[2];
        memcpy(words, a + i, sizeof words);
        bins[words[0] >> 16 & 0x7fffu]++;
        bins[words[0] >> 48 & 0x7fffu]++;
        bins[words[1] >> 16 & 0x7fffu]++;
        bins[words[1] >> 48 & 0x7fffu]++;
    }
    for (; i < count; i++)
        bins[magnitude_at(a, i) >> 16]++;
    return 0;
}

static inline uint64_t total_of(Integers a)
{
    uint32_t lanes[FLOAT_LANES];
    uint64_t total = 0;
    f_write(lanes, f_from_i(a));
    for (int lane = 0; lane < FLOAT_LANES; lane++)
        total += lanes[lane];
    return total;
}

/* How many have each magnitude of a window, and after those how many lie below it. What lies within is picked out
 * first, without a branch: counting takes a load and a store for each. */
static int histogram_window(const struct work *work, size_t count)
{
    const float *a = work->a;
    const float row = *(const float *)work->b;
    uint32_t kept[BLOCK + FLOAT_LANES], *bins = work->out;
    const uint32_t end = 1u << work->bins;
    if (!(row >= 0.0f && row < (float)((1u << 31) / ROW)))
        return 0;
    const uint32_t begin = (uint32_t)row * ROW;
    const Integers begins = i_all(begin), magnitudes = i_all(0x7fffffffu);
    Integers below = i_all(0);
    size_t found = 0, i = 0;
    for (; i + FLOAT_LANES <= count; i += FLOAT_LANES) {
        const Integers place = i_sub(i_and(i_from_f(f_read(a + i)), magnitudes), begins);
        below = i_add(below, i_right(place, 31));
        found += i_keep_below(kept + found, place, end);
    }
    uint64_t under = total_of(below);
    for (; i < count; i++) {
        const uint32_t place = magnitude_at(a, i) - begin;
        under += place >> 31;
        kept[found] = place;
        found += place < end;
    }
    for (size_t k = 0; k < found;) { /* many in a row are the same where models agree: then one does not wait for another */
        const size_t first = k;
        while (++k < found && kept[k] == kept[first])
            ;
        bins[kept[first]] += (uint32_t)(k - first);
    }
    bins[end] += (uint32_t)under;
    return 0;
}
