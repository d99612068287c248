// The largest of a row of numbers, exactly; of equal ones the first columns, in ascending order. NaN is the largest.
//
// Numbers are compared as integers in their order. A block of columns has a vector of maxima, one a lane; maxima of a
// few blocks make groups, at least twice as many as numbers are wanted. The count-th largest group is a bound that
// count numbers reach at least, and of the others few do: only they are ranked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace largest {

constexpr int BYTES = 64;  // of a vector; narrower machines take it in pieces
constexpr int64_t BLOCK = 64;  // columns

template <class Int>
struct Kind {
    using Bits = std::make_unsigned_t<Int>;
    static constexpr int lanes = BYTES / sizeof(Int), vectors = BLOCK / lanes;
    static constexpr Int least = std::numeric_limits<Int>::min();
    typedef Int Vector __attribute__((vector_size(BYTES)));
    typedef Bits Raw __attribute__((vector_size(BYTES)));
    typedef signed char Flags __attribute__((vector_size(lanes)));

    static Vector at(const Int *place) {
        Vector found;
        std::memcpy(&found, place, BYTES);
        return found;
    }
};

// Integers in the order of floats with so many bits of mantissa: zeros are equal, -inf is the least one, NaNs are
// above infinity, those with a sign because they wrap around.
template <class Int>
struct Order {
    using K = Kind<Int>;
    using Bits = typename K::Bits;
    Bits below;

    explicit Order(int mantissa) : below(static_cast<Bits>(Bits{1} << mantissa)) {}

    typename K::Vector operator()(typename K::Vector bits) const {
        const auto sign = bits >> static_cast<Int>(8 * sizeof(Int) - 1);
        const auto magnitude = bits ^ (sign & std::numeric_limits<Int>::max());
        return (typename K::Vector)((typename K::Raw)magnitude - (typename K::Raw)sign - below);
    }

    Int operator()(Int bits) const {
        typename K::Vector v = {bits};
        return (*this)(v)[0];
    }

    // The bits of what stands at this place.
    Int back(Int key) const {
        const Bits bits = static_cast<Bits>(key) + below, sign = Bits{1} << (8 * sizeof(Int) - 1);
        return static_cast<Int>(bits & sign ? (Bits{0} - bits) | sign : bits);
    }
};

template <class V>
V larger(V a, V b) {
    return a > b ? a : b;
}

template <class V>
V smaller(V a, V b) {
    return a < b ? a : b;
}

template <class Int, int bytes, class V>
int64_t sum(const V& v) {
    if constexpr (bytes == sizeof(Int)) {
        return v[0];
    } else {
        typedef Int Half __attribute__((vector_size(bytes / 2)));
        Half halves[2];
        std::memcpy(halves, &v, bytes);
        return sum<Int, bytes / 2>(halves[0] + halves[1]);
    }
}

// How many keys are at least so large.
template <class Int>
int64_t reaching(const Int *keys, int64_t n, Int bound) {
    using K = Kind<Int>;
    constexpr int64_t most = 1 << 14;  // 16 bits hold their count
    int64_t total = 0;
    for (int64_t begin = 0; begin < n; begin += most) {
        typename K::Vector counts = {};
        for (int64_t i = begin; i < std::min(n, begin + most); i += K::lanes) counts -= K::at(keys + i) >= bound;
        total += sum<Int, BYTES>(counts);
    }
    return total;
}

// The count-th largest of n keys, whole vectors of them, by bisection.
template <class Int>
Int ranked(const Int *keys, int64_t n, int64_t count) {
    using K = Kind<Int>;
    using Bits = typename K::Bits;
    auto high = K::at(keys), low = high;
    for (int64_t i = K::lanes; i < n; i += K::lanes) {
        high = larger(high, K::at(keys + i));
        low = smaller(low, K::at(keys + i));
    }
    Int top = high[0], bottom = low[0];
    for (int lane = 1; lane < K::lanes; lane++) {
        top = std::max<Int>(top, high[lane]);
        bottom = std::min<Int>(bottom, low[lane]);
    }
    while (bottom < top) {  // bottom is reached by count keys, what follows top by fewer
        const Bits gap = static_cast<Bits>(static_cast<Bits>(top) - static_cast<Bits>(bottom));
        const Int middle = static_cast<Int>(static_cast<Bits>(bottom) + gap / 2 + gap % 2);
        const int64_t found = reaching(keys, n, middle);
        if (found == count) return middle;
        const bool more = found > count;
        bottom = more ? middle : bottom;
        top = more ? top : static_cast<Int>(middle - 1);
    }
    return bottom;
}

typedef int32_t Eight __attribute__((vector_size(32)));

// Of eight flags as bits, where the set ones are.
struct Places {
    Eight at[256] = {};
    uint8_t count[256] = {};
    Places() {
        for (int bits = 0; bits < 256; bits++)
            for (int i = 0; i < 8; i++)
                if (bits >> i & 1) at[bits][count[bits]++] = i;
    }
};
inline const Places PLACES;

// Puts a block of floats in their order where they lie, hides columns beyond begin .. end, and notes its maxima.
template <class Int>
void put_in_order(Order<Int> order, Int *block, int64_t begin, int64_t end, Int *top) {
    using K = Kind<Int>;
    typename K::Vector most = typename K::Vector{} + K::least;
    for (int v = 0; v < K::vectors; v++) {
        auto keys = order(K::at(block + v * K::lanes));
        if (begin > 0 || end < BLOCK)
            for (int lane = 0; lane < K::lanes; lane++) {
                const int64_t column = v * K::lanes + lane;
                if (column < begin || column >= end) keys[lane] = K::least;
            }
        std::memcpy(block + v * K::lanes, &keys, BYTES);
        most = larger(most, keys);
    }
    std::memcpy(top, &most, BYTES);
}

template <class Int>
class Selection {
    using K = Kind<Int>;
    using Vector = typename K::Vector;
    std::vector<Int> keys;
    std::vector<int32_t> at, hits;

public:
    explicit Selection(int64_t most_blocks)
        : keys(most_blocks * BLOCK), at(most_blocks * BLOCK + 8), hits(most_blocks + 1) {}

    // The columns of the count largest, among columns begin .. end, of a row of so many blocks; ``tops`` has the maxima
    // of each block.
    const int32_t *of(const Int *row, const Int *tops, int64_t blocks, int64_t begin, int64_t end, int64_t count) {
        const int64_t step = blocks * K::lanes / (2 * count);  // blocks a group
        const Int bound = step ? bounded(tops, blocks, step, count) : K::least;
        int64_t found = 0;
        int64_t reached = 0;
        for (int64_t block = 0; block < blocks; block++) {
            hits[reached] = block;
            reached += !step | any(K::at(tops + block * K::lanes) >= bound);
        }
        for (int64_t hit = 0; hit < reached; hit++) found = collect(row, hits[hit] * BLOCK, bound, found);
        if (bound == K::least) {  // what is hidden reaches it too
            const auto last = std::remove_if(at.begin(), at.begin() + found,
                                             [=](int32_t column) { return column < begin || column >= end; });
            found = last - at.begin();
        }
        if (found > count) thin(row, found, count);
        return at.data();
    }

private:
    static bool any(const Vector& reached) {
        const auto flags = __builtin_convertvector(reached, typename K::Flags);
        uint64_t words[K::lanes / 8], all = 0;
        std::memcpy(words, &flags, K::lanes);
        for (uint64_t word : words) all |= word;
        return all;
    }

    // What count values reach at least.
    Int bounded(const Int *tops, int64_t blocks, int64_t step, int64_t count) {
        int64_t groups = 0;
        for (int64_t first = 0; first < blocks; first += step) {
            Vector group = Vector{} + K::least;
            for (int64_t block = first; block < std::min(blocks, first + step); block++)
                group = larger(group, K::at(tops + block * K::lanes));
            std::memcpy(&keys[groups], &group, BYTES);
            groups += K::lanes;
        }
        return ranked(keys.data(), groups, count);
    }

    // Appends the columns of a block that reach the bound.
    int64_t collect(const Int *row, int64_t column, Int bound, int64_t found) {
        uint64_t flags[BLOCK / 8];
        for (int v = 0; v < K::vectors; v++) {
            const auto narrow = __builtin_convertvector(K::at(row + column + v * K::lanes) >= bound, typename K::Flags);
            std::memcpy(reinterpret_cast<char*>(flags) + v * K::lanes, &narrow, K::lanes);
        }
        for (int64_t word = 0; word < BLOCK / 8; word++) {
            const auto bits = ((flags[word] & 0x0101010101010101u) * 0x0102040810204080u) >> 56;
            const Eight columns = PLACES.at[bits] + static_cast<int32_t>(column + 8 * word);
            std::memcpy(&at[found], &columns, sizeof columns);
            found += PLACES.count[bits];
        }
        return found;
    }

    // Keeps the count largest of those found, and the first of equal ones.
    void thin(const Int *row, int64_t found, int64_t count) {
        int64_t filled = found;
        for (int64_t i = 0; i < found; i++) keys[i] = row[at[i]];
        while (filled % K::lanes) keys[filled++] = K::least;
        const Int bound = ranked(keys.data(), filled, count);
        int64_t equal = count, kept = 0;
        for (int64_t i = 0; i < found; i++) equal -= keys[i] > bound;
        for (int64_t i = 0; i < found; i++) {
            const bool tie = keys[i] == bound;
            at[kept] = at[i];
            kept += (keys[i] > bound) | (tie & (equal > 0));
            equal -= tie;
        }
    }
};

}  // namespace largest
