/* Convolutions that answer, in float32 on channels-last maps, for processors with 512-bit vectors: a whole chain of them in one call.
 *
 * Dense: a tile is 14 pixels of the output. What they read is copied once, pixel by pixel, into blocks of 64 numbers, so that the product of a
 * tile with 32 output channels keeps 28 sums in registers and reads its numbers at fixed distances. The copy takes whole rows of channels and
 * costs a few hundredths of the product; it is also where maps that stand side by side are joined, maps of half the size are doubled and the
 * border is padded, so that none of these is ever written to memory. A few tiles go through the same weights while these are in the cache.
 *
 * Winograd: a 3 x 3 kernel on four by four outputs at once takes 36 products of sums instead of 144 (Lavin and Gray, 2016); in single precision
 * it costs about one digit. The 36 products are those of the dense form, on tiles that stay in the second-level cache.
 *
 * Depthwise: 16 channels and a strip of rows at a time, copied once with their border.
 *
 * Bias, SiLU and the sum with another map are done on the sums in registers. What one convolution leaves for the next stays in a workspace
 * that the caller keeps from call to call, so that its pages are there and what is read next is often still in the cache.
 *
 * Written with the vector types that gcc and clang have in C; on processors without 512-bit vectors `convolution_serves` says no.
 */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "../native.h"

enum { LANES = 16, PIXELS = 14, BLOCK = 64, PARTS = 8 };
enum { STRIP = 8, SLID = 8 }; /* rows of a depthwise convolution's output at a time, and pixels of a row */

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Mirrored by `_step` in cpu.py, where every field is an int64. A map begins `offset` numbers into memory `base` of the call; its strides of
 * (batch, row, pixel) count numbers, its channels are adjacent, and with `half` it is read at half its rows and columns. Base -1 is no map.
 * Weights of the dense form: (group, 16 output channels, kernel row, column, input channel, 16), of the depthwise form (16 channels, kernel row,
 * column, 16), of Winograd's (36, 16 output channels, input channel, 16); all padded with zeros to whole vectors. `tiles` go through the weights together. */
typedef struct {
    int64_t base, offset, stride[3], channels, half;
} Map;

enum { DENSE, DEPTHWISE, WINOGRAD };

typedef struct {
    int64_t kind, batch, height, width, out_height, out_width, inputs, outputs, kernel_height, kernel_width, step, groups, parts, activated, early, tiles;
    const float *weights, *bias;
    int64_t out_base, out_offset, out_stride; /* pixels follow each other, `out_stride` numbers apart */
    double scale;                             /* of what is added; `early` is before SiLU */
    Map added, part[PARTS];
} Step;

#if defined(__x86_64__) && defined(__GNUC__)

#define FAST __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#define WITHIN INLINE FAST

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));

int convolution_serves(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

WITHIN Vector all(float x) { return (Vector){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

/* x / (1 + e^-x), to three units in the last place; NaN for NaN. e^-x is 2^n times a polynomial on half a unit around zero, and the quotient
 * a first guess of fourteen bits and one step of Newton's. */
WITHIN Vector silu(Vector x) {
    const __m512 t = _mm512_min_ps(_mm512_set1_ps(126.0f), x * all(-1.44269504f)); /* of a NaN and a number it gives the second */
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vector f = (Vector)t - (Vector)n;
    Vector p = all(1.5403530e-04f);
    p = p * f + all(1.3333558e-03f);
    p = p * f + all(9.6181291e-03f);
    p = p * f + all(5.5504109e-02f);
    p = p * f + all(2.4022651e-01f);
    p = p * f + all(6.9314718e-01f);
    p = p * f + all(1.0f);
    const Vector below = all(1.0f) + (Vector)_mm512_scalef_ps(p, n);
    const Vector guess = _mm512_rcp14_ps(below);
    return x * (guess * (all(2.0f) - below * guess));
}

/* A step with its maps found in memory. */
typedef struct {
    const Step *step;
    const float *part[PARTS], *added;
    float *out;
} Work;

/* What becomes of 16 sums of one pixel: bias, SiLU, the other map's channels, and their place in the output. */
WITHIN void finish(const Step *s, Vector sum, const float *restrict added, float *restrict out, int64_t channel) {
    const int64_t lanes = MIN(LANES, s->outputs - channel);
    if (lanes == LANES) {
        if (s->bias) sum += *(const Vector *)(s->bias + channel);
        if (added && s->early) sum += *(const Vector *)(added + channel) * all((float)s->scale);
        if (s->activated) sum = silu(sum);
        if (added && !s->early) sum += *(const Vector *)(added + channel) * all((float)s->scale);
        *(Vector *)(out + channel) = sum;
        return;
    }
    float shift[LANES] = {0}, values[LANES] = {0};
    if (s->bias) memcpy(shift, s->bias + channel, sizeof(float) * lanes);
    if (added)
        for (int64_t c = 0; c < lanes; c++) values[c] = added[channel + c] * (float)s->scale;
    sum += *(const Vector *)shift;
    if (s->early) sum += *(const Vector *)values;
    if (s->activated) sum = silu(sum);
    if (!s->early) sum += *(const Vector *)values;
    *(Vector *)values = sum;
    memcpy(out + channel, values, sizeof(float) * lanes);
}

WITHIN const float *at(const float *data, const Map *map, int64_t image, int64_t y, int64_t x) {
    return data + image * map->stride[0] + (y >> map->half) * map->stride[1] + (x >> map->half) * map->stride[2];
}

WITHIN void copy(float *restrict to, const float *restrict from, int64_t count) {
    for (; count >= LANES; count -= LANES, to += LANES, from += LANES) *(Vector *)to = *(const Vector *)from;
    if (count & 8) memcpy(to, from, 32), to += 8, from += 8;
    if (count & 4) memcpy(to, from, 16), to += 4, from += 4;
    if (count & 2) memcpy(to, from, 8), to += 2, from += 2;
    if (count & 1) *to = *from;
}

/* Where a tile's pixels read: image, top row and left column of each. */
typedef struct {
    int64_t image[PIXELS], top[PIXELS], left[PIXELS];
} Corners;

/* Put `count` numbers of each pixel, zeros where `from` is NULL, at place k of a tile: (block of 64, pixel, 64). Returns k + count. */
WITHIN int64_t put(float *restrict tile, int64_t k, const float *const *from, int64_t count) {
    for (int64_t done = 0, now; done < count; done += now, k += now) {
        float *restrict to = tile + (k / BLOCK) * (PIXELS * BLOCK) + k % BLOCK;
        now = MIN(count - done, BLOCK - k % BLOCK);
        for (int i = 0; i < PIXELS; i++, to += BLOCK)
            if (from[i])
                copy(to, from[i] + done, now);
            else
                memset(to, 0, sizeof(float) * now);
    }
    return k;
}

/* What the pixels of a tile read. `adjacent`: one map whose pixels follow each other in memory, so that a row of the kernel is one piece. */
WITHIN void gather(const Work *w, float *restrict tile, const Corners *corners, int adjacent) {
    const Step *s = w->step;
    int whole = adjacent;
    for (int i = 0; i < PIXELS; i++) whole &= corners->left[i] >= 0 && corners->left[i] + s->kernel_width <= s->width;
    const float *from[PIXELS];
    int64_t k = 0;
    for (int64_t row = 0; row < s->kernel_height; row++)
        for (int64_t column = 0; column < (whole ? 1 : s->kernel_width); column++)
            for (int64_t m = 0; m < s->parts; m++) {
                const Map map = s->part[m];
                for (int i = 0; i < PIXELS; i++) {
                    const int64_t y = corners->top[i] + row, x = corners->left[i] + column;
                    const int inside = y >= 0 && y < s->height && x >= 0 && x < s->width;
                    from[i] = inside ? at(w->part[m], &map, corners->image[i], y, x) : NULL;
                }
                k = put(tile, k, from, whole ? s->kernel_width * s->inputs : map.channels);
            }
}

/* Sums of a tile's 14 pixels in WIDTH times 16 output channels, over `runs` runs of `length` numbers that begin `apart` numbers from each
 * other; the weights of the second 16 channels stand `next` numbers further. */
#define MULTIPLY(WIDTH)                                                                                                                          \
    WITHIN void multiply_##WIDTH(Vector *restrict sums, const float *restrict tile, const float *restrict weights, int64_t next, int64_t first,  \
                                 int64_t runs, int64_t length, int64_t apart) {                                                                  \
        Vector sum[PIXELS][WIDTH];                                                                                                               \
        _Pragma("GCC unroll 14") for (int i = 0; i < PIXELS; i++) _Pragma("GCC unroll 2") for (int c = 0; c < WIDTH; c++) sum[i][c] = all(0);    \
        for (int64_t run = 0; run < runs; run++, first += apart)                                                                                 \
            for (int64_t k = first, left = length, now; left > 0; k += now, left -= now) {                                                       \
                now = MIN(left, BLOCK - k % BLOCK);                                                                                              \
                const float *restrict number = tile + k / BLOCK * (PIXELS * BLOCK) + k % BLOCK;                                                  \
                for (const float *end = number + now; number < end; number++, weights += LANES) {                                                \
                    Vector weight[WIDTH];                                                                                                        \
                    _Pragma("GCC unroll 2") for (int c = 0; c < WIDTH; c++) weight[c] = *(const Vector *)(weights + c * next);                   \
                    _Pragma("GCC unroll 14") for (int i = 0; i < PIXELS; i++) {                                                                  \
                        const Vector value = all(number[i * BLOCK]);                                                                             \
                        _Pragma("GCC unroll 2") for (int c = 0; c < WIDTH; c++) sum[i][c] += value * weight[c];                                  \
                    }                                                                                                                            \
                }                                                                                                                                \
            }                                                                                                                                    \
        _Pragma("GCC unroll 14") for (int i = 0; i < PIXELS; i++) _Pragma("GCC unroll 2") for (int c = 0; c < WIDTH; c++) sums[i * WIDTH + c] = sum[i][c]; \
    }
MULTIPLY(1)
MULTIPLY(2)

/* Output pixels start..start + count, counted through the batch, in all channels. */
static FAST void dense_pixels(const Work *w, int64_t start, int64_t count, float *restrict scratch) {
    const Step *s = w->step;
    const int64_t area = s->out_height * s->out_width, taps = s->kernel_height * s->kernel_width, inputs = s->inputs / s->groups;
    const int64_t tiles = (count + PIXELS - 1) / PIXELS, tile_size = (taps * s->inputs + BLOCK - 1) / BLOCK * BLOCK * PIXELS;
    const int64_t outputs = s->outputs / s->groups, blocks = (outputs + LANES - 1) / LANES, terms = taps * inputs;
    const int64_t runs = s->groups == 1 ? 1 : taps, length = s->groups == 1 ? terms : inputs;
    const int adjacent = s->parts == 1 && !s->part[0].half && s->part[0].stride[2] == s->inputs;
    const int64_t first_image = start / area, first_y = start % area / s->out_width, first_x = start % s->out_width;
    int64_t image = first_image, y = first_y, x = first_x;
    for (int64_t t = 0; t < tiles; t++) {
        Corners corners;
        for (int64_t i = 0; i < PIXELS; i++) { /* places past the end read the last pixel again, and are not written */
            corners.image[i] = image, corners.top[i] = y * s->step - s->kernel_height / 2, corners.left[i] = x * s->step - s->kernel_width / 2;
            if (t * PIXELS + i < count - 1 && ++x == s->out_width) {
                x = 0;
                if (++y == s->out_height) y = 0, image++;
            }
        }
        gather(w, scratch + t * tile_size, &corners, adjacent);
    }
    Vector sums[PIXELS * 2];
    for (int64_t group = 0; group < s->groups; group++)
        for (int64_t block = 0; block < blocks; block += 2) {
            const int64_t width = MIN(2, blocks - block), channel = group * outputs + block * LANES;
            const float *weights = s->weights + (group * blocks + block) * terms * LANES;
            image = first_image, y = first_y, x = first_x;
            for (int64_t t = 0; t < tiles; t++) {
                const float *tile = scratch + t * tile_size;
                if (width == 2)
                    multiply_2(sums, tile, weights, terms * LANES, group * inputs, runs, length, s->inputs);
                else
                    multiply_1(sums, tile, weights, 0, group * inputs, runs, length, s->inputs);
                for (int64_t i = 0; i < MIN(PIXELS, count - t * PIXELS); i++) {
                    const float *added = w->added ? at(w->added, &s->added, image, y, x) : NULL;
                    float *out = w->out + (start + t * PIXELS + i) * s->out_stride;
                    finish(s, sums[i * width], added, out, channel);
                    if (width == 2) finish(s, sums[i * 2 + 1], added, out, channel + LANES);
                    if (w->added && ++x == s->out_width) {
                        x = 0;
                        if (++y == s->out_height) y = 0, image++;
                    }
                }
            }
        }
}

/* B^T d of six vectors that stand `step` apart, written `to_step` apart. */
WITHIN void winograd_in(const Vector *d, int64_t step, Vector *to, int64_t to_step) {
    const Vector a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], f = d[4 * step], g = d[5 * step], four = all(4.0f), two = all(2.0f);
    const Vector even = f - four * c, odd = e - four * b, near = f - c, far = two * (e - b);
    to[0] = four * a - all(5.0f) * c + f;
    to[to_step] = even + odd;
    to[2 * to_step] = even - odd;
    to[3 * to_step] = near + far;
    to[4 * to_step] = near - far;
    to[5 * to_step] = four * b - all(5.0f) * e + g;
}

/* A^T m of six vectors. */
WITHIN void winograd_out(const Vector *m, int64_t step, Vector *to, int64_t to_step) {
    const Vector near = m[step] + m[2 * step], nears = m[step] - m[2 * step], far = m[3 * step] + m[4 * step], fars = m[3 * step] - m[4 * step];
    to[0] = m[0] + near + far;
    to[to_step] = nears + all(2.0f) * fars;
    to[2 * to_step] = near + all(4.0f) * far;
    to[3 * to_step] = nears + all(8.0f) * fars + m[5 * step];
}

/* Squares start..start + count of four by four outputs, counted through the batch, in all channels. Input channels are whole vectors. */
static FAST void winograd_squares(const Work *w, int64_t start, int64_t count, float *restrict scratch) {
    const Step *s = w->step;
    const int64_t across = (s->out_width + 3) / 4, area = (s->out_height + 3) / 4 * across, blocks = (s->outputs + LANES - 1) / LANES;
    const int64_t tiles = (count + PIXELS - 1) / PIXELS, tile_size = (s->inputs + BLOCK - 1) / BLOCK * BLOCK * PIXELS;
    float *restrict products = scratch + 36 * tiles * tile_size; /* (36, square, block, 16) */
    Vector d[36], e[36];
    for (int64_t n = 0; n < tiles * PIXELS; n++) { /* places past the end read the last square again, and are not written */
        const int64_t square = MIN(start + n, start + count - 1), image = square / area, top = square % area / across * 4 - 1;
        const int64_t left = square % across * 4 - 1;
        float *restrict to = scratch + n / PIXELS * tile_size + n % PIXELS * BLOCK;
        int64_t k = 0;
        for (int64_t m = 0; m < s->parts; m++) {
            const Map map = s->part[m];
            for (int64_t c = 0; c < map.channels; c += LANES, k += LANES) {
                for (int64_t y = 0; y < 6; y++)
                    for (int64_t x = 0; x < 6; x++) {
                        const int inside = top + y >= 0 && top + y < s->height && left + x >= 0 && left + x < s->width;
                        d[y * 6 + x] = inside ? *(const Vector *)(at(w->part[m], &map, image, top + y, left + x) + c) : all(0);
                    }
                for (int x = 0; x < 6; x++) winograd_in(d + x, 6, e + x, 6);
                for (int y = 0; y < 6; y++) winograd_in(e + y * 6, 1, d + y * 6, 1);
                float *restrict place = to + k / BLOCK * (PIXELS * BLOCK) + k % BLOCK;
                for (int64_t i = 0; i < 36; i++) *(Vector *)(place + i * tiles * tile_size) = d[i];
            }
        }
    }
    Vector sums[PIXELS * 2];
    for (int64_t i = 0; i < 36; i++)
        for (int64_t block = 0; block < blocks; block += 2) {
            const int64_t width = MIN(2, blocks - block);
            const float *weights = s->weights + (i * blocks + block) * s->inputs * LANES;
            for (int64_t t = 0; t < tiles; t++) {
                const float *tile = scratch + (i * tiles + t) * tile_size;
                if (width == 2)
                    multiply_2(sums, tile, weights, s->inputs * LANES, 0, 1, s->inputs, 0);
                else
                    multiply_1(sums, tile, weights, 0, 0, 1, s->inputs, 0);
                for (int64_t n = 0; n < PIXELS; n++)
                    for (int64_t c = 0; c < width; c++)
                        *(Vector *)(products + (((i * tiles + t) * PIXELS + n) * blocks + block + c) * LANES) = sums[n * width + c];
            }
        }
    for (int64_t n = 0; n < count; n++) {
        const int64_t square = start + n, image = square / area, top = square % area / across * 4, left = square % across * 4;
        for (int64_t block = 0; block < blocks; block++) {
            for (int64_t i = 0; i < 36; i++) d[i] = *(const Vector *)(products + ((i * tiles * PIXELS + n) * blocks + block) * LANES);
            for (int x = 0; x < 6; x++) winograd_out(d + x, 6, e + x, 6);
            for (int y = 0; y < 4; y++) winograd_out(e + y * 6, 1, d + y * 4, 1);
            for (int64_t y = 0; y < MIN(4, s->out_height - top); y++)
                for (int64_t x = 0; x < MIN(4, s->out_width - left); x++) {
                    const float *added = w->added ? at(w->added, &s->added, image, top + y, left + x) : NULL;
                    float *out = w->out + ((image * s->out_height + top + y) * s->out_width + left + x) * s->out_stride;
                    finish(s, d[y * 4 + x], added, out, block * LANES);
                }
        }
    }
}

/* Eight pixels of a row of a depthwise convolution: `rows` points at their first number in the padded copy, whose rows are `wide` pixels. */
#define SLIDE(COLUMNS)                                                                                                                    \
    WITHIN void slide_##COLUMNS(Vector *restrict sums, const float *restrict rows, int64_t wide, int64_t step, const float *restrict weights, \
                                int64_t kernel_rows) {                                                                                    \
        Vector sum[SLID];                                                                                                                 \
        _Pragma("GCC unroll 8") for (int i = 0; i < SLID; i++) sum[i] = all(0);                                                           \
        for (int64_t r = 0; r < kernel_rows; r++, rows += wide * LANES)                                                                   \
            _Pragma("GCC unroll 7") for (int c = 0; c < COLUMNS; c++, weights += LANES) {                                                 \
                const Vector weight = *(const Vector *)weights;                                                                           \
                _Pragma("GCC unroll 8") for (int i = 0; i < SLID; i++) sum[i] += weight * *(const Vector *)(rows + (i * step + c) * LANES); \
            }                                                                                                                             \
        _Pragma("GCC unroll 8") for (int i = 0; i < SLID; i++) sums[i] = sum[i];                                                          \
    }
SLIDE(3)
SLIDE(5)
SLIDE(7)

/* Fewer pixels, or another kernel. */
static FAST void slide(Vector *restrict sums, int64_t pixels, const float *restrict rows, int64_t wide, int64_t step, const float *restrict weights,
                       int64_t kernel_rows, int64_t kernel_columns) {
    for (int64_t i = 0; i < pixels; i++) {
        Vector sum = all(0);
        for (int64_t r = 0; r < kernel_rows; r++)
            for (int64_t c = 0; c < kernel_columns; c++)
                sum += *(const Vector *)(weights + (r * kernel_columns + c) * LANES) * *(const Vector *)(rows + (r * wide + i * step + c) * LANES);
        sums[i] = sum;
    }
}

/* Rows y..y + count of the output of one image, in 16 channels. */
static FAST void depthwise_strip(const Work *w, int64_t image, int64_t y, int64_t count, int64_t channel, float *restrict scratch) {
    const Step *s = w->step;
    const int64_t above = s->kernel_height / 2, beside = s->kernel_width / 2, wide = s->width + 2 * beside, lanes = MIN(LANES, s->outputs - channel);
    const int64_t first = y * s->step - above, rows = (count - 1) * s->step + s->kernel_height;
    for (int64_t r = 0; r < rows; r++) {
        float *restrict to = scratch + r * wide * LANES;
        if (first + r < 0 || first + r >= s->height) {
            memset(to, 0, sizeof(float) * wide * LANES);
            continue;
        }
        memset(to, 0, sizeof(float) * beside * LANES);
        memset(to + (beside + s->width) * LANES, 0, sizeof(float) * beside * LANES);
        for (int64_t x = 0; x < s->width; x++) {
            float *restrict cell = to + (beside + x) * LANES;
            const float *from = at(w->part[0], s->part, image, first + r, x) + channel;
            if (lanes == LANES)
                *(Vector *)cell = *(const Vector *)from;
            else
                for (int64_t c = 0; c < LANES; c++) cell[c] = c < lanes ? from[c] : 0.0f;
        }
    }
    const float *weights = s->weights + channel * s->kernel_height * s->kernel_width;
    const int64_t pixels = MIN(SLID, s->out_width), columns = s->kernel_width;
    Vector sums[SLID];
    for (int64_t r = 0; r < count; r++)
        for (int64_t x = 0; x < s->out_width; x += SLID) {
            const int64_t start = MIN(x, s->out_width - pixels); /* the last pixels of a row may be some of those before */
            const float *from = scratch + (r * s->step * wide + start * s->step) * LANES;
            if (pixels < SLID || (columns != 3 && columns != 5 && columns != 7))
                slide(sums, pixels, from, wide, s->step, weights, s->kernel_height, columns);
            else if (s->step == 1)
                columns == 3 ? slide_3(sums, from, wide, 1, weights, s->kernel_height)
                : columns == 5 ? slide_5(sums, from, wide, 1, weights, s->kernel_height)
                               : slide_7(sums, from, wide, 1, weights, s->kernel_height);
            else
                columns == 3 ? slide_3(sums, from, wide, s->step, weights, s->kernel_height)
                : columns == 5 ? slide_5(sums, from, wide, s->step, weights, s->kernel_height)
                               : slide_7(sums, from, wide, s->step, weights, s->kernel_height);
            for (int64_t i = 0; i < pixels; i++) {
                float *out = w->out + ((image * s->out_height + y + r) * s->out_width + start + i) * s->out_stride;
                finish(s, sums[i], w->added ? at(w->added, &s->added, image, y + r, start + i) : NULL, out, channel);
            }
        }
}

/* Steps one after the other. `bases` are the memories that maps begin in; `scratch` has `share` numbers for each thread. */
void convolution_run(const Step *steps, int64_t count, float *const *bases, float *scratch, int64_t share, int threads) {
    for (const Step *s = steps; s < steps + count; s++) {
        Work w = {.step = s, .added = s->added.base < 0 ? NULL : bases[s->added.base] + s->added.offset, .out = bases[s->out_base] + s->out_offset};
        for (int64_t m = 0; m < s->parts; m++) w.part[m] = bases[s->part[m].base] + s->part[m].offset;
        const int64_t pixels = s->batch * s->out_height * s->out_width, piece = s->tiles * PIXELS;
        const int64_t strips = (s->out_height + STRIP - 1) / STRIP, blocks = (s->outputs + LANES - 1) / LANES;
        const int64_t squares = s->batch * ((s->out_height + 3) / 4) * ((s->out_width + 3) / 4);
        const int64_t items = s->kind == DEPTHWISE ? s->batch * strips * blocks : ((s->kind == WINOGRAD ? squares : pixels) + piece - 1) / piece;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
        for (int64_t item = 0; item < items; item++) {
            float *own = scratch;
#ifdef _OPENMP
            own += omp_get_thread_num() * share;
#endif
            if (s->kind == WINOGRAD)
                winograd_squares(&w, item * piece, MIN(piece, squares - item * piece), own);
            else if (s->kind == DEPTHWISE) {
                const int64_t strip = item / blocks % strips;
                depthwise_strip(&w, item / (blocks * strips), strip * STRIP, MIN(STRIP, s->out_height - strip * STRIP), item % blocks * LANES, own);
            } else
                dense_pixels(&w, item * piece, MIN(piece, pixels - item * piece), own);
        }
    }
}

#else

int convolution_serves(void) { return 0; }
void convolution_run(const Step *steps, int64_t count, float *const *bases, float *scratch, int64_t share, int threads) {
    (void)steps, (void)count, (void)bases, (void)scratch, (void)share, (void)threads;
}

#endif
