/* Softmax attention in float32 without a (query, key) array, forward and backward, for processors with 512-bit vectors.
 *
 * A work item is one key head of one sequence; forward it may be a stretch of its queries. It goes through the keys in blocks that fit the
 * second-level cache, copied once into the order in which they are read: keys in panels of 32, dimension by dimension, and values row by row,
 * padded to whole vectors. Six rows at a time meet a block: their logits stay in the first-level cache between the product that makes them
 * and the product that reads them, so what torch's kernel spends on calls of a general matrix product is not spent here. Running maximum, sum
 * and output are kept from block to block (online softmax), logits in base 2. Query heads that share a key head share its copy.
 *
 * Backward, an item owns the gradients of its keys, values and queries, so nothing is shared and nothing needs atomics. 48 rows at a time meet
 * a block of keys: their weights, and what the weights' gradients become, stay in the second-level cache for the three products that read them.
 *
 * Written with the vector types that gcc and clang have in C, not with intrinsics; on other processors `flash_serves` says no.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../native.h"

enum { ROWS = 6, PANEL = 32, LANES = 16 };
enum { BLOCK = 512 };             /* keys at a time, forward */
enum { KEYS = 256, QUERIES = 48 }; /* keys and queries at a time, backward */

/* Mirrored field by field by `Problem` in cpu_native.py. Strides of (batch, head, row) count elements; elements of a row are adjacent. `place` has
 * five numbers a sequence: its batch, the rows where its queries and its keys begin, and how many of each there are. `bias_key` is 1, or 0
 * where the keys share a number. `chunks` is into how many stretches the queries of a head are cut. Items of one batch, or of one head, follow
 * each other where `serial` says so (bits 1 and 2): they add to one bias gradient. */
typedef struct {
    int64_t sequences, kv_heads, group, dim, value_dim, left, right, chunks, bias_key, serial;
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3], dq_stride[3], dk_stride[3], dv_stride[3], bias_stride[3], dbias_stride[3];
    int64_t lse_stride[2]; /* of (batch, head), for delta too */
    double scale;
    const int64_t *place;
    const float *q, *k, *v, *bias;
    float *out, *lse; /* backward: `out` is the gradient of the output */
    const float *delta;
    float *dq, *dk, *dv, *dbias;
} Problem;

#if defined(__x86_64__) && defined(__GNUC__)

#define FAST __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#define WITHIN INLINE FAST

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(64), aligned(4), may_alias));

int flash_serves(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

#define LOG2E 1.4426950408889634
#define LN2 0.6931471805599453

WITHIN Vector all(float x) { return (Vector){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

/* 2^x for x <= 0, to the last bit or two; 0 below -126, NaN for NaN. The fraction is centred: 2^(n + f) = 2^(n - 1/2) 2^(f + 1/2). */
WITHIN Vector power_of_two(Vector x) {
    const Whole n = __builtin_convertvector(x, Whole);
    const Vector f = x - __builtin_convertvector(n, Vector) + all(0.5f);
    Vector p = all(1.5252734e-05f * 0.70710678f);
    p = p * f + all(1.5403530e-04f * 0.70710678f);
    p = p * f + all(1.3333558e-03f * 0.70710678f);
    p = p * f + all(9.6181291e-03f * 0.70710678f);
    p = p * f + all(5.5504109e-02f * 0.70710678f);
    p = p * f + all(2.4022651e-01f * 0.70710678f);
    p = p * f + all(6.9314718e-01f * 0.70710678f);
    p = p * f + all(0.70710678f);
    return (Vector)(((Whole)p + (n << 23)) & ~(x <= all(-126.0f)));
}

WITHIN float sum_of(Vector x) {
    float total = 0;
    for (int i = 0; i < LANES; i++)
        total += x[i];
    return total;
}

WITHIN float largest_of(Vector x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++)
        top = x[i] > top ? x[i] : top;
    return top;
}

/* Products of six rows, (dim, 6) in memory, and one panel, (dim, 32). */
WITHIN void multiply_panel(float *restrict products, int64_t step, const float *restrict rows, const float *restrict panel, int64_t dim) {
    Vector sum[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
        sum[r][0] = sum[r][1] = all(0);
    for (int64_t d = 0; d < dim; d++, rows += ROWS, panel += PANEL) {
        const Vector low = *(const Vector *)panel, high = *(const Vector *)(panel + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const Vector x = all(rows[r]);
            sum[r][0] += x * low;
            sum[r][1] += x * high;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
        *(Vector *)(products + r * step) = sum[r][0];
        *(Vector *)(products + r * step + LANES) = sum[r][1];
    }
}

/* Six rows of out = keep x out + weights x values, for WIDTH vectors of columns; weight (r, j) stands at r * BY_ROW + j * BY_TERM. */
#define ADD_PRODUCT(NAME, WIDTH, BY_ROW, BY_TERM)                                                                                             \
    static FAST void NAME##_##WIDTH(float *restrict out, int64_t width, const float *restrict weights, const float *restrict values,          \
                                    int64_t terms, const float *restrict keep) {                                                              \
        Vector sum[ROWS][WIDTH];                                                                                                              \
        _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) _Pragma("GCC unroll 4") for (int c = 0; c < WIDTH; c++)                        \
            sum[r][c] = *(const Vector *)(out + r * width + c * LANES) * all(keep[r]);                                                        \
        for (int64_t j = 0; j < terms; j++, values += width) {                                                                                \
            Vector value[WIDTH];                                                                                                              \
            _Pragma("GCC unroll 4") for (int c = 0; c < WIDTH; c++) value[c] = *(const Vector *)(values + c * LANES);                         \
            _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) {                                                                          \
                const Vector w = all(weights[r * BY_ROW + j * BY_TERM]);                                                                      \
                _Pragma("GCC unroll 4") for (int c = 0; c < WIDTH; c++) sum[r][c] += w * value[c];                                            \
            }                                                                                                                                 \
        }                                                                                                                                     \
        _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) _Pragma("GCC unroll 4") for (int c = 0; c < WIDTH; c++)                        \
            *(Vector *)(out + r * width + c * LANES) = sum[r][c];                                                                             \
    }

/* The same for any number of columns: `width` floats, a multiple of a vector, between the rows of out and of values. */
#define ADD_PRODUCTS(NAME, BY_ROW, BY_TERM)                                                                                                   \
    ADD_PRODUCT(NAME, 1, BY_ROW, BY_TERM)                                                                                                     \
    ADD_PRODUCT(NAME, 2, BY_ROW, BY_TERM)                                                                                                     \
    ADD_PRODUCT(NAME, 3, BY_ROW, BY_TERM)                                                                                                     \
    ADD_PRODUCT(NAME, 4, BY_ROW, BY_TERM)                                                                                                     \
    static FAST void NAME(float *out, int64_t width, const float *weights, const float *values, int64_t terms, const float *keep) {           \
        for (int64_t column = 0; column < width; column += 4 * LANES)                                                                         \
            switch (width - column) {                                                                                                         \
            case LANES: NAME##_1(out + column, width, weights, values + column, terms, keep); break;                                          \
            case 2 * LANES: NAME##_2(out + column, width, weights, values + column, terms, keep); break;                                      \
            case 3 * LANES: NAME##_3(out + column, width, weights, values + column, terms, keep); break;                                      \
            default: NAME##_4(out + column, width, weights, values + column, terms, keep);                                                    \
            }                                                                                                                                 \
    }

ADD_PRODUCTS(add_values, BLOCK, 1)    /* output rows: weights of a row stand side by side */
ADD_PRODUCTS(add_rows, KEYS, 1)       /* the same in the backward pass' blocks */
ADD_PRODUCTS(add_transposed, 1, KEYS) /* rows are keys: the weights of a key stand one above the other */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t whole(int64_t count, int64_t size) { return (count + size - 1) / size * size; }

/* `count` rows into panels of (dim, 32), with zeros where there are no more rows. */
static FAST void copy_panels(float *to, const float *from, int64_t step, int64_t count, int64_t dim) {
    for (int64_t first = 0; first < count; first += PANEL, to += PANEL * dim, from += PANEL * step) {
        const int64_t here = least(PANEL, count - first);
        for (int64_t d = 0; d < dim; d += LANES) /* square by square: each row is read a line at a time */
            for (int64_t j = 0; j < PANEL; j++)
                for (int64_t i = d; i < least(d + LANES, dim); i++)
                    to[i * PANEL + j] = j < here ? from[j * step + i] : 0;
    }
}

/* `count` rows as they are, each filled up to `width` with zeros. */
static FAST void copy_rows(float *to, const float *from, int64_t step, int64_t count, int64_t dim, int64_t width) {
    for (int64_t j = 0; j < count; j++, to += width, from += step) {
        memcpy(to, from, dim * sizeof(float));
        for (int64_t i = dim; i < width; i++)
            to[i] = 0;
    }
}

/* Six rows as (dim, 6) times a factor; where there are fewer, the last is repeated. */
static FAST void copy_tile(float *to, const float *from, int64_t step, int64_t count, int64_t dim, float factor) {
    for (int64_t r = 0; r < ROWS; r++) {
        const float *row = from + least(r, count - 1) * step;
        for (int64_t d = 0; d < dim; d++)
            to[d * ROWS + r] = row[d] * factor;
    }
}

/* To the logits from .. to of a row, whose first key is `first`: its bias, and -inf outside of low .. high, the keys that it sees. */
static FAST void finish_row(const Problem *p, float *logits, const float *bias, int64_t first, int64_t from, int64_t to, int64_t low, int64_t high,
                            int64_t count) {
    if (bias && p->bias_key)
        for (int64_t j = from; j < least(to, count); j++)
            logits[j] += (float)LOG2E * bias[first + j];
    else if (bias)
        for (int64_t j = from; j < to; j++)
            logits[j] += (float)LOG2E * bias[0];
    for (int64_t j = from; j < least(low, to); j++)
        logits[j] = -INFINITY;
    for (int64_t j = most(high, from); j < to; j++)
        logits[j] = -INFINITY;
}

/* One sequence: where it lies, and which keys its query `row` sees. */
typedef struct {
    int64_t batch, query, key, queries, keys;
} Sequence;

static Sequence sequence_of(const Problem *p, int64_t index) {
    const int64_t *place = p->place + 5 * index;
    return (Sequence){place[0], place[1], place[2], place[3], place[4]};
}

static int64_t first_seen(const Problem *p, const Sequence *s, int64_t row) {
    return p->left >= 0 ? most(row + s->keys - s->queries - p->left, 0) : 0;
}

static int64_t last_seen(const Problem *p, const Sequence *s, int64_t row) { /* exclusive */
    return p->right >= 0 ? least(row + s->keys - s->queries + p->right + 1, s->keys) : s->keys;
}

#define AT(name, head, row) (p->name + s->batch * p->name##_stride[0] + (head) * p->name##_stride[1] + (row) * p->name##_stride[2])

/* --- forward --------------------------------------------------------------------------------------------------------------------- */

/* The memory of a work item. `out` is (rows, width), whole sixes of rows a head; so are the running maximum and sum. */
typedef struct {
    float *queries, *keys, *values, *logits, *out, *top, *total;
    int64_t width;
} Room;

/* Queries row .. row + rows (up to six) of one head against a block of keys; `slot` is where their running sums lie. */
static FAST void meet(const Problem *p, const Sequence *s, const Room *room, int64_t head, int64_t slot, int64_t row, int64_t rows, int64_t first,
                      int64_t count) {
    const int64_t from = most(first_seen(p, s, row), first), to = least(last_seen(p, s, row + rows - 1), first + count);
    if (from >= to)
        return;
    const int64_t begin = (from - first) / PANEL * PANEL, end = whole(to - first, PANEL);
    copy_tile(room->queries, AT(q, head, s->query + row), p->q_stride[2], rows, p->dim, (float)(p->scale * LOG2E));
    for (int64_t j = begin; j < end; j += PANEL)
        multiply_panel(room->logits + j, BLOCK, room->queries, room->keys + j * p->dim, p->dim);
    float keep[ROWS];
    for (int64_t r = 0; r < ROWS; r++) {
        float *logits = room->logits + r * BLOCK;
        const int64_t own = row + least(r, rows - 1);
        finish_row(p, logits, p->bias ? AT(bias, head, own) : NULL, first, begin, end, first_seen(p, s, own) - first, last_seen(p, s, own) - first, count);
        Vector top = all(room->top[slot + r]);
        for (int64_t j = begin; j < end; j += LANES) {
            const Vector x = *(const Vector *)(logits + j);
            const Whole higher = x > top;
            top = (Vector)(((Whole)x & higher) | ((Whole)top & ~higher));
        }
        const float before = room->top[slot + r], after = largest_of(top), anchor = after == -INFINITY ? 0 : after;
        keep[r] = before == after ? 1 : exp2f(before - anchor);
        Vector total = all(0);
        for (int64_t j = begin; j < end; j += LANES) {
            const Vector weight = power_of_two(*(const Vector *)(logits + j) - all(anchor));
            *(Vector *)(logits + j) = weight;
            total += weight;
        }
        room->top[slot + r] = after;
        room->total[slot + r] = room->total[slot + r] * keep[r] + sum_of(total);
    }
    add_values(room->out + slot * room->width, room->width, room->logits + begin, room->values + begin * room->width, least(end, count) - begin, keep);
}

/* Queries first .. last of the heads that share key head `shared`. */
static FAST void attend(const Problem *p, const Sequence *s, const Room *room, int64_t shared, int64_t first, int64_t last) {
    const int64_t rows = last - first, slots = whole(rows, ROWS);
    memset(room->out, 0, p->group * slots * room->width * sizeof(float));
    for (int64_t i = 0; i < p->group * slots; i++)
        room->top[i] = -INFINITY, room->total[i] = 0;
    const int64_t end = last_seen(p, s, last - 1);
    for (int64_t block = first_seen(p, s, first); block < end; block += BLOCK) {
        const int64_t count = least(BLOCK, end - block);
        copy_panels(room->keys, AT(k, shared, s->key + block), p->k_stride[2], count, p->dim);
        copy_rows(room->values, AT(v, shared, s->key + block), p->v_stride[2], count, p->value_dim, room->width);
        for (int64_t member = 0; member < p->group; member++)
            for (int64_t row = 0; row < rows; row += ROWS)
                meet(p, s, room, shared * p->group + member, member * slots + row, first + row, least(ROWS, rows - row), block, count);
    }
    for (int64_t member = 0; member < p->group; member++)
        for (int64_t row = 0; row < rows; row++) {
            const int64_t head = shared * p->group + member, slot = member * slots + row;
            const float total = room->total[slot], share = total == 0 ? 0 : 1 / total, *from = room->out + slot * room->width;
            float *out = AT(out, head, s->query + first + row);
            for (int64_t i = 0; i < p->value_dim; i++)
                out[i] = from[i] * share;
            p->lse[s->batch * p->lse_stride[0] + head * p->lse_stride[1] + s->query + first + row] =
                total == 0 ? -INFINITY : (room->top[slot] + log2f(total)) * (float)LN2;
        }
}

/* --- backward -------------------------------------------------------------------------------------------------------------------- */

/* The memory of a work item: a block of keys, some rows, and their gradients. `weights` and `slopes` are (queries, keys). */
typedef struct {
    float *keys, *values, *key_rows, *dkeys, *dvalues;
    float *query_tile, *dout_tile, *query_rows, *dout_rows, *weights, *slopes, *dqueries;
    int64_t width, value_width;
} Desk;

/* Queries row .. row + rows (up to QUERIES) of one head and a block of keys: their share of all gradients. */
static FAST void give_back(const Problem *p, const Sequence *s, const Desk *desk, int64_t head, float *dqueries, int64_t row, int64_t rows, int64_t first,
                           int64_t count) {
    const int64_t from = most(first_seen(p, s, row), first), to = least(last_seen(p, s, row + rows - 1), first + count);
    if (from >= to)
        return;
    const int64_t begin = (from - first) / PANEL * PANEL, end = whole(to - first, PANEL);
    const float keep[ROWS] = {1, 1, 1, 1, 1, 1};
    const float *sums = p->lse + s->batch * p->lse_stride[0] + head * p->lse_stride[1] + s->query;
    const float *delta = p->delta + s->batch * p->lse_stride[0] + head * p->lse_stride[1] + s->query;
    for (int64_t tile = 0; tile < rows; tile += ROWS) {
        const int64_t here = least(ROWS, rows - tile);
        float *weights = desk->weights + tile * KEYS, *slopes = desk->slopes + tile * KEYS;
        copy_tile(desk->query_tile, AT(q, head, s->query + row + tile), p->q_stride[2], here, p->dim, (float)(p->scale * LOG2E));
        copy_tile(desk->dout_tile, AT(out, head, s->query + row + tile), p->out_stride[2], here, p->value_dim, 1);
        for (int64_t j = begin; j < end; j += PANEL) {
            multiply_panel(weights + j, KEYS, desk->query_tile, desk->keys + j * p->dim, p->dim);
            multiply_panel(slopes + j, KEYS, desk->dout_tile, desk->values + j * p->value_dim, p->value_dim);
        }
        for (int64_t r = 0; r < here; r++, weights += KEYS, slopes += KEYS) {
            const int64_t own = row + tile + r;
            finish_row(p, weights, p->bias ? AT(bias, head, own) : NULL, first, begin, end, first_seen(p, s, own) - first, last_seen(p, s, own) - first, count);
            /* a row without keys has only logits of -inf, and weights of 0 */
            const Vector sum = all(sums[own] == -INFINITY ? 0 : sums[own] * (float)LOG2E), taken = all(delta[own]);
            for (int64_t j = begin; j < end; j += LANES) {
                const Vector weight = power_of_two(*(const Vector *)(weights + j) - sum);
                *(Vector *)(weights + j) = weight;
                *(Vector *)(slopes + j) = weight * (*(const Vector *)(slopes + j) - taken);
            }
            if (p->dbias) {
                float *dbias = AT(dbias, head, own) + first;
                for (int64_t j = begin; j < least(end, count); j++)
                    dbias[j] += slopes[j];
            }
        }
        for (int64_t r = here; r < ROWS; r++, weights += KEYS, slopes += KEYS) /* rows that are not there */
            for (int64_t j = begin; j < end; j++)
                weights[j] = slopes[j] = 0;
        add_rows(dqueries + (row + tile) * desk->width, desk->width, desk->slopes + tile * KEYS + begin, desk->key_rows + begin * desk->width,
                 least(end, count) - begin, keep);
    }
    copy_rows(desk->query_rows, AT(q, head, s->query + row), p->q_stride[2], rows, p->dim, desk->width);
    copy_rows(desk->dout_rows, AT(out, head, s->query + row), p->out_stride[2], rows, p->value_dim, desk->value_width);
    for (int64_t r = 0; r < rows; r++) /* the last six keys may go beyond the panels */
        for (int64_t j = end; j < least(begin + whole(end - begin, ROWS), KEYS); j++)
            desk->weights[r * KEYS + j] = desk->slopes[r * KEYS + j] = 0;
    for (int64_t j = begin; j < end; j += ROWS) {
        const int64_t key = least(j, KEYS - ROWS);
        for (int64_t r = 0; r < rows; r++) /* or reach back at the end of the block: what was added already must not be again */
            for (int64_t i = key; i < j; i++)
                desk->weights[r * KEYS + i] = desk->slopes[r * KEYS + i] = 0;
        add_transposed(desk->dvalues + key * desk->value_width, desk->value_width, desk->weights + key, desk->dout_rows, rows, keep);
        add_transposed(desk->dkeys + key * desk->width, desk->width, desk->slopes + key, desk->query_rows, rows, keep);
    }
}

/* All gradients of the heads that share key head `shared`. */
static FAST void differentiate(const Problem *p, const Sequence *s, const Desk *desk, int64_t shared) {
    const int64_t slots = whole(s->queries, ROWS), width = desk->width, value_width = desk->value_width;
    memset(desk->dqueries, 0, p->group * slots * width * sizeof(float));
    for (int64_t block = 0; block < s->keys; block += KEYS) {
        const int64_t count = least(KEYS, s->keys - block);
        copy_panels(desk->keys, AT(k, shared, s->key + block), p->k_stride[2], count, p->dim);
        copy_panels(desk->values, AT(v, shared, s->key + block), p->v_stride[2], count, p->value_dim);
        copy_rows(desk->key_rows, AT(k, shared, s->key + block), p->k_stride[2], count, p->dim, width);
        memset(desk->dkeys, 0, KEYS * width * sizeof(float));
        memset(desk->dvalues, 0, KEYS * value_width * sizeof(float));
        for (int64_t member = 0; member < p->group; member++)
            for (int64_t row = 0; row < s->queries; row += QUERIES)
                give_back(p, s, desk, shared * p->group + member, desk->dqueries + member * slots * width, row, least(QUERIES, s->queries - row), block, count);
        for (int64_t j = 0; j < count; j++) {
            float *dk = AT(dk, shared, s->key + block + j), *dv = AT(dv, shared, s->key + block + j);
            for (int64_t i = 0; i < p->dim; i++)
                dk[i] = desk->dkeys[j * width + i] * (float)p->scale;
            memcpy(dv, desk->dvalues + j * value_width, p->value_dim * sizeof(float));
        }
    }
    for (int64_t member = 0; member < p->group; member++)
        for (int64_t row = 0; row < s->queries; row++) {
            float *dq = AT(dq, shared * p->group + member, s->query + row);
            for (int64_t i = 0; i < p->dim; i++)
                dq[i] = desk->dqueries[(member * slots + row) * width + i] * (float)p->scale;
        }
}

/* --- work items ------------------------------------------------------------------------------------------------------------------ */

/* One allocation cut into `count` arrays of these sizes, each at a multiple of 64 bytes; NULL where there is no memory. */
static float *furnish(float **pieces[], const int64_t sizes[], int count) {
    int64_t needed = LANES;
    for (int i = 0; i < count; i++)
        needed += whole(sizes[i], LANES);
    float *store = malloc(needed * sizeof(float));
    float *next = (float *)(((uintptr_t)store + 63) / 64 * 64);
    for (int i = 0; store && i < count; i++) {
        *pieces[i] = next;
        next += whole(sizes[i], LANES);
    }
    return store;
}

static int64_t longest(const Problem *p) {
    int64_t found = 0;
    for (int64_t i = 0; i < p->sequences; i++)
        found = most(found, sequence_of(p, i).queries);
    return found;
}

/* 0, or 1 where a thread found no memory. */
int flash_forward(const Problem *p, int threads) {
    const int64_t width = whole(p->value_dim, LANES), slots = p->group * (longest(p) / p->chunks + 2 * ROWS);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        Room room = {.width = width};
        float **pieces[] = {&room.queries, &room.keys, &room.values, &room.logits, &room.out, &room.top, &room.total};
        const int64_t sizes[] = {p->dim * ROWS, p->dim * BLOCK, BLOCK * width, ROWS * BLOCK, slots * width, slots, slots};
        float *store = furnish(pieces, sizes, 7);
#pragma omp for schedule(dynamic) collapse(3)
        for (int64_t i = 0; i < p->sequences; i++)
            for (int64_t head = 0; head < p->kv_heads; head++)
                for (int64_t chunk = 0; chunk < p->chunks; chunk++) {
                    const Sequence s = sequence_of(p, i);
                    const int64_t each = whole((s.queries + p->chunks - 1) / p->chunks, ROWS), first = chunk * each, last = least(first + each, s.queries);
                    if (store && first < last)
                        attend(p, &s, &room, head, first, last);
                }
        if (!store) {
#pragma omp atomic write
            failed = 1;
        }
        free(store);
    }
    return failed;
}

int flash_backward(const Problem *p, int threads) {
    const int64_t width = whole(p->dim, LANES), value_width = whole(p->value_dim, LANES), slots = p->group * whole(longest(p), ROWS);
    const int64_t outer[2] = {p->serial & 1 ? 1 : p->sequences, p->serial & 2 ? 1 : p->kv_heads};
    const int64_t inner[2] = {p->serial & 1 ? p->sequences : 1, p->serial & 2 ? p->kv_heads : 1};
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        Desk desk = {.width = width, .value_width = value_width};
        float **pieces[] = {&desk.keys,       &desk.values,     &desk.key_rows,  &desk.dkeys,   &desk.dvalues, &desk.query_tile,
                            &desk.dout_tile,  &desk.query_rows, &desk.dout_rows, &desk.weights, &desk.slopes,  &desk.dqueries};
        const int64_t sizes[] = {KEYS * p->dim,       KEYS * p->value_dim, KEYS * width,          KEYS * width,   KEYS * value_width, ROWS * p->dim,
                                 ROWS * p->value_dim, QUERIES * width,     QUERIES * value_width, QUERIES * KEYS, QUERIES * KEYS,     slots * width};
        float *store = furnish(pieces, sizes, 12);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t i = 0; i < outer[0]; i++)
            for (int64_t head = 0; head < outer[1]; head++)
                for (int64_t item = 0; store && item < inner[0] * inner[1]; item++) {
                    const Sequence s = sequence_of(p, i + item / inner[1]);
                    differentiate(p, &s, &desk, head + item % inner[1]);
                }
        if (!store) {
#pragma omp atomic write
            failed = 1;
        }
        free(store);
    }
    return failed;
}

#else

int flash_serves(void) { return 0; }
int flash_forward(const Problem *p, int threads) { return 1; }
int flash_backward(const Problem *p, int threads) { return 1; }

#endif
