// Attention of every query over its best keys of a memory: all scores are made, and none leaves a second-level cache.
//
// Keys of a head are packed once, transposed, in panels that a first-level cache holds; for few queries they are read
// where they lie, and each head is one thread's. Some queries meet panel after panel of what they may see; scores are put in order where a panel's product leaves them, with the maxima from which
// a row's selection begins. What was found is read while the next row's keys are chosen.

#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "largest.hpp"
#include "tiles.hpp"

namespace {

using tiles::bfloat16;

constexpr int64_t PANEL = largest::BLOCK;  // keys
constexpr int64_t QUERIES = 24;            // worked on together, whose scores are alive

struct Tensor {  // [batch, heads, rows, channels side by side]
    int64_t batch, head, row;
};

struct Sizes {
    int64_t batch, heads, queries, keys, width, count;
    int64_t known, segment, most;  // keys before the first segment of queries, queries of one, keys that it sees

    int64_t panels() const { return (keys + PANEL - 1) / PANEL; }
    int64_t end(int64_t query) const { return known + query / segment * segment; }
    int64_t begin(int64_t query) const { return std::max<int64_t>(0, end(query) - most); }
};

template <typename T>
struct Kind {
    typedef std::conditional_t<std::is_same_v<T, double>, double, float> Real;
    typedef std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t> Int;
    static constexpr int mantissa = std::is_same_v<T, double> ? 52 : 23;
};

template <typename T>
class Task {
    typedef typename Kind<T>::Real Real;
    typedef typename Kind<T>::Int Int;
    static constexpr int64_t LANES = largest::Kind<Int>::lanes;

    const Sizes s;
    const largest::Order<Int> order{Kind<T>::mantissa};
    const bool paired;  // see tiles::Pairs; where the width is even
    const int64_t most_blocks, wide;
    std::unique_ptr<Real[]> queries, scores, mixed, weights;
    std::unique_ptr<Int[]> tops;
    std::vector<int32_t> columns;
    largest::Selection<Int> selection;

public:
    explicit Task(Sizes s)
        : s(s), paired(tiles::PAIRED && std::is_same_v<T, bfloat16> && s.width % 2 == 0),
          most_blocks(std::min(s.panels(), s.most / PANEL + 2)), wide(most_blocks * PANEL),
          queries(new Real[QUERIES * s.width]), scores(new Real[QUERIES * wide]), mixed(new Real[s.width]),
          weights(new Real[s.count]), tops(new Int[QUERIES * most_blocks * LANES]), columns(2 * s.count),
          selection(most_blocks) {}

    // Keys of one panel, transposed; 0 beyond the last.
    void pack(const T *k, int64_t step, int64_t panel, Real *to) const {
        int64_t first = panel * PANEL, size = std::min(PANEL, s.keys - first);
        k += first * step;
        if constexpr (std::is_same_v<T, Real>) {
            tiles::transpose(k, step, to, PANEL, size, s.width);
        } else {
            if (paired) {
                tiles::pair *pairs = reinterpret_cast<tiles::pair *>(to);
                for (int64_t d = 0; d < s.width / 2; d++)
                    for (int64_t j = 0; j < PANEL; j++)
                        pairs[d * PANEL + j] =
                            j < size ? k[j * step + 2 * d].bits | tiles::pair(k[j * step + 2 * d + 1].bits) << 16 : 0;
            } else {
                for (int64_t d = 0; d < s.width; d++)
                    for (int64_t j = 0; j < PANEL; j++) to[d * PANEL + j] = j < size ? float(k[j * step + d]) : 0.0f;
            }
        }
    }

    // Queries first .. last of one segment and one head.
    void run(const T *q, int64_t q_row, const T *k, int64_t k_row, const T *v, int64_t v_row, const Real *packed,
             T *out, int64_t o_row, int64_t first, int64_t last, T *kept, int32_t *chosen) {
        int64_t begin = s.begin(first), end = s.end(first), rows = last - first;
        if (begin == end) {
            for (int64_t row = first; row < last; row++) {
                std::fill_n(out + row * o_row, s.width, T{});
                if (chosen) std::fill_n(kept + row * s.count, s.count, T{}), std::fill_n(chosen + row * s.count, s.count, 0);
            }
            return;
        }
        score(q + first * q_row, q_row, k, k_row, packed, rows, begin, end);
        int64_t offset = begin / PANEL * PANEL, blocks = (end - 1) / PANEL + 1 - begin / PANEL;
        const Int *keys = reinterpret_cast<const Int *>(scores.get());
        for (int64_t i = 0; i <= rows; i++) {
            if (i < rows) {
                const int32_t *found = selection.of(keys + i * wide, tops.get() + i * most_blocks * LANES, blocks,
                                                    begin - offset, end - offset, s.count);
                int32_t *own = columns.data() + i % 2 * s.count;
                for (int64_t j = 0; j < s.count; j++) {
                    own[j] = found[j] + offset;
                    for (int64_t d = 0; d < s.width; d += 64 / sizeof(T)) __builtin_prefetch(v + own[j] * v_row + d);
                }
            }
            if (i == 0) continue;
            const int32_t *own = columns.data() + (i - 1) % 2 * s.count;
            int64_t row = first + i - 1;
            weigh(keys + (i - 1) * wide - offset, own);
            mix(v, v_row, own, out + row * o_row);
            if (chosen) {
                std::copy_n(own, s.count, chosen + row * s.count);
                for (int64_t j = 0; j < s.count; j++) kept[row * s.count + j] = weights[j];
            }
        }
    }

private:
    void score(const T *q, int64_t q_row, const T *k, int64_t k_row, const Real *packed, int64_t rows, int64_t begin,
               int64_t end) {
        int64_t depth = paired ? s.width / 2 : s.width, first = begin / PANEL, stop = (end - 1) / PANEL + 1;
        for (int64_t i = 0; i < rows; i++)
            if (paired && packed)
                std::memcpy(reinterpret_cast<T *>(queries.get()) + i * s.width, q + i * q_row, s.width * sizeof(T));
            else
                for (int64_t d = 0; d < s.width; d++) queries[i * s.width + d] = q[i * q_row + d];
        for (int64_t panel = first; panel < stop; panel++) {
            Real *to = scores.get() + (panel - first) * PANEL;
            const Real *from = packed + panel * PANEL * s.width;
            if (!packed)
                multiply(k, k_row, std::max(begin, panel * PANEL), std::min(end, (panel + 1) * PANEL), rows,
                         to - panel * PANEL);
            else if (paired)
                tiles::product_of<tiles::Pairs>(reinterpret_cast<const tiles::Pairs::left *>(queries.get()), s.width, 2,
                                                reinterpret_cast<const tiles::Pairs::right *>(from), PANEL,
                                                reinterpret_cast<float *>(to), wide, rows, PANEL, depth, false);
            else
                tiles::product(queries.get(), s.width, from, PANEL, to, wide, rows, PANEL, depth, false);
            for (int64_t i = 0; i < rows; i++)
                largest::put_in_order(order, reinterpret_cast<Int *>(to + i * wide), begin - panel * PANEL,
                                      end - panel * PANEL, tops.get() + (i * most_blocks + panel - first) * LANES);
        }
    }

    // Keys first .. last, one by one.
    void multiply(const T *k, int64_t k_row, int64_t first, int64_t last, int64_t rows, Real *to) const {
        for (int64_t j = first; j < last; j++)
            for (int64_t i = 0; i < rows; i++) {
                const Real *query = queries.get() + i * s.width;
                Real sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t d = 0; d < s.width; d++) sum += query[d] * Real(k[j * k_row + d]);
                to[i * wide + j] = sum;
            }
    }

    // Softmax over what was found.
    void weigh(const Int *keys, const int32_t *own) {
        Real most = -std::numeric_limits<Real>::infinity(), sum = 0;
        for (int64_t j = 0; j < s.count; j++) {
            Int bits = order.back(keys[own[j]]);
            std::memcpy(&weights[j], &bits, sizeof bits);
            most = weights[j] <= most ? most : weights[j];
        }
        for (int64_t j = 0; j < s.count; j++) sum += weights[j] = std::exp(weights[j] - most);
        for (int64_t j = 0; j < s.count; j++) weights[j] /= sum;
    }

    void mix(const T *v, int64_t v_row, const int32_t *own, T *out) {
        std::fill_n(mixed.get(), s.width, Real(0));
        for (int64_t j = 0; j < s.count; j++) {
            const T *value = v + own[j] * v_row;
            Real *to = mixed.get(), weight = weights[j];
#pragma omp simd
            for (int64_t d = 0; d < s.width; d++) to[d] += weight * Real(value[d]);
        }
        for (int64_t d = 0; d < s.width; d++) out[d] = mixed[d];
    }
};

// Without room to pack keys in, all heads are worked on at once.
template <typename T>
void retrieve(const T *q, const T *k, const T *v, typename Kind<T>::Real *packed, T *out, T *kept, int32_t *chosen,
              const Tensor *at, Sizes s, int threads) {
    int64_t pieces = (s.segment + QUERIES - 1) / QUERIES, heads = s.batch * s.heads, together = packed ? 1 : heads;
    int64_t tasks = (s.queries + s.segment - 1) / s.segment * pieces;
    auto in = [&](int tensor, int64_t item) {
        return item / s.heads * at[tensor].batch + item % s.heads * at[tensor].head;
    };
#pragma omp parallel num_threads(threads)
    {
        Task<T> task(s);
        for (int64_t begin = 0; begin < heads; begin += together) {
#pragma omp for schedule(static)
            for (int64_t panel = 0; panel < (packed ? s.panels() : 0); panel++)
                task.pack(k + in(1, begin), at[1].row, panel, packed + panel * PANEL * s.width);
#pragma omp for schedule(dynamic, 1)
            for (int64_t number = 0; number < together * tasks; number++) {
                int64_t item = begin + number / tasks, segment = number % tasks / pieces;
                int64_t first = segment * s.segment + number % pieces * QUERIES, places = item * s.queries * s.count;
                int64_t stop = std::min(s.queries, (segment + 1) * s.segment);
                if (first < stop)
                    task.run(q + in(0, item), at[0].row, k + in(1, item), at[1].row, v + in(2, item), at[2].row, packed,
                             out + in(3, item), at[3].row, first, std::min(stop, first + QUERIES),
                             chosen ? kept + places : nullptr, chosen ? chosen + places : nullptr);
            }
        }
    }
}

}  // namespace

#define RETRIEVE(NAME, T)                                                                                             \
    extern "C" void retrieve_##NAME(const T *q, const T *k, const T *v, Kind<T>::Real *packed, T *out, T *kept,       \
                                    int32_t *chosen, const Tensor *at, const Sizes *sizes, int threads) {             \
        retrieve<T>(q, k, v, packed, out, kept, chosen, at, *sizes, threads);                                         \
    }
RETRIEVE(float32, float)
RETRIEVE(bfloat16, bfloat16)
RETRIEVE(float64, double)
