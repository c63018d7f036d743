/* Attention and reductions over the edges of a graph, grouped by receiving node (CSR rows).
 *
 * A row is one target node; its edges stand at positions indptr[i] .. indptr[i + 1]. Position p belongs to the caller's edge
 * permutation[p] (p itself where permutation is NULL) and comes from source column[p]. Rows are independent, so threads share them and
 * no result depends on how: sums run in edge order, there are no atomics, two runs give the same bits.
 *
 * The attention takes a row's edges CHUNK at a time: logits of a chunk into a small buffer, running maximum, rescale, add values. Nothing
 * of size edges x heads x dim exists. Gradients that belong to a source (keys, values) are the weighted sum over the transposed rows.
 *
 * The file includes itself twice, for float and for double; functions end in _float and _double.
 */
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../native.h"

enum { CHUNK = 32, ROWS = 32, AHEAD = 4 };
enum { SUM = 0, MAXIMUM = 1, MINIMUM = 2 };

/* Mirrors cpu.Problem field by field. Pointers are NULL where the call lacks the tensor or does not want the result. */
typedef struct {
    int64_t rows, heads, dim, value_dim, keys_on_edges, values_on_edges;
    double scale, eps;
    const int64_t *indptr, *column, *permutation;
    const void *q, *k, *v, *bias, *envelope, *gate;
    void *out, *weights, *lse;
    const void *grad_out, *grad_weights;
    void *grad_q, *grad_k, *grad_v, *grad_logits, *grad_envelope, *grad_gate, *edge_weights;
} Problem;

/* 2^n times a polynomial on [-ln2/2, ln2/2]; 0 below the normal numbers, so that exp(-inf) is 0. Vectorises where expf does not. */
INLINE float exp_float(float x) {
    float bounded = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    int32_t n = (int32_t)(bounded * 1.44269504f + (bounded < 0.0f ? -0.5f : 0.5f));
    float r = bounded - (float)n * 0.693359375f + (float)n * 2.12194440e-4f;
    float s = 1.9875691500e-4f;
    s = s * r + 1.3981999507e-3f;
    s = s * r + 8.3334519073e-3f;
    s = s * r + 4.1665795894e-2f;
    s = s * r + 1.6666665459e-1f;
    s = s * r + 5.0000001201e-1f;
    s = s * r * r + r + 1.0f;
    union { int32_t bits; float value; } power = {(n + 127) << 23};
    return x < -87.0f ? 0.0f : s * power.value;
}
INLINE double exp_double(double x) { return exp(x); }

/* Stable counting sort of index (values 0 .. size - 1): indptr (size + 1) and permutation (edges). Gives -1, or the first edge whose value is
 * out of range. */
int64_t segment_order(const int64_t *index, int64_t edges, int64_t size, int64_t *indptr, int64_t *permutation) {
    memset(indptr, 0, (size_t)(size + 1) * sizeof(int64_t));
    for (int64_t e = 0; e < edges; e++) {
        if (index[e] < 0 || index[e] >= size) return e;
        indptr[index[e] + 1]++;
    }
    for (int64_t i = 0; i < size; i++) indptr[i + 1] += indptr[i];
    for (int64_t e = 0; e < edges; e++) permutation[indptr[index[e]]++] = e;
    for (int64_t i = size; i > 0; i--) indptr[i] = indptr[i - 1];
    indptr[0] = 0;
    return -1;
}

#define REAL float
#define CLONED CLONES
#include "segment.c"
#undef REAL
#undef CLONED
#define REAL double
#define CLONED /* float64 is for checking: one version compiles in a third of the time */
#include "segment.c"

#else

INLINE REAL NAME(dot)(const REAL *a, const REAL *b, int64_t n) {
    REAL sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < n; d++) sum += a[d] * b[d];
    return sum;
}

INLINE void NAME(add_scaled)(REAL *y, REAL factor, const REAL *x, int64_t n) {
#pragma omp simd
    for (int64_t d = 0; d < n; d++) y[d] += factor * x[d];
}

INLINE void NAME(set_scaled)(REAL *y, REAL factor, const REAL *x, int64_t n) {
#pragma omp simd
    for (int64_t d = 0; d < n; d++) y[d] = factor * x[d];
}

/* Rows of sources lie anywhere in memory: without asking ahead, two thirds of the time is spent waiting for them. */
INLINE void NAME(ask_for)(const REAL *row, int64_t n) {
    for (int64_t d = 0; d < n; d += 64 / (int64_t)sizeof(REAL)) __builtin_prefetch(row + d);
}

/* logits (count, heads) of the positions from `first` on of row i; their values are on the way into the cache afterwards. */
INLINE void NAME(logits)(const Problem *a, int64_t i, int64_t first, int64_t count, REAL *logit, int64_t dim, int64_t value_dim) {
    const int64_t heads = a->heads;
    const int64_t last = a->indptr[a->rows];
    const REAL *bias = a->bias, *q = a->q, *k = a->k, *v = a->v, scale = (REAL)a->scale;
    for (int64_t c = 0; c < count; c++) {
        const int64_t edge = a->permutation[first + c], ahead = first + c + AHEAD < last ? first + c + AHEAD : last - 1;
        if (q) NAME(ask_for)(k + (a->keys_on_edges ? a->permutation[ahead] : a->column[ahead]) * heads * dim, heads * dim);
        NAME(ask_for)(v + (a->values_on_edges ? edge : a->column[first + c]) * heads * value_dim, heads * value_dim);
        REAL *restrict row = logit + c * heads;
        if (q) {
            const REAL *query = q + i * heads * dim, *key = k + (a->keys_on_edges ? edge : a->column[first + c]) * heads * dim;
            for (int64_t h = 0; h < heads; h++) row[h] = scale * NAME(dot)(query + h * dim, key + h * dim, dim);
            if (bias) for (int64_t h = 0; h < heads; h++) row[h] += bias[edge * heads + h];
        } else {
            memcpy(row, bias + edge * heads, (size_t)heads * sizeof(REAL));
        }
    }
}

INLINE void NAME(forward)(const Problem *a, int64_t from, int64_t to, REAL *scratch, int64_t dim, int64_t value_dim) {
    const int64_t heads = a->heads;
    const REAL *v = a->v, *envelope = a->envelope, *gate = a->gate;
    REAL *weights = a->weights;
    REAL *restrict logit = scratch, *restrict peak = logit + CHUNK * heads, *restrict total = peak + heads, *restrict shrink = total + heads;
    for (int64_t i = from; i < to; i++) {
        const int64_t end = a->indptr[i + 1];
        REAL *restrict out = (REAL *)a->out + i * heads * value_dim, *restrict lse = (REAL *)a->lse + i * heads;
        memset(out, 0, (size_t)(heads * value_dim) * sizeof(REAL));
        for (int64_t h = 0; h < heads; h++) peak[h] = -INFINITY, total[h] = 0;
        for (int64_t first = a->indptr[i]; first < end; first += CHUNK) {
            const int64_t count = end - first < CHUNK ? end - first : CHUNK;
            NAME(logits)(a, i, first, count, logit, dim, value_dim);
            memcpy(shrink, peak, (size_t)heads * sizeof(REAL));
            for (int64_t c = 0; c < count; c++)
                for (int64_t h = 0; h < heads; h++) peak[h] = logit[c * heads + h] > peak[h] ? logit[c * heads + h] : peak[h];
            for (int64_t h = 0; h < heads; h++) shrink[h] = peak[h] == -INFINITY ? 0 : NAME(exp)(shrink[h] - peak[h]);
            if (first > a->indptr[i])
                for (int64_t h = 0; h < heads; h++) {
                    total[h] *= shrink[h];
                    for (int64_t d = 0; d < value_dim; d++) out[h * value_dim + d] *= shrink[h];
                }
            /* A row that is -inf so far keeps the shift 0: its terms are exp(-inf) = 0. */
            for (int64_t h = 0; h < heads; h++) shrink[h] = peak[h] == -INFINITY ? 0 : peak[h];
            for (int64_t c = 0; c < count; c++) {
                const int64_t position = first + c, edge = a->permutation[position];
                REAL *restrict row = logit + c * heads;
                if (weights) memcpy(weights + edge * heads, row, (size_t)heads * sizeof(REAL));
                for (int64_t h = 0; h < heads; h++) row[h] = NAME(exp)(row[h] - shrink[h]);
                if (envelope) for (int64_t h = 0; h < heads; h++) row[h] *= envelope[edge * heads + h];
                for (int64_t h = 0; h < heads; h++) total[h] += row[h];
                if (gate) for (int64_t h = 0; h < heads; h++) row[h] *= gate[edge * heads + h];
                const REAL *value = v + (a->values_on_edges ? edge : a->column[position]) * heads * value_dim;
                for (int64_t h = 0; h < heads; h++) NAME(add_scaled)(out + h * value_dim, row[h], value + h * value_dim, value_dim);
            }
        }
        for (int64_t h = 0; h < heads; h++) {
            const REAL inverse = total[h] == 0 ? 0 : 1 / (total[h] + (REAL)a->eps);
            lse[h] = total[h] == 0 ? INFINITY : peak[h] + (REAL)log((double)(total[h] + (REAL)a->eps));
            for (int64_t d = 0; d < value_dim; d++) out[h * value_dim + d] *= inverse;
        }
        if (weights)
            for (int64_t position = a->indptr[i]; position < end; position++) {
                const int64_t edge = a->permutation[position];
                REAL *restrict row = weights + edge * heads;
                for (int64_t h = 0; h < heads; h++) row[h] = lse[h] == INFINITY ? 0 : NAME(exp)(row[h] - lse[h]);
                if (envelope) for (int64_t h = 0; h < heads; h++) row[h] *= envelope[edge * heads + h];
                if (gate) for (int64_t h = 0; h < heads; h++) row[h] *= gate[edge * heads + h];
            }
    }
}

/* With a = envelope * exp(logit - lse), A = gate * a the weight, and dA = grad_out . value + grad_weights:
 *   delta = sum A dA,  d logit = a (gate dA - delta),  d envelope = exp(logit - lse) (gate dA - delta),  d gate = a dA. */
INLINE void NAME(backward)(const Problem *a, int64_t from, int64_t to, REAL *scratch, int64_t dim, int64_t value_dim) {
    const int64_t heads = a->heads;
    const REAL *q = a->q, *k = a->k, *v = a->v, *envelope = a->envelope, *gate = a->gate, scale = (REAL)a->scale;
    const REAL *weights = a->weights, *grad_weights = a->grad_weights;
    REAL *grad_k = a->grad_k, *grad_v = a->grad_v, *grad_logits = a->grad_logits, *edge_weights = a->edge_weights;
    REAL *grad_envelope = a->grad_envelope, *grad_gate = a->grad_gate;
    REAL *restrict logit = scratch, *restrict delta = logit + CHUNK * heads, *restrict slope = delta + heads;
    for (int64_t i = from; i < to; i++) {
        const int64_t end = a->indptr[i + 1];
        const REAL *out = (const REAL *)a->out + i * heads * value_dim, *grad_out = (const REAL *)a->grad_out + i * heads * value_dim;
        const REAL *lse = (const REAL *)a->lse + i * heads;
        REAL *grad_q = a->grad_q ? (REAL *)a->grad_q + i * heads * dim : NULL;
        if (grad_q) memset(grad_q, 0, (size_t)(heads * dim) * sizeof(REAL));
        for (int64_t h = 0; h < heads; h++) delta[h] = NAME(dot)(out + h * value_dim, grad_out + h * value_dim, value_dim);
        if (grad_weights)
            for (int64_t position = a->indptr[i]; position < end; position++) {
                const int64_t edge = a->permutation[position];
                for (int64_t h = 0; h < heads; h++) delta[h] += weights[edge * heads + h] * grad_weights[edge * heads + h];
            }
        for (int64_t first = a->indptr[i]; first < end; first += CHUNK) {
            const int64_t count = end - first < CHUNK ? end - first : CHUNK;
            NAME(logits)(a, i, first, count, logit, dim, value_dim);
            for (int64_t c = 0; c < count; c++) {
                const int64_t position = first + c, edge = a->permutation[position];
                const REAL *value = v + (a->values_on_edges ? edge : a->column[position]) * heads * value_dim;
                REAL *restrict share = logit + c * heads;
                for (int64_t h = 0; h < heads; h++) share[h] = lse[h] == INFINITY ? 0 : NAME(exp)(share[h] - lse[h]);
                for (int64_t h = 0; h < heads; h++) slope[h] = NAME(dot)(grad_out + h * value_dim, value + h * value_dim, value_dim);
                if (grad_weights) for (int64_t h = 0; h < heads; h++) slope[h] += grad_weights[edge * heads + h];
                for (int64_t h = 0; h < heads; h++) {
                    const int64_t at = edge * heads + h;
                    const REAL u = envelope ? envelope[at] : 1, g = gate ? gate[at] : 1, inside = g * slope[h] - delta[h];
                    if (grad_gate) grad_gate[at] = u * share[h] * slope[h];
                    if (grad_envelope) grad_envelope[at] = share[h] * inside;
                    if (edge_weights) edge_weights[at] = g * u * share[h];
                    slope[h] = u * share[h] * inside;
                    if (grad_logits) grad_logits[at] = slope[h];
                    if (grad_v && a->values_on_edges) NAME(set_scaled)(grad_v + at * value_dim, g * u * share[h], grad_out + h * value_dim, value_dim);
                }
                if (q) {
                    const REAL *key = k + (a->keys_on_edges ? edge : a->column[position]) * heads * dim, *query = q + i * heads * dim;
                    for (int64_t h = 0; h < heads; h++) {
                        if (grad_q) NAME(add_scaled)(grad_q + h * dim, scale * slope[h], key + h * dim, dim);
                        if (grad_k && a->keys_on_edges) NAME(set_scaled)(grad_k + (edge * heads + h) * dim, scale * slope[h], query + h * dim, dim);
                    }
                }
            }
        }
    }
}

/* Constant dims let the compiler keep a head in registers. */
#define SPECIALISE(body)                                                                                  \
    CLONED static void NAME(body##_rows)(const Problem *a, int64_t from, int64_t to, REAL *scratch) {         \
        const int64_t dim = a->q ? a->dim : a->value_dim;                                                  \
        if (dim == 16 && a->value_dim == 16) NAME(body)(a, from, to, scratch, 16, 16);                        \
        else NAME(body)(a, from, to, scratch, a->dim, a->value_dim);                                          \
    }
SPECIALISE(forward)
SPECIALISE(backward)

#define OVER_ROWS(body)                                                                                   \
    int NAME(segment_attention_##body)(const Problem *a, int threads) {                                       \
        const int64_t blocks = (a->rows + ROWS - 1) / ROWS;                                                \
        int failed = 0;                                                                                    \
        _Pragma("omp parallel num_threads(threads) reduction(| : failed)") {                               \
            REAL *scratch = malloc((size_t)((CHUNK + 3) * a->heads + 1) * sizeof(REAL));                   \
            failed |= scratch == NULL;                                                                     \
            _Pragma("omp for schedule(dynamic)") for (int64_t b = 0; b < blocks; b++) {                    \
                const int64_t from = b * ROWS, to = from + ROWS < a->rows ? from + ROWS : a->rows;         \
                if (scratch) NAME(body##_rows)(a, from, to, scratch);                                         \
            }                                                                                              \
            free(scratch);                                                                                 \
        }                                                                                                  \
        return failed;                                                                                     \
    }
OVER_ROWS(forward)
OVER_ROWS(backward)

/* out[i] = factor * sum over the row of weight[edge] * x[column], per head. */
CLONED static void NAME(weighted_sum_row)(int64_t i, int64_t heads, int64_t dim, REAL factor, const int64_t *indptr, const int64_t *column,
                                       const int64_t *permutation, const REAL *weight, const REAL *x, REAL *out, int64_t last) {
    REAL *restrict sum = out + i * heads * dim;
    memset(sum, 0, (size_t)(heads * dim) * sizeof(REAL));
    for (int64_t position = indptr[i]; position < indptr[i + 1]; position++) {
        const REAL *w = weight + permutation[position] * heads, *row = x + column[position] * heads * dim;
        if (position + AHEAD < last) NAME(ask_for)(x + column[position + AHEAD] * heads * dim, heads * dim);
        if (dim == 16)
            for (int64_t h = 0; h < heads; h++) NAME(add_scaled)(sum + h * 16, w[h], row + h * 16, 16);
        else
            for (int64_t h = 0; h < heads; h++) NAME(add_scaled)(sum + h * dim, w[h], row + h * dim, dim);
    }
    for (int64_t d = 0; d < heads * dim; d++) sum[d] *= factor;
}

void NAME(segment_weighted_sum)(int64_t rows, int64_t heads, int64_t dim, double factor, const int64_t *indptr, const int64_t *column,
                             const int64_t *permutation, const REAL *weight, const REAL *x, REAL *out, int threads) {
#pragma omp parallel for schedule(dynamic, ROWS) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) NAME(weighted_sum_row)(i, heads, dim, (REAL)factor, indptr, column, permutation, weight, x, out, indptr[rows]);
}

/* out[edge, head] = a[i, head] . b[column, head] for every edge of the row. */
CLONED static void NAME(edge_dot_row)(int64_t i, int64_t heads, int64_t dim, const int64_t *indptr, const int64_t *column, const int64_t *permutation,
                                   const REAL *a, const REAL *b, REAL *out) {
    const REAL *left = a + i * heads * dim;
    for (int64_t position = indptr[i]; position < indptr[i + 1]; position++) {
        const REAL *right = b + column[position] * heads * dim;
        REAL *to = out + permutation[position] * heads;
        for (int64_t h = 0; h < heads; h++) to[h] = NAME(dot)(left + h * dim, right + h * dim, dim);
    }
}

void NAME(segment_edge_dot)(int64_t rows, int64_t heads, int64_t dim, const int64_t *indptr, const int64_t *column, const int64_t *permutation,
                         const REAL *a, const REAL *b, REAL *out, int threads) {
#pragma omp parallel for schedule(dynamic, ROWS) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) NAME(edge_dot_row)(i, heads, dim, indptr, column, permutation, a, b, out);
}

/* out (rows, width): sum, maximum or minimum of the row's edges; an empty row is 0. */
CLONED static void NAME(reduce_row)(int64_t i, int64_t width, int mode, const int64_t *indptr, const int64_t *permutation, const REAL *x, REAL *out) {
    REAL *restrict to = out + i * width;
    if (indptr[i] == indptr[i + 1]) {
        memset(to, 0, (size_t)width * sizeof(REAL));
        return;
    }
    memcpy(to, x + (permutation ? permutation[indptr[i]] : indptr[i]) * width, (size_t)width * sizeof(REAL));
    for (int64_t position = indptr[i] + 1; position < indptr[i + 1]; position++) {
        const REAL *from = x + (permutation ? permutation[position] : position) * width;
        /* A NaN wins a maximum or minimum, as in torch. */
        if (mode == SUM) for (int64_t f = 0; f < width; f++) to[f] += from[f];
        else if (mode == MAXIMUM) for (int64_t f = 0; f < width; f++) to[f] = from[f] > to[f] || from[f] != from[f] ? from[f] : to[f];
        else for (int64_t f = 0; f < width; f++) to[f] = from[f] < to[f] || from[f] != from[f] ? from[f] : to[f];
    }
}

void NAME(segment_reduce)(int64_t rows, int64_t width, int mode, const int64_t *indptr, const int64_t *permutation, const REAL *x, REAL *out, int threads) {
#pragma omp parallel for schedule(dynamic, ROWS) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) NAME(reduce_row)(i, width, mode, indptr, permutation, x, out);
}

/* out[edge] = x[i] for every edge of the row: the transpose of the sum. */
void NAME(segment_gather)(int64_t rows, int64_t width, const int64_t *indptr, const int64_t *permutation, const REAL *x, REAL *out, int threads) {
#pragma omp parallel for schedule(dynamic, ROWS) num_threads(threads)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t position = indptr[i]; position < indptr[i + 1]; position++)
            memcpy(out + (permutation ? permutation[position] : position) * width, x + i * width, (size_t)width * sizeof(REAL));
}

CLONED static void NAME(softmax_row)(int64_t i, int64_t width, const int64_t *indptr, const int64_t *permutation, const REAL *x, REAL *out, REAL *scratch) {
    REAL *restrict peak = scratch, *restrict total = scratch + width;
    for (int64_t f = 0; f < width; f++) peak[f] = -INFINITY, total[f] = 0;
    for (int64_t position = indptr[i]; position < indptr[i + 1]; position++) {
        const REAL *from = x + (permutation ? permutation[position] : position) * width;
        for (int64_t f = 0; f < width; f++) peak[f] = from[f] > peak[f] ? from[f] : peak[f];
    }
    for (int64_t f = 0; f < width; f++) peak[f] = peak[f] == -INFINITY ? 0 : peak[f];
    for (int64_t position = indptr[i]; position < indptr[i + 1]; position++) {
        const int64_t at = (permutation ? permutation[position] : position) * width;
        const REAL *from = x + at;
        REAL *restrict to = out + at;
        for (int64_t f = 0; f < width; f++) to[f] = NAME(exp)(from[f] - peak[f]);
        for (int64_t f = 0; f < width; f++) total[f] += to[f];
    }
    for (int64_t f = 0; f < width; f++) total[f] = total[f] == 0 ? 0 : 1 / total[f];
    for (int64_t position = indptr[i]; position < indptr[i + 1]; position++) {
        REAL *restrict to = out + (permutation ? permutation[position] : position) * width;
        for (int64_t f = 0; f < width; f++) to[f] *= total[f];
    }
}

int NAME(segment_softmax)(int64_t rows, int64_t width, const int64_t *indptr, const int64_t *permutation, const REAL *x, REAL *out, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        REAL *scratch = malloc((size_t)(2 * width + 1) * sizeof(REAL));
        failed |= scratch == NULL;
#pragma omp for schedule(dynamic, ROWS)
        for (int64_t i = 0; i < rows; i++)
            if (scratch) NAME(softmax_row)(i, width, indptr, permutation, x, out, scratch);
        free(scratch);
    }
    return failed;
}

#endif
