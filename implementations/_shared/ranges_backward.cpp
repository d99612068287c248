// The backward pass of attention over ranges of keys on CPUs, in one pass: five products of each pair of blocks.
//
// A task is one batch and the heads that share keys and values in some range, so that no two tasks add to one gradient
// and sums have one order whatever the threads. A task goes over its queries by groups of panels, and for each group
// over the keys by tiles. A panel of queries is kept twice, as [query][channel] and [channel][query], and a tile of keys
// likewise, so that all five are plain products of small blocks, see ``tiles.hpp``:
//
//     scores[key][query]    = keys x queries      to weights by the log-sum-exps of the forward pass
//     slopes[key][query]    = values x gradients  then weights * (slopes - delta)
//     of values[key][d]    += weights x gradients
//     of keys[key][d]      += slopes x queries
//     of queries[d][query] += keys x slopes
//
// delta is the sum over a query's channels of output * gradient, less the gradient of its log-sum-exp.

#include <memory>

#include "ranges.hpp"
#include "tiles.hpp"

namespace {

using namespace ranges;
using tiles::BYTES;

constexpr int64_t KEYS = 48;   // of a tile: a multiple of the rows of a product
constexpr int64_t PANELS = 4;  // of a group

// Where gradients of a range's keys and values go, laid out as they are read, or 0; strides as in Range.
struct Wanted {
    int64_t k, v, k_batch, k_head, k_row, v_batch, v_head, v_row;
};

template <typename Real>
struct Given {  // of one head
    const Real *lse, *through, *bias;
    Real *table;
};

template <typename T, typename Real>
class Backward {
    static constexpr int64_t LANES = tiles::Lanes<Real>::width, WIDTH = tiles::VECTORS * LANES;
    static constexpr Real LOG2_E = Real(1.4426950408889634);
    typedef tiles::Vector<Real> vec;

    struct Panel {
        int64_t top, bottom;  // its first and last row
        Real *query, *query_across, *gradient, *gradient_across, *result;
        Real lse[WIDTH], delta[WIDTH];
        int64_t begin[WIDTH], end[WIDTH];  // keys of the range at hand that each row sees
    };

    int64_t D, width, farthest;
    Real scale;
    std::unique_ptr<Real[]> room;
    Real *weights, *slopes, *keys, *keys_across, *values, *of_keys, *of_values;
    Panel panels[PANELS];

  public:
    static constexpr int64_t ROWS = PANELS * WIDTH;

    Backward(int64_t D, int64_t farthest, Real scale) : D(D), width(tiles::padded(D)), farthest(farthest), scale(scale) {
        int64_t panel = 2 * WIDTH * width + 3 * D * WIDTH, tile = KEYS * width, pad = BYTES / sizeof(Real);
        room.reset(new Real[PANELS * panel + 2 * KEYS * WIDTH + 4 * tile + D * KEYS + pad]());
        Real *next = room.get();
        next += (BYTES - reinterpret_cast<uintptr_t>(next) % BYTES) % BYTES / sizeof(Real);
        auto take = [&next](int64_t count) { return next += count, next - count; };
        for (Panel &one : panels) {
            one.query = take(WIDTH * width), one.gradient = take(WIDTH * width);
            one.query_across = take(D * WIDTH), one.gradient_across = take(D * WIDTH), one.result = take(D * WIDTH);
        }
        weights = take(KEYS * WIDTH), slopes = take(KEYS * WIDTH);
        keys = take(tile), values = take(tile), of_keys = take(tile), of_values = take(tile);
        keys_across = take(D * KEYS);
    }

    // Rows first .. last of one head.
    void run(const Rows<T> &q, const Rows<T> &out, const Rows<T> &gradient, T *dq, int64_t dq_row, const Given<Real> &given,
             int64_t first, int64_t last, const Range *shown, const Wanted *wanted, int64_t count, int64_t batch,
             int64_t head) {
        int64_t used = (last - first) / WIDTH + 1;
        for (int64_t i = 0; i < used; i++) load(panels[i], q, out, gradient, given, first + i * WIDTH, last);
        for (int64_t i = 0; i < count; i++) {
            const Range &one = shown[i];
            int64_t own = head / one.group;
            for (int64_t p = 0; p < used; p++)
                for (int64_t t = 0; t < WIDTH; t++) {
                    int64_t row = std::min(panels[p].top + t, panels[p].bottom);
                    panels[p].begin[t] = one.low.at(row, one.keys, 0);
                    panels[p].end[t] = one.high.at(row, one.keys, one.keys);
                }
            const T *k = reinterpret_cast<const T *>(one.k) + batch * one.k_batch + own * one.k_head;
            const T *v = reinterpret_cast<const T *>(one.v) + batch * one.v_batch + own * one.v_head;
            const Wanted &to = wanted[i];
            Real *dk = reinterpret_cast<Real *>(to.k), *dv = reinterpret_cast<Real *>(to.v);
            if (dk) dk += batch * to.k_batch + own * to.k_head, dv += batch * to.v_batch + own * to.v_head;
            int64_t end = panels[used - 1].end[WIDTH - 1];
            for (int64_t key = panels[0].begin[0]; key < end; key += KEYS) {
                int64_t stop = std::min(end, key + KEYS);
                hold({k + key * one.k_row, one.k_row}, {v + key * one.v_row, one.v_row}, stop - key);
                for (int64_t p = 0; p < used; p++) {
                    int64_t from = std::max(key, panels[p].begin[0]), next = std::min(stop, panels[p].end[WIDTH - 1]);
                    if (from < next) visit(panels[p], one, given, batch, head, key, from, next, dk != nullptr);
                }
                if (dk) hand_on(of_keys, dk + key * to.k_row, to.k_row, stop - key, scale);
                if (dk) hand_on(of_values, dv + key * to.v_row, to.v_row, stop - key, Real(1));
            }
        }
        for (int64_t i = 0; i < used; i++)
            for (int64_t row = panels[i].top; row <= panels[i].bottom; row++)
                for (int64_t d = 0; d < D; d++)
                    dq[row * dq_row + d] = panels[i].result[d * WIDTH + row - panels[i].top] * scale;
    }

  private:
    // A row that sees no key, or does not exist, has a log-sum-exp that makes nothing of all its scores.
    void load(Panel &panel, const Rows<T> &q, const Rows<T> &out, const Rows<T> &gradient, const Given<Real> &given,
              int64_t top, int64_t last) {
        panel.top = top, panel.bottom = std::min(last, top + WIDTH - 1);
        int64_t rows = panel.bottom - top + 1;
        for (int64_t t = 0; t < WIDTH; t++) {
            Real *query = panel.query + t * width, *slope = panel.gradient + t * width, delta = 0;
            panel.lse[t] = -LEAST<Real>, panel.delta[t] = 0;
            if (t >= rows) {
                std::fill_n(query, D, Real(0)), std::fill_n(slope, D, Real(0));
                continue;
            }
            const T *from = q.first + (top + t) * q.step, *result = out.first + (top + t) * out.step;
            const T *given_here = gradient.first + (top + t) * gradient.step;
            for (int64_t d = 0; d < D; d++) {
                query[d] = Real(from[d]), slope[d] = Real(given_here[d]);
                delta += slope[d] * Real(result[d]);
            }
            if (given.lse[top + t] != LEAST<Real>) panel.lse[t] = given.lse[top + t] * LOG2_E;
            panel.delta[t] = given.through ? delta - given.through[top + t] : delta;
        }
        tiles::transpose(panel.query, width, panel.query_across, WIDTH, WIDTH, D);
        tiles::transpose(panel.gradient, width, panel.gradient_across, WIDTH, WIDTH, D);
        for (int64_t i = 0; i < D * WIDTH; i++) panel.query_across[i] *= scale * LOG2_E;
        std::fill_n(panel.result, D * WIDTH, Real(0));
    }

    void hold(const Rows<T> &k, const Rows<T> &v, int64_t count) {
        for (int64_t j = 0; j < count; j++)
            for (int64_t d = 0; d < D; d++) {
                keys[j * width + d] = Real(k.first[j * k.step + d]);
                values[j * width + d] = Real(v.first[j * v.step + d]);
            }
        tiles::transpose(keys, width, keys_across, KEYS, count, D);
        std::fill_n(of_keys, count * width, Real(0)), std::fill_n(of_values, count * width, Real(0));
    }

    // One panel and keys from .. to of the tile that begins with ``key``.
    void visit(Panel &panel, const Range &one, const Given<Real> &given, int64_t batch, int64_t head, int64_t key,
               int64_t from, int64_t to, bool all) {
        int64_t at = from - key, count = to - from;
        tiles::product(keys + at * width, width, panel.query_across, WIDTH, weights, WIDTH, count, WIDTH, D, false);
        if (one.bias) add_bias(panel, one, batch, head, given.bias, from, to);
        hide(panel, one, from, to);
        tiles::product(values + at * width, width, panel.gradient_across, WIDTH, slopes, WIDTH, count, WIDTH, D, false);
        for (int64_t first = 0; first < WIDTH; first += LANES) {
            vec lse = *reinterpret_cast<vec *>(panel.lse + first), delta = *reinterpret_cast<vec *>(panel.delta + first);
            for (int64_t j = 0; j < count; j++) {
                vec &weight = *reinterpret_cast<vec *>(weights + j * WIDTH + first);
                vec &slope = *reinterpret_cast<vec *>(slopes + j * WIDTH + first);
                weight = tiles::powers(vec(weight - lse));
                slope = weight * (slope - delta);
            }
        }
        if (one.bias == 2 && given.table) add_slopes(panel, one, batch, given.table, from, to);
        tiles::product(keys_across + at, KEYS, slopes, WIDTH, panel.result, WIDTH, D, WIDTH, count, true);
        if (!all) return;
        tiles::product(weights, WIDTH, panel.gradient, width, of_values + at * width, width, count, width, WIDTH, true);
        tiles::product(slopes, WIDTH, panel.query, width, of_keys + at * width, width, count, width, WIDTH, true);
    }

    void add_bias(const Panel &panel, const Range &one, int64_t batch, int64_t head, const Real *bias, int64_t from,
                  int64_t to) {
        for (int64_t j = from; j < to; j++) {
            int64_t ahead = one.at(batch, j) - panel.top;  // of lane 0
            Real *scores = weights + (j - from) * WIDTH;
            if (one.bias == 1) {
                Real slope = bias[head] * LOG2_E;
                for (int t = 0; t < WIDTH; t++) scores[t] -= slope * Real(std::abs(int32_t(ahead) - t));
            } else {
                const Real *line = bias + head * (2 * farthest + 1) + farthest;
                if (all_far(ahead)) {
                    Real same = line[std::clamp(ahead, -farthest, farthest)] * LOG2_E;
                    for (int t = 0; t < WIDTH; t++) scores[t] += same;
                    continue;
                }
                for (int t = 0; t < WIDTH; t++) scores[t] += line[std::clamp(ahead - t, -farthest, farthest)] * LOG2_E;
            }
        }
    }

    // Whether all lanes are as far from a key as a table tells apart, on one side.
    bool all_far(int64_t ahead) const { return ahead <= -farthest || ahead - WIDTH + 1 >= farthest; }

    void add_slopes(const Panel &panel, const Range &one, int64_t batch, Real *table, int64_t from, int64_t to) {
        for (int64_t j = from; j < to; j++) {
            int64_t ahead = one.at(batch, j) - panel.top;
            if (all_far(ahead)) {
                Real sum = 0;
                for (int t = 0; t < WIDTH; t++) sum += slopes[(j - from) * WIDTH + t];
                table[farthest + std::clamp(ahead, -farthest, farthest)] += sum;
                continue;
            }
            for (int t = 0; t < WIDTH; t++)
                table[farthest + std::clamp(ahead - t, -farthest, farthest)] += slopes[(j - from) * WIDTH + t];
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
                    weights[(j - from) * WIDTH + t] = LEAST<Real>;
    }

    void hand_on(const Real *sums, Real *to, int64_t step, int64_t count, Real factor) {
        for (int64_t j = 0; j < count; j++)
            for (int64_t d = 0; d < D; d++) to[j * step + d] += sums[j * width + d] * factor;
    }
};

// Strides of q, out, gradient and dq; heads are taken ``shared`` at a time, and gradients of keys and values begin at 0.
template <typename T, typename Real>
void backward(const T *q, const T *out, const T *gradient, T *dq, const Real *lse, const Real *through, const Real *bias,
              Real *table, const Query *strides, int64_t B, int64_t H, int64_t rows, int64_t D, const Range *shown,
              const Wanted *wanted, int64_t count, int64_t shared, int64_t farthest, double scale, int threads) {
    int64_t biases = 2 * farthest + 1;
#pragma omp parallel num_threads(threads)
    {
        Backward<T, Real> task(D, farthest, Real(scale));
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < B * H / shared; i++)
            for (int64_t item = i * shared; item < (i + 1) * shared; item++) {
                int64_t b = item / H, h = item % H;
                auto at = [&](int64_t which) { return b * strides[which].batch + h * strides[which].head; };
                Given<Real> given{lse + item * rows, through ? through + item * rows : nullptr, bias,
                                  table ? table + item * biases : nullptr};
                for (int64_t first = 0; first < rows; first += task.ROWS)
                    task.run({q + at(0), strides[0].row}, {out + at(1), strides[1].row},
                             {gradient + at(2), strides[2].row}, dq + at(3), strides[3].row, given, first,
                             std::min(rows, first + task.ROWS) - 1, shown, wanted, count, b, h);
            }
    }
}

}  // namespace

#define BACKWARD(NAME, T, REAL)                                                                                        \
    extern "C" void attend_backward_##NAME(const T *q, const T *out, const T *gradient, T *dq, const REAL *lse,        \
                                           const REAL *through, const REAL *bias, REAL *table, const Query *strides,   \
                                           int64_t B, int64_t H, int64_t rows, int64_t D, const Range *shown,          \
                                           const Wanted *wanted, int64_t count, int64_t shared, int64_t farthest,      \
                                           double scale, int threads) {                                                \
        backward<T, REAL>(q, out, gradient, dq, lse, through, bias, table, strides, B, H, rows, D, shown, wanted,      \
                          count, shared, farthest, scale, threads);                                                    \
    }

BACKWARD(float32, float, float)
BACKWARD(bfloat16, bfloat16, float)
BACKWARD(float64, double, double)
