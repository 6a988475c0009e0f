// Matrix products of a task in float32: each block is converted once and then multiplied with all rows.

#pragma once

#include "step.h"

namespace {

// Products of queries, keys and values of type T. `Tiled` has the same interface.
template <typename T> class Widened {
  public:
    using Element = T;
    // Rows and columns of a product are multiples of these.
    static constexpr int64_t ROWS = TILE, COLUMNS = LANES;
    // Held by a thread while it computes.
    struct Unit {};

    Widened(const TreeAttention &step, int64_t rows, int64_t most_columns, Scratch &scratch)
        : head_size(step.head_size), scale(step.scale), query(scratch.query.reserve<float>(rows * head_size)),
          keys(scratch.keys.reserve<float>(most_columns * head_size)),
          values(scratch.values.reserve<float>(most_columns * head_size)) {
        std::fill_n(query, rows * head_size, 0.0f);
    }

    void take_query(int64_t row, const T *from) {
        for (int64_t d = 0; d < head_size; d++) query[row * head_size + d] = scale * widen(from[d]);
    }

    // keys: [D, size], values: [size, D], of which the first `valid` are multiplied.
    void take_block(const T *block, int64_t size, int64_t valid) {
        widen_all(block, size * head_size, keys);
        widen_all(block + size * head_size, size * head_size, values);
        columns = size, depth = valid;
    }

    void start_own(int64_t count) {
        columns = round_up(count, LANES), depth = count;
        std::fill_n(keys, columns * head_size, 0.0f);
    }

    void take_own(int64_t column, const T *key, const T *value) {
        for (int64_t d = 0; d < head_size; d++) keys[d * columns + column] = widen(key[d]);
        widen_all(value, head_size, values + column * head_size);
    }

    void score(int64_t row, Matrix scores) {
        std::fill_n(scores.data, ROWS * scores.stride, 0.0f);
        multiply({query + row * head_size, head_size}, {keys, columns}, head_size, scores.stride, scores);
    }

    void attend(Matrix weights, Matrix attended) {
        // Beyond `depth` the cache is uninitialised and may hold NaN.
        multiply(weights, {values, head_size}, depth, head_size, attended);
    }

  private:
    const int64_t head_size;
    const float scale;
    float *const query, *const keys, *const values;
    int64_t columns = 0, depth = 0;
};

} // namespace
