/* Efficient attention on the CPU, forward and backward, in float and in double, made for a great many short sequences of narrow heads.
 *
 * A task is one head of one sequence. It walks the keys for their largest values, walks them again for the sums and the context
 * (dim, value_dim), which stays in registers or the first-level cache, and walks the queries, each softmaxed and multiplied in one go. Rows are
 * read where they lie: no softmax over a strided axis, no transposed copy, nothing of the length of the sequence but the output in memory.
 * Backward recomputes the softmaxes. Head dims of 8, 16 and 32 have loops of constant length.
 *
 * This file includes itself twice, as a template over REAL. Tasks write to places of their own: results do not depend on the threads.
 */
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../native.h"

/* Mirrored field by field by `Problem` in cpu.py. Strides of (batch, head, row) count elements; elements of a row are adjacent. */
typedef struct {
    int64_t batch, heads, queries, keys, dim, value_dim, threads;
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3], dout_stride[3], dq_stride[3], dk_stride[3], dv_stride[3];
    double scale;
    const void *q, *k, *v;
    const uint8_t *mask; /* (batch, keys), or NULL */
    void *out;
    const void *dout;
    void *dq, *dk, *dv;
} Problem;

/* exp(x) for x <= 0: 2^n exp(r) with |r| <= log(2) / 2 and the Taylor series of exp(r); below -87 it is 0. Branchless, so that it vectorises. */
INLINE float decay_float(float x) {
    const int32_t n = (int32_t)(x * 1.44269504f - 0.5f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float series = 1 / 5040.0f;
    series = series * r + 1 / 720.0f;
    series = series * r + 1 / 120.0f;
    series = series * r + 1 / 24.0f;
    series = series * r + 1 / 6.0f;
    series = series * r + 0.5f;
    series = series * r + 1;
    series = series * r + 1;
    const int32_t bits = ((n < -127 ? -127 : n) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    float value = series * power;
    int32_t masked;
    memcpy(&masked, &value, sizeof value);
    masked &= -(int32_t)!(x < -87.0f);
    memcpy(&value, &masked, sizeof value);
    return value;
}

INLINE double decay_double(double x) { return exp(x); }

#define REAL float
#include __FILE__
#undef REAL
#define REAL double
#include __FILE__
#undef REAL

#else /* the template */

/* One head of one sequence. */
typedef struct {
    const REAL *q, *k, *v, *dout;
    REAL *out, *dq, *dk, *dv;
    const uint8_t *mask;
} NAME(Head);
#define Head NAME(Head)

/* Largest of every key dim in `largest`, sums of exponentials inverted in `inverse`, and the context (dim, value_dim). */
INLINE void NAME(summarise)(const Problem *p, const Head *h, REAL *restrict largest, REAL *restrict inverse, REAL *restrict context, const int64_t dim,
                            const int64_t value_dim) {
    for (int64_t d = 0; d < dim; d++) largest[d] = -(REAL)INFINITY, inverse[d] = 0;
    for (int64_t i = 0; i < dim * value_dim; i++) context[i] = 0;
    for (int64_t n = 0; n < p->keys; n++) {
        if (h->mask && !h->mask[n]) continue;
        const REAL *key = h->k + n * p->k_stride[2];
        for (int64_t d = 0; d < dim; d++) largest[d] = key[d] > largest[d] ? key[d] : largest[d];
    }
    for (int64_t n = 0; n < p->keys; n++) {
        if (h->mask && !h->mask[n]) continue;
        const REAL *key = h->k + n * p->k_stride[2], *value = h->v + n * p->v_stride[2];
        REAL weight[dim];
        for (int64_t d = 0; d < dim; d++) weight[d] = NAME(decay)(key[d] - largest[d]);
        for (int64_t d = 0; d < dim; d++) inverse[d] += weight[d];
        for (int64_t d = 0; d < dim; d++)
            for (int64_t e = 0; e < value_dim; e++) context[d * value_dim + e] += weight[d] * value[e];
    }
    for (int64_t d = 0; d < dim; d++) {
        inverse[d] = inverse[d] > 0 ? 1 / inverse[d] : 0;
        for (int64_t e = 0; e < value_dim; e++) context[d * value_dim + e] *= inverse[d];
    }
}

/* Softmax of one query, times `factor`. */
INLINE void NAME(soften)(REAL *restrict weight, const REAL *restrict query, REAL factor, const int64_t dim) {
    REAL largest = query[0], sum = 0;
    for (int64_t d = 1; d < dim; d++) largest = query[d] > largest ? query[d] : largest;
    for (int64_t d = 0; d < dim; d++) weight[d] = NAME(decay)(query[d] - largest);
    for (int64_t d = 0; d < dim; d++) sum += weight[d];
    for (int64_t d = 0; d < dim; d++) weight[d] *= factor / sum;
}

INLINE void NAME(forward_head)(const Problem *p, const Head *h, REAL *scratch, const int64_t dim, const int64_t value_dim) {
    REAL *largest = scratch, *inverse = largest + dim, *context = inverse + dim;
    NAME(summarise)(p, h, largest, inverse, context, dim, value_dim);
    for (int64_t n = 0; n < p->queries; n++) {
        REAL weight[dim], sum[value_dim];
        NAME(soften)(weight, h->q + n * p->q_stride[2], (REAL)p->scale, dim);
        for (int64_t e = 0; e < value_dim; e++) sum[e] = 0;
        for (int64_t d = 0; d < dim; d++)
            for (int64_t e = 0; e < value_dim; e++) sum[e] += weight[d] * context[d * value_dim + e];
        memcpy(h->out + n * p->out_stride[2], sum, value_dim * sizeof(REAL));
    }
}

INLINE void NAME(backward_head)(const Problem *p, const Head *h, REAL *scratch, const int64_t dim, const int64_t value_dim) {
    REAL *largest = scratch, *inverse = largest + dim, *context = inverse + dim, *given = context + dim * value_dim, *taken = given + dim * value_dim;
    NAME(summarise)(p, h, largest, inverse, context, dim, value_dim);
    for (int64_t i = 0; i < dim * value_dim; i++) given[i] = 0;
    for (int64_t n = 0; n < p->queries; n++) {
        const REAL *dout = h->dout + n * p->dout_stride[2];
        REAL weight[dim], through[dim], mean = 0;
        NAME(soften)(weight, h->q + n * p->q_stride[2], 1, dim);
        for (int64_t d = 0; d < dim; d++) {
            REAL sum = 0;
            for (int64_t e = 0; e < value_dim; e++) {
                sum += dout[e] * context[d * value_dim + e];
                given[d * value_dim + e] += weight[d] * dout[e];
            }
            through[d] = sum * (REAL)p->scale;
        }
        for (int64_t d = 0; d < dim; d++) mean += weight[d] * through[d];
        REAL *dq = h->dq + n * p->dq_stride[2];
        for (int64_t d = 0; d < dim; d++) dq[d] = weight[d] * (through[d] - mean);
    }
    /* sum over keys of a key's weight times its gradient: the context against its own gradient */
    for (int64_t d = 0; d < dim; d++) {
        taken[d] = 0;
        for (int64_t e = 0; e < value_dim; e++) {
            given[d * value_dim + e] *= (REAL)p->scale;
            taken[d] += given[d * value_dim + e] * context[d * value_dim + e];
        }
    }
    for (int64_t n = 0; n < p->keys; n++) {
        REAL *dk = h->dk + n * p->dk_stride[2], *dv = h->dv + n * p->dv_stride[2];
        if (h->mask && !h->mask[n]) {
            memset(dk, 0, dim * sizeof(REAL));
            memset(dv, 0, value_dim * sizeof(REAL));
            continue;
        }
        const REAL *key = h->k + n * p->k_stride[2], *value = h->v + n * p->v_stride[2];
        REAL weight[dim], sum[value_dim];
        for (int64_t d = 0; d < dim; d++) weight[d] = NAME(decay)(key[d] - largest[d]) * inverse[d];
        for (int64_t e = 0; e < value_dim; e++) sum[e] = 0;
        for (int64_t d = 0; d < dim; d++) {
            REAL through = 0;
            for (int64_t e = 0; e < value_dim; e++) {
                through += value[e] * given[d * value_dim + e];
                sum[e] += weight[d] * given[d * value_dim + e];
            }
            dk[d] = weight[d] * (through - taken[d]);
        }
        memcpy(dv, sum, value_dim * sizeof(REAL));
    }
}

CLONES static void NAME(one_head)(const Problem *p, const Head *h, REAL *scratch, int backward) {
    const int64_t dim = p->dim, value_dim = p->value_dim;
#define FORM(size)                                                                                        \
    if (dim == size && value_dim == size) {                                                               \
        if (backward) NAME(backward_head)(p, h, scratch, size, size);                                     \
        else NAME(forward_head)(p, h, scratch, size, size);                                               \
        return;                                                                                           \
    }
    FORM(8) FORM(16) FORM(32)
#undef FORM
    if (backward) NAME(backward_head)(p, h, scratch, dim, value_dim);
    else NAME(forward_head)(p, h, scratch, dim, value_dim);
}

#define AT(name, b, head) (p->name ? (REAL *)p->name + (b) * p->name##_stride[0] + (head) * p->name##_stride[1] : NULL)

/* 0, or 1 where the memory for a thread's contexts could not be had. */
static int NAME(run)(const Problem *p, int backward) {
    int failed = 0;
#pragma omp parallel num_threads((int)p->threads)
    {
        REAL *scratch = malloc((3 * p->dim + 2 * p->dim * p->value_dim + 1) * sizeof(REAL));
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < p->batch * p->heads; pair++) {
            const int64_t b = pair / p->heads, head = pair % p->heads;
            if (!scratch) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            const Head h = {.q = AT(q, b, head), .k = AT(k, b, head), .v = AT(v, b, head), .dout = AT(dout, b, head), .out = AT(out, b, head),
                            .dq = AT(dq, b, head), .dk = AT(dk, b, head), .dv = AT(dv, b, head), .mask = p->mask ? p->mask + b * p->keys : NULL};
            NAME(one_head)(p, &h, scratch, backward);
        }
        free(scratch);
    }
    return failed;
}

int NAME(efficient_attention_forward)(const Problem *p) { return NAME(run)(p, 0); }
int NAME(efficient_attention_backward)(const Problem *p) { return NAME(run)(p, 1); }

#undef AT
#undef Head

#endif
