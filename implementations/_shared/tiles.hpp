// Matrix products of small blocks that lie in the caches, and powers of two: what native kernels of attention share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace tiles {

constexpr int64_t PAD = 16;  // columns of a right-hand side are a multiple of this, whatever the machine's vectors hold
constexpr int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

// As many sums as registers hold, beside a row of the right-hand side and one number of the left.
#if defined(__AVX512F__)
constexpr int BYTES = 64, ROWS = 6, VECTORS = 4;
#elif defined(__AVX__)
constexpr int BYTES = 32, ROWS = 6, VECTORS = 2;
#else
constexpr int BYTES = 16, ROWS = 4, VECTORS = 4;
#endif

template <typename T>
struct Lanes {
    typedef T type __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
    static constexpr int64_t width = BYTES / sizeof(T);
};
template <typename T>
using Vector = typename Lanes<T>::type;

// The upper half of a float.
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

// What a product multiplies: one number of a row on the left, and a vector of them on the right.
template <typename T>
struct Numbers {
    typedef T left, right, sum;
    typedef Vector<T> vector;
    static T one(const T *at) { return *at; }
    static Vector<T> add(Vector<T> sum, T one, vector row) { return sum + one * row; }
};

// Two neighbours in bfloat16 as one number: where units are made for it, both are multiplied and added to one sum.
typedef uint32_t pair;

#ifdef __AVX512BF16__
constexpr bool PAIRED = true;
struct Pairs {
    typedef bfloat16 left;
    typedef pair right;
    typedef float sum;
    typedef pair vector __attribute__((vector_size(BYTES), aligned(4), may_alias));
    static __m512i one(const bfloat16 *at) {
        int32_t both;
        std::memcpy(&both, at, 4);
        return _mm512_set1_epi32(both);
    }
    static Vector<float> add(Vector<float> sum, __m512i one, vector row) {
        return _mm512_dpbf16_ps(sum, (__m512bh)one, (__m512bh)row);
    }
};
#else
constexpr bool PAIRED = false;
typedef Numbers<float> Pairs;
#endif

// c = a b, or c += a b, for R rows and C vectors; a row's numbers lie ``step`` apart.
template <typename E, int R, int C>
inline void tile(const typename E::left *a, int64_t lda, int64_t step, const typename E::right *b, int64_t ldb,
                 typename E::sum *c, int64_t ldc, int64_t depth, bool add) {
    typedef Vector<typename E::sum> Sum;
    constexpr int64_t W = Lanes<typename E::sum>::width;
    Sum sum[R][C];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) sum[i][j] = add ? *reinterpret_cast<const Sum *>(c + i * ldc + j * W) : Sum{};
    for (int64_t d = 0; d < depth; d++) {
        typename E::vector row[C];
        for (int j = 0; j < C; j++) row[j] = *reinterpret_cast<const typename E::vector *>(b + d * ldb + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            auto one = E::one(a + i * lda + d * step);
            for (int j = 0; j < C; j++) sum[i][j] = E::add(sum[i][j], one, row[j]);
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) *reinterpret_cast<Sum *>(c + i * ldc + j * W) = sum[i][j];
}

template <typename E, int R, int C>
inline void strip(const typename E::left *a, int64_t lda, int64_t step, const typename E::right *b, int64_t ldb,
                  typename E::sum *c, int64_t ldc, int64_t rows, int64_t depth, bool add) {
    int64_t i = 0;
    for (; i + R <= rows; i += R) tile<E, R, C>(a + i * lda, lda, step, b, ldb, c + i * ldc, ldc, depth, add);
    for (; i + 4 <= rows; i += 4) tile<E, 4, C>(a + i * lda, lda, step, b, ldb, c + i * ldc, ldc, depth, add);
    for (; i < rows; i++) tile<E, 1, C>(a + i * lda, lda, step, b, ldb, c + i * ldc, ldc, depth, add);
}

// c[rows, columns] = a[rows, depth] b[depth, columns], added where asked; columns are a multiple of PAD.
template <typename E>
void product_of(const typename E::left *a, int64_t lda, int64_t step, const typename E::right *b, int64_t ldb,
                typename E::sum *c, int64_t ldc, int64_t rows, int64_t columns, int64_t depth, bool add) {
    constexpr int64_t W = Lanes<typename E::sum>::width;
    int64_t j = 0;
    for (; j + VECTORS * W <= columns; j += VECTORS * W)
        strip<E, ROWS, VECTORS>(a, lda, step, b + j, ldb, c + j, ldc, rows, depth, add);
    for (; j < columns; j += W) strip<E, ROWS, 1>(a, lda, step, b + j, ldb, c + j, ldc, rows, depth, add);
}

template <typename T>
void product(const T *a, int64_t lda, const T *b, int64_t ldb, T *c, int64_t ldc, int64_t rows, int64_t columns,
             int64_t depth, bool add) {
    product_of<Numbers<T>>(a, lda, 1, b, ldb, c, ldc, rows, columns, depth, add);
}

// to[d, j] = from[j, d] for ``size`` rows of ``width`` numbers; ``ldt`` columns, of which 0 fills those beyond.
template <typename T>
void transpose(const T *from, int64_t step, T *to, int64_t ldt, int64_t size, int64_t width) {
    for (int64_t begin = 0; begin < width; begin += 16) {
        int64_t end = std::min(begin + 16, width);
        for (int64_t j = 0; j < size; j++)
            for (int64_t d = begin; d < end; d++) to[d * ldt + j] = from[j * step + d];
        for (int64_t d = begin; d < end; d++)
            for (int64_t j = size; j < ldt; j++) to[d * ldt + j] = T(0);
    }
}

// 2^x for x <= 0, and 0 below the least normal number. The polynomial of 2^f is the best of its degree.
inline Vector<float> powers(Vector<float> x) {
    typedef int32_t Whole __attribute__((vector_size(BYTES)));
    Vector<float> bounded = x < -126.0f ? Vector<float>{} - 127.0f : x;  // 2^-127 has the bits of 0
    Whole whole = __builtin_convertvector(bounded - 0.5f, Whole);        // to the nearest: the rest is cut off
    Vector<float> f = bounded - __builtin_convertvector(whole, Vector<float>);
    Vector<float> p = f * 1.535336188e-4f + 1.339887440e-3f;
    p = p * f + 9.618437358e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472029e-1f;
    p = p * f + 1.0f;
    return p * (Vector<float>)((whole + 127) << 23);
}
inline Vector<double> powers(Vector<double> x) {
    for (int64_t i = 0; i < Lanes<double>::width; i++) x[i] = std::exp2(x[i]);
    return x;
}

template <typename T>
T power(T x) {
    return powers(Vector<T>{} + x)[0];
}

// The largest of a row of a multiple of PAD numbers, and not less than ``most``.
template <typename T>
T largest(const T *row, int64_t count, T most) {
    constexpr int64_t W = Lanes<T>::width;
    Vector<T> top = Vector<T>{} + most;
    for (int64_t j = 0; j < count; j += W) {
        Vector<T> x = *reinterpret_cast<const Vector<T> *>(row + j);
        top = x > top ? x : top;
    }
    for (int64_t i = 0; i < W; i++) most = std::max(most, top[i]);
    return most;
}

// 2^(x - most) in the place of x, for a multiple of PAD numbers; their sum.
template <typename T>
T powers(T *row, int64_t count, T most) {
    constexpr int64_t W = Lanes<T>::width;
    Vector<T> sum{};
    for (int64_t j = 0; j < count; j += W) {
        Vector<T> p = powers(*reinterpret_cast<const Vector<T> *>(row + j) - most);
        *reinterpret_cast<Vector<T> *>(row + j) = p;
        sum += p;
    }
    T all = 0;
    for (int64_t i = 0; i < W; i++) all += sum[i];
    return all;
}

}  // namespace tiles
