// What every native kernel asks of a compiler: the machine's instructions, vectors, OpenMP and the standard library.

#include <vector>

#include "tiles.hpp"

extern "C" void probe(float *x, int64_t n) {
    std::vector<float> powers(n);
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) powers[i] = tiles::power(x[i]);
    std::copy(powers.begin(), powers.end(), x);
}
