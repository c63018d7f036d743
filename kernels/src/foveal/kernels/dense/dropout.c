/* What dropout multiplies a tile of attention weights by, drawn by Philox 4x32: the same bits as philox.py and the Triton kernels draw.
 *
 * Each pair has a counter of its own, (key, query, plane, 0), so the keys of a row are independent of each other and fill the lanes of a
 * vector register; of the four words only the first is wanted, and the compiler drops what does not lead to it. In torch the same costs
 * some forty passes over int64 arrays. This file includes itself twice, as a template over REAL.
 */
#ifndef REAL

#include <stdint.h>

#include "../native.h"

#define ROUNDS 7

/* Mirrored field by field by `Problem` in cpu_dropout.py. `out` is (planes, rows, keys), contiguous; words below `threshold` drop their pair. */
typedef struct {
    int64_t planes, rows, keys, first_row, first_key;
    uint64_t seed, threshold;
    double growth;
    const int64_t *plane;
    void *out;
} Problem;

static inline uint32_t high(uint32_t a, uint32_t b) { return (uint32_t)(((uint64_t)a * b) >> 32); }

#define REAL float
#include __FILE__
#undef REAL
#define REAL double
#include __FILE__
#undef REAL

#else /* the template */

CLONES static void NAME(draw_row)(REAL *restrict out, uint32_t plane, uint32_t query, const Problem *p) {
    const uint32_t threshold = (uint32_t)p->threshold, first = (uint32_t)p->first_key, low = (uint32_t)p->seed, top = (uint32_t)(p->seed >> 32);
    const REAL growth = (REAL)p->growth;
    const int64_t keys = p->keys;
#pragma omp simd
    for (int64_t j = 0; j < keys; j++) {
        uint32_t c0 = first + (uint32_t)j, c1 = query, c2 = plane, c3 = 0, k0 = low, k1 = top;
#pragma GCC unroll 8
        for (int round = 0; round < ROUNDS; round++) {
            const uint32_t c0_was = c0, c2_was = c2;
            c0 = high(c2_was, 0xCD9E8D57u) ^ c1 ^ k0;
            c1 = c2_was * 0xCD9E8D57u;
            c2 = high(c0_was, 0xD2511F53u) ^ c3 ^ k1;
            c3 = c0_was * 0xD2511F53u;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        out[j] = c0 >= threshold ? growth : 0;
    }
}

void NAME(dropout)(const Problem *p, int threads) {
    REAL *out = p->out;
    if (p->threshold >> 32) { /* a probability so close to 1 that every word drops its pair */
        for (int64_t i = 0; i < p->planes * p->rows * p->keys; i++)
            out[i] = 0;
        return;
    }
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t i = 0; i < p->planes; i++)
        for (int64_t row = 0; row < p->rows; row++)
            NAME(draw_row)(out + (i * p->rows + row) * p->keys, (uint32_t)p->plane[i], (uint32_t)(p->first_row + row), p);
}

#endif
