/* Selective scan on the CPU, forward and backward, in float and in double.
 *
 * A task is one batch element and one block of consecutive channels. It walks the sequence in chunks of CHUNK steps and, inside a chunk,
 * its channels: the chunk's B and C are transposed once into (step, state) tiles that stay in the first-level cache for all channels of a
 * group, and so are the tiles that gather dB and dC. The state vector (padded with zeros to a whole number of vectors) is the vectorised
 * axis. Forward keeps the state at the start of every chunk; backward recomputes the states of one chunk from there, so nothing of size
 * (batch, dim, length, state) ever exists. Tasks write to places of their own: the result does not depend on the number of threads.
 *
 * This file includes itself twice, as a template over REAL. Sequences are walked by step t; reversed scans map t to position length - 1 - t
 * where data is loaded and stored, and nowhere else.
 */
#ifndef REAL

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../native.h"

/* Sums are split over vector lanes where `omp simd reduction` says so, and nowhere else: the argument reduction of exp must not be regrouped. */
#if defined(__clang__)
#pragma clang fp reassociate(off)
#elif defined(__GNUC__)
#pragma GCC optimize("no-associative-math")
#endif

#define CHUNK 64

/* Mirrored field by field by `Problem` in cpu.py. Strides count elements; a constant B or C has length stride 0 and a group per channel. */
typedef struct {
    int64_t batch, dim, length, state, groups_b, groups_c, constant_b, constant_c, blocks, threads, softplus, reverse;
    int64_t u_stride[3], delta_stride[3], z_stride[3], dout_stride[3], b_stride[4], c_stride[4];
    const void *u, *delta, *a, *b, *c, *d, *z, *delta_bias, *initial_state;
    const uint8_t *starts; /* (batch, length): 1 at the position of each step that forgets the state before it */
    void *out, *last_state, *checkpoints;
    const void *dout;
    void *du, *ddelta, *da, *db, *dc, *dd, *dz, *ddelta_bias; /* per batch element and channel; db, dc: per block of channels too */
    void *dinitial_state;                                     /* holds the gradient of the last state when the backward pass starts */
} Problem;

/* exp(x) = 2^n exp(r) with |r| <= log(2) / 2 and the Taylor series of exp(r): within 2 units in the last place; NaN stays NaN.
 * No conditional expression but integer minimum and maximum: under target_clones gcc 12 does not turn others into selects, and a loop with
 * a branch is not vectorised. So the low end of the range is masked in the bits, and the kernels below blend by factors of 0 and 1. */
INLINE float exponential_float(float x) {
    const float scaled = x * 1.44269504f;
    const int32_t n = (int32_t)(scaled + __builtin_copysignf(0.5f, scaled));
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float series = 1 / 5040.0f;
    series = series * r + 1 / 720.0f;
    series = series * r + 1 / 120.0f;
    series = series * r + 1 / 24.0f;
    series = series * r + 1 / 6.0f;
    series = series * r + 0.5f;
    series = series * r + 1;
    series = series * r + 1;
    const int32_t above = n < -127 ? -127 : n, bits = ((above > 128 ? 128 : above) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    float value = series * power;
    int32_t masked;
    memcpy(&masked, &value, sizeof value);
    masked &= -(int32_t)!(x < -87.3f);
    memcpy(&value, &masked, sizeof value);
    return value;
}

INLINE double exponential_double(double x) {
    const double scaled = x * 1.4426950408889634;
    const int32_t n = (int32_t)(scaled + __builtin_copysign(0.5, scaled));
    const double r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
    double series = 1 / 6227020800.0;
    series = series * r + 1 / 479001600.0;
    series = series * r + 1 / 39916800.0;
    series = series * r + 1 / 3628800.0;
    series = series * r + 1 / 362880.0;
    series = series * r + 1 / 40320.0;
    series = series * r + 1 / 5040.0;
    series = series * r + 1 / 720.0;
    series = series * r + 1 / 120.0;
    series = series * r + 1 / 24.0;
    series = series * r + 1 / 6.0;
    series = series * r + 0.5;
    series = series * r + 1;
    series = series * r + 1;
    const int32_t above = n < -1023 ? -1023 : n;
    const int64_t bits = ((int64_t)(above > 1024 ? 1024 : above) + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    double value = series * power;
    int64_t masked;
    memcpy(&masked, &value, sizeof value);
    masked &= -(int64_t)!(x < -708.0);
    memcpy(&value, &masked, sizeof value);
    return value;
}

INLINE float magnitude_float(float x) { return __builtin_fabsf(x); }
INLINE double magnitude_double(double x) { return __builtin_fabs(x); }

/* log(1 + e) = 2 artanh(s), s = e / (2 + e), for 0 <= e <= 1: a series in s^2 <= 1/9 that keeps the relative precision of small e. */
INLINE float log_one_plus_float(float e) {
    const float s = e / (2 + e), q = s * s;
    float series = 1 / 15.0f;
    series = series * q + 1 / 13.0f;
    series = series * q + 1 / 11.0f;
    series = series * q + 1 / 9.0f;
    series = series * q + 1 / 7.0f;
    series = series * q + 1 / 5.0f;
    series = series * q + 1 / 3.0f;
    return 2 * s * (series * q + 1);
}

INLINE double log_one_plus_double(double e) {
    const double s = e / (2 + e), q = s * s;
    double series = 1 / 33.0;
    series = series * q + 1 / 31.0;
    series = series * q + 1 / 29.0;
    series = series * q + 1 / 27.0;
    series = series * q + 1 / 25.0;
    series = series * q + 1 / 23.0;
    series = series * q + 1 / 21.0;
    series = series * q + 1 / 19.0;
    series = series * q + 1 / 17.0;
    series = series * q + 1 / 15.0;
    series = series * q + 1 / 13.0;
    series = series * q + 1 / 11.0;
    series = series * q + 1 / 9.0;
    series = series * q + 1 / 7.0;
    series = series * q + 1 / 5.0;
    series = series * q + 1 / 3.0;
    return 2 * s * (series * q + 1);
}

/* States are padded with zeros to whole blocks of LANES, and every loop over states walks one block: its length is a constant, so that
 * the recurrences keep a block in vector registers from step to step. */
#define LANES 16

static int64_t padded_state(int64_t state) { return (state + LANES - 1) / LANES * LANES; }

#define REAL float
#include __FILE__
#undef REAL
#define REAL double
#include __FILE__
#undef REAL

#else /* the template */

#define exponential NAME(exponential)
#define log_one_plus NAME(log_one_plus)

/* ---- Arithmetic on one chunk of one channel: the functions that are worth a form for each kind of vector. ---- */

/* Step sizes of a chunk from delta + bias: softplus, linear above 20 as in torch. */
CLONES static void NAME(softplus)(REAL *restrict dt, const REAL *restrict raw, int64_t steps) {
#pragma omp simd
    for (int64_t t = 0; t < steps; t++) {
        const REAL x = raw[t], size = NAME(magnitude)(x), curved = (REAL)(x <= 20);
        dt[t] = (REAL)0.5 * (x + size) + curved * log_one_plus(exponential(-size));
    }
}

CLONES static void NAME(softplus_backward)(REAL *restrict ddt, const REAL *restrict raw, int64_t steps) {
#pragma omp simd
    for (int64_t t = 0; t < steps; t++) ddt[t] /= 1 + (REAL)(raw[t] <= 20) * exponential(-raw[t]);
}

/* decay[t][n] = exp(dt[t] rate[n]) */
CLONES static void NAME(decays)(REAL *restrict decay, const REAL *restrict dt, const REAL *restrict rate, int64_t steps, int64_t width) {
    for (int64_t block = 0; block < width; block += LANES)
        for (int64_t t = 0; t < steps; t++) {
#pragma omp simd
            for (int64_t n = block; n < block + LANES; n++) decay[t * width + n] = exponential(dt[t] * rate[n]);
        }
}

/* h[t + 1] = decay[t] h[t] + dt[t] u[t] B[t] and, where y is asked for, y[t] = C[t] . h[t + 1] + skip u[t]. */
CLONES static void NAME(recur)(REAL *restrict h, REAL *restrict y, const REAL *restrict decay, const REAL *restrict dt, const REAL *restrict u,
                               const REAL *restrict tile_b, const REAL *restrict tile_c, REAL skip, int64_t steps, int64_t width) {
    for (int64_t t = 0; y && t < steps; t++) y[t] = skip * u[t];
    for (int64_t block = 0; block < width; block += LANES) {
        REAL state[LANES];
        for (int64_t n = 0; n < LANES; n++) state[n] = h[block + n];
        for (int64_t t = 0; t < steps; t++) {
            const REAL x = dt[t] * u[t];
            const int64_t at = t * width + block;
#pragma omp simd
            for (int64_t n = 0; n < LANES; n++) {
                state[n] = decay[at + n] * state[n] + x * tile_b[at + n];
                h[at + width + n] = state[n];
            }
        }
        for (int64_t t = 0; y && t < steps; t++) {
            const int64_t at = t * width + block;
            REAL sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t n = 0; n < LANES; n++) sum += h[at + width + n] * tile_c[at + n];
            y[t] += sum;
        }
    }
}

/* y silu(z), in place. */
CLONES static void NAME(gate)(REAL *restrict y, const REAL *restrict z, int64_t steps) {
#pragma omp simd
    for (int64_t t = 0; t < steps; t++) y[t] *= z[t] / (1 + exponential(-z[t]));
}

/* dy from the gradient of the gated output, in place; z becomes dz. */
CLONES static void NAME(gate_backward)(REAL *restrict dy, REAL *restrict z, const REAL *restrict y, int64_t steps) {
#pragma omp simd
    for (int64_t t = 0; t < steps; t++) {
        const REAL open = 1 / (1 + exponential(-z[t])), into = dy[t], gate = z[t];
        dy[t] = into * gate * open;
        z[t] = into * y[t] * open * (1 + gate * (1 - open));
    }
}

/* From the last step to the first; g is the gradient of the state after the step at hand, on return of the state before the chunk. */
CLONES static void NAME(recur_backward)(REAL *restrict g, REAL *restrict grad_rate, REAL *restrict grad_b, REAL *restrict grad_c, REAL *restrict du,
                                        REAL *restrict ddt, const REAL *restrict h, const REAL *restrict decay, const REAL *restrict rate,
                                        const REAL *restrict dt, const REAL *restrict u, const REAL *restrict dy, const REAL *restrict tile_b,
                                        const REAL *restrict tile_c, REAL skip, int64_t steps, int64_t width) {
    for (int64_t t = 0; t < steps; t++) du[t] = skip * dy[t];
    for (int64_t t = 0; t < steps; t++) ddt[t] = 0;
    for (int64_t block = 0; block < width; block += LANES) {
        REAL after[LANES], to_rate[LANES];
        for (int64_t n = 0; n < LANES; n++) after[n] = g[block + n];
        for (int64_t n = 0; n < LANES; n++) to_rate[n] = grad_rate[block + n];
        for (int64_t t = steps - 1; t >= 0; t--) {
            const REAL step = dt[t], x = step * u[t], into = dy[t];
            const int64_t at = t * width + block;
            REAL through_b = 0, through_decay = 0;
#pragma omp simd reduction(+ : through_b, through_decay)
            for (int64_t n = 0; n < LANES; n++) {
                const REAL whole = after[n] + into * tile_c[at + n], before = whole * decay[at + n], decayed = before * h[at + n];
                grad_c[at + n] += into * h[at + width + n];
                grad_b[at + n] += whole * x;
                through_b += whole * tile_b[at + n];
                through_decay += decayed * rate[block + n];
                to_rate[n] += decayed * step;
                after[n] = before;
            }
            du[t] += step * through_b;
            ddt[t] += u[t] * through_b + through_decay;
        }
        for (int64_t n = 0; n < LANES; n++) g[block + n] = after[n];
        for (int64_t n = 0; n < LANES; n++) grad_rate[block + n] = to_rate[n];
    }
}

/* ---- Moving data between the arrays as they lie and the chunk: `at` is the position of its first step, `sign` the way to the next. ---- */

typedef struct {
    int64_t b, channel, at, sign, steps;
} NAME(Place);

static void NAME(load_row)(REAL *restrict row, const void *data, const int64_t *stride, NAME(Place) at) {
    const REAL *restrict from = (const REAL *)data + at.b * stride[0] + at.channel * stride[1] + at.at * stride[2];
    for (int64_t t = 0; t < at.steps; t++) row[t] = from[at.sign * t * stride[2]];
}

static void NAME(store_row)(void *data, const REAL *restrict row, const Problem *p, NAME(Place) at) {
    REAL *restrict to = (REAL *)data + (at.b * p->dim + at.channel) * p->length + at.at;
    for (int64_t t = 0; t < at.steps; t++) to[at.sign * t] = row[t];
}

/* tile[t][n] = matrix[n][t], zero in the padding. */
static void NAME(load_tile)(REAL *restrict tile, const void *data, const int64_t *stride, int64_t group, int64_t state, int64_t width, NAME(Place) at) {
    const REAL *restrict from = (const REAL *)data + at.b * stride[0] + group * stride[1] + at.at * stride[3];
    for (int64_t t = 0; t < at.steps; t++)
        for (int64_t n = 0; n < width; n++) tile[t * width + n] = n < state ? from[n * stride[2] + at.sign * t * stride[3]] : 0;
}

/* matrix[n][t] += tile[t][n]; a constant matrix has one position, which takes the sum over the steps. */
static void NAME(add_tile)(REAL *restrict matrix, const REAL *restrict tile, int64_t length, int64_t constant, int64_t state, int64_t width,
                           NAME(Place) at) {
    for (int64_t n = 0; n < state; n++)
        for (int64_t t = 0; t < at.steps; t++) matrix[constant ? n : n * length + at.at + at.sign * t] += tile[t * width + n];
}

/* padded[n] = values[n], zero in the padding and where there are no values. */
static void NAME(load_state)(REAL *restrict padded, const REAL *restrict values, int64_t state, int64_t width) {
    for (int64_t n = 0; n < width; n++) padded[n] = values && n < state ? values[n] : 0;
}

/* ---- A task: one batch element, the channels low ... high - 1. ---- */

static REAL NAME(channel_value)(const void *data, int64_t channel) { return data ? ((const REAL *)data)[channel] : 0; }

/* dt of the chunk, and what softplus received. */
static void NAME(load_step_sizes)(REAL *restrict dt, REAL *restrict raw, const Problem *p, NAME(Place) at) {
    const REAL bias = NAME(channel_value)(p->delta_bias, at.channel);
    NAME(load_row)(raw, p->delta, p->delta_stride, at);
    for (int64_t t = 0; t < at.steps; t++) dt[t] = raw[t] += bias;
    if (p->softplus) NAME(softplus)(dt, raw, at.steps);
}

/* A state that is forgotten has decayed to nothing: its gradients are nothing too. */
static void NAME(forget)(REAL *restrict decay, const Problem *p, int64_t width, NAME(Place) at) {
    for (int64_t t = 0; p->starts && t < at.steps; t++)
        if (p->starts[at.b * p->length + at.at + at.sign * t]) memset(decay + t * width, 0, width * sizeof(REAL));
}

static void NAME(forward_task)(const Problem *p, int64_t task, REAL *restrict scratch) {
    const int64_t b = task / p->blocks, block = task % p->blocks, length = p->length, state = p->state, width = padded_state(state);
    const int64_t low = p->dim * block / p->blocks, high = p->dim * (block + 1) / p->blocks;
    const int64_t chunks = (length + CHUNK - 1) / CHUNK, tile = CHUNK * width, per_b = p->dim / p->groups_b, per_c = p->dim / p->groups_c;
    REAL *restrict tile_b = scratch, *restrict tile_c = tile_b + tile, *restrict decay = tile_c + tile;
    REAL *restrict h = decay + tile, *restrict rate = h + tile + width; /* h[t + 1] is the state after step t, h[0] the one before the chunk */
    REAL dt[CHUNK], raw[CHUNK], u[CHUNK], y[CHUNK], z[CHUNK];

    for (int64_t k = 0; k < chunks; k++) {
        const int64_t start = k * CHUNK, steps = length - start < CHUNK ? length - start : CHUNK;
        for (int64_t channel = low; channel < high; channel++) {
            const int64_t line = b * p->dim + channel;
            const NAME(Place) at = {b, channel, p->reverse ? length - 1 - start : start, p->reverse ? -1 : 1, steps};
            if (channel == low || channel % per_b == 0) NAME(load_tile)(tile_b, p->b, p->b_stride, channel / per_b, state, width, at);
            if (channel == low || channel % per_c == 0) NAME(load_tile)(tile_c, p->c, p->c_stride, channel / per_c, state, width, at);
            REAL *restrict kept = (REAL *)p->checkpoints + (line * chunks + k) * state;
            if (k == 0) NAME(load_state)(kept, p->initial_state ? (const REAL *)p->initial_state + line * state : NULL, state, state);
            NAME(load_state)(h, kept, state, width);
            NAME(load_state)(rate, (const REAL *)p->a + channel * state, state, width);
            NAME(load_row)(u, p->u, p->u_stride, at);
            NAME(load_step_sizes)(dt, raw, p, at);

            NAME(decays)(decay, dt, rate, steps, width);
            NAME(forget)(decay, p, width, at);
            NAME(recur)(h, y, decay, dt, u, tile_b, tile_c, NAME(channel_value)(p->d, channel), steps, width);
            if (p->z) {
                NAME(load_row)(z, p->z, p->z_stride, at);
                NAME(gate)(y, z, steps);
            }
            NAME(store_row)(p->out, y, p, at);
            NAME(load_state)(k + 1 < chunks ? kept + state : (REAL *)p->last_state + line * state, h + steps * width, state, state);
        }
    }
}

static void NAME(backward_task)(const Problem *p, int64_t task, REAL *restrict scratch) {
    const int64_t b = task / p->blocks, block = task % p->blocks, length = p->length, state = p->state, width = padded_state(state);
    const int64_t low = p->dim * block / p->blocks, high = p->dim * (block + 1) / p->blocks;
    const int64_t chunks = (length + CHUNK - 1) / CHUNK, tile = CHUNK * width, per_b = p->dim / p->groups_b, per_c = p->dim / p->groups_c;
    REAL *restrict tile_b = scratch, *restrict tile_c = tile_b + tile, *restrict grad_b = tile_c + tile, *restrict grad_c = grad_b + tile;
    REAL *restrict decay = grad_c + tile, *restrict h = decay + tile, *restrict rate = h + tile + width;
    REAL *restrict g = rate + width, *restrict grad_rate = g + width;
    REAL dt[CHUNK], raw[CHUNK], u[CHUNK], y[CHUNK], z[CHUNK], dy[CHUNK], ddt[CHUNK], du[CHUNK];

    const int64_t length_b = p->constant_b ? 1 : length, length_c = p->constant_c ? 1 : length;
    REAL *restrict db = (REAL *)p->db + (block * p->batch + b) * p->groups_b * state * length_b;
    REAL *restrict dc = (REAL *)p->dc + (block * p->batch + b) * p->groups_c * state * length_c;

    for (int64_t k = chunks - 1; k >= 0; k--) {
        const int64_t start = k * CHUNK, steps = length - start < CHUNK ? length - start : CHUNK;
        for (int64_t channel = low; channel < high; channel++) {
            const int64_t line = b * p->dim + channel;
            const NAME(Place) at = {b, channel, p->reverse ? length - 1 - start : start, p->reverse ? -1 : 1, steps};
            if (channel == low || channel % per_b == 0) {
                NAME(load_tile)(tile_b, p->b, p->b_stride, channel / per_b, state, width, at);
                memset(grad_b, 0, tile * sizeof(REAL));
            }
            if (channel == low || channel % per_c == 0) {
                NAME(load_tile)(tile_c, p->c, p->c_stride, channel / per_c, state, width, at);
                memset(grad_c, 0, tile * sizeof(REAL));
            }
            const REAL skip = NAME(channel_value)(p->d, channel);
            NAME(load_state)(h, (const REAL *)p->checkpoints + (line * chunks + k) * state, state, width);
            NAME(load_state)(rate, (const REAL *)p->a + channel * state, state, width);
            NAME(load_row)(u, p->u, p->u_stride, at);
            NAME(load_row)(dy, p->dout, p->dout_stride, at);
            NAME(load_step_sizes)(dt, raw, p, at);

            NAME(decays)(decay, dt, rate, steps, width);
            NAME(forget)(decay, p, width, at);
            NAME(recur)(h, p->z ? y : NULL, decay, dt, u, tile_b, tile_c, skip, steps, width);
            if (p->z) {
                NAME(load_row)(z, p->z, p->z_stride, at);
                NAME(gate_backward)(dy, z, y, steps);
                NAME(store_row)(p->dz, z, p, at);
            }
            REAL *restrict carried = (REAL *)p->dinitial_state + line * state, *restrict da = (REAL *)p->da + line * state;
            NAME(load_state)(g, carried, state, width);
            NAME(load_state)(grad_rate, da, state, width);
            NAME(recur_backward)(g, grad_rate, grad_b, grad_c, du, ddt, h, decay, rate, dt, u, dy, tile_b, tile_c, skip, steps, width);
            NAME(load_state)(carried, g, state, state);
            NAME(load_state)(da, grad_rate, state, state);

            if (p->softplus) NAME(softplus_backward)(ddt, raw, steps);
            for (int64_t t = 0; p->delta_bias && t < steps; t++) ((REAL *)p->ddelta_bias)[line] += ddt[t];
            for (int64_t t = 0; p->d && t < steps; t++) ((REAL *)p->dd)[line] += dy[t] * u[t];
            NAME(store_row)(p->du, du, p, at);
            NAME(store_row)(p->ddelta, ddt, p, at);
            if (channel + 1 == high || (channel + 1) % per_b == 0)
                NAME(add_tile)(db + channel / per_b * state * length_b, grad_b, length_b, p->constant_b, state, width, at);
            if (channel + 1 == high || (channel + 1) % per_c == 0)
                NAME(add_tile)(dc + channel / per_c * state * length_c, grad_c, length_c, p->constant_c, state, width, at);
        }
    }
}

/* 0, or 1 where the scratch memory (a few tiles a thread) could not be had. */
static int NAME(run)(const Problem *p, void (*work)(const Problem *, int64_t, REAL *)) {
    const size_t bytes = (7 * CHUNK + 8) * padded_state(p->state) * sizeof(REAL);
    int failed = 0;
#pragma omp parallel num_threads((int)p->threads)
    {
        void *scratch = NULL;
        const int missing = posix_memalign(&scratch, 64, bytes);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p->batch * p->blocks; task++) {
            if (missing) {
#pragma omp atomic write
                failed = 1;
            } else {
                work(p, task, (REAL *)scratch);
            }
        }
        free(scratch);
    }
    return failed;
}

int NAME(selective_scan_forward)(const Problem *p) { return NAME(run)(p, NAME(forward_task)); }
int NAME(selective_scan_backward)(const Problem *p) { return NAME(run)(p, NAME(backward_task)); }

#undef exponential
#undef log_one_plus

#endif
