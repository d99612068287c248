// BigBird's attention, forward: rows of blocks against the blocks they see, read where they lie.
//
// Keys are packed once, transposed, and values head by head, both in panels of up to 64 tokens that a first-level cache
// holds. A few queries meet some panels at a time, so that their scores stay in a second-level cache, and keep a running
// maximum and sum. Rows are worked off in no fixed order, each by one thread.

#include <limits>
#include <vector>

#include "tiles.hpp"

namespace {

using tiles::padded;

constexpr int64_t PANEL = 64;   // tokens of a panel, and queries worked on together
constexpr int64_t TOGETHER = 8;  // panels whose scores are alive together

struct Sizes {
    int64_t batch, heads, tokens, width, block;
    int64_t blocks() const { return (tokens + block - 1) / block; }
    int64_t size(int64_t n) const { return std::min(block, tokens - n * block); }
    int64_t panels() const { return (block + PANEL - 1) / PANEL; }  // of a block
    int64_t columns() const { return std::min(PANEL, padded(block)); }
    int64_t key_panel() const { return width * columns(); }
    int64_t value_panel() const { return std::min(PANEL, block) * padded(width); }
};

template <typename T>
void pack(const T *k, const T *v, const int64_t *by_k, const int64_t *by_v, T *keys, T *values, Sizes s) {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < s.batch * s.heads * s.blocks(); item++) {
        int64_t n = item % s.blocks(), h = item / s.blocks() % s.heads, b = item / s.blocks() / s.heads;
        for (int64_t p = 0; p < s.panels(); p++) {
            int64_t first = n * s.block + p * PANEL, size = std::min(PANEL, s.size(n) - p * PANEL);
            if (size <= 0) break;
            int64_t number = item * s.panels() + p, row = padded(s.width);
            const T *from = k + b * by_k[0] + h * by_k[1] + first * by_k[2];
            tiles::transpose(from, by_k[2], keys + number * s.key_panel(), s.columns(), size, s.width);
            const T *of = v + b * by_v[0] + h * by_v[1] + first * by_v[2];
            T *to = values + number * s.value_panel();
            for (int64_t j = 0; j < size; j++) {
                std::memcpy(to + j * row, of + j * by_v[2], s.width * sizeof(T));
                std::fill(to + j * row + s.width, to + (j + 1) * row, T(0));
            }
        }
    }
}

template <typename T>
struct Panel {
    const T *keys, *values;
    int64_t size;
};

// The panels that a row of blocks sees in one head; ``packed`` is the number of the head's first block.
template <typename T>
void find(std::vector<Panel<T>> &found, const T *keys, const T *values, int64_t packed, int64_t n, int64_t h,
          const int64_t *edges, const int64_t *of_edges, const int64_t *inner, const int64_t *of_inner, Sizes s) {
    int64_t last = s.blocks() - 1;
    const int64_t *list = nullptr;
    int64_t count = last + 1;  // the first and the last see all
    if (n == 1 || (n == last - 1 && n > 0)) {
        list = edges + (h * of_edges[0] + (n > 1)) * of_edges[1];
        count = of_edges[1];
    } else if (n > 1 && n < last) {
        list = inner + (h * of_inner[0] + n - 2) * of_inner[1];
        count = of_inner[1];
    }
    found.clear();
    for (int64_t i = 0; i < count; i++) {
        int64_t block = list ? list[i] : i;
        for (int64_t p = 0; p < s.panels() && p * PANEL < s.size(block); p++) {
            int64_t number = (packed + block) * s.panels() + p;
            int64_t size = std::min(PANEL, s.size(block) - p * PANEL);
            found.push_back({keys + number * s.key_panel(), values + number * s.value_panel(), size});
        }
    }
}

// Some queries against some panels; what came before is scaled to the new maximum.
template <typename T>
void add(const Panel<T> *panels, int64_t count, const T *queries, int64_t rows, T *scores, T *mixed, T *most, T *sum,
         Sizes s) {
    int64_t seen = 0, wide = padded(s.width);
    for (int64_t i = 0; i < count; i++) seen += padded(panels[i].size);
    int64_t at = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t size = panels[i].size, columns = padded(size);
        tiles::product(queries, s.width, panels[i].keys, s.columns(), scores + at, seen, rows, columns, s.width, false);
        for (int64_t t = 0; t < rows && size < columns; t++)
            std::fill(scores + t * seen + at + size, scores + t * seen + at + columns,
                      -std::numeric_limits<T>::infinity());
        at += columns;
    }
    for (int64_t t = 0; t < rows; t++) {
        T *row = scores + t * seen;
        T top = tiles::largest(row, seen, most[t]);
        if (top > most[t]) {
            T factor = tiles::power(most[t] - top);  // 0 at first
            sum[t] *= factor;
            for (int64_t d = 0; d < wide; d++) mixed[t * wide + d] *= factor;
            most[t] = top;
        }
        sum[t] += tiles::powers(row, seen, top);
    }
    at = 0;
    for (int64_t i = 0; i < count; i++) {
        tiles::product(scores + at, seen, panels[i].values, wide, mixed, wide, rows, wide, panels[i].size, true);
        at += padded(panels[i].size);
    }
}

template <typename T>
void attend(const T *q, const T *k, const T *v, const int64_t *by_q, const int64_t *by_k, const int64_t *by_v,
            const int64_t *edges, const int64_t *of_edges, const int64_t *inner, const int64_t *of_inner, T *keys,
            T *values, T *out, const int64_t *by_out, Sizes s, T scale, int threads) {
    int64_t wide = padded(s.width), most_rows = std::min(PANEL, s.block);
#pragma omp parallel num_threads(threads)
    {
        pack(k, v, by_k, by_v, keys, values, s);
        std::vector<T> room(most_rows * (s.width + TOGETHER * s.columns() + wide + 2));
        T *queries = room.data(), *scores = queries + most_rows * s.width;
        T *mixed = scores + most_rows * TOGETHER * s.columns(), *most = mixed + most_rows * wide;
        T *sum = most + most_rows;
        std::vector<Panel<T>> panels;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < s.blocks() * s.batch * s.heads * s.panels(); item++) {
            int64_t piece = item % s.panels(), h = item / s.panels() % s.heads;
            int64_t b = item / s.panels() / s.heads % s.batch, n = item / s.panels() / s.heads / s.batch;
            n = n == 0 ? 0 : n == 1 ? s.blocks() - 1 : n - 1;  // the longest lists first
            int64_t first = n * s.block + piece * PANEL, rows = std::min(PANEL, s.size(n) - piece * PANEL);
            if (rows <= 0) continue;
            const T *from = q + b * by_q[0] + h * by_q[1] + first * by_q[2];
            for (int64_t t = 0; t < rows; t++)
                for (int64_t d = 0; d < s.width; d++) queries[t * s.width + d] = from[t * by_q[2] + d] * scale;
            std::fill(mixed, mixed + rows * wide, T(0));
            std::fill(most, most + rows, -std::numeric_limits<T>::infinity());
            std::fill(sum, sum + rows, T(0));
            find(panels, keys, values, (b * s.heads + h) * s.blocks(), n, h, edges, of_edges, inner, of_inner, s);
            int64_t count = panels.size();
            for (int64_t i = 0; i < count; i += TOGETHER)
                add(panels.data() + i, std::min(TOGETHER, count - i), queries, rows, scores, mixed, most, sum, s);
            T *to = out + b * by_out[0] + h * by_out[1] + first * by_out[2];
            for (int64_t t = 0; t < rows; t++)
                for (int64_t d = 0; d < s.width; d++) to[t * by_out[2] + d] = mixed[t * wide + d] / sum[t];
        }
    }
}

}  // namespace

#define ATTEND(NAME, T)                                                                                               \
    extern "C" void NAME(const T *q, const T *k, const T *v, const int64_t *by_q, const int64_t *by_k,                \
                         const int64_t *by_v, const int64_t *edges, const int64_t *of_edges, const int64_t *inner,    \
                         const int64_t *of_inner, T *keys, T *values, T *out, const int64_t *by_out,                  \
                         const int64_t *sizes, double scale, int threads) {                                           \
        Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};                                                    \
        attend<T>(q, k, v, by_q, by_k, by_v, edges, of_edges, inner, of_inner, keys, values, out, by_out, s,          \
                  T(scale), threads);                                                                                 \
    }
ATTEND(attend_float32, float)
ATTEND(attend_float64, double)
