/* The gated delta rule on the CPU, forward and backward, in float and in double: the recurrence itself, on a state that stays in cache.
 *
 * A step decays the state, predicts the value from the key, and adds key times beta times the error. Prediction needs a pass over the state
 * before the update; the update of one step and the prediction of the next are one pass here, so that each number of the state is loaded
 * and stored once a step.
 *
 * Given its errors, the recurrence is linear attention of the values u = beta times error, and so is what the backward pass needs of it:
 *     values task, backwards: the gradient of the state, corrected by each step's own error as the state was; gives dv and dbeta.
 *     keys task, forwards: the state again, read by dout (dq) and by dv (what the predictions took from k);
 *     and backwards: the gradient of the state again, read by u (what the updates took from k).
 * The gradient of a log decay is summed as in linear.c: over pairs with that decay between them, from the totals of readers and writers.
 *
 * This file includes itself twice, as a template over REAL. Tasks write to places of their own: results do not depend on the threads.
 */
#ifndef REAL

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../native.h"

#define VECTOR_BYTES 64
#define WIDEST 4 /* vectors in a block of lanes */

/* Mirrored field by field by `Problem` in cpu.py. Strides of (batch, head, row) count elements; elements of a row are adjacent. */
typedef struct {
    int64_t batch, heads, length, dim, value_dim, threads;
    int64_t q_stride[3], k_stride[3], v_stride[3], dout_stride[3];
    const void *q, *k, *v, *beta, *factor, *initial_state; /* beta, factor = exp(g): (batch, heads, length); initial_state may be NULL */
    void *out, *final_state, *errors;
    const void *dout, *dfinal_state; /* dfinal_state may be NULL */
    void *dq, *dk, *dv, *dinitial_state;
    void *dbeta, *dg; /* (batch, heads, blocks of values, length) and (batch, heads, blocks of keys, length); dg to be summed from the end */
} Problem;

#define REAL float
#include __FILE__
#undef REAL
#define REAL double
#include __FILE__
#undef REAL

#else /* the template */

#define LANES ((int)(VECTOR_BYTES / sizeof(REAL)))

typedef REAL NAME(vec) __attribute__((vector_size(VECTOR_BYTES)));
#define vec NAME(vec)

/* One head, one block of lanes. */
typedef struct {
    int64_t length, rows, lanes, q_step, k_step, v_step, dout_step, width_of_v, width_of_k;
    const REAL *q, *k, *v, *beta, *factor, *dout, *dv, *errors;
    REAL *results, *more, *terms; /* what the walk writes: see each */
    const vec *beyond;
} NAME(Head);
#define Head NAME(Head)

/* `count` numbers as vectors, zeros after them. */
INLINE void NAME(load)(vec *to, const REAL *from, int64_t count, const int width) {
    if (count == width * LANES) {
        memcpy(to, from, width * sizeof(vec));
        return;
    }
    memset(to, 0, width * sizeof(vec));
    memcpy(to, from, count * sizeof(REAL));
}

INLINE REAL NAME(dot)(const vec *a, const vec *b, const int width) {
    vec product = a[0] * b[0];
    for (int j = 1; j < width; j++) product += a[j] * b[j];
    REAL sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += product[lane];
    return sum;
}

/* Outputs (results) and errors (more) of a block of values; the state before the first step becomes that after the last. */
INLINE void NAME(forward_walk)(const Head *h, vec *restrict state, const int width) {
    const vec zero = {0};
    vec predicted[WIDEST];
    for (int j = 0; j < width; j++) predicted[j] = zero;
    for (int64_t r = 0; r < h->rows; r++)
        for (int j = 0; j < width; j++) predicted[j] += state[r * width + j] * h->k[r];
    for (int64_t t = 0; t < h->length; t++) {
        const REAL *key = h->k + t * h->k_step, *query = h->q + t * h->q_step, *next = t + 1 < h->length ? key + h->k_step : key;
        const REAL factor = h->factor[t];
        vec error[WIDEST], update[WIDEST], read[WIDEST];
        NAME(load)(error, h->v + t * h->v_step, h->lanes, width);
        for (int j = 0; j < width; j++) {
            error[j] -= predicted[j] * factor;
            update[j] = error[j] * h->beta[t];
            read[j] = predicted[j] = zero;
        }
        memcpy(h->more + t * h->width_of_v, error, h->lanes * sizeof(REAL));
        for (int64_t r = 0; r < h->rows; r++)
            for (int j = 0; j < width; j++) {
                const vec number = state[r * width + j] * factor + update[j] * key[r];
                state[r * width + j] = number;
                read[j] += number * query[r];
                predicted[j] += number * next[r];
            }
        memcpy(h->results + t * h->width_of_v, read, h->lanes * sizeof(REAL));
    }
}

/* dv (results) and each step's share of dbeta (terms) of a block of values; the gradient of the state after the last step becomes that before the first. */
INLINE void NAME(value_walk)(const Head *h, vec *restrict state, const int width) {
    const vec zero = {0};
    vec correction[WIDEST];
    REAL factor = 1;
    const REAL *corrected = h->k;
    for (int j = 0; j < width; j++) correction[j] = zero;
    for (int64_t t = h->length - 1; t >= 0; t--) {
        const REAL *key = h->k + t * h->k_step, *query = h->q + t * h->q_step;
        vec dout[WIDEST], dupdate[WIDEST], error[WIDEST];
        NAME(load)(dout, h->dout + t * h->dout_step, h->lanes, width);
        NAME(load)(error, h->errors + t * h->width_of_v, h->lanes, width);
        for (int j = 0; j < width; j++) dupdate[j] = zero;
        for (int64_t r = 0; r < h->rows; r++)
            for (int j = 0; j < width; j++) {
                const vec number = (state[r * width + j] - correction[j] * corrected[r]) * factor + dout[j] * query[r];
                state[r * width + j] = number;
                dupdate[j] += number * key[r];
            }
        h->terms[t] = NAME(dot)(dupdate, error, width);
        for (int j = 0; j < width; j++) correction[j] = dupdate[j] * h->beta[t];
        memcpy(h->results + t * h->width_of_v, correction, h->lanes * sizeof(REAL));
        factor = h->factor[t];
        corrected = key;
    }
    for (int64_t r = 0; r < h->rows; r++)
        for (int j = 0; j < width; j++) state[r * width + j] = (state[r * width + j] - correction[j] * corrected[r]) * factor;
}

/* dq (results), the part of dk that comes from predictions (more), and the readers' totals (terms) of a block of key dims. */
INLINE void NAME(reader_walk)(const Head *h, vec *restrict state, const int width) {
    const vec zero = {0};
    for (int64_t t = 0; t < h->length; t++) {
        const REAL *dout = h->dout + t * h->dout_step, *dv = h->dv + t * h->width_of_v, *error = h->errors + t * h->width_of_v;
        const REAL factor = h->factor[t], beta = h->beta[t];
        vec key[WIDEST], query[WIDEST], read[WIDEST], predicted[WIDEST], through = zero;
        NAME(load)(key, h->k + t * h->k_step, h->lanes, width);
        NAME(load)(query, h->q + t * h->q_step, h->lanes, width);
        for (int j = 0; j < width; j++) read[j] = predicted[j] = zero;
        if (h->beyond && t == h->length - 1)
            for (int64_t i = 0; i < h->rows * width; i++) through += h->beyond[i] * state[i] * factor;
        REAL own = 0;
        for (int64_t r = 0; r < h->rows; r++) own += dout[r] * error[r];
        for (int64_t r = 0; r < h->rows; r++) {
            const REAL update = beta * error[r];
            for (int j = 0; j < width; j++) {
                const vec number = state[r * width + j] * factor;
                read[j] += number * dout[r];
                predicted[j] += number * dv[r];
                state[r * width + j] = number + key[j] * update;
            }
        }
        REAL term = NAME(dot)(query, read, width) - NAME(dot)(key, predicted, width);
        for (int lane = 0; lane < LANES; lane++) term += through[lane];
        h->terms[t] = term;
        for (int j = 0; j < width; j++) {
            read[j] += key[j] * (beta * own);
            predicted[j] = -predicted[j];
        }
        memcpy(h->results + t * h->width_of_k, read, h->lanes * sizeof(REAL));
        memcpy(h->more + t * h->width_of_k, predicted, h->lanes * sizeof(REAL));
    }
}

/* Backwards: adds to dk (more) what comes from updates, and takes the writers' totals off (terms). */
INLINE void NAME(writer_walk)(const Head *h, vec *restrict state, const int width) {
    const vec zero = {0};
    for (int64_t t = h->length - 1; t >= 0; t--) {
        const REAL *dout = h->dout + t * h->dout_step, *dv = h->dv + t * h->width_of_v, *error = h->errors + t * h->width_of_v;
        const int last = t == h->length - 1;
        const REAL factor = last ? 1 : h->factor[t + 1], beta = h->beta[t];
        vec key[WIDEST], query[WIDEST], read[WIDEST], sum[WIDEST];
        NAME(load)(key, h->k + t * h->k_step, h->lanes, width);
        NAME(load)(query, h->q + t * h->q_step, h->lanes, width);
        for (int j = 0; j < width; j++) read[j] = zero;
        REAL own = 0;
        for (int64_t r = 0; r < h->rows; r++) own += dout[r] * error[r];
        for (int64_t r = 0; r < h->rows; r++) {
            const REAL update = beta * error[r];
            for (int j = 0; j < width; j++) {
                const vec number = state[r * width + j] * factor;
                read[j] += number * update;
                state[r * width + j] = number + query[j] * dout[r] - key[j] * dv[r];
            }
        }
        if (!last) h->terms[t] -= NAME(dot)(key, read, width);
        NAME(load)(sum, h->more + t * h->width_of_k, h->lanes, width);
        for (int j = 0; j < width; j++) sum[j] += read[j] + query[j] * (beta * own);
        memcpy(h->more + t * h->width_of_k, sum, h->lanes * sizeof(REAL));
    }
}

#define WIDTHS(walk)                                      \
    CLONES static void NAME(run_##walk)(const Head *h, vec *state, int width) { \
        if (width == 1) NAME(walk)(h, state, 1);          \
        if (width == 2) NAME(walk)(h, state, 2);          \
        if (width == 4) NAME(walk)(h, state, 4);          \
    }
WIDTHS(forward_walk)
WIDTHS(value_walk)
WIDTHS(reader_walk)
WIDTHS(writer_walk)
#undef WIDTHS

static int NAME(width)(int64_t lanes) { return lanes <= LANES ? 1 : lanes <= 2 * LANES ? 2 : WIDEST; }

/* A block of a (dim, value_dim) matrix of one head as a state: rows are its rows (lanes its columns from `first` on), or the other way round. */
static void NAME(fill)(vec *state, const REAL *matrix, const Problem *p, int transposed, int64_t first, int64_t lanes, int width) {
    const int64_t rows = transposed ? p->value_dim : p->dim;
    memset(state, 0, rows * width * sizeof(vec));
    if (!matrix) return;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t lane = 0; lane < lanes; lane++)
            ((REAL *)(state + r * width))[lane] = transposed ? matrix[(first + lane) * p->value_dim + r] : matrix[r * p->value_dim + first + lane];
}

static const REAL *NAME(head_of)(const void *base, const int64_t *stride, int64_t batch, int64_t head) {
    return base ? (const REAL *)base + batch * stride[0] + head * stride[1] : NULL;
}

static int64_t NAME(blocks)(int64_t lanes) { return (lanes + WIDEST * LANES - 1) / (WIDEST * LANES); }

/* What all walks of one head share; rows and lanes are left to the task. */
static Head NAME(head)(const Problem *p, int64_t pair) {
    const int64_t b = pair / p->heads, h = pair % p->heads, tokens = pair * p->length;
    return (Head){
        .length = p->length, .q_step = p->q_stride[2], .k_step = p->k_stride[2], .v_step = p->v_stride[2], .dout_step = p->dout_stride[2],
        .width_of_v = p->value_dim, .width_of_k = p->dim,
        .q = NAME(head_of)(p->q, p->q_stride, b, h), .k = NAME(head_of)(p->k, p->k_stride, b, h), .v = NAME(head_of)(p->v, p->v_stride, b, h),
        .beta = (const REAL *)p->beta + tokens, .factor = (const REAL *)p->factor + tokens,
        .dout = NAME(head_of)(p->dout, p->dout_stride, b, h),
        .dv = p->dv ? (const REAL *)p->dv + tokens * p->value_dim : NULL, .errors = (const REAL *)p->errors + tokens * p->value_dim,
    };
}

/* Forward, or the backward pass as far as it goes by blocks of values. */
static void NAME(value_task)(const Problem *p, int64_t pair, int64_t block, vec *state, int backward) {
    const int64_t first = block * WIDEST * LANES, left = p->value_dim - first, lanes = left < WIDEST * LANES ? left : WIDEST * LANES;
    const int64_t matrix = pair * p->dim * p->value_dim, own = pair * p->length * p->value_dim + first;
    const int width = NAME(width)(lanes);
    const void *entering = backward ? p->dfinal_state : p->initial_state;
    REAL *leaving = (REAL *)(backward ? p->dinitial_state : p->final_state) + matrix;
    Head h = NAME(head)(p, pair);
    h.rows = p->dim, h.lanes = lanes;
    NAME(fill)(state, entering ? (const REAL *)entering + matrix : NULL, p, 0, first, lanes, width);
    if (backward) {
        h.dout += first, h.errors += first, h.results = (REAL *)p->dv + own;
        h.terms = (REAL *)p->dbeta + (pair * NAME(blocks)(p->value_dim) + block) * p->length;
        NAME(run_value_walk)(&h, state, width);
    } else {
        h.v += first, h.results = (REAL *)p->out + own, h.more = (REAL *)p->errors + own;
        NAME(run_forward_walk)(&h, state, width);
    }
    for (int64_t r = 0; r < p->dim; r++) memcpy(leaving + r * p->value_dim + first, state + r * width, lanes * sizeof(REAL));
}

static void NAME(key_task)(const Problem *p, int64_t pair, int64_t block, vec *state) {
    const int64_t first = block * WIDEST * LANES, left = p->dim - first, lanes = left < WIDEST * LANES ? left : WIDEST * LANES;
    const int64_t matrix = pair * p->dim * p->value_dim, own = pair * p->length * p->dim + first;
    const int width = NAME(width)(lanes);
    vec *beyond = state + p->value_dim * WIDEST;
    Head h = NAME(head)(p, pair);
    h.rows = p->value_dim, h.lanes = lanes, h.q += first, h.k += first;
    h.results = (REAL *)p->dq + own, h.more = (REAL *)p->dk + own;
    h.terms = (REAL *)p->dg + (pair * NAME(blocks)(p->dim) + block) * p->length;
    const REAL *dfinal = p->dfinal_state ? (const REAL *)p->dfinal_state + matrix : NULL;
    if (dfinal) NAME(fill)(beyond, dfinal, p, 1, first, lanes, width);
    h.beyond = dfinal ? beyond : NULL;
    NAME(fill)(state, p->initial_state ? (const REAL *)p->initial_state + matrix : NULL, p, 1, first, lanes, width);
    NAME(run_reader_walk)(&h, state, width);
    NAME(fill)(state, dfinal, p, 1, first, lanes, width);
    NAME(run_writer_walk)(&h, state, width);
}

/* 0, or 1 where the memory for a thread's state could not be had. The tasks of the keys read dv: they come after those of the values. */
static int NAME(run)(const Problem *p, int backward) {
    const int64_t pairs = p->batch * p->heads, rows = p->dim > p->value_dim ? p->dim : p->value_dim;
    int failed = 0;
#pragma omp parallel num_threads((int)p->threads)
    {
        void *state = NULL;
        const int missing = posix_memalign(&state, VECTOR_BYTES, 2 * rows * WIDEST * sizeof(vec));
        for (int keys = 0; keys <= backward; keys++) {
            const int64_t blocks = NAME(blocks)(keys ? p->dim : p->value_dim);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < pairs * blocks; task++) {
                if (missing) {
#pragma omp atomic write
                    failed = 1;
                } else if (keys) {
                    NAME(key_task)(p, task / blocks, task % blocks, state);
                } else {
                    NAME(value_task)(p, task / blocks, task % blocks, state, backward);
                }
            }
        }
        free(state);
    }
    return failed;
}

int NAME(delta_rule_forward)(const Problem *p) { return NAME(run)(p, 0); }
int NAME(delta_rule_backward)(const Problem *p) { return NAME(run)(p, 1); }

#undef LANES
#undef vec
#undef Head

#endif
