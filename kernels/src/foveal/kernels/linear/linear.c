/* Linear attention with decay on the CPU, forward and backward, in float and in double: the recurrence itself, on a state that stays in cache.
 *
 * A state has `rows` rows and a block of lanes, up to four vectors wide. A sweep walks the sequence once; a step decays the state, reads it
 * with the query of that step (one number a row), and adds key times lanes to it: three operations a number of the state. In chunks of 64
 * the matrix products of the quadratic form are as many operations, so the recurrence loses nothing, and it is exact for any decay: no
 * quotient of two decays is ever formed.
 *
 * The backward pass is three such sweeps, because the gradient of each of q, k and v is linear attention of the other tensors:
 *     dq: rows are value dims. dout reads what v wrote into lanes of k.           dk: backwards, v reads what dout wrote into lanes of q.
 *     dv: backwards, rows are key dims, k reads what q wrote into lanes of dout.
 * The gradient of a log decay at step t is the sum over all pairs (key j < t <= query i) of their share of the result. The sweeps give
 * each query's and each key's total over its strictly earlier (later) partners; summed from the end, their difference is that gradient.
 * Pairs that no decay lies between are left out of both, so that nothing large cancels where decays are strong.
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

enum { NO_DECAY, ROW_DECAY, LANE_DECAY };

/* Mirrored field by field by `Problem` in cpu.py. Strides of (batch, head, row) count elements; elements of a row are adjacent. */
typedef struct {
    int64_t batch, heads, length, dim, value_dim, per_channel, threads;
    int64_t q_stride[3], k_stride[3], v_stride[3], dout_stride[3], factor_stride[3];
    const void *q, *k, *v, *factor, *initial_state; /* factor: exp(decay), or NULL; initial_state may be NULL */
    void *out, *final_state;
    const void *dout, *dfinal_state; /* dfinal_state may be NULL */
    void *dq, *dk, *dv, *dinitial_state;
    void *ddecay; /* NULL, or (batch, heads, length, dim), or (batch, heads, blocks, length) to be summed from the end where it is not per channel */
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

/* What one sweep reads and writes. Rows of `lane`, `out` and `weight` have `lanes` elements, those of `key` and `query` have `rows`. */
typedef struct {
    int64_t length, rows, lanes;
    int backwards;
    const REAL *key, *query, *lane, *factor;
    int64_t key_step, query_step, lane_step, factor_step, factor_row; /* factor_row: 0 where one factor serves all rows */
    REAL *out;
    int64_t out_step;
    /* The share of the decay's gradient: sign * weight . (what earlier steps gave), added to terms, per lane (term_lane 1) or summed (0). */
    const REAL *weight;
    int64_t weight_step;
    REAL *terms;
    int64_t term_step, term_lane;
    REAL sign;
    const vec *beyond; /* gradient of the state after the last step: a reader of that step, for the terms only */
} NAME(Sweep);
#define Sweep NAME(Sweep)

/* `count` numbers as vectors, zeros after them. */
INLINE void NAME(load)(vec *to, const REAL *from, int64_t count, const int width) {
    if (count == width * LANES) {
        memcpy(to, from, width * sizeof(vec));
        return;
    }
    memset(to, 0, width * sizeof(vec));
    memcpy(to, from, count * sizeof(REAL));
}

/* terms += sign * weight * given */
CLONES static void NAME(add_terms)(const Sweep *s, int64_t t, const vec *given, int width) {
    vec weight[WIDEST];
    NAME(load)(weight, s->weight + t * s->weight_step, s->lanes, width);
    if (s->term_lane) {
        REAL *terms = s->terms + t * s->term_step;
        vec sums[WIDEST];
        NAME(load)(sums, terms, s->lanes, width);
        for (int j = 0; j < width; j++) sums[j] += s->sign * weight[j] * given[j];
        memcpy(terms, sums, s->lanes * sizeof(REAL));
        return;
    }
    vec product = weight[0] * given[0];
    for (int j = 1; j < width; j++) product += weight[j] * given[j];
    REAL sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += product[lane];
    s->terms[t * s->term_step] += s->sign * sum;
}

/* The decayed state before step t against the gradient of the state after it: one more reader, of weight 1. */
static void NAME(add_beyond)(const Sweep *s, int64_t t, const vec *state, const REAL *row_factor, int64_t factor_row, const vec *lane_factor, int width) {
    vec through[WIDEST];
    REAL ones[WIDEST * VECTOR_BYTES / sizeof(REAL)];
    memset(through, 0, sizeof through);
    for (int i = 0; i < WIDEST * LANES; i++) ones[i] = 1;
    for (int64_t r = 0; r < s->rows; r++)
        for (int j = 0; j < width; j++) {
            const vec number = state[r * width + j] * s->beyond[r * width + j];
            through[j] += lane_factor ? number * lane_factor[j] : number * row_factor[r * factor_row];
        }
    Sweep reader = *s;
    reader.weight = ones, reader.weight_step = 0;
    NAME(add_terms)(&reader, t, through, width);
}

/* One walk over the sequence, the state in `state`, (rows, width). Backwards, the factor between two steps is that of the later one. */
INLINE void NAME(walk)(const Sweep *s, vec *restrict state, const int width, const int decay) {
    const vec zero = {0};
    const REAL one = 1;
    for (int64_t step = 0; step < s->length; step++) {
        const int64_t t = s->backwards ? s->length - 1 - step : step, since = s->backwards ? t + 1 : t;
        const int decays = since < s->length;
        const REAL *key = s->key + t * s->key_step, *query = s->query + t * s->query_step;
        const REAL *factor = decays ? s->factor + since * s->factor_step : &one;
        const int64_t factor_row = decays ? s->factor_row : 0;
        vec lane[WIDEST], read[WIDEST], lane_factor[WIDEST];
        NAME(load)(lane, s->lane + t * s->lane_step, s->lanes, width);
        for (int j = 0; j < width; j++) read[j] = zero;
        for (int j = 0; j < width; j++) lane_factor[j] = zero + 1;
        if (decay == LANE_DECAY && decays) NAME(load)(lane_factor, factor, s->lanes, width);
        if (s->beyond && t == s->length - 1) NAME(add_beyond)(s, t, state, factor, factor_row, decay == LANE_DECAY ? lane_factor : NULL, width);
        REAL own = 0;
        for (int64_t r = 0; r < s->rows; r++) own += query[r] * key[r];
        for (int64_t r = 0; r < s->rows; r++) {
            for (int j = 0; j < width; j++) {
                vec number = state[r * width + j];
                if (decay == ROW_DECAY) number *= factor[r * factor_row];
                if (decay == LANE_DECAY) number *= lane_factor[j];
                read[j] += number * query[r];
                state[r * width + j] = number + lane[j] * key[r];
            }
        }
        if (s->terms && decays) NAME(add_terms)(s, t, read, width);
        for (int j = 0; j < width; j++) read[j] += lane[j] * own;
        memcpy(s->out + t * s->out_step, read, s->lanes * sizeof(REAL));
    }
}

CLONES static void NAME(sweep)(const Sweep *s, vec *state, int width, int decay) {
#define FORM(w, d)                    \
    if (width == w && decay == d) {   \
        NAME(walk)(s, state, w, d);   \
        return;                       \
    }
    FORM(1, NO_DECAY) FORM(1, ROW_DECAY) FORM(1, LANE_DECAY)
    FORM(2, NO_DECAY) FORM(2, ROW_DECAY) FORM(2, LANE_DECAY)
    FORM(4, NO_DECAY) FORM(4, ROW_DECAY) FORM(4, LANE_DECAY)
#undef FORM
}

/* Vectors of a block that holds `lanes` lanes. */
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

/* Forward: block `block` of the values of one head. */
static void NAME(forward_task)(const Problem *p, int64_t pair, int64_t block, vec *state) {
    const int64_t b = pair / p->heads, h = pair % p->heads, first = block * WIDEST * LANES, left = p->value_dim - first;
    const int64_t lanes = left < WIDEST * LANES ? left : WIDEST * LANES, matrix = pair * p->dim * p->value_dim;
    const int width = NAME(width)(lanes);
    const Sweep s = {
        .length = p->length, .rows = p->dim, .lanes = lanes,
        .key = NAME(head_of)(p->k, p->k_stride, b, h), .key_step = p->k_stride[2],
        .query = NAME(head_of)(p->q, p->q_stride, b, h), .query_step = p->q_stride[2],
        .lane = NAME(head_of)(p->v, p->v_stride, b, h) + first, .lane_step = p->v_stride[2],
        .factor = NAME(head_of)(p->factor, p->factor_stride, b, h), .factor_step = p->factor_stride[2], .factor_row = p->per_channel,
        .out = (REAL *)p->out + pair * p->length * p->value_dim + first, .out_step = p->value_dim,
    };
    NAME(fill)(state, p->initial_state ? (const REAL *)p->initial_state + matrix : NULL, p, 0, first, lanes, width);
    NAME(sweep)(&s, state, width, p->factor ? ROW_DECAY : NO_DECAY);
    for (int64_t r = 0; r < p->dim; r++)
        memcpy((REAL *)p->final_state + matrix + r * p->value_dim + first, state + r * width, lanes * sizeof(REAL));
}

/* Backward, a block of the values: dv, and the gradient of the initial state. */
static void NAME(value_task)(const Problem *p, int64_t pair, int64_t block, vec *state) {
    const int64_t b = pair / p->heads, h = pair % p->heads, first = block * WIDEST * LANES, left = p->value_dim - first;
    const int64_t lanes = left < WIDEST * LANES ? left : WIDEST * LANES, matrix = pair * p->dim * p->value_dim;
    const int width = NAME(width)(lanes);
    const Sweep s = {
        .length = p->length, .rows = p->dim, .lanes = lanes, .backwards = 1,
        .key = NAME(head_of)(p->q, p->q_stride, b, h), .key_step = p->q_stride[2],
        .query = NAME(head_of)(p->k, p->k_stride, b, h), .query_step = p->k_stride[2],
        .lane = NAME(head_of)(p->dout, p->dout_stride, b, h) + first, .lane_step = p->dout_stride[2],
        .factor = NAME(head_of)(p->factor, p->factor_stride, b, h), .factor_step = p->factor_stride[2], .factor_row = p->per_channel,
        .out = (REAL *)p->dv + pair * p->length * p->value_dim + first, .out_step = p->value_dim,
    };
    NAME(fill)(state, p->dfinal_state ? (const REAL *)p->dfinal_state + matrix : NULL, p, 0, first, lanes, width);
    NAME(sweep)(&s, state, width, p->factor ? ROW_DECAY : NO_DECAY);
    for (int64_t r = 0; r < p->dim; r++) {
        const REAL factor = s.factor ? s.factor[r * s.factor_row] : 1;
        REAL *to = (REAL *)p->dinitial_state + matrix + r * p->value_dim + first;
        for (int64_t lane = 0; lane < lanes; lane++) to[lane] = factor * ((REAL *)(state + r * width))[lane];
    }
}

/* Backward, a block of the key dims: dq, dk and the decay's gradient. */
static void NAME(key_task)(const Problem *p, int64_t pair, int64_t block, vec *state) {
    const int64_t b = pair / p->heads, h = pair % p->heads, first = block * WIDEST * LANES, left = p->dim - first;
    const int64_t lanes = left < WIDEST * LANES ? left : WIDEST * LANES, matrix = pair * p->dim * p->value_dim;
    const int width = NAME(width)(lanes), decay = !p->factor ? NO_DECAY : p->per_channel ? LANE_DECAY : ROW_DECAY;
    const int64_t own = pair * p->length * p->dim + first;
    vec *beyond = state + p->value_dim * WIDEST;
    Sweep s = {
        .length = p->length, .rows = p->value_dim, .lanes = lanes,
        .key = NAME(head_of)(p->v, p->v_stride, b, h), .key_step = p->v_stride[2],
        .query = NAME(head_of)(p->dout, p->dout_stride, b, h), .query_step = p->dout_stride[2],
        .lane = NAME(head_of)(p->k, p->k_stride, b, h) + first, .lane_step = p->k_stride[2],
        .factor = NAME(head_of)(p->factor, p->factor_stride, b, h), .factor_step = p->factor_stride[2],
        .out = (REAL *)p->dq + own, .out_step = p->dim,
        .weight = NAME(head_of)(p->q, p->q_stride, b, h) + first, .weight_step = p->q_stride[2], .sign = 1,
    };
    if (p->per_channel && p->factor) s.factor += first;
    if (p->ddecay && p->per_channel) {
        s.terms = (REAL *)p->ddecay + own, s.term_step = p->dim, s.term_lane = 1;
        for (int64_t t = 0; t < p->length; t++) memset(s.terms + t * p->dim, 0, lanes * sizeof(REAL));
    } else if (p->ddecay) {
        s.terms = (REAL *)p->ddecay + (pair * NAME(blocks)(p->dim) + block) * p->length, s.term_step = 1;
        memset(s.terms, 0, p->length * sizeof(REAL));
    }
    if (p->dfinal_state && p->ddecay) {
        NAME(fill)(beyond, (const REAL *)p->dfinal_state + matrix, p, 1, first, lanes, width);
        s.beyond = beyond;
    }
    NAME(fill)(state, p->initial_state ? (const REAL *)p->initial_state + matrix : NULL, p, 1, first, lanes, width);
    NAME(sweep)(&s, state, width, decay);

    const Sweep read = s;
    s.backwards = 1, s.sign = -1, s.beyond = NULL, s.out = (REAL *)p->dk + own;
    s.key = read.query, s.key_step = read.query_step, s.query = read.key, s.query_step = read.key_step;
    s.lane = read.weight, s.lane_step = read.weight_step, s.weight = read.lane, s.weight_step = read.lane_step;
    NAME(fill)(state, p->dfinal_state ? (const REAL *)p->dfinal_state + matrix : NULL, p, 1, first, lanes, width);
    NAME(sweep)(&s, state, width, decay);
    if (s.terms && s.term_lane) {
        double sum[WIDEST * VECTOR_BYTES / sizeof(REAL)] = {0};
        for (int64_t t = p->length - 1; t >= 0; t--)
            for (int64_t lane = 0; lane < lanes; lane++) s.terms[t * p->dim + lane] = (REAL)(sum[lane] += s.terms[t * p->dim + lane]);
    }
}

/* 0, or 1 where the memory for a thread's state could not be had. */
static int NAME(run)(const Problem *p, int backward) {
    const int64_t pairs = p->batch * p->heads, value_blocks = NAME(blocks)(p->value_dim), key_blocks = backward ? NAME(blocks)(p->dim) : 0;
    const int64_t rows = p->dim > p->value_dim ? p->dim : p->value_dim;
    int failed = 0;
#pragma omp parallel num_threads((int)p->threads)
    {
        void *state = NULL;
        const int missing = posix_memalign(&state, VECTOR_BYTES, 2 * rows * WIDEST * sizeof(vec));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < pairs * (value_blocks + key_blocks); task++) {
            const int64_t pair = task / (value_blocks + key_blocks), block = task % (value_blocks + key_blocks);
            if (missing) {
#pragma omp atomic write
                failed = 1;
            } else if (!backward) {
                NAME(forward_task)(p, pair, block, state);
            } else if (block < value_blocks) {
                NAME(value_task)(p, pair, block, state);
            } else {
                NAME(key_task)(p, pair, block - value_blocks, state);
            }
        }
        free(state);
    }
    return failed;
}

int NAME(linear_attention_forward)(const Problem *p) { return NAME(run)(p, 0); }
int NAME(linear_attention_backward)(const Problem *p) { return NAME(run)(p, 1); }

#undef LANES
#undef vec
#undef Sweep

#endif
