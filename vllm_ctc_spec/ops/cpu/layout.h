// How keys and values lie in vLLM's CPU cache, and how their elements are converted to and from float32.
//
// Everything in these headers has internal linkage, so that the compiler may inline it.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LANES = 16;

inline int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline int64_t round_up(int64_t count, int64_t multiple) { return divide_up(count, multiple) * multiple; }

// Index of an element of a matrix [rows, columns] of the cache: row by row, or, if tiled, in AMX's order
// [columns / 16, rows / 2, 16, 2].
inline int64_t place(bool is_tiled, int64_t row, int64_t column, int64_t rows, int64_t columns) {
    if (!is_tiled) return row * columns + column;
    return column / LANES * LANES * rows + row / 2 * 2 * LANES + column % LANES * 2 + row % 2;
}

struct BFloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(_Float16 x) { return static_cast<float>(x); }
inline float widen(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline void narrow(float x, float *to) { *to = x; }
inline void narrow(float x, _Float16 *to) { *to = static_cast<_Float16>(x); }
inline void narrow(float x, BFloat16 *to) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // Round to nearest, ties to even.
    to->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename T> void widen_all(const T *__restrict from, int64_t count, float *__restrict to) {
    for (int64_t index = 0; index < count; index++) to[index] = widen(from[index]);
}

} // namespace
