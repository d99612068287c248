// Attention with Transformer-XL's relative positions over a staircase of keys, forward; as ``relative.py``, which see.
//
// One thread takes some rows of one segment in one head, packs the keys and values that these see, entries first, and
// works off 64 rows at a time. Scores by distance are one product with the packed distances; row i of it, read one
// place further left than row i - 1, has the distances of its keys. Contents are added in place by a product that walks
// its result with a row one place shorter. The scores of 64 rows stay in a second-level cache for common lengths.

#include <limits>
#include <vector>

#include "tiles.hpp"

namespace {

using tiles::padded;

constexpr int64_t PANEL = 64;   // keys or distances of a panel, and rows worked on together
constexpr int64_t PIECE = 512;  // rows of a segment that share packed keys

struct Sizes {
    int64_t items, batch, tokens, width, past, phase, segment, memory, band, known, capacity, rate, distances;
    int64_t panels() const { return (distances + PANEL - 1) / PANEL; }  // of distances, the last one ending at 0
};

// A tensor of [items, rows, width]: steps from item to item and from row to row.
template <typename T>
struct Stream {
    T *data;
    int64_t item, row;
    T *at(int64_t i, int64_t r) const { return data + i * item + r * row; }
};

// Rows first .. end of one segment: the keys that they see begin with an entry, then with a row of the keys.
struct Piece {
    int64_t first, end, entry, entries, begin;
};

std::vector<Piece> pieces(const Sizes &s) {
    std::vector<Piece> found;
    for (int64_t begin = -s.phase; begin < s.tokens; begin += s.segment) {
        int64_t memory = std::min(s.memory, s.past + begin), oldest = s.past + begin - memory;
        int64_t known = s.known + oldest / s.rate, seen = std::min(s.capacity, known);
        int64_t end = std::min(begin + s.segment, s.tokens);
        for (int64_t first = std::max(begin, int64_t(0)); first < end; first += PIECE) {
            int64_t low = s.band ? std::max(oldest, s.past + first - s.memory + 1) : oldest;
            found.push_back({first, std::min(first + PIECE, end), known - seen, seen, low});
        }
    }
    return found;
}

template <typename T>
struct Room {
    std::vector<T> keys, values, scores, content, position, mixed;
    std::vector<T> sum;
};

template <typename T>
void attend_rows(Room<T> &room, const Sizes &s, const Piece &p, int64_t item, int64_t first, int64_t rows,
                 const Stream<const T> &content, const Stream<const T> &position, const T *distances,
                 const Stream<T> &out, T scale) {
    int64_t D = s.width, wide = padded(D), seen = p.entries + s.past + first + rows - p.begin;  // keys of the last row
    int64_t whole = (seen + PANEL - 1) / PANEL * PANEL;
    int64_t from = s.panels() * PANEL - seen, skipped = from / PANEL, off = from % PANEL + rows - 1;
    int64_t step = padded(off + whole + tiles::PAD);
    if (step % 64 == 0) step += tiles::PAD;  // else rows would meet in the same places of a cache
    room.scores.resize(std::max<int64_t>(room.scores.size(), rows * step));
    T *scores = room.scores.data();
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < D; d++) {
            room.content[i * D + d] = content.at(item, first + i)[d] * scale;
            room.position[i * D + d] = position.at(item, first + i)[d] * scale;
        }
    int64_t oldest = s.band ? std::max(int64_t(0), seen - rows - s.memory + 1) : 0;  // key of the first row
    int64_t farthest = s.band ? std::max(skipped, (s.panels() * PANEL - s.memory) / PANEL) : skipped;
    for (int64_t panel = std::max(farthest, int64_t(0)); panel < s.panels(); panel++)
        tiles::product(room.position.data(), D, distances + panel * PANEL * D, PANEL,
                       scores + (panel - skipped) * PANEL, step, rows, PANEL, D, false);
    T *shifted = scores + off;  // row i begins at shifted + i (step - 1)
    for (int64_t key = oldest / PANEL * PANEL; key < seen; key += PANEL)
        tiles::product(room.content.data(), D, room.keys.data() + key * D, PANEL, shifted + key, step - 1, rows, PANEL,
                       D, true);
    for (int64_t i = 0; i < rows; i++) {
        T *row = shifted + i * (step - 1);
        int64_t end = seen - rows + i + 1, low = s.band ? std::max(int64_t(0), end - s.memory) : 0;
        int64_t count = padded(end - low);
        std::fill(row + end, row + low + count, -std::numeric_limits<T>::infinity());
        T most = tiles::largest(row + low, count, -std::numeric_limits<T>::infinity());
        room.sum[i] = tiles::powers(row + low, count, most);
        std::fill(row + oldest / PANEL * PANEL, row + low, T(0));
        if (low + count < seen) std::fill(row + low + count, row + seen, T(0));
    }
    for (int64_t key = oldest / PANEL * PANEL; key < seen; key += PANEL)
        tiles::product(shifted + key, step - 1, room.values.data() + key * wide, wide, room.mixed.data(), wide, rows,
                       wide, std::min(PANEL, seen - key), key > oldest / PANEL * PANEL);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < D; d++) out.at(item, first + i)[d] = room.mixed[i * wide + d] / room.sum[i];
}

// Keys transposed in panels, values row by row: entries, then rows.
template <typename T>
void pack(Room<T> &room, const Sizes &s, const Piece &p, int64_t item, const Stream<const T> &k,
          const Stream<const T> &v, const Stream<const T> &far_k, const Stream<const T> &far_v) {
    int64_t D = s.width, wide = padded(D), seen = p.entries + s.past + p.end - p.begin;
    int64_t whole = (seen + PANEL - 1) / PANEL * PANEL;
    room.keys.resize(std::max<int64_t>(room.keys.size(), whole * D));
    room.values.resize(std::max<int64_t>(room.values.size(), whole * wide));
    std::vector<T> joined(PANEL * D);
    for (int64_t key = 0; key < seen; key += PANEL) {
        int64_t size = std::min(PANEL, seen - key);
        for (int64_t j = 0; j < size; j++) {
            int64_t c = key + j;
            bool entry = c < p.entries;
            const T *one = entry ? far_k.at(item, p.entry + c) : k.at(item, p.begin + c - p.entries);
            const T *other = entry ? far_v.at(item, p.entry + c) : v.at(item, p.begin + c - p.entries);
            std::memcpy(joined.data() + j * D, one, D * sizeof(T));
            std::memcpy(room.values.data() + c * wide, other, D * sizeof(T));
            std::fill(room.values.data() + c * wide + D, room.values.data() + (c + 1) * wide, T(0));
        }
        tiles::transpose(joined.data(), D, room.keys.data() + key * D, PANEL, size, D);
    }
}

template <typename T>
void attend(Sizes s, Stream<const T> content, Stream<const T> position, Stream<const T> k, Stream<const T> v,
            Stream<const T> r, Stream<const T> far_k, Stream<const T> far_v, Stream<T> out, T *distances, T scale,
            int threads) {
    std::vector<Piece> all = pieces(s);
    int64_t heads = s.items / s.batch, missing = s.panels() * PANEL - s.distances;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t number = 0; number < heads * s.panels(); number++) {
            int64_t head = number / s.panels(), panel = number % s.panels();
            T *to = distances + number * PANEL * s.width;
            for (int64_t j = 0; j < PANEL; j++) {
                int64_t row = panel * PANEL + j - missing;  // none beyond the farthest
                for (int64_t d = 0; d < s.width; d++) to[d * PANEL + j] = row < 0 ? T(0) : r.at(head, row)[d];
            }
        }
        Room<T> room;
        room.content.resize(PANEL * s.width);
        room.position.resize(PANEL * s.width);
        room.mixed.resize(PANEL * padded(s.width));
        room.sum.resize(PANEL);
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < s.items * int64_t(all.size()); number++) {
            const Piece &p = all[all.size() - 1 - number / s.items];  // the latest see most
            int64_t item = number % s.items, head = item / s.batch;
            pack(room, s, p, item, k, v, far_k, far_v);
            for (int64_t first = p.first; first < p.end; first += PANEL)
                attend_rows(room, s, p, item, first, std::min(PANEL, p.end - first), content, position,
                            distances + head * s.panels() * PANEL * s.width, out, scale);
        }
    }
}

}  // namespace

#define ATTEND(NAME, T)                                                                                               \
    extern "C" void NAME(const T *content, const T *position, const T *k, const T *v, const T *r, const T *far_k,     \
                         const T *far_v, T *out, T *distances, const int64_t *by, const int64_t *sizes, double scale, \
                         int threads) {                                                                               \
        Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],  sizes[5], sizes[6],                                \
                sizes[7], sizes[8], sizes[9], sizes[10], sizes[11], sizes[12]};                                       \
        attend<T>(s, {content, by[0], by[1]}, {position, by[2], by[3]}, {k, by[4], by[5]}, {v, by[6], by[7]},         \
                  {r, by[8], by[9]}, {far_k, by[10], by[11]}, {far_v, by[12], by[13]}, {out, by[14], by[15]},         \
                  distances, T(scale), threads);                                                                      \
    }
ATTEND(attend_float32, float)
ATTEND(attend_float64, double)
