// Softmax of every row of scores in place, while they lie in the caches: what is hidden becomes 0.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

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
        uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
        bits = uint16_t(x == x ? rounded : 0x7fc0);
        return *this;
    }
};

// 2^x for x <= 0, and 0 below the least normal number. The series of 2^f ends below half a unit of the last place.
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

template <typename T, typename Wide>
void one_row(T *row, int64_t front, int64_t begin, int64_t end, int64_t columns, Wide scale, Wide *held) {
    Wide most = -std::numeric_limits<Wide>::infinity();
    const T *run = row;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < front; j++) most = std::max(most, Wide(run[j]));
#pragma omp simd reduction(max : most)
    for (int64_t j = begin; j < end; j++) most = std::max(most, Wide(run[j]));
    Wide shift = most == -std::numeric_limits<Wide>::infinity() ? Wide(0) : most * scale;
    Wide sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < front; j++) {
        Wide p = power(Wide(run[j]) * scale - shift);
        held[j] = p;
        sum += p;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < end; j++) {
        Wide p = power(Wide(run[j]) * scale - shift);
        held[j] = p;
        sum += p;
    }
    Wide share = Wide(1) / sum;
#pragma omp simd
    for (int64_t j = 0; j < front; j++) row[j] = held[j] * share;
    for (int64_t j = front; j < begin; j++) row[j] = Wide(0);
#pragma omp simd
    for (int64_t j = begin; j < end; j++) row[j] = held[j] * share;
    for (int64_t j = end; j < columns; j++) row[j] = Wide(0);
}

template <typename T, typename Wide>
void all_rows(T *scores, int64_t items, int64_t rows, int64_t columns, int64_t front, int64_t low, int64_t high,
              Wide scale, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Wide *held = sizeof(T) == sizeof(Wide) ? nullptr : new Wide[columns];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < items * rows; i++) {
            int64_t t = i % rows;
            T *row = scores + i * columns;
            int64_t begin = std::min(columns, front + std::max(int64_t(0), t + low));
            int64_t end = std::max(begin, std::min(columns, front + t + high + 1));
            one_row<T, Wide>(row, front, begin, end, columns, scale, held ? held : reinterpret_cast<Wide *>(row));
        }
        delete[] held;
    }
}

}  // namespace

extern "C" {
void band_softmax_float32(float *s, int64_t g, int64_t n, int64_t m, int64_t front, int64_t low, int64_t high, double scale, int threads) {
    all_rows<float, float>(s, g, n, m, front, low, high, float(scale), threads);
}
void band_softmax_bfloat16(bfloat16 *s, int64_t g, int64_t n, int64_t m, int64_t front, int64_t low, int64_t high, double scale, int threads) {
    all_rows<bfloat16, float>(s, g, n, m, front, low, high, float(scale), threads);
}
void band_softmax_float64(double *s, int64_t g, int64_t n, int64_t m, int64_t front, int64_t low, int64_t high, double scale, int threads) {
    all_rows<double, double>(s, g, n, m, front, low, high, scale, threads);
}
}
