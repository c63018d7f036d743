/* Softmax attention in float32 without a (query, key) array, for processors with 512-bit vectors.
 *
 * A work item is one key head of one sequence and a stretch of its queries. It goes through the keys in blocks that fit the second-level
 * cache, copied once into the order in which they are read: keys in panels of 32, dimension by dimension, and values row by row, padded to
 * whole vectors. Six rows at a time meet a block: their logits stay in the first-level cache between the product that makes them and the
 * product that reads them, so what torch's kernel spends on calls of a general matrix product is not spent here. Running maximum, sum and
 * output are kept from block to block (online softmax), logits in base 2. Query heads that share a key head share its copy.
 *
 * Written with the vector types that gcc and clang have in C, not with intrinsics; on other processors `flash_serves` says no.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 6, PANEL = 32, BLOCK = 512, LANES = 16 };

/* Mirrored field by field by `Problem` in cpu_native.py. Strides count elements, of (head, row); the last axis of q, k, v and out is
 * contiguous. `place` has seven numbers a sequence: where q, k, v, out and lse begin, how many queries, how many keys. The bias has strides of
 * (sequence, head, row), `bias_key` is 1, or 0 where the keys share it; `chunks` is into how many stretches the queries of a head are cut. */
typedef struct {
    int64_t sequences, kv_heads, group, dim, value_dim, left, right, chunks;
    int64_t q_stride[2], k_stride[2], v_stride[2], out_stride[2], bias_stride[3], bias_key, lse_stride;
    double scale;
    const int64_t *place;
    const float *q, *k, *v, *bias;
    float *out, *lse;
} Problem;

#if defined(__x86_64__) && defined(__GNUC__)

#define FAST __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) FAST

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(64), aligned(4), may_alias));

int flash_serves(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

INLINE Vector all(float x) { return (Vector){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

/* 2^x for x <= 0, to the last bit or two; 0 below -126, NaN for NaN. The fraction is centred: 2^(n + f) = 2^(n - 1/2) 2^(f + 1/2). */
INLINE Vector power_of_two(Vector x) {
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

INLINE float sum_of(Vector x) {
    float total = 0;
    for (int i = 0; i < LANES; i++)
        total += x[i];
    return total;
}

INLINE float largest_of(Vector x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++)
        top = x[i] > top ? x[i] : top;
    return top;
}

/* Logits of six rows, (dim, 6) in memory, and one panel of keys, (dim, 32). */
INLINE void logits_of_panel(float *restrict logits, const float *restrict queries, const float *restrict panel, int64_t dim) {
    Vector sum[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
        sum[r][0] = sum[r][1] = all(0);
    for (int64_t d = 0; d < dim; d++, queries += ROWS, panel += PANEL) {
        const Vector low = *(const Vector *)panel, high = *(const Vector *)(panel + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const Vector q = all(queries[r]);
            sum[r][0] += q * low;
            sum[r][1] += q * high;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
        *(Vector *)(logits + r * BLOCK) = sum[r][0];
        *(Vector *)(logits + r * BLOCK + LANES) = sum[r][1];
    }
}

/* out (6 rows) = keep x out + weights (6 rows) x values, for `WIDTH` vectors of columns. */
#define ADD_VALUES(WIDTH)                                                                                                                     \
    static FAST void add_values_##WIDTH(float *restrict out, int64_t out_row, const float *restrict weights, const float *restrict values,    \
                                        int64_t row, int64_t keys, const float *restrict keep) {                                              \
        Vector sum[ROWS][WIDTH];                                                                                                              \
        _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) _Pragma("GCC unroll 4") for (int c = 0; c < WIDTH; c++)                        \
            sum[r][c] = *(const Vector *)(out + r * out_row + c * LANES) * all(keep[r]);                                                      \
        for (int64_t j = 0; j < keys; j++, values += row) {                                                                                   \
            Vector value[WIDTH];                                                                                                              \
            _Pragma("GCC unroll 4") for (int c = 0; c < WIDTH; c++) value[c] = *(const Vector *)(values + c * LANES);                         \
            _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) {                                                                          \
                const Vector w = all(weights[r * BLOCK + j]);                                                                                 \
                _Pragma("GCC unroll 4") for (int c = 0; c < WIDTH; c++) sum[r][c] += w * value[c];                                            \
            }                                                                                                                                 \
        }                                                                                                                                     \
        _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) _Pragma("GCC unroll 4") for (int c = 0; c < WIDTH; c++)                        \
            *(Vector *)(out + r * out_row + c * LANES) = sum[r][c];                                                                           \
    }
ADD_VALUES(1)
ADD_VALUES(2)
ADD_VALUES(3)
ADD_VALUES(4)

/* The memory of a work item. `out` is (rows, width), six rows more than there are queries; so are the running maximum and sum. */
typedef struct {
    float *queries, *keys, *values, *logits, *out, *top, *total;
    int64_t width;
} Room;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Keys first .. first + count of a head into panels, (panel, dim, 32), and its values into rows of `width`; zeros fill both up. */
static FAST void copy_block(const Problem *p, const Room *room, const float *k, const float *v, int64_t first, int64_t count) {
    const int64_t panels = (count + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < panels; panel++) {
        float *to = room->keys + panel * PANEL * p->dim;
        const int64_t here = least(PANEL, count - panel * PANEL);
        const float *from = k + (first + panel * PANEL) * p->k_stride[1];
        for (int64_t d = 0; d < p->dim; d += LANES) /* square by square: each row is read a line at a time */
            for (int64_t j = 0; j < PANEL; j++)
                for (int64_t i = d; i < least(d + LANES, p->dim); i++)
                    to[i * PANEL + j] = j < here ? from[j * p->k_stride[1] + i] : 0;
    }
    for (int64_t j = 0; j < count; j++) {
        float *to = room->values + j * room->width;
        memcpy(to, v + (first + j) * p->v_stride[1], p->value_dim * sizeof(float));
        for (int64_t i = p->value_dim; i < room->width; i++)
            to[i] = 0;
    }
}

/* Rows row .. row + count (up to six) of one head against a block of keys; `slot` is where their running sums lie. */
static FAST void meet(const Problem *p, const Room *room, const float *q, const float *bias, int64_t slot, int64_t row, int64_t rows, int64_t queries,
                      int64_t keys, int64_t first, int64_t count) {
    const int64_t offset = keys - queries;
    int64_t from = first, to = first + count; /* the keys that some of the rows see */
    if (p->left >= 0)
        from = most(from, row + offset - p->left);
    if (p->right >= 0)
        to = least(to, row + rows + offset + p->right);
    if (from >= to)
        return;
    const int64_t begin = (from - first) / PANEL * PANEL, end = least((to - first + PANEL - 1) / PANEL * PANEL, (count + PANEL - 1) / PANEL * PANEL);
    const float unit = (float)(p->scale * 1.4426950408889634);
    for (int64_t r = 0; r < ROWS; r++) {
        const float *source = q + (row + least(r, rows - 1)) * p->q_stride[1]; /* rows that are not there repeat the last */
        for (int64_t d = 0; d < p->dim; d++)
            room->queries[d * ROWS + r] = source[d] * unit;
    }
    for (int64_t j = begin; j < end; j += PANEL)
        logits_of_panel(room->logits + j, room->queries, room->keys + j * p->dim, p->dim);
    float keep[ROWS];
    for (int64_t r = 0; r < ROWS; r++) {
        float *logits = room->logits + r * BLOCK;
        const int64_t own = row + least(r, rows - 1);
        const int64_t low = p->left >= 0 ? most(own + offset - p->left - first, 0) : 0;
        const int64_t high = least(p->right >= 0 ? own + offset + p->right + 1 - first : count, count);
        if (bias) {
            const float *added = bias + own * p->bias_stride[2];
            if (p->bias_key)
                for (int64_t j = begin; j < least(end, count); j++)
                    logits[j] += 1.44269504f * added[first + j];
            else
                for (int64_t j = begin; j < end; j++)
                    logits[j] += 1.44269504f * added[0];
        }
        for (int64_t j = begin; j < least(low, end); j++)
            logits[j] = -INFINITY;
        for (int64_t j = most(high, begin); j < end; j++)
            logits[j] = -INFINITY;
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
    const int64_t seen = least(end, count) - begin;
    for (int64_t column = 0; column < room->width; column += 4 * LANES) {
        float *out = room->out + slot * room->width + column;
        const float *values = room->values + begin * room->width + column, *weights = room->logits + begin;
        switch (least((room->width - column) / LANES, 4)) {
        case 1: add_values_1(out, room->width, weights, values, room->width, seen, keep); break;
        case 2: add_values_2(out, room->width, weights, values, room->width, seen, keep); break;
        case 3: add_values_3(out, room->width, weights, values, room->width, seen, keep); break;
        default: add_values_4(out, room->width, weights, values, room->width, seen, keep);
        }
    }
}

/* Queries first .. last of the heads that share key head `shared` of a sequence. */
static FAST void attend(const Problem *p, const Room *room, int64_t sequence, int64_t shared, int64_t first, int64_t last) {
    const int64_t *place = p->place + 7 * sequence, queries = place[5], keys = place[6], rows = last - first;
    const int64_t slots = (rows + ROWS - 1) / ROWS * ROWS; /* a head's rows, to whole sixes */
    const float *k = p->k + place[1] + shared * p->k_stride[0], *v = p->v + place[2] + shared * p->v_stride[0];
    memset(room->out, 0, p->group * slots * room->width * sizeof(float));
    for (int64_t i = 0; i < p->group * slots; i++)
        room->top[i] = -INFINITY, room->total[i] = 0;
    const int64_t low = p->left >= 0 ? most(first + keys - queries - p->left, 0) : 0;
    const int64_t high = p->right >= 0 ? least(last + keys - queries + p->right, keys) : keys;
    for (int64_t block = low; block < high; block += BLOCK) {
        const int64_t count = least(BLOCK, high - block);
        copy_block(p, room, k, v, block, count);
        for (int64_t member = 0; member < p->group; member++) {
            const int64_t head = shared * p->group + member;
            const float *q = p->q + place[0] + head * p->q_stride[0];
            const float *bias = p->bias ? p->bias + sequence * p->bias_stride[0] + head * p->bias_stride[1] : NULL;
            for (int64_t row = 0; row < rows; row += ROWS)
                meet(p, room, q, bias, member * slots + row, first + row, least(ROWS, rows - row), queries, keys, block, count);
        }
    }
    for (int64_t member = 0; member < p->group; member++)
        for (int64_t row = 0; row < rows; row++) {
            const int64_t head = shared * p->group + member, slot = member * slots + row;
            const float total = room->total[slot], share = total == 0 ? 0 : 1 / total;
            const float *from = room->out + slot * room->width;
            float *out = p->out + place[3] + head * p->out_stride[0] + (first + row) * p->out_stride[1];
            for (int64_t i = 0; i < p->value_dim; i++)
                out[i] = from[i] * share;
            p->lse[place[4] + head * p->lse_stride + first + row] = total == 0 ? -INFINITY : (room->top[slot] + log2f(total)) * 0.69314718f;
        }
}

static float *take(float **store, int64_t count) { /* 64-byte pieces of one allocation */
    float *here = *store;
    *store += (count + LANES - 1) / LANES * LANES;
    return here;
}

/* 0, or 1 where a thread found no memory. */
int flash_forward(const Problem *p, int threads) {
    int64_t longest = 0;
    for (int64_t i = 0; i < p->sequences; i++)
        longest = most(longest, p->place[7 * i + 5]);
    const int64_t width = (p->value_dim + LANES - 1) / LANES * LANES, slots = p->group * ((longest + p->chunks - 1) / p->chunks + 2 * ROWS);
    const int64_t sizes[] = {p->dim * ROWS, p->dim * BLOCK, BLOCK * width, ROWS * BLOCK, slots * width, slots, slots};
    int64_t needed = LANES;
    for (int i = 0; i < 7; i++)
        needed += sizes[i] + LANES;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *store = malloc(needed * sizeof(float));
        if (!store) {
#pragma omp atomic write
            failed = 1;
        }
        float *next = store ? (float *)(((uintptr_t)store + 63) / 64 * 64) : NULL;
        Room room = {0};
        if (store) {
            float **pieces[] = {&room.queries, &room.keys, &room.values, &room.logits, &room.out, &room.top, &room.total};
            for (int i = 0; i < 7; i++)
                *pieces[i] = take(&next, sizes[i]);
            room.width = width;
        }
#pragma omp for schedule(dynamic) collapse(3)
        for (int64_t i = 0; i < p->sequences; i++)
            for (int64_t head = 0; head < p->kv_heads; head++)
                for (int64_t chunk = 0; chunk < p->chunks; chunk++) {
                    const int64_t queries = p->place[7 * i + 5], each = ((queries + p->chunks - 1) / p->chunks + ROWS - 1) / ROWS * ROWS;
                    const int64_t first = chunk * each, last = least(first + each, queries);
                    if (store && first < last)
                        attend(p, &room, i, head, first, last);
                }
        free(store);
    }
    return failed;
}

#else

int flash_serves(void) { return 0; }
int flash_forward(const Problem *p, int threads) { return 1; }

#endif
