// Float32 arithmetic on vectors of 16: exponentials, matrix products, and a row's online softmax.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "layout.h"

namespace {

constexpr int64_t TILE = 4;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
// GCC splits them where the processor's vectors are narrower.
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));

inline Vec *vectors(float *at) { return reinterpret_cast<Vec *>(at); }

// e^x for x <= 0: 2^n times a polynomial (Cephes, expf.c). Zero where it would be below the smallest normal number.
inline Vec exponential(Vec x) {
    constexpr float ROUND = 12582912.0f;
    const Vec clamped = x < -87.0f ? Vec{} - 87.0f : x;
    const Vec n = (clamped * 1.44269504f + ROUND) - ROUND;
    const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec y = Vec{} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const Int power = (__builtin_convertvector(n, Int) + 127) << 23;
    return x < -87.0f ? Vec{} : y * reinterpret_cast<Vec>(power);
}

inline float exponential(float x) { return exponential(Vec{} + x)[0]; }

// cap * tanh(x / cap), in place; count is a multiple of LANES.
inline void bound(float *scores, int64_t count, float cap) {
    for (int64_t v = 0; v < count / LANES; v++) {
        const Vec x = vectors(scores)[v];
        const Vec fading = exponential((x < 0.0f ? x : -x) * (2.0f / cap));
        const Vec bounded = cap * (1.0f - fading) / (1.0f + fading);
        vectors(scores)[v] = x < 0.0f ? -bounded : bounded;
    }
}

struct Matrix {
    float *data;
    int64_t stride;

    float *row(int64_t index) const { return data + index * stride; }
    Matrix column(int64_t index) const { return {data + index, stride}; }
};

// to [TILE, columns] += a [TILE, depth] b [depth, columns], for `VECTORS` vectors of columns.
template <int VECTORS> inline void multiply_columns(Matrix a, Matrix b, int64_t depth, Matrix to) {
    Vec sum[TILE][VECTORS];
    for (int row = 0; row < TILE; row++)
        for (int v = 0; v < VECTORS; v++) sum[row][v] = vectors(to.row(row))[v];
    for (int64_t k = 0; k < depth; k++, b.data += b.stride) {
        for (int v = 0; v < VECTORS; v++) {
            const Vec own = vectors(b.data)[v];
            for (int row = 0; row < TILE; row++) sum[row][v] += a.data[row * a.stride + k] * own;
        }
    }
    for (int row = 0; row < TILE; row++)
        for (int v = 0; v < VECTORS; v++) vectors(to.row(row))[v] = sum[row][v];
}

// The same for all `width` columns, a multiple of LANES.
void multiply(Matrix a, Matrix b, int64_t depth, int64_t width, Matrix to) {
    int64_t column = 0;
    for (; column + 4 * LANES <= width; column += 4 * LANES)
        multiply_columns<4>(a, b.column(column), depth, to.column(column));
    for (; column < width; column += LANES) multiply_columns<1>(a, b.column(column), depth, to.column(column));
}

// One block of a row's online softmax: turns scores [width] into weights in place, and rescales what the earlier blocks
// left in attended [head_size] and sum, if the largest score has grown.
void absorb(float *scores, int64_t width, float *attended, int64_t head_size, float &largest, float &sum) {
    Vec peak = vectors(scores)[0];
    for (int64_t v = 1; v < width / LANES; v++) {
        const Vec own = vectors(scores)[v];
        peak = own > peak ? own : peak;
    }
    float now = largest;
    for (int lane = 0; lane < LANES; lane++) now = std::max(now, peak[lane]);
    if (now == NOTHING) {
        std::fill_n(scores, width, 0.0f);
        return;
    }
    Vec total = {};
    for (int64_t v = 0; v < width / LANES; v++) total += vectors(scores)[v] = exponential(vectors(scores)[v] - now);
    const float faded = exponential(largest - now);
    sum *= faded;
    for (int lane = 0; lane < LANES; lane++) sum += total[lane];
    for (int64_t d = 0; d < head_size; d++) attended[d] *= faded;
    largest = now;
}

} // namespace
