// Softmax attention over ranges of keys on CPUs: scores live in the innermost cache, once they are made they are used.
//
// Lanes of vectors are queries. A panel of them is kept transposed, [channel][query], so that a key or a value enters
// as one number for all lanes, from where it lies: nothing is packed, and a softmax over keys runs along lanes. Scores
// of a panel and some keys are a tile; with it the panel's maxima, sums and answers move on ("online softmax", in base
// 2). Panels that share keys are computed together.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "ranges.hpp"
#include "tiles.hpp"

namespace {

using namespace ranges;
using tiles::BYTES;
template <typename Real>
constexpr int LANES = tiles::Lanes<Real>::width;
constexpr int RANKS = BYTES == 64 ? 8 : 4;  // rows of a product at once, of two vectors each: as many as registers hold
constexpr int KEYS = 64;   // of a tile
constexpr int PANELS = 4;  // of a task

// C (+)= A B for ranks R of C, all rows of a panel's width: C[r][:] over A(r, i) B[i][:], i below depth.
template <int R, bool ADD, typename Real>
inline void multiply(const Real *a, int64_t rank, int64_t step, const Real *b, Real *c, int64_t depth) {
    constexpr int HALF = LANES<Real>, WIDTH = 2 * HALF;
    typedef tiles::Vector<Real> vec;
    vec sum[R][2];
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++)
            sum[r][half] = ADD ? *reinterpret_cast<vec *>(c + r * WIDTH + half * HALF) : vec{};
    for (int64_t i = 0; i < depth; i++) {
        vec low = *reinterpret_cast<const vec *>(b + i * WIDTH);
        vec high = *reinterpret_cast<const vec *>(b + i * WIDTH + HALF);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Real x = a[r * rank + i * step];
            sum[r][0] += x * low;
            sum[r][1] += x * high;
        }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) *reinterpret_cast<vec *>(c + r * WIDTH + half * HALF) = sum[r][half];
}

template <bool ADD, typename Real>
inline void multiply(const Real *a, int64_t rank, int64_t step, const Real *b, Real *c, int64_t ranks, int64_t depth) {
    constexpr int WIDTH = 2 * LANES<Real>;
    int64_t r = 0;
    for (; r + RANKS <= ranks; r += RANKS) multiply<RANKS, ADD>(a + r * rank, rank, step, b, c + r * WIDTH, depth);
    for (; r < ranks; r++) multiply<1, ADD>(a + r * rank, rank, step, b, c + r * WIDTH, depth);
}

// Two neighbours in bfloat16 as one number: where units are made for it, both are multiplied and added to one sum.
typedef uint32_t pair;

#ifdef __AVX512BF16__
constexpr bool HALVES = true;

inline __m512 multiplied(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// As above over pairs: A(r, i) lies at a + r rank + i step, both of its halves side by side.
template <int R, bool ADD>
inline void multiply_pairs(const bfloat16 *a, int64_t rank, int64_t step, const pair *b, float *c, int64_t depth) {
    __m512 sum[R][2];
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++)
            sum[r][half] = ADD ? _mm512_loadu_ps(c + r * 32 + half * 16) : _mm512_setzero_ps();
    for (int64_t i = 0; i < depth; i++) {
        __m512i low = _mm512_loadu_si512(b + i * 32), high = _mm512_loadu_si512(b + i * 32 + 16);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t both;
            std::memcpy(&both, a + r * rank + i * step, 4);
            __m512i x = _mm512_set1_epi32(both);
            sum[r][0] = multiplied(sum[r][0], x, low);
            sum[r][1] = multiplied(sum[r][1], x, high);
        }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(c + r * 32 + half * 16, sum[r][half]);
}

template <bool ADD>
inline void multiply_pairs(const bfloat16 *a, int64_t rank, int64_t step, const pair *b, float *c, int64_t ranks,
                           int64_t depth) {
    int64_t r = 0;
    for (; r + RANKS <= ranks; r += RANKS) multiply_pairs<RANKS, ADD>(a + r * rank, rank, step, b, c + r * 32, depth);
    for (; r < ranks; r++) multiply_pairs<1, ADD>(a + r * rank, rank, step, b, c + r * 32, depth);
}

inline __m512i rounded(const float *x) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x)));
}

// Rows 2 i and 2 i + 1 of a panel's width as one row of pairs; an odd last one stands beside 0.
inline void paired(const float *rows, int64_t count, pair *to) {
    for (int64_t i = 0; i < count; i += 2)
        for (int half = 0; half < 2; half++) {
            const float *row = rows + i * 32 + half * 16;
            __m512i second = i + 1 < count ? rounded(row + 32) : _mm512_setzero_si512();
            second = _mm512_or_si512(rounded(row), _mm512_slli_epi32(second, 16));
            _mm512_storeu_si512(to + i / 2 * 32 + half * 16, second);
        }
}

// The same of rows of bfloat16 that lie ``step`` apart and have D numbers.
inline void paired(const bfloat16 *rows, int64_t step, int64_t count, int64_t D, pair *to) {
    for (int64_t i = 0; i < count; i += 2)
        for (int64_t d = 0; d < D; d++) {
            pair second = i + 1 < count ? rows[(i + 1) * step + d].bits : 0;
            to[i / 2 * D + d] = rows[i * step + d].bits | second << 16;
        }
}

#else
constexpr bool HALVES = false;
template <bool ADD>
void multiply_pairs(const bfloat16 *, int64_t, int64_t, const pair *, float *, int64_t, int64_t);
void paired(const float *, int64_t, pair *);
void paired(const bfloat16 *, int64_t, int64_t, int64_t, pair *);
#endif

template <typename T, typename Real>
class Task {
    static constexpr int WIDTH = 2 * LANES<Real>;
    static constexpr bool PAIRED = HALVES && std::is_same_v<T, bfloat16>;  // see multiply_pairs; where D is even

    struct Panel {
        int64_t top, bottom;  // its first and last row
        Real *query, *answer;
        Real most[WIDTH], sum[WIDTH];
        int64_t begin[WIDTH], end[WIDTH];  // keys of the range at hand that each row sees
    };

    int64_t D, farthest;
    bool paired_rows;
    Real scale;
    std::unique_ptr<Real[]> room;
    Real *tile, *tile_pairs, *keys_here, *values_here;
    Panel panels[PANELS];

  public:
    static constexpr int ROWS = PANELS * WIDTH;

    Task(int64_t D, int64_t farthest, Real scale)
        : D(D), farthest(farthest), paired_rows(PAIRED && D % 2 == 0), scale(scale) {
        int64_t each = D * WIDTH, copied = std::is_same_v<T, Real> ? 0 : KEYS * D, pad = BYTES / sizeof(Real);
        room.reset(new Real[2 * PANELS * each + 2 * KEYS * WIDTH + 2 * copied + pad]);
        Real *next = room.get();
        next += (BYTES - reinterpret_cast<uintptr_t>(next) % BYTES) % BYTES / sizeof(Real);
        for (Panel &panel : panels) panel.query = next, panel.answer = next + each, next += 2 * each;
        tile = next, tile_pairs = tile + KEYS * WIDTH;
        keys_here = tile_pairs + KEYS * WIDTH, values_here = keys_here + copied;
    }

    // Rows first .. last of one head; item: batch and head as one number, by which bounds and places are listed.
    void run(const T *q, int64_t q_row, T *out, int64_t o_row, Real *lse, int64_t first, int64_t last,
             const Range *ranges, int64_t count, int64_t batch, int64_t head, int64_t item, int64_t rows,
             const Real *bias) {
        int64_t used = (last - first) / WIDTH + 1;
        for (int64_t i = 0; i < used; i++) load(panels[i], q, q_row, first + i * WIDTH, last);
        for (int64_t i = 0; i < count; i++) {
            const Range &one = ranges[i];
            int64_t own = head / one.group, most = one.keys;
            const T *k = reinterpret_cast<const T *>(one.k) + batch * one.k_batch + own * one.k_head;
            const T *v = reinterpret_cast<const T *>(one.v) + batch * one.v_batch + own * one.v_head;
            const int32_t *begins = reinterpret_cast<const int32_t *>(one.begins);
            const int32_t *ends = reinterpret_cast<const int32_t *>(one.ends);
            for (int64_t p = 0; p < used; p++)
                for (int64_t t = 0; t < WIDTH; t++) {
                    int64_t row = std::min(panels[p].top + t, panels[p].bottom);
                    panels[p].begin[t] = begins ? begins[item * rows + row] : one.low.at(row, most, 0);
                    panels[p].end[t] = ends ? ends[item * rows + row] : one.high.at(row, most, most);
                }
            int64_t end = panels[used - 1].end[WIDTH - 1];
            for (int64_t key = panels[0].begin[0]; key < end; key += KEYS) {
                int64_t stop = std::min(end, key + KEYS);
                const Rows<T> near_k{k + key * one.k_row, one.k_row}, near_v{v + key * one.v_row, one.v_row};
                hold(near_k, near_v, stop - key);
                for (int64_t p = 0; p < used; p++) {
                    int64_t from = std::max(key, panels[p].begin[0]), to = std::min(stop, panels[p].end[WIDTH - 1]);
                    if (from >= to) continue;
                    if (paired_rows) from -= (from - key) % 2;  // hidden, if it is one more
                    score(panels[p], near_k, from - key, to - from);
                    if (one.bias && one.row_places)
                        add_placed_bias(panels[p], one, head, bias, from, to, item * rows, item * most);
                    else if (one.bias)
                        add_bias(panels[p], one, batch, head, bias, from, to);
                    hide(panels[p], one, from, to);
                    advance(panels[p], to - from);
                    answer(panels[p], near_v, from - key, to - from);
                }
            }
        }
        for (int64_t i = 0; i < used; i++) store(panels[i], out, o_row, lse);
    }

  private:
    void load(Panel &panel, const T *q, int64_t q_row, int64_t top, int64_t last) {
        panel.top = top, panel.bottom = std::min(last, top + WIDTH - 1);
        for (int64_t t = 0; t < WIDTH; t++) {
            const T *row = q + std::min(top + t, last) * q_row;
            if constexpr (PAIRED)
                if (paired_rows) {  // as they are: rounded products with the scale would be others
                    pair *query = reinterpret_cast<pair *>(panel.query);
                    for (int64_t d = 0; d < D; d += 2)
                        query[d / 2 * WIDTH + t] = row[d].bits | pair(row[d + 1].bits) << 16;
                    continue;
                }
            for (int64_t d = 0; d < D; d++) panel.query[d * WIDTH + t] = Real(row[d]) * scale;
        }
        std::fill_n(panel.answer, D * WIDTH, Real(0));
        std::fill_n(panel.most, WIDTH, LEAST<Real>);
        std::fill_n(panel.sum, WIDTH, Real(0));
    }

    // What all panels need of some keys and values in another form than they lie there.
    void hold(const Rows<T> &k, const Rows<T> &v, int64_t count) {
        if constexpr (PAIRED)
            if (paired_rows) return paired(v.first, v.step, count, D, reinterpret_cast<pair *>(values_here));
        if constexpr (!std::is_same_v<T, Real>)
            for (int64_t j = 0; j < count; j++)
#pragma omp simd
                for (int64_t d = 0; d < D; d++) {
                    keys_here[j * D + d] = Real(k.first[j * k.step + d]);
                    values_here[j * D + d] = Real(v.first[j * v.step + d]);
                }
    }

    void score(const Panel &panel, const Rows<T> &k, int64_t from, int64_t count) {
        if constexpr (PAIRED)
            if (paired_rows) {
                const pair *query = reinterpret_cast<const pair *>(panel.query);
                multiply_pairs<false>(k.first + from * k.step, k.step, 2, query, tile, count, D / 2);
#pragma omp simd
                for (int64_t i = 0; i < count * WIDTH; i++) tile[i] *= scale;
                return;
            }
        if constexpr (std::is_same_v<T, Real>)
            multiply<false>(k.first + from * k.step, k.step, 1, panel.query, tile, count, D);
        else
            multiply<false>(keys_here + from * D, D, 1, panel.query, tile, count, D);
    }

    void answer(Panel &panel, const Rows<T> &v, int64_t from, int64_t count) {
        if constexpr (PAIRED)
            if (paired_rows) {
                pair *weights = reinterpret_cast<pair *>(tile_pairs);
                paired(tile, count, weights);
                const T *values = reinterpret_cast<const T *>(values_here) + from * D;
                return multiply_pairs<true>(values, 2, 2 * D, weights, panel.answer, D, (count + 1) / 2);
            }
        if constexpr (std::is_same_v<T, Real>)
            multiply<true>(v.first + from * v.step, 1, v.step, tile, panel.answer, D, count);
        else
            multiply<true>(values_here + from * D, 1, D, tile, panel.answer, D, count);
    }

    void add_bias(const Panel &panel, const Range &one, int64_t batch, int64_t head, const Real *bias, int64_t from,
                  int64_t to) {
        constexpr Real LOG2_E = Real(1.4426950408889634);
        for (int64_t j = from; j < to; j++) {
            int64_t ahead = one.at(batch, j) - panel.top;  // of lane 0
            Real *scores = tile + (j - from) * WIDTH;
            if (one.bias == 1) {
                Real slope = bias[head] * LOG2_E;
#pragma omp simd
                for (int t = 0; t < WIDTH; t++) scores[t] -= slope * Real(std::abs(int32_t(ahead) - t));
            } else {
                const Real *line = bias + head * (2 * farthest + 1) + farthest;
                for (int t = 0; t < WIDTH; t++) scores[t] += line[std::clamp(ahead - t, -farthest, farthest)] * LOG2_E;
            }
        }
    }

    // The same where rows and keys stand anywhere: their places begin at ``row_table`` and ``key_table``.
    // Apart, because within ``run`` it costs every other form a sixth of its time, in registers.
    __attribute__((noinline))
    void add_placed_bias(const Panel &panel, const Range &one, int64_t head, const Real *bias, int64_t from, int64_t to,
                         int64_t row_table, int64_t key_table) {
        constexpr Real LOG2_E = Real(1.4426950408889634);
        const int32_t *rows = reinterpret_cast<const int32_t *>(one.row_places) + row_table;
        const int32_t *keys = reinterpret_cast<const int32_t *>(one.key_places) + key_table;
        int32_t place[WIDTH], most = int32_t(farthest);
        for (int t = 0; t < WIDTH; t++) place[t] = rows[std::min(panel.top + t, panel.bottom)];
        for (int64_t j = from; j < to; j++) {
            Real *scores = tile + (j - from) * WIDTH;
            if (one.bias == 1) {
                Real slope = bias[head] * LOG2_E;
#pragma omp simd
                for (int t = 0; t < WIDTH; t++) scores[t] -= slope * Real(std::abs(keys[j] - place[t]));
            } else {
                const Real *line = bias + head * (2 * farthest + 1) + farthest;
                for (int t = 0; t < WIDTH; t++) scores[t] += line[std::clamp(keys[j] - place[t], -most, most)] * LOG2_E;
            }
        }
    }

    void hide(const Panel &panel, const Range &one, int64_t from, int64_t to) {
        const int32_t *since = reinterpret_cast<const int32_t *>(one.since);
        bool inside = since == nullptr;
        for (int t = 0; t < WIDTH; t++) inside &= panel.begin[t] <= from && panel.end[t] >= to;
        if (inside) return;
        for (int64_t j = from; j < to; j++)
            for (int t = 0; t < WIDTH; t++)
                if (j < panel.begin[t] || j >= panel.end[t] || (since && panel.top + t < since[j]))
                    tile[(j - from) * WIDTH + t] = LEAST<Real>;
    }

    // From scores to their powers, with the maxima and sums so far.
    void advance(Panel &panel, int64_t count) {
        typedef tiles::Vector<Real> vec;
        for (int first = 0; first < WIDTH; first += LANES<Real>) {
            vec &before = *reinterpret_cast<vec *>(panel.most + first);
            vec &sum = *reinterpret_cast<vec *>(panel.sum + first);
            vec most = before;
            for (int64_t j = 0; j < count; j++) {
                vec score = *reinterpret_cast<vec *>(tile + j * WIDTH + first);
                most = score > most ? score : most;
            }
            bool moved = false;
            for (int lane = 0; lane < LANES<Real>; lane++) moved |= most[lane] != before[lane];
            vec none = vec{} + LEAST<Real>, shift = most == none ? vec{} : most;  // nothing seen so far: no inf - inf
            if (moved) {
                vec keep = tiles::powers(vec(before - shift));
                for (int64_t d = 0; d < D; d++) *reinterpret_cast<vec *>(panel.answer + d * WIDTH + first) *= keep;
                sum *= keep, before = most;
            }
            vec added{};
            for (int64_t j = 0; j < count; j++) {
                vec &score = *reinterpret_cast<vec *>(tile + j * WIDTH + first);
                score = tiles::powers(vec(score - shift));
                added += score;
            }
            sum += added;
        }
    }

    void store(const Panel &panel, T *out, int64_t o_row, Real *lse) const {
        for (int64_t row = panel.top; row <= panel.bottom; row++) {
            int64_t t = row - panel.top;
            Real sum = panel.sum[t], share = panel.most[t] == LEAST<Real> ? Real(0) : Real(1) / sum;
            for (int64_t d = 0; d < D; d++) out[row * o_row + d] = panel.answer[d * WIDTH + t] * share;
            lse[row] = (panel.most[t] + std::log2(sum)) * Real(0.6931471805599453);
        }
    }
};

template <typename T, typename Real>
void attend(const T *q, T *out, Real *lse, const Real *bias, const Query *strides, int64_t B, int64_t H, int64_t rows,
            int64_t D, const Range *ranges, int64_t count, int64_t farthest, double scale, int threads) {
    int64_t tasks = (rows + Task<T, Real>::ROWS - 1) / Task<T, Real>::ROWS;
#pragma omp parallel num_threads(threads)
    {
        Task<T, Real> task(D, farthest, Real(scale * 1.4426950408889634));
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < B * H * tasks; i++) {
            int64_t item = i / tasks, b = item / H, h = item % H;
            int64_t first = (tasks - 1 - i % tasks) * task.ROWS, last = std::min(rows, first + task.ROWS) - 1;
            task.run(q + b * strides[0].batch + h * strides[0].head, strides[0].row,
                     out + b * strides[1].batch + h * strides[1].head, strides[1].row, lse + item * rows, first, last,
                     ranges, count, b, h, item, rows, bias);
        }
    }
}

}  // namespace

#define ATTEND(NAME, T, REAL)                                                                                          \
    extern "C" void attend_##NAME(const T *q, T *out, REAL *lse, const REAL *bias, const Query *strides, int64_t B,  \
                                  int64_t H, int64_t rows, int64_t D, const Range *ranges, int64_t count,              \
                                  int64_t farthest, double scale, int threads) {                                       \
        attend<T, REAL>(q, out, lse, bias, strides, B, H, rows, D, ranges, count, farthest, scale, threads);           \
    }

ATTEND(float32, float, float)
ATTEND(bfloat16, bfloat16, float)
ATTEND(float64, double, double)
