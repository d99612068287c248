// Softmax attention over ranges of keys on CPUs: scores live in the innermost cache, once they are made they are used.
//
// Lanes of vectors are queries. A panel of them is kept transposed, [channel][query], so that a key or a value enters as
// one number for all lanes, from where it lies: nothing is packed, and a softmax over keys runs along the lanes. Scores
// of a panel and some keys are a tile; with it the panel's maxima, sums and answers move on ("online softmax", in base
// 2). Panels that share keys are computed together.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

namespace {

#ifdef __AVX512F__
constexpr int BYTES = 64, RANKS = 8;  // of a vector; rows of a product at once: as many as registers hold
#else
constexpr int BYTES = 32, RANKS = 4;
#endif
constexpr int KEYS = 64;   // of a tile
constexpr int PANELS = 4;  // of a task

struct bfloat16 {
    uint16_t bits;
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
    bfloat16 &operator=(float x) {  // to the nearest, ties to even; NaN stays one
        uint32_t wide;
        std::memcpy(&wide, &x, 4);
        bits = x == x ? uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16) : 0x7fc0;
        return *this;
    }
};

template <typename Real>
constexpr Real LEAST = -std::numeric_limits<Real>::infinity();

// 2^x, and 0 below the least normal number. The series of 2^f ends below half a unit of the last place.
inline float power(float x) {
    float whole = std::nearbyint(x);
    float f = x - whole;
    float p = 1.5252734e-5f;
    p = p * f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    int32_t exponent = (int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &exponent, 4);
    return x < -126.0f ? 0.0f : p * scale;
}
inline double power(double x) { return std::exp2(x); }

// floor((row + shift) / step) * stride + base, or no bound
struct Line {
    int64_t kind, base, step, stride, shift;
    int64_t at(int64_t row, int64_t keys, int64_t otherwise) const {
        if (kind == 0) return otherwise;
        return std::clamp((row + shift) / step * stride + base, int64_t(0), keys);
    }
};

// As Python lays it out: one range of keys.
struct Range {
    int64_t k, v, k_batch, k_head, k_row, v_batch, v_head, v_row, group, keys;
    Line low, high;
    int64_t bias, every, ahead, since;
};

struct Query {
    int64_t batch, head, row;
};

// C (+)= A B for ranks R of C, all rows of a panel's width: C[r][:] over A(r, i) B[i][:], i below depth.
template <int R, bool ADD, typename Real>
inline void multiply(const Real *a, int64_t rank, int64_t step, const Real *b, Real *c, int64_t depth) {
    constexpr int LANES = BYTES / sizeof(Real), WIDTH = 2 * LANES;
    typedef Real vec __attribute__((vector_size(BYTES), aligned(sizeof(Real)), may_alias));
    vec sum[R][2];
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++)
            sum[r][half] = ADD ? *reinterpret_cast<vec *>(c + r * WIDTH + half * LANES) : vec{};
    for (int64_t i = 0; i < depth; i++) {
        vec low = *reinterpret_cast<const vec *>(b + i * WIDTH);
        vec high = *reinterpret_cast<const vec *>(b + i * WIDTH + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Real x = a[r * rank + i * step];
            sum[r][0] += x * low;
            sum[r][1] += x * high;
        }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) *reinterpret_cast<vec *>(c + r * WIDTH + half * LANES) = sum[r][half];
}

template <bool ADD, typename Real>
inline void multiply(const Real *a, int64_t rank, int64_t step, const Real *b, Real *c, int64_t ranks, int64_t depth) {
    constexpr int WIDTH = 2 * BYTES / sizeof(Real);
    int64_t r = 0;
    for (; r + RANKS <= ranks; r += RANKS) multiply<RANKS, ADD>(a + r * rank, rank, step, b, c + r * WIDTH, depth);
    for (; r < ranks; r++) multiply<1, ADD>(a + r * rank, rank, step, b, c + r * WIDTH, depth);
}

template <typename T, typename Real>
class Task {
    static constexpr int WIDTH = 2 * BYTES / sizeof(Real);

    struct Panel {
        int64_t top, bottom;  // its first and last row
        Real *query, *answer;
        Real most[WIDTH], sum[WIDTH];
        int64_t begin[WIDTH], end[WIDTH];  // keys of the range at hand that each row sees
    };

    int64_t D, farthest;
    std::unique_ptr<Real[]> room;
    Real *tile, *keys_here, *values_here;
    Panel panels[PANELS];

  public:
    static constexpr int ROWS = PANELS * WIDTH;

    Task(int64_t D, int64_t farthest) : D(D), farthest(farthest) {
        int64_t each = D * WIDTH, copied = std::is_same_v<T, Real> ? 0 : KEYS * D, pad = BYTES / sizeof(Real);
        room.reset(new Real[2 * PANELS * each + KEYS * WIDTH + 2 * copied + pad]);
        Real *next = room.get();
        next += (BYTES - reinterpret_cast<uintptr_t>(next) % BYTES) % BYTES / sizeof(Real);
        for (Panel &panel : panels) panel.query = next, panel.answer = next + each, next += 2 * each;
        tile = next, keys_here = tile + KEYS * WIDTH, values_here = keys_here + copied;
    }

    // Rows first .. last of one head.
    void run(const T *q, int64_t q_row, T *out, int64_t o_row, Real *lse, int64_t first, int64_t last,
             const Range *ranges, int64_t count, int64_t batch, int64_t head, const Real *bias, Real scale) {
        int64_t used = (last - first) / WIDTH + 1;
        for (int64_t i = 0; i < used; i++) load(panels[i], q, q_row, first + i * WIDTH, last, scale);
        for (int64_t i = 0; i < count; i++) {
            const Range &one = ranges[i];
            int64_t own = head / one.group, most = one.keys;
            const T *k = reinterpret_cast<const T *>(one.k) + batch * one.k_batch + own * one.k_head;
            const T *v = reinterpret_cast<const T *>(one.v) + batch * one.v_batch + own * one.v_head;
            for (int64_t p = 0; p < used; p++)
                for (int64_t t = 0; t < WIDTH; t++) {
                    int64_t row = std::min(panels[p].top + t, panels[p].bottom);
                    panels[p].begin[t] = one.low.at(row, most, 0), panels[p].end[t] = one.high.at(row, most, most);
                }
            int64_t end = panels[used - 1].end[WIDTH - 1];
            for (int64_t key = panels[0].begin[0]; key < end; key += KEYS) {
                int64_t stop = std::min(end, key + KEYS), k_row = one.k_row, v_row = one.v_row;
                const Real *near_k = held(k, key, stop, keys_here, k_row);
                const Real *near_v = held(v, key, stop, values_here, v_row);
                for (int64_t p = 0; p < used; p++) {
                    int64_t from = std::max(key, panels[p].begin[0]), to = std::min(stop, panels[p].end[WIDTH - 1]);
                    if (from >= to) continue;
                    multiply<false>(near_k + (from - key) * k_row, k_row, 1, panels[p].query, tile, to - from, D);
                    if (one.bias) add_bias(panels[p], one, head, bias, from, to);
                    hide(panels[p], one, from, to);
                    advance(panels[p], to - from);
                    multiply<true>(near_v + (from - key) * v_row, 1, v_row, tile, panels[p].answer, D, to - from);
                }
            }
        }
        for (int64_t i = 0; i < used; i++) store(panels[i], out, o_row, lse);
    }

  private:
    void load(Panel &panel, const T *q, int64_t q_row, int64_t top, int64_t last, Real scale) {
        panel.top = top, panel.bottom = std::min(last, top + WIDTH - 1);
        for (int64_t t = 0; t < WIDTH; t++)
            for (int64_t d = 0; d < D; d++)
                panel.query[d * WIDTH + t] = top + t <= last ? Real(q[(top + t) * q_row + d]) * scale : Real(0);
        std::fill_n(panel.answer, D * WIDTH, Real(0));
        std::fill_n(panel.most, WIDTH, LEAST<Real>);
        std::fill_n(panel.sum, WIDTH, Real(0));
    }

    // Rows of keys or values as they lie, or in the wider type.
    const Real *held(const T *rows, int64_t begin, int64_t end, Real *copy, int64_t &row) const {
        if constexpr (std::is_same_v<T, Real>) return rows + begin * row;
        for (int64_t j = begin; j < end; j++)
#pragma omp simd
            for (int64_t d = 0; d < D; d++) copy[(j - begin) * D + d] = Real(rows[j * row + d]);
        row = D;
        return copy;
    }

    void add_bias(const Panel &panel, const Range &one, int64_t head, const Real *bias, int64_t from, int64_t to) {
        constexpr Real LOG2_E = Real(1.4426950408889634);
        for (int64_t j = from; j < to; j++) {
            int64_t ahead = one.ahead + j * one.every - panel.top;  // of lane 0
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
        alignas(BYTES) Real most[WIDTH], keep[WIDTH], sum[WIDTH];
        std::copy_n(panel.most, WIDTH, most);
        for (int64_t j = 0; j < count; j++)
#pragma omp simd
            for (int t = 0; t < WIDTH; t++) most[t] = std::max(most[t], tile[j * WIDTH + t]);
        if (std::memcmp(most, panel.most, sizeof most)) {
#pragma omp simd
            for (int t = 0; t < WIDTH; t++) keep[t] = most[t] == LEAST<Real> ? Real(1) : power(panel.most[t] - most[t]);
            for (int t = 0; t < WIDTH; t++) panel.most[t] = most[t], panel.sum[t] *= keep[t];
            for (int64_t d = 0; d < D; d++)
#pragma omp simd
                for (int t = 0; t < WIDTH; t++) panel.answer[d * WIDTH + t] *= keep[t];
        }
        for (int t = 0; t < WIDTH; t++) most[t] = most[t] == LEAST<Real> ? Real(0) : most[t];  // nothing seen so far
        std::copy_n(panel.sum, WIDTH, sum);
        for (int64_t j = 0; j < count; j++)
#pragma omp simd
            for (int t = 0; t < WIDTH; t++) {
                Real p = power(tile[j * WIDTH + t] - most[t]);
                tile[j * WIDTH + t] = p;
                sum[t] += p;
            }
        std::copy_n(sum, WIDTH, panel.sum);
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
        Task<T, Real> task(D, farthest);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < B * H * tasks; i++) {
            int64_t item = i / tasks, b = item / H, h = item % H;
            int64_t first = (tasks - 1 - i % tasks) * task.ROWS, last = std::min(rows, first + task.ROWS) - 1;
            task.run(q + b * strides[0].batch + h * strides[0].head, strides[0].row,
                     out + b * strides[1].batch + h * strides[1].head, strides[1].row, lse + item * rows, first, last,
                     ranges, count, b, h, bias, Real(scale * 1.4426950408889634));
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
