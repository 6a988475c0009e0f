// Matrix products of a task by AMX in bfloat16, for which the cache is laid out in AMX's tiles.
//
// Softmax weights are rounded to bfloat16, as vLLM's own kernel does (csrc/cpu/cpu_attn_amx.hpp).

#pragma once

#ifdef __AMX_BF16__

#include <immintrin.h>

#include "step.h"

namespace {

// The five tile registers in use: 16 rows of 64 bytes each.
struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64};
    uint8_t num_rows[16] = {16, 16, 16, 16, 16};
};

// A bfloat16 matrix: row by row, with `stride` elements from row to row; or, as the right operand of a product, in
// AMX's layout, with `stride` rows.
struct Narrow {
    const BFloat16 *data;
    int64_t stride;
};

// to [16, 32] += a [16, depth] b [depth, 32]; depth is a multiple of 32.
inline void multiply_tiles(Narrow a, Narrow b, int64_t depth, Matrix to) {
    // The compiler does not know that loading a tile reads memory.
    asm volatile("" ::: "memory");
    const int64_t to_bytes = 4 * to.stride;
    _tile_loadd(0, to.data, to_bytes);
    _tile_loadd(1, to.data + LANES, to_bytes);
    for (int64_t k = 0; k < depth; k += 2 * LANES, b.data += 2 * LANES * LANES) {
        _tile_loadd(2, a.data + k, 2 * a.stride);
        _tile_loadd(3, b.data, 64);
        _tile_loadd(4, b.data + LANES * b.stride, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
    }
    _tile_stored(0, to.data, to_bytes);
    _tile_stored(1, to.data + LANES, to_bytes);
}

// See `Widened`.
class Tiled {
  public:
    using Element = BFloat16;
    static constexpr int64_t ROWS = LANES, COLUMNS = 2 * LANES;
    class Unit {
      public:
        Unit() {
            static constexpr TileShapes SHAPES;
            _tile_loadconfig(&SHAPES);
        }
        ~Unit() { _tile_release(); }
    };

    Tiled(const TreeAttention &step, int64_t rows, int64_t most_columns, Scratch &scratch)
        : head_size(step.head_size), scale(step.scale), query(scratch.query.reserve<BFloat16>(rows * head_size)),
          own_keys(scratch.keys.reserve<BFloat16>(most_columns * head_size)),
          own_values(scratch.values.reserve<BFloat16>(most_columns * head_size)),
          narrowed(scratch.weights.reserve<BFloat16>(ROWS * most_columns)) {
        std::fill_n(query, rows * head_size, BFloat16{});
    }

    void take_query(int64_t row, const BFloat16 *from) { std::copy_n(from, head_size, query + row * head_size); }

    void take_block(const BFloat16 *block, int64_t size, int64_t valid) {
        keys = block, values = block + size * head_size, columns = size, whole = valid / COLUMNS * COLUMNS;
        if (valid == whole) return;
        // Beyond `valid` the cache is uninitialised and may hold NaN.
        const int64_t rest = valid - whole;
        std::fill_n(own_values, COLUMNS * head_size, BFloat16{});
        for (int64_t d = 0; d < head_size; d += LANES) {
            const BFloat16 *from = values + d * columns + whole * LANES;
            BFloat16 *to = own_values + d * COLUMNS;
            std::copy_n(from, round_up(rest, 2) * LANES, to);
            for (int64_t lane = 0; rest % 2 && lane < LANES; lane++) to[(rest - 1) * LANES + 2 * lane + 1] = {};
        }
    }

    void start_own(int64_t count) {
        keys = own_keys, values = own_values, columns = whole = round_up(count, COLUMNS);
        std::fill_n(own_keys, columns * head_size, BFloat16{});
        std::fill_n(own_values, columns * head_size, BFloat16{});
    }

    void take_own(int64_t column, const BFloat16 *key, const BFloat16 *value) {
        BFloat16 *to = own_keys + place(true, 0, column, head_size, columns);
        for (int64_t d = 0; d < head_size; d += 2) std::copy_n(key + d, 2, to + d * LANES);
        to = own_values + place(true, column, 0, columns, head_size);
        for (int64_t d = 0; d < head_size; d += LANES)
            for (int64_t lane = 0; lane < LANES; lane++) to[d * columns + 2 * lane] = value[d + lane];
    }

    void score(int64_t row, Matrix scores) {
        std::fill_n(scores.data, ROWS * scores.stride, 0.0f);
        for (int64_t column = 0; column < scores.stride; column += COLUMNS)
            multiply_tiles({query + row * head_size, head_size}, {keys + column * head_size, head_size}, head_size,
                           scores.column(column));
        for (int64_t index = 0; index < ROWS * scores.stride; index++) scores.data[index] *= scale;
    }

    void attend(Matrix weights, Matrix attended) {
        const int64_t width = weights.stride;
        for (int64_t index = 0; index < ROWS * width; index++) narrow(weights.data[index], narrowed + index);
        for (int64_t d = 0; d < head_size; d += COLUMNS) {
            multiply_tiles({narrowed, width}, {values + d * columns, columns}, std::min(whole, width),
                           attended.column(d));
            if (whole < width)
                multiply_tiles({narrowed + whole, width}, {own_values + d * COLUMNS, COLUMNS}, COLUMNS,
                               attended.column(d));
        }
    }

  private:
    const int64_t head_size;
    const float scale;
    BFloat16 *const query, *const own_keys, *const own_values, *const narrowed;
    // Of the current block. If its length is no multiple of COLUMNS, its values from `whole` on are in own_values.
    const BFloat16 *keys = nullptr, *values = nullptr;
    int64_t columns = 0, whole = 0;
};

} // namespace

#endif
