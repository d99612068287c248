// What the kernels of attention over ranges of keys share: ranges as Python lays them out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "tiles.hpp"

namespace ranges {

using tiles::bfloat16;

template <typename Real>
constexpr Real LEAST = -std::numeric_limits<Real>::infinity();

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
    int64_t begins, ends;  // of each row of each head in place of the lines, rising from row to row; or 0
    int64_t row_places, key_places;  // of each head where its rows and keys stand, if not one after the other; or 0
    int64_t places;        // of each key in each row of the batch, tokens from row 0, in place of ahead and every; or 0
    int64_t at(int64_t batch, int64_t key) const {
        return places ? reinterpret_cast<const int32_t *>(places)[batch * keys + key] : ahead + key * every;
    }
};

struct Query {
    int64_t batch, head, row;
};

template <typename T>
struct Rows {
    const T *first;
    int64_t step;
};

}  // namespace ranges
