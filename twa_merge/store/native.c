/* Project and combine on tiles of offsets, on CPUs: kernels.py says what they are, tiles.py how
   offsets lie, quantize.py how they are packed. Vectors are the compiler's own, so that one source
   serves every processor; a group's 128 numbers are 8 planes of 16 lanes.

   What ends in _tile takes one tile of n offsets, `width` numbers each:
   project: sums[offset] = sum of offset * gradient, where a row of the tensor has `row` numbers;
   combine: out = total * centre + sum of beta[offset] * offset.
   The functions at the end take u tiles, each of which is one thread's.

   Where a rank's rows begin must not show in the sums: they are taken in float32 over pieces of a
   row at most, over all else in float64. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { LANES = 16, PLANES = 8, GROUP = PLANES * LANES, RUNS = LANES / WIDTH };
/* Vectors in flight at a time: as many as hide the time that an addition takes. */
enum { CHAINS = 4, PIECE = CHAINS * WIDTH };
/* Offsets whose sums are kept in vectors at a time. */
enum { TOGETHER = 32 };

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef double doubles __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));

#define INLINE static inline __attribute__((always_inline))
#define LOAD(name, Vector, Number)                                                                 \
    INLINE Vector name(const Number *from) {                                                       \
        Vector v;                                                                                  \
        memcpy(&v, from, sizeof v);                                                                \
        return v;                                                                                  \
    }
LOAD(load, floats, float)
LOAD(load_ints, ints, int32_t)

INLINE void store(float *to, floats v) { memcpy(to, &v, sizeof v); }

INLINE floats to_floats(ints v) { return __builtin_convertvector(v, floats); }

INLINE double added_up(doubles v) {
    double sum = 0;
    for (int j = 0; j < WIDTH / 2; j++) sum += v[j];
    return sum;
}

/* Left to themselves compilers widen bytes one by one, and take halves by way of the stack. */
#if defined(__AVX512F__)
INLINE __m256 low_half(floats v) { return _mm512_castps512_ps256((__m512)v); }
INLINE __m256 high_half(floats v) { return (__m256)_mm512_extractf64x4_pd((__m512d)v, 1); }
INLINE doubles to_doubles(__m256 v) { return (doubles)_mm512_cvtps_pd(v); }
INLINE words unsigned_halves(const uint16_t *from) {
    return (words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
}
INLINE ints signed_bytes(const int8_t *from) {
    return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
}
INLINE ints unsigned_bytes(const uint8_t *from) {
    return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
}
#elif defined(__AVX2__)
INLINE __m128 low_half(floats v) { return _mm256_castps256_ps128((__m256)v); }
INLINE __m128 high_half(floats v) { return _mm256_extractf128_ps((__m256)v, 1); }
INLINE doubles to_doubles(__m128 v) { return (doubles)_mm256_cvtps_pd(v); }
INLINE words unsigned_halves(const uint16_t *from) {
    return (words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
}
INLINE ints signed_bytes(const int8_t *from) {
    return (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
}
INLINE ints unsigned_bytes(const uint8_t *from) {
    return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
}
#else
typedef float half_floats __attribute__((vector_size(2 * WIDTH)));
INLINE half_floats low_half(floats v) { return (half_floats){v[0], v[1]}; }
INLINE half_floats high_half(floats v) { return (half_floats){v[2], v[3]}; }
INLINE doubles to_doubles(half_floats v) { return (doubles){v[0], v[1]}; }
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
LOAD(load_halves, halves, uint16_t)
INLINE words unsigned_halves(const uint16_t *from) {
    return __builtin_convertvector(load_halves(from), words);
}
typedef int8_t signed_run __attribute__((vector_size(WIDTH)));
typedef uint8_t unsigned_run __attribute__((vector_size(WIDTH)));
LOAD(load_signed, signed_run, int8_t)
LOAD(load_unsigned, unsigned_run, uint8_t)
INLINE ints signed_bytes(const int8_t *from) {
    return __builtin_convertvector(load_signed(from), ints);
}
INLINE ints unsigned_bytes(const uint8_t *from) {
    return __builtin_convertvector(load_unsigned(from), ints);
}
#endif

/* a * b + c, rounded once where the processor can: left to themselves compilers do so in one loop,
   not in the next, and where a tile ends would show. */
INLINE floats times_plus(floats a, floats b, floats c) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* The sums of its two halves. */
INLINE doubles folded(floats v) { return to_doubles(low_half(v) + high_half(v)); }

INLINE void add(doubles sums[2], floats v) {
    sums[0] += to_doubles(low_half(v));
    sums[1] += to_doubles(high_half(v));
}

/* ---- Plain numbers: one offset of a tile after the other. ---- */

INLINE floats some_float32(const float *from) { return load(from); }
INLINE floats some_bfloat16(const uint16_t *from) {
    return (floats)(unsigned_halves(from) << 16);
}

/* Combining goes from offset to offset a piece at a time, which no processor sees coming: the next
   tile is fetched meanwhile, line by line, into the second cache. */
enum { LINE = 64 };
#define FETCH(from) __builtin_prefetch(from, 0, 2)

#define PLAIN(dtype, Number)                                                                       \
    INLINE floats few_##dtype(const Number *from, ptrdiff_t count) {                               \
        Number filled[WIDTH] = {0};                                                                \
        memcpy(filled, from, count * sizeof *from);                                                \
        return some_##dtype(filled);                                                               \
    }                                                                                              \
    INLINE void project_tile_##dtype(const Number *data, const float *scales,                      \
                                     const float *gradient, double *sums, ptrdiff_t n,             \
                                     ptrdiff_t width, ptrdiff_t row) {                             \
        (void)scales;                                                                              \
        for (ptrdiff_t i = 0; i < n; i++, data += width) {                                         \
            doubles a[CHAINS][2] = {0};                                                            \
            ptrdiff_t j = 0;                                                                       \
            if (row % PIECE == 0)                                                                  \
                for (; j + PIECE <= width; j += PIECE) {                                           \
                    floats piece = {0};                                                            \
                    for (int k = 0; k < CHAINS; k++) {                                             \
                        ptrdiff_t at = j + k * WIDTH;                                              \
                        piece += some_##dtype(data + at) * load(gradient + at);                    \
                    }                                                                              \
                    a[j / PIECE % CHAINS][0] += folded(piece);                                     \
                }                                                                                  \
            else                                                                                   \
                for (; j + PIECE <= width; j += PIECE)                                             \
                    for (int k = 0; k < CHAINS; k++) {                                             \
                        ptrdiff_t at = j + k * WIDTH;                                              \
                        add(a[k], some_##dtype(data + at) * load(gradient + at));                  \
                    }                                                                              \
            for (; j < width; j += WIDTH) {                                                        \
                ptrdiff_t count = width - j < WIDTH ? width - j : WIDTH;                           \
                add(a[0], few_##dtype(data + j, count) * few_float32(gradient + j, count));        \
            }                                                                                      \
            double sum = 0;                                                                        \
            for (int k = 0; k < CHAINS; k++) sum += added_up(a[k][0] + a[k][1]);                   \
            sums[i] = sum;                                                                         \
        }                                                                                          \
    }                                                                                              \
    INLINE void combine_tile_##dtype(const Number *data, const float *scales, const float *beta,   \
                                     float total, const float *centre, float *out, ptrdiff_t n,    \
                                     ptrdiff_t width) {                                            \
        (void)scales;                                                                              \
        ptrdiff_t j = 0;                                                                           \
        for (; j + PIECE <= width; j += PIECE) {                                                   \
            floats a[CHAINS];                                                                      \
            const Number *ahead = data + n * (width + j);                                          \
            for (int k = 0; k < CHAINS; k++) a[k] = total * load(centre + j + k * WIDTH);          \
            for (ptrdiff_t i = 0; i < n; i++, ahead += PIECE) {                                    \
                for (int k = 0; k < PIECE; k += LINE / (int)sizeof(Number)) FETCH(ahead + k);      \
                for (int k = 0; k < CHAINS; k++) {                                                 \
                    ptrdiff_t at = i * width + j + k * WIDTH;                                      \
                    a[k] = times_plus((floats){0} + beta[i], some_##dtype(data + at), a[k]);       \
                }                                                                                  \
            }                                                                                      \
            for (int k = 0; k < CHAINS; k++) store(out + j + k * WIDTH, a[k]);                     \
        }                                                                                          \
        for (; j < width; j += WIDTH) {                                                            \
            ptrdiff_t count = width - j < WIDTH ? width - j : WIDTH;                               \
            floats a = total * few_float32(centre + j, count);                                     \
            for (ptrdiff_t i = 0; i < n; i++)                                                      \
                a = times_plus((floats){0} + beta[i], few_##dtype(data + i * width + j, count), a);\
            memcpy(out + j, &a, count * sizeof *out);                                              \
        }                                                                                          \
    }
PLAIN(float32, float)
PLAIN(bfloat16, uint16_t)

/* ---- Packed groups: the same group of all offsets side by side. ---- */

/* Bits stay where they stand in their word; a plane's factor brings them down, and its zero is what
   is stored for nothing. */
static const int32_t MASKS_int4[PLANES] = {15,       15 << 4,  15 << 8,  15 << 12,
                                           15 << 16, 15 << 20, 15 << 24, -(1 << 28)};
static const float FACTORS_int4[PLANES] = {1,        0x1p-4f,  0x1p-8f,  0x1p-12f,
                                           0x1p-16f, 0x1p-20f, 0x1p-24f, 0x1p-28f};
static const float ZEROS_int4[PLANES] = {8, 8, 8, 8, 8, 8, 8, 0};
INLINE ints words_int4(const int32_t *from) { return load_ints(from); }

static const int32_t MASKS_int1[PLANES] = {1, 2, 4, 8, 16, 32, 64, 128};
static const float FACTORS_int1[PLANES] = {2,       1,       0x1p-1f, 0x1p-2f,
                                           0x1p-3f, 0x1p-4f, 0x1p-5f, 0x1p-6f};
static const float ZEROS_int1[PLANES] = {1, 1, 1, 1, 1, 1, 1, 1};
INLINE ints words_int1(const uint8_t *from) { return unsigned_bytes(from); }

/* A group of the gradient, made ready for the groups of all offsets. */
typedef struct {
    const float *gradient;
} ready_int8;
typedef struct {
    floats parts[RUNS][PLANES], zero;
} ready_planes;

INLINE void prepare_int8(ready_int8 *ready, const float *gradient) { ready->gradient = gradient; }
INLINE floats product_int8(const int8_t *data, const ready_int8 *ready) {
    floats a[CHAINS] = {0};
    for (int j = 0; j < GROUP; j += PIECE)
        for (int k = 0; k < CHAINS; k++) {
            int at = j + k * WIDTH;
            a[k] += to_floats(signed_bytes(data + at)) * load(ready->gradient + at);
        }
    return (a[0] + a[1]) + (a[2] + a[3]);
}

#define READY(dtype, Word)                                                                         \
    INLINE void prepare_##dtype(ready_planes *ready, const float *gradient) {                      \
        ready->zero = (floats){0};                                                                 \
        for (int r = 0; r < RUNS; r++)                                                             \
            for (int k = 0; k < PLANES; k++) {                                                     \
                floats g = load(gradient + k * LANES + r * WIDTH);                                 \
                ready->zero -= ZEROS_##dtype[k] * g;                                               \
                ready->parts[r][k] = FACTORS_##dtype[k] * g;                                       \
            }                                                                                      \
    }                                                                                              \
    INLINE floats product_##dtype(const Word *data, const ready_planes *ready) {                   \
        floats a = ready->zero, b = {0};                                                           \
        for (int r = 0; r < RUNS; r++) {                                                           \
            ints w = words_##dtype(data + r * WIDTH);                                              \
            for (int k = 0; k < PLANES; k += 2) {                                                  \
                a += to_floats(w & MASKS_##dtype[k]) * ready->parts[r][k];                         \
                b += to_floats(w & MASKS_##dtype[k + 1]) * ready->parts[r][k + 1];                 \
            }                                                                                      \
        }                                                                                          \
        return a + b;                                                                              \
    }

/* gcc would take two groups at a time, from two streams: a third of the speed in int8. */
#define ONE_AT_A_TIME __asm__ volatile("" ::: "memory")

#define PROJECT(dtype, Word, SIZE, Ready)                                                          \
    INLINE void project_tile_##dtype(const Word *data, const float *scales, const float *gradient, \
                                     double *sums, ptrdiff_t n, ptrdiff_t width, ptrdiff_t row) {  \
        (void)row;                                                                                 \
        for (ptrdiff_t first = 0; first < n; first += TOGETHER) {                                  \
            ptrdiff_t count = n - first < TOGETHER ? n - first : TOGETHER;                         \
            doubles lanes[TOGETHER] = {0};                                                         \
            for (ptrdiff_t g = 0; g < width / GROUP; g++) {                                        \
                ONE_AT_A_TIME;                                                                     \
                Ready ready;                                                                       \
                prepare_##dtype(&ready, gradient + g * GROUP);                                     \
                for (ptrdiff_t i = 0; i < count; i++) {                                            \
                    ptrdiff_t at = g * n + first + i;                                              \
                    lanes[i] += folded(scales[at] * product_##dtype(data + at * SIZE, &ready));    \
                }                                                                                  \
            }                                                                                      \
            for (ptrdiff_t i = 0; i < count; i++) sums[first + i] = added_up(lanes[i]);            \
        }                                                                                          \
    }

#define COMBINE(dtype, Word, SIZE)                                                                 \
    INLINE void combine_tile_##dtype(const Word *data, const float *scales, const float *beta,     \
                                     float total, const float *centre, float *out, ptrdiff_t n,    \
                                     ptrdiff_t width) {                                            \
        for (ptrdiff_t g = 0; g < width; g += GROUP, data += n * SIZE, scales += n)                \
            for (int r = 0; r < LANES; r += WIDTH) {                                               \
                floats a[PLANES] = {0};                                                            \
                float zero = 0;                                                                    \
                for (ptrdiff_t i = 0; i < n; i++) {                                                \
                    float weight = beta[i] * scales[i];                                            \
                    ints w = words_##dtype(data + i * SIZE + r);                                   \
                    zero += weight;                                                                \
                    for (int k = 0; k < PLANES; k++)                                               \
                        a[k] += weight * to_floats(w & MASKS_##dtype[k]);                          \
                }                                                                                  \
                for (int k = 0; k < PLANES; k++) {                                                 \
                    ptrdiff_t at = g + k * LANES + r;                                              \
                    floats base = total * load(centre + at) - zero * ZEROS_##dtype[k];             \
                    store(out + at, base + FACTORS_##dtype[k] * a[k]);                             \
                }                                                                                  \
            }                                                                                      \
    }

READY(int4, int32_t)
PROJECT(int8, int8_t, GROUP, ready_int8)
PROJECT(int4, int32_t, LANES, ready_planes)
COMBINE(int4, int32_t, LANES)
COMBINE(int1, uint8_t, LANES)

INLINE void combine_tile_int8(const int8_t *data, const float *scales, const float *beta,
                              float total, const float *centre, float *out, ptrdiff_t n,
                              ptrdiff_t width) {
    enum { VECTORS = 8 };
    for (ptrdiff_t g = 0; g < width; g += GROUP, data += n * GROUP, scales += n)
        for (int j = 0; j < GROUP; j += VECTORS * WIDTH) {
            floats a[VECTORS];
            for (int k = 0; k < VECTORS; k++) a[k] = total * load(centre + g + j + k * WIDTH);
            for (ptrdiff_t i = 0; i < n; i++) {
                float weight = beta[i] * scales[i];
                for (int k = 0; k < VECTORS; k++)
                    a[k] += weight * to_floats(signed_bytes(data + i * GROUP + j + k * WIDTH));
            }
            for (int k = 0; k < VECTORS; k++) store(out + g + j + k * WIDTH, a[k]);
        }
}

#if !defined(__AVX2__)
READY(int1, uint8_t)
PROJECT(int1, uint8_t, LANES, ready_planes)
#else
/* Three signed numbers have eight sums: they are made once for up to 32 offsets, and looked up by
   three bits of eight offsets at a time. A group of an offset is four words of 32 bits; bit
   8 b + k of word q is the sign of number 16 k + 4 q + b. */
enum { WORDS = 4, TRIPLES = 11, EIGHTS_AT_ONCE = 4 };

INLINE __m256 number_of(const float *gradient, int q, int bit) {
    return _mm256_set1_ps(bit < 32 ? gradient[bit % 8 * LANES + 4 * q + bit / 8] : 0.0f);
}

/* The words of a group of eight offsets, which come in the order 0, 2, 4, 6, 1, 3, 5, 7. */
INLINE void words_of_eight(const uint8_t *data, __m256i words[WORDS]) {
    const __m256i *from = (const __m256i *)data;
    __m256i x0 = _mm256_loadu_si256(from), x1 = _mm256_loadu_si256(from + 1);
    __m256i x2 = _mm256_loadu_si256(from + 2), x3 = _mm256_loadu_si256(from + 3);
    __m256i low01 = _mm256_unpacklo_epi32(x0, x1), low23 = _mm256_unpacklo_epi32(x2, x3);
    __m256i high01 = _mm256_unpackhi_epi32(x0, x1), high23 = _mm256_unpackhi_epi32(x2, x3);
    words[0] = _mm256_unpacklo_epi64(low01, low23);
    words[1] = _mm256_unpackhi_epi64(low01, low23);
    words[2] = _mm256_unpacklo_epi64(high01, high23);
    words[3] = _mm256_unpackhi_epi64(high01, high23);
}

/* Adds the products of a group of 8 * EIGHTS offsets to their sums. */
INLINE void add_products(const uint8_t *data, const float *scales, const float *gradient,
                         double *sums, const int EIGHTS) {
    const __m256 first = {-1, 1, -1, 1, -1, 1, -1, 1}, second = {-1, -1, 1, 1, -1, -1, 1, 1},
                 third = {-1, -1, -1, -1, 1, 1, 1, 1};
    __m256i words[EIGHTS_AT_ONCE][WORDS];
    __m256 odd[EIGHTS_AT_ONCE], even[EIGHTS_AT_ONCE];
#pragma GCC unroll 4
    for (int e = 0; e < EIGHTS; e++) {
        words_of_eight(data + e * 8 * LANES, words[e]);
        odd[e] = even[e] = _mm256_setzero_ps();
    }
#pragma GCC unroll 4
    for (int q = 0; q < WORDS; q++)
#pragma GCC unroll 11
        for (int t = 0; t < TRIPLES; t++) {
            __m256 table = number_of(gradient, q, 3 * t) * first +
                           number_of(gradient, q, 3 * t + 1) * second +
                           number_of(gradient, q, 3 * t + 2) * third;
#pragma GCC unroll 4
            for (int e = 0; e < EIGHTS; e++) {
                __m256i bits = _mm256_srli_epi32(words[e][q], 3 * t);
                *(t % 2 ? odd + e : even + e) += _mm256_permutevar8x32_ps(table, bits);
            }
        }
#pragma GCC unroll 4
    for (int e = 0; e < EIGHTS; e++) {
        __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        __m256 found = _mm256_permutevar8x32_ps(odd[e] + even[e], order);
        found *= _mm256_loadu_ps(scales + 8 * e);
        double *low = sums + 8 * e, *high = low + 4;
        __m256d first_four = _mm256_cvtps_pd(_mm256_castps256_ps128(found));
        __m256d last_four = _mm256_cvtps_pd(_mm256_extractf128_ps(found, 1));
        _mm256_storeu_pd(low, _mm256_loadu_pd(low) + first_four);
        _mm256_storeu_pd(high, _mm256_loadu_pd(high) + last_four);
    }
}

INLINE void add_fewer_products(const uint8_t *data, const float *scales, const float *gradient,
                               double *sums, ptrdiff_t count) {
    uint8_t filled[8 * LANES] = {0};
    float scale[8] = {0};
    double sum[8] = {0};
    memcpy(filled, data, count * LANES);
    memcpy(scale, scales, count * sizeof *scale);
    add_products(filled, scale, gradient, sum, 1);
    for (ptrdiff_t i = 0; i < count; i++) sums[i] += sum[i];
}

INLINE void project_tile_int1(const uint8_t *data, const float *scales, const float *gradient,
                              double *sums, ptrdiff_t n, ptrdiff_t width, ptrdiff_t row) {
    (void)row;
    memset(sums, 0, n * sizeof *sums);
    for (ptrdiff_t g = 0; g < width; g += GROUP, data += n * LANES, scales += n) {
        const float *here = gradient + g;
        ptrdiff_t i = 0;
        for (; i + 32 <= n; i += 32)
            add_products(data + i * LANES, scales + i, here, sums + i, EIGHTS_AT_ONCE);
        for (; i + 16 <= n; i += 16) add_products(data + i * LANES, scales + i, here, sums + i, 2);
        for (; i + 8 <= n; i += 8) add_products(data + i * LANES, scales + i, here, sums + i, 1);
        if (i < n) add_fewer_products(data + i * LANES, scales + i, here, sums + i, n - i);
    }
}
#endif

/* ---- What is called: numbers of an offset's group are in SIZE words, those of plain offsets in
   as many as there are. ---- */

#define TILES(dtype, Word, SIZE)                                                                   \
    void project_##dtype(const Word *data, const float *scales, const float *gradient,             \
                         double *sums, ptrdiff_t u, ptrdiff_t n, ptrdiff_t width, ptrdiff_t row,   \
                         int threads) {                                                            \
        ptrdiff_t groups = width / GROUP * n, size = n * (SIZE);                                   \
        _Pragma("omp parallel for num_threads(threads)")                                           \
        for (ptrdiff_t t = 0; t < u; t++)                                                          \
            project_tile_##dtype(data + t * size, scales ? scales + t * groups : scales,           \
                                 gradient + t * width, sums + t * n, n, width, row);               \
    }                                                                                              \
    void combine_##dtype(const Word *data, const float *scales, const float *beta, float total,    \
                         const float *centre, float *out, ptrdiff_t u, ptrdiff_t n,                \
                         ptrdiff_t width, int threads) {                                           \
        ptrdiff_t groups = width / GROUP * n, size = n * (SIZE);                                   \
        _Pragma("omp parallel for num_threads(threads)")                                           \
        for (ptrdiff_t t = 0; t < u; t++)                                                          \
            combine_tile_##dtype(data + t * size, scales ? scales + t * groups : scales, beta,     \
                                 total, centre + t * width, out + t * width, n, width);            \
    }

TILES(float32, float, width)
TILES(bfloat16, uint16_t, width)
TILES(int8, int8_t, width)
TILES(int4, int32_t, width / GROUP * LANES)
TILES(int1, uint8_t, width / GROUP * LANES)
