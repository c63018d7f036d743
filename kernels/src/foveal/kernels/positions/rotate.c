/* Rotary embedding on the CPU, in float and in double: pairs (p, p + pairs) or (2p, 2p + 1) of each row turned by that row's cosines and sines.
 *
 * A row is one (batch element, head, position). Cosines and sines are shared by the heads and come as tables of positions: they cost one
 * evaluation a position and pair, and every row is then read and written once. This file includes itself twice, as a template over REAL.
 */
#ifndef REAL

#include <stdint.h>
#include <string.h>

#include "../native.h"

/* Mirrored field by field by `Problem` in cpu.py. Strides count elements of (batch, head, position); channels lie side by side.
 * A table that the batch shares has batch stride 0. */
typedef struct {
    int64_t batch, heads, length, dim, pairs, table_stride, neighbours;
    int64_t x_stride[3], out_stride[3];
    const void *x, *cos, *sin;
    void *out;
} Problem;

#define REAL float
#include __FILE__
#undef REAL
#define REAL double
#include __FILE__
#undef REAL

#else /* the template */

/* All positions of one head: a call a row would cost as much as the row. */
CLONES static void NAME(turn_halves)(REAL *restrict out, const REAL *restrict x, const REAL *restrict cos, const REAL *restrict sin, const Problem *p) {
    const int64_t pairs = p->pairs, x_step = p->x_stride[2], out_step = p->out_stride[2];
    for (int64_t n = 0; n < p->length; n++) {
#pragma omp simd
        for (int64_t i = 0; i < pairs; i++) {
            out[i] = x[i] * cos[i] - x[i + pairs] * sin[i];
            out[i + pairs] = x[i + pairs] * cos[i] + x[i] * sin[i];
        }
        x += x_step, out += out_step, cos += pairs, sin += pairs;
    }
}

CLONES static void NAME(turn_neighbours)(REAL *restrict out, const REAL *restrict x, const REAL *restrict cos, const REAL *restrict sin, const Problem *p) {
    const int64_t pairs = p->pairs, x_step = p->x_stride[2], out_step = p->out_stride[2];
    for (int64_t n = 0; n < p->length; n++) {
#pragma omp simd
        for (int64_t i = 0; i < pairs; i++) {
            const REAL first = x[2 * i], second = x[2 * i + 1];
            out[2 * i] = first * cos[i] - second * sin[i];
            out[2 * i + 1] = second * cos[i] + first * sin[i];
        }
        x += x_step, out += out_step, cos += pairs, sin += pairs;
    }
}

void NAME(rotate)(const Problem *p, int threads) {
    const int64_t rest = p->dim - 2 * p->pairs;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t b = 0; b < p->batch; b++)
        for (int64_t h = 0; h < p->heads; h++) {
            const REAL *x = (const REAL *)p->x + b * p->x_stride[0] + h * p->x_stride[1];
            const REAL *cos = (const REAL *)p->cos + b * p->table_stride, *sin = (const REAL *)p->sin + b * p->table_stride;
            REAL *out = (REAL *)p->out + b * p->out_stride[0] + h * p->out_stride[1];
            (p->neighbours ? NAME(turn_neighbours) : NAME(turn_halves))(out, x, cos, sin, p);
            for (int64_t n = 0; rest && n < p->length; n++)
                memcpy(out + n * p->out_stride[2] + 2 * p->pairs, x + n * p->x_stride[2] + 2 * p->pairs, rest * sizeof(REAL));
        }
}

#endif
