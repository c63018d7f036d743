/* Multi-scale selective attention on CPU: one thread takes one sequence and keeps it in its cache.
 *
 * A sequence is (length, channels), channels last, so every inner loop runs over contiguous channels and vectorises. The composition in torch
 * writes and reads each intermediate from memory (convolution, two passes of the norm, gate, interpolation, product, sum); here a sequence of
 * a few hundred kilobytes goes through all of it while it sits in the second-level cache. The backward keeps only the inputs and two numbers a
 * norm, and convolves again. Parameter gradients are summed in a buffer a thread and then in thread order: the same bits for the same number
 * of threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "../native.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Parameters of a depthwise convolution and the norm after it; taps is (kernel, channels), NULL for no convolution. */
typedef struct {
    const float *taps, *bias, *scale, *shift;
    int64_t kernel, stride;
} Layer;

/* Their gradients, each accumulated; taps and bias may be NULL. */
typedef struct {
    float *taps, *bias, *scale, *shift;
} Gradient;

/* exp(x) to two units in the last place of a float, in a form that vectorises: 2^n times a polynomial on [-ln2/2, ln2/2]. */
INLINE float exponential(float x) {
    x = MIN(MAX(x, -87.0f), 88.0f);
    const float n = rintf(x * 1.44269504088896341f);
    const float r = x - n * 0.693147180559945309f;
    float p = 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union {
        int32_t i;
        float f;
    } power = {((int32_t)n + 127) << 23};
    return p * power.f;
}

INLINE int64_t out_length(int64_t length, const Layer *layer) {
    return layer->taps ? (length + 2 * (layer->kernel / 2) - layer->kernel) / layer->stride + 1 : length;
}

INLINE void convolve(const float *restrict x, int64_t length, int64_t channels, const Layer *layer, float *restrict y) {
    const int64_t out = out_length(length, layer), kernel = layer->kernel, pad = kernel / 2;
    const float *restrict taps = layer->taps, *restrict bias = layer->bias;
    if (!taps) {
        memcpy(y, x, sizeof(float) * length * channels);
        return;
    }
    for (int64_t t = 0; t < out; t++) {
        float *restrict row = y + t * channels;
        const int64_t first = t * layer->stride - pad;
        if (kernel == 5 && first >= 0 && first + 5 <= length) {
            const float *restrict in = x + first * channels;
            for (int64_t c = 0; c < channels; c++)
                row[c] = taps[c] * in[c] + taps[channels + c] * in[channels + c] + taps[2 * channels + c] * in[2 * channels + c] +
                         taps[3 * channels + c] * in[3 * channels + c] + taps[4 * channels + c] * in[4 * channels + c];
        } else if (kernel == 1) {
            const float *restrict in = x + first * channels;
            for (int64_t c = 0; c < channels; c++) row[c] = taps[c] * in[c];
        } else {
            memset(row, 0, sizeof(float) * channels);
            for (int64_t k = MAX(0, -first); k < MIN(kernel, length - first); k++) {
                const float *restrict in = x + (first + k) * channels;
                const float *restrict tap = taps + k * channels;
                for (int64_t c = 0; c < channels; c++) row[c] += tap[c] * in[c];
            }
        }
        if (bias)
            for (int64_t c = 0; c < channels; c++) row[c] += bias[c];
    }
}

/* Mean and reciprocal standard deviation of all values in one pass, about the mean of the first row so that a common offset costs no digits.
 * Sums of a row in float, of the rows in double. */
INLINE void statistics(const float *restrict y, int64_t rows, int64_t channels, float eps, float *mean, float *rstd) {
    float pivot = 0.0f;
    for (int64_t c = 0; c < channels; c++) pivot += y[c];
    pivot /= (float)channels;
    double sum = 0.0, square = 0.0;
    int64_t t = 0;
    for (; t + 4 <= rows; t += 4) { /* four rows at once: independent sums hide the latency of the additions */
        const float *restrict r0 = y + t * channels, *restrict r1 = r0 + channels, *restrict r2 = r1 + channels, *restrict r3 = r2 + channels;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0, q0 = 0, q1 = 0, q2 = 0, q3 = 0;
        for (int64_t c = 0; c < channels; c++) {
            const float d0 = r0[c] - pivot, d1 = r1[c] - pivot, d2 = r2[c] - pivot, d3 = r3[c] - pivot;
            s0 += d0, s1 += d1, s2 += d2, s3 += d3;
            q0 += d0 * d0, q1 += d1 * d1, q2 += d2 * d2, q3 += d3 * d3;
        }
        sum += (double)s0 + s1 + s2 + s3;
        square += (double)q0 + q1 + q2 + q3;
    }
    for (; t < rows; t++) {
        float s = 0.0f, q = 0.0f;
        for (int64_t c = 0; c < channels; c++) {
            const float d = y[t * channels + c] - pivot;
            s += d;
            q += d * d;
        }
        sum += s;
        square += q;
    }
    const double count = (double)(rows * channels), offset = sum / count;
    const double variance = square / count - offset * offset;
    *mean = (float)(pivot + offset);
    *rstd = (float)(1.0 / sqrt((variance > 0.0 ? variance : 0.0) + (double)eps));
}

/* Convolution, norm, scale and shift. `line` has room for 2 * channels. */
INLINE void layer_forward(const float *x, int64_t length, int64_t channels, const Layer *layer, float eps, float *restrict y, float *stats,
                          float *restrict line) {
    const int64_t rows = out_length(length, layer);
    convolve(x, length, channels, layer, y);
    statistics(y, rows, channels, eps, stats, stats + 1);
    float *restrict factor = line, *restrict offset = line + channels;
    for (int64_t c = 0; c < channels; c++) {
        factor[c] = stats[1] * layer->scale[c];
        offset[c] = layer->shift[c] - stats[0] * factor[c];
    }
    for (int64_t t = 0; t < rows; t++)
        for (int64_t c = 0; c < channels; c++) y[t * channels + c] = y[t * channels + c] * factor[c] + offset[c];
}

/* The convolution again, standardised: what the backward reads. */
INLINE void restandardise(const float *x, int64_t length, int64_t channels, const Layer *layer, const float *stats, float *restrict hat) {
    const float rstd = stats[1], offset = -stats[0] * stats[1];
    convolve(x, length, channels, layer, hat);
    const int64_t count = out_length(length, layer) * channels;
    for (int64_t i = 0; i < count; i++) hat[i] = hat[i] * rstd + offset;
}

/* Backward of convolution and norm. `hat` holds the standardised convolution and is overwritten by the gradient of the convolution; `grad` is
 * the gradient of the layer's output; the gradient of x is ADDED to dx. `line` has room for 2 * channels. */
INLINE void layer_backward(const float *restrict x, int64_t length, int64_t channels, const Layer *layer, float rstd, float *restrict hat,
                           const float *restrict grad, float *restrict dx, Gradient *out, float *restrict line) {
    const int64_t rows = out_length(length, layer), kernel = layer->kernel, pad = kernel / 2;
    const float *restrict scale = layer->scale, *restrict taps = layer->taps;
    float *restrict dscale = line, *restrict dshift = line + channels;
    memset(line, 0, sizeof(float) * 2 * channels);
    for (int64_t t = 0; t < rows; t++) {
        const float *restrict g = grad + t * channels, *restrict h = hat + t * channels;
        for (int64_t c = 0; c < channels; c++) {
            dscale[c] += g[c] * h[c];
            dshift[c] += g[c];
        }
    }
    float first = 0.0f, second = 0.0f;
    for (int64_t c = 0; c < channels; c++) {
        out->scale[c] += dscale[c];
        out->shift[c] += dshift[c];
        first += dshift[c] * scale[c];
        second += dscale[c] * scale[c];
    }
    const float mean1 = rstd * first / (float)(rows * channels), mean2 = rstd * second / (float)(rows * channels);
    float *restrict factor = line;
    for (int64_t c = 0; c < channels; c++) factor[c] = rstd * scale[c];
    if (!taps) {
        for (int64_t t = 0; t < rows; t++)
            for (int64_t c = 0; c < channels; c++) {
                const int64_t i = t * channels + c;
                dx[i] += grad[i] * factor[c] - mean1 - hat[i] * mean2;
            }
        return;
    }
    for (int64_t t = 0; t < rows; t++) {
        const float *restrict g = grad + t * channels;
        float *restrict h = hat + t * channels;
        for (int64_t c = 0; c < channels; c++) h[c] = g[c] * factor[c] - mean1 - h[c] * mean2;
    }
    if (out->bias)
        for (int64_t t = 0; t < rows; t++)
            for (int64_t c = 0; c < channels; c++) out->bias[c] += hat[t * channels + c];
    if (kernel == 1) {
        for (int64_t t = 0; t < rows; t++) {
            const float *restrict d = hat + t * channels, *restrict in = x + t * layer->stride * channels;
            float *restrict din = dx + t * layer->stride * channels, *restrict dtap = out->taps;
            for (int64_t c = 0; c < channels; c++) {
                dtap[c] += d[c] * in[c];
                din[c] += d[c] * taps[c];
            }
        }
        return;
    }
    const int full = kernel == 5 && layer->stride == 1 && length >= 6; /* the common case has its own loops for the inner rows */
    for (int64_t t = 0; t < rows; t++) {
        const float *restrict d = hat + t * channels;
        const int64_t start = t * layer->stride - pad;
        if (full && start >= 0 && start + 6 <= length) { /* two rows at once: their taps meet five of six rows of x */
            const float *restrict e = d + channels, *restrict in = x + start * channels;
            float *restrict dtap = out->taps;
            for (int64_t c = 0; c < channels; c++) {
                dtap[c] += d[c] * in[c] + e[c] * in[channels + c];
                dtap[channels + c] += d[c] * in[channels + c] + e[c] * in[2 * channels + c];
                dtap[2 * channels + c] += d[c] * in[2 * channels + c] + e[c] * in[3 * channels + c];
                dtap[3 * channels + c] += d[c] * in[3 * channels + c] + e[c] * in[4 * channels + c];
                dtap[4 * channels + c] += d[c] * in[4 * channels + c] + e[c] * in[5 * channels + c];
            }
            t++;
            continue;
        }
        for (int64_t k = MAX(0, -start); k < MIN(kernel, length - start); k++) {
            const float *restrict in = x + (start + k) * channels;
            float *restrict dtap = out->taps + k * channels;
            for (int64_t c = 0; c < channels; c++) dtap[c] += d[c] * in[c];
        }
    }
    if (full) { /* stride 1: each row of x gathers from the rows of the output that read it */
        for (int64_t t = 0; t < length; t++) {
            float *restrict din = dx + t * channels;
            if (t >= 2 && t + 3 <= rows) {
                const float *restrict d = hat + (t - 2) * channels;
                for (int64_t c = 0; c < channels; c++)
                    din[c] += d[c] * taps[4 * channels + c] + d[channels + c] * taps[3 * channels + c] + d[2 * channels + c] * taps[2 * channels + c] +
                              d[3 * channels + c] * taps[channels + c] + d[4 * channels + c] * taps[c];
            } else {
                for (int64_t k = MAX(0, t + pad - rows + 1); k < MIN(kernel, t + pad + 1); k++) {
                    const float *restrict d = hat + (t + pad - k) * channels, *restrict tap = taps + k * channels;
                    for (int64_t c = 0; c < channels; c++) din[c] += d[c] * tap[c];
                }
            }
        }
        return;
    }
    for (int64_t t = 0; t < rows; t++) {
        const float *restrict d = hat + t * channels;
        const int64_t start = t * layer->stride - pad;
        for (int64_t k = MAX(0, -start); k < MIN(kernel, length - start); k++) {
            const float *restrict tap = taps + k * channels;
            float *restrict din = dx + (start + k) * channels;
            for (int64_t c = 0; c < channels; c++) din[c] += d[c] * tap[c];
        }
    }
}

/* ------------------------------------------------------------------------------------------------ depthwise convolution + sequence norm */

CLONES static void norm_forward_one(const float *x, int64_t length, int64_t channels, const Layer *layer, const float *slope, float eps, float *y,
                                    float *stats, float *line) {
    layer_forward(x, length, channels, layer, eps, y, stats, line);
    if (slope) {
        const float a = *slope;
        const int64_t count = out_length(length, layer) * channels;
        for (int64_t i = 0; i < count; i++) y[i] = y[i] > 0.0f ? y[i] : a * y[i];
    }
}

CLONES static void norm_backward_one(const float *x, int64_t length, int64_t channels, const Layer *layer, const float *slope, const float *stats,
                                     const float *grad, float *hat, float *scratch, float *dx, Gradient *out, float *dslope, float *line) {
    const int64_t rows = out_length(length, layer);
    restandardise(x, length, channels, layer, stats, hat);
    if (slope) {
        const float a = *slope;
        double total = 0.0;
        for (int64_t t = 0; t < rows; t++) {
            float part = 0.0f;
            for (int64_t c = 0; c < channels; c++) {
                const int64_t i = t * channels + c;
                const float before = hat[i] * layer->scale[c] + layer->shift[c];
                part += before > 0.0f ? 0.0f : grad[i] * before;
                scratch[i] = before > 0.0f ? grad[i] : a * grad[i];
            }
            total += part;
        }
        *dslope += (float)total;
        grad = scratch;
    }
    memset(dx, 0, sizeof(float) * length * channels);
    layer_backward(x, length, channels, layer, stats[1], hat, grad, dx, out, line);
}

void depthwise_norm_forward(const float *x, const float *taps, const float *bias, const float *scale, const float *shift, const float *slope, float *y,
                            float *stats, int64_t sequences, int64_t length, int64_t channels, int64_t kernel, int64_t stride, float eps, int threads) {
    const Layer layer = {taps, bias, scale, shift, kernel, stride};
    const int64_t out = out_length(length, &layer);
#pragma omp parallel num_threads(threads)
    {
        float *line = malloc(sizeof(float) * 2 * channels);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < sequences; n++)
            norm_forward_one(x + n * length * channels, length, channels, &layer, slope, eps, y + n * out * channels, stats + 2 * n, line);
        free(line);
    }
}

/* `gradients`: (threads, (kernel + 3) * channels + 1), zero on entry: taps, bias, scale, shift, slope. */
void depthwise_norm_backward(const float *x, const float *taps, const float *bias, const float *scale, const float *shift, const float *slope,
                             const float *stats, const float *grad, float *dx, float *gradients, int64_t sequences, int64_t length, int64_t channels,
                             int64_t kernel, int64_t stride, int threads) {
    const Layer layer = {taps, bias, scale, shift, kernel, stride};
    const int64_t out = out_length(length, &layer), size = (kernel + 3) * channels + 1;
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        float *own = gradients + thread * size;
        Gradient g = {own, bias ? own + kernel * channels : NULL, own + (kernel + 1) * channels, own + (kernel + 2) * channels};
        float *hat = malloc(sizeof(float) * out * channels), *scratch = slope ? malloc(sizeof(float) * out * channels) : NULL;
        float *line = malloc(sizeof(float) * 2 * channels);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < sequences; n++)
            norm_backward_one(x + n * length * channels, length, channels, &layer, slope, stats + 2 * n, grad + n * out * channels, hat, scratch,
                              dx + n * length * channels, &g, own + size - 1, line);
        free(hat);
        free(scratch);
        free(line);
    }
}

/* ------------------------------------------------------------------------------------------------------------------- gated injection */

CLONES static void injection_forward_one(const float *local, const float *other, int64_t length, int64_t other_length, int64_t channels,
                                         const Layer *layers, const int64_t *index, float eps, float *gate, float *shift, float *line, float *y,
                                         float *stats) {
    layer_forward(other, other_length, channels, &layers[1], eps, gate, stats + 2, line);
    layer_forward(other, other_length, channels, &layers[2], eps, shift, stats + 4, line);
    for (int64_t i = 0; i < other_length * channels; i++) gate[i] = 1.0f / (1.0f + exponential(-gate[i]));
    convolve(local, length, channels, &layers[0], y);
    statistics(y, length, channels, eps, stats, stats + 1);
    float *restrict factor = line, *restrict offset = line + channels;
    for (int64_t c = 0; c < channels; c++) {
        factor[c] = stats[1] * layers[0].scale[c];
        offset[c] = layers[0].shift[c] - stats[0] * factor[c];
    }
    for (int64_t t = 0; t < length; t++) {
        const float *restrict g = gate + index[t] * channels, *restrict s = shift + index[t] * channels;
        float *restrict row = y + t * channels;
        for (int64_t c = 0; c < channels; c++) row[c] = (row[c] * factor[c] + offset[c]) * g[c] + s[c];
    }
}

CLONES static void injection_backward_one(const float *local, const float *other, int64_t length, int64_t other_length, int64_t channels,
                                          const Layer *layers, const int64_t *index, const float *stats, const float *grad, float *a, float *gate,
                                          float *gate_hat, float *shift_hat, float *dlocal_out, float *dgate, float *dshift, float *line, float *dlocal,
                                          float *dother, Gradient *out) {
    restandardise(local, length, channels, &layers[0], stats, a);
    restandardise(other, other_length, channels, &layers[1], stats + 2, gate_hat);
    restandardise(other, other_length, channels, &layers[2], stats + 4, shift_hat);
    for (int64_t t = 0; t < other_length; t++)
        for (int64_t c = 0; c < channels; c++) {
            const int64_t i = t * channels + c;
            gate[i] = 1.0f / (1.0f + exponential(-(gate_hat[i] * layers[1].scale[c] + layers[1].shift[c])));
        }
    memset(dgate, 0, sizeof(float) * other_length * channels);
    memset(dshift, 0, sizeof(float) * other_length * channels);
    for (int64_t t = 0; t < length; t++) {
        const float *restrict g = grad + t * channels, *restrict w = gate + index[t] * channels, *restrict h = a + t * channels;
        const float *restrict scale = layers[0].scale, *restrict offset = layers[0].shift;
        float *restrict dl = dlocal_out + t * channels, *restrict dg = dgate + index[t] * channels, *restrict ds = dshift + index[t] * channels;
        /* three outputs: restrict alone does not convince gcc that they are apart */
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; c++) {
            dl[c] = g[c] * w[c];
            dg[c] += g[c] * (h[c] * scale[c] + offset[c]);
            ds[c] += g[c];
        }
    }
    for (int64_t i = 0; i < other_length * channels; i++) dgate[i] *= gate[i] * (1.0f - gate[i]);
    memset(dlocal, 0, sizeof(float) * length * channels);
    memset(dother, 0, sizeof(float) * other_length * channels);
    layer_backward(local, length, channels, &layers[0], stats[1], a, dlocal_out, dlocal, &out[0], line);
    layer_backward(other, other_length, channels, &layers[1], stats[3], gate_hat, dgate, dother, &out[1], line);
    layer_backward(other, other_length, channels, &layers[2], stats[5], shift_hat, dshift, dother, &out[2], line);
}

/* taps: (3, kernel, channels); scale, shift: (3, channels); stats: (sequences, 6). Parts: local, gate, shift. */
void gated_injection_forward(const float *local, const float *other, const float *taps, const float *scale, const float *shift, const int64_t *index,
                             float *y, float *stats, int64_t sequences, int64_t length, int64_t other_length, int64_t channels, int64_t kernel, float eps,
                             int threads) {
    Layer layers[3];
    for (int64_t i = 0; i < 3; i++) layers[i] = (Layer){taps + i * kernel * channels, NULL, scale + i * channels, shift + i * channels, kernel, 1};
#pragma omp parallel num_threads(threads)
    {
        float *own = malloc(sizeof(float) * (2 * other_length + 2) * channels);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < sequences; n++)
            injection_forward_one(local + n * length * channels, other + n * other_length * channels, length, other_length, channels, layers, index, eps,
                                  own, own + other_length * channels, own + 2 * other_length * channels, y + n * length * channels, stats + 6 * n);
        free(own);
    }
}

/* `gradients`: (threads, 3, kernel + 2, channels), zero on entry: for each part taps, scale, shift. */
void gated_injection_backward(const float *local, const float *other, const float *taps, const float *scale, const float *shift, const int64_t *index,
                              const float *stats, const float *grad, float *dlocal, float *dother, float *gradients, int64_t sequences, int64_t length,
                              int64_t other_length, int64_t channels, int64_t kernel, int threads) {
    Layer layers[3];
    for (int64_t i = 0; i < 3; i++) layers[i] = (Layer){taps + i * kernel * channels, NULL, scale + i * channels, shift + i * channels, kernel, 1};
    const int64_t part = (kernel + 2) * channels;
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        Gradient g[3];
        for (int64_t i = 0; i < 3; i++) {
            float *own = gradients + (thread * 3 + i) * part;
            g[i] = (Gradient){own, NULL, own + kernel * channels, own + (kernel + 1) * channels};
        }
        const int64_t long_size = length * channels, short_size = other_length * channels;
        float *own = malloc(sizeof(float) * (2 * long_size + 5 * short_size + 2 * channels));
        float *other_own = own + 2 * long_size;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < sequences; n++)
            injection_backward_one(local + n * long_size, other + n * short_size, length, other_length, channels, layers, index, stats + 6 * n,
                                   grad + n * long_size, own, other_own, other_own + short_size, other_own + 2 * short_size, own + long_size,
                                   other_own + 3 * short_size, other_own + 4 * short_size, other_own + 5 * short_size, dlocal + n * long_size, dother + n * short_size, g);
        free(own);
    }
}

/* ------------------------------------------------------------------------------------------- PReLU and norm over groups of channels */

CLONES static void channel_forward_rows(const float *restrict x, int64_t rows, int64_t channels, const float *restrict slope, const float *restrict scale,
                                        const float *restrict shift, const int64_t *sizes, int64_t groups, float eps, float *restrict y) {
    for (int64_t r = 0; r < rows; r++) {
        const float *restrict in = x + r * channels;
        float *restrict out = y + r * channels;
        for (int64_t c = 0; c < channels; c++) out[c] = in[c] > 0.0f ? in[c] : in[c] * slope[c];
        for (int64_t g = 0, start = 0; g < groups; start += sizes[g++]) {
            float *restrict own = out + start;
            float sum = 0.0f, square = 0.0f;
            for (int64_t c = 0; c < sizes[g]; c++) sum += own[c];
            const float mean = sum / (float)sizes[g];
            for (int64_t c = 0; c < sizes[g]; c++) square += (own[c] - mean) * (own[c] - mean);
            const float rstd = 1.0f / sqrtf(square / (float)sizes[g] + eps);
            for (int64_t c = 0; c < sizes[g]; c++) own[c] = (own[c] - mean) * rstd;
        }
        for (int64_t c = 0; c < channels; c++) out[c] = out[c] * scale[c] + shift[c];
    }
}

CLONES static void channel_backward_rows(const float *restrict x, const float *restrict grad, int64_t rows, int64_t channels, const float *restrict slope,
                                         const float *restrict scale, const int64_t *sizes, int64_t groups, float eps, float *restrict hat,
                                         float *restrict dx, float *restrict dslope, float *restrict dscale, float *restrict dshift) {
    for (int64_t r = 0; r < rows; r++) {
        const float *restrict in = x + r * channels, *restrict go = grad + r * channels;
        float *restrict di = dx + r * channels;
        for (int64_t c = 0; c < channels; c++) hat[c] = in[c] > 0.0f ? in[c] : in[c] * slope[c];
        for (int64_t g = 0, start = 0; g < groups; start += sizes[g++]) {
            float *restrict h = hat + start;
            const float *restrict gs = go + start, *restrict sc = scale + start;
            float *restrict d = di + start;
            const float count = (float)sizes[g];
            float sum = 0.0f, square = 0.0f, first = 0.0f, second = 0.0f;
            for (int64_t c = 0; c < sizes[g]; c++) sum += h[c];
            const float mean = sum / count;
            for (int64_t c = 0; c < sizes[g]; c++) square += (h[c] - mean) * (h[c] - mean);
            const float rstd = 1.0f / sqrtf(square / count + eps);
            for (int64_t c = 0; c < sizes[g]; c++) {
                h[c] = (h[c] - mean) * rstd;
                first += gs[c] * sc[c];
                second += gs[c] * sc[c] * h[c];
            }
            first /= count;
            second /= count;
            for (int64_t c = 0; c < sizes[g]; c++) d[c] = rstd * (gs[c] * sc[c] - first - h[c] * second);
        }
        for (int64_t c = 0; c < channels; c++) {
            dscale[c] += go[c] * hat[c];
            dshift[c] += go[c];
            dslope[c] += in[c] > 0.0f ? 0.0f : di[c] * in[c];
            di[c] = in[c] > 0.0f ? di[c] : di[c] * slope[c];
        }
    }
}

void channel_norm_forward(const float *x, const float *slope, const float *scale, const float *shift, const int64_t *sizes, float *y, int64_t rows,
                          int64_t channels, int64_t groups, float eps, int threads) {
    const int64_t block = 64;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < rows; start += block)
        channel_forward_rows(x + start * channels, MIN(block, rows - start), channels, slope, scale, shift, sizes, groups, eps, y + start * channels);
}

/* `gradients`: (threads, 3, channels), zero on entry: slope a channel, scale, shift. */
void channel_norm_backward(const float *x, const float *grad, const float *slope, const float *scale, const int64_t *sizes, float *dx, float *gradients,
                           int64_t rows, int64_t channels, int64_t groups, float eps, int threads) {
    const int64_t block = 64;
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        float *own = gradients + thread * 3 * channels, *hat = malloc(sizeof(float) * channels);
#pragma omp for schedule(static)
        for (int64_t start = 0; start < rows; start += block)
            channel_backward_rows(x + start * channels, grad + start * channels, MIN(block, rows - start), channels, slope, scale, sizes, groups, eps,
                                  hat, dx + start * channels, own, own + channels, own + 2 * channels);
        free(hat);
    }
}
