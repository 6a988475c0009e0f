// Tree attention over vLLM's paged CPU cache, and the K/V move in it; cpu_kernels.py compiles and calls both, and says
// what the arguments are.
//
// A task of attention is one request, one key-value head and a part of the context: its rows, the query heads of the
// key-value head folded in, run over the blocks with an online softmax. The step's own keys and values, under the
// ancestor masks, are one more block after the context. Of the products with a block there are two kinds: `Widened`
// makes float32 of it, once for all rows; `Tiled` leaves it to AMX, in whose layout the cache is then, and rounds
// weights to bfloat16, as vLLM's own kernel does (csrc/cpu/cpu_attn_amx.hpp).
//
// Letters: R requests, H query heads, K key-value heads, G = H / K, D head size, B block size.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <omp.h>
#include <vector>

#ifdef __AMX_BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16, TILE = 4;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
// Whatever the width of the processor's own vectors.
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));

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
    // To the nearest, ties to even.
    to->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename T> void widen_all(const T *__restrict from, int64_t count, float *__restrict to) {
    for (int64_t index = 0; index < count; index++) to[index] = widen(from[index]);
}

// Where a matrix [rows, columns] of the cache has an element.
inline int64_t place(bool is_tiled, int64_t row, int64_t column, int64_t rows, int64_t columns) {
    if (!is_tiled) return row * columns + column;
    return column / LANES * LANES * rows + row / 2 * 2 * LANES + column % LANES * 2 + row % 2;
}

inline int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline int64_t round_up(int64_t count, int64_t multiple) { return divide_up(count, multiple) * multiple; }

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
    const auto power = (__builtin_convertvector(n, Int) + 127) << 23;
    return x < -87.0f ? Vec{} : y * reinterpret_cast<const Vec &>(power);
}

inline float exponential(float x) { return exponential(Vec{} + x)[0]; }

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

// A row's online softmax: scores [width] become weights, and what was attended to before is scaled.
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

// Tensors of which only the innermost dimension must be contiguous. Strides count elements.
struct Rows {
    void *data;
    int64_t row_stride, head_stride;
};

struct TreeAttention {
    Rows out, query, key, value;
    const void *cache;
    int64_t cache_block_stride, cache_head_stride;
    const int32_t *block_table;
    int64_t block_table_stride;
    const int32_t *row_starts, *num_rows, *context_lens;
    const int64_t *ancestor_masks;
    int64_t num_requests, max_rows, num_heads, num_kv_heads, head_size, block_size;
    float scale;
};

namespace {

template <typename T> T *at(const Rows &rows, int64_t row, int64_t head) {
    return static_cast<T *>(rows.data) + row * rows.row_stride + head * rows.head_stride;
}

// What a task has found: attended to [rows * G, D], with the largest score and the sum of the weights of each.
struct Partial {
    float *attended, *largest, *sum;

    Partial(float *memory, int64_t rows, int64_t head_size)
        : attended(memory), largest(memory + rows * head_size), sum(largest + rows) {}
    static int64_t size(int64_t rows, int64_t head_size) { return round_up(rows * (head_size + 2), LANES); }
};

// Aligned to vectors, and never smaller than before.
class Memory {
  public:
    template <typename T> T *reserve(int64_t count) {
        memory.resize(std::max<size_t>(memory.size(), divide_up(count * sizeof(T), sizeof(Vec))));
        return reinterpret_cast<T *>(memory.data());
    }

  private:
    std::vector<Vec> memory;
};

struct Scratch {
    Memory query, keys, values, scores, weights;
};

// The products of a task whose elements are T, in float32.
template <typename T> class Widened {
  public:
    using Element = T;
    // Rows and columns of a product are multiples of these.
    static constexpr int64_t ROWS = TILE, COLUMNS = LANES;
    // What a thread needs while it computes.
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
        // Behind `depth` the cache may hold anything, also what is not a number.
        multiply(weights, {values, head_size}, depth, head_size, attended);
    }

  private:
    const int64_t head_size;
    const float scale;
    float *const query, *const keys, *const values;
    int64_t columns = 0, depth = 0;
};

#ifdef __AMX_BF16__

// 16 rows of 64 bytes in each of five tiles.
struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64};
    uint8_t num_rows[16] = {16, 16, 16, 16, 16};
};

// A matrix of bfloat16: row by row, or, right of a product, in AMX's layout, and then `stride` is its number of rows.
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

// The same by AMX.
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
        // Behind `valid` the cache may hold anything, also what is not a number.
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
    // Of the block at hand, whose values from `whole` on, if there are any, are in own_values.
    const BFloat16 *keys = nullptr, *values = nullptr;
    int64_t columns = 0, whole = 0;
};

#endif

template <typename Products> class Task {
  public:
    using T = typename Products::Element;

    Task(const TreeAttention &step, int64_t request, int64_t head, Scratch &scratch, Partial found)
        : step(step), head(head), group(step.num_heads / step.num_kv_heads), start(step.row_starts[request]),
          count(step.num_rows[request]), length(step.context_lens[request]),
          table(step.block_table + request * step.block_table_stride),
          most_columns(std::max(step.block_size, round_up(count, Products::COLUMNS))),
          products(step, round_up(count * group, Products::ROWS), most_columns, scratch),
          scores(scratch.scores.reserve<float>(Products::ROWS * most_columns)), found(found) {
        const int64_t rows = round_up(count * group, Products::ROWS);
        std::fill_n(found.attended, rows * step.head_size, 0.0f);
        std::fill_n(found.largest, rows, NOTHING);
        std::fill_n(found.sum, rows, 0.0f);
        for (int64_t row = 0; row < count * group; row++)
            products.take_query(row, at<T>(step.query, start + row / group, head * group + row % group));
    }

    void context(int64_t first_block, int64_t end_block) {
        for (int64_t block = first_block; block < end_block; block++) {
            const int64_t valid = std::min(step.block_size, length - block * step.block_size);
            products.take_block(static_cast<const T *>(step.cache) + table[block] * step.cache_block_stride +
                                    head * step.cache_head_stride,
                                step.block_size, valid);
            attend(valid, [valid](int64_t, float *scores, int64_t width) {
                std::fill(scores + valid, scores + width, NOTHING);
            });
        }
    }

    void own_rows() {
        products.start_own(count);
        for (int64_t column = 0; column < count; column++)
            products.take_own(column, at<T>(step.key, start + column, head), at<T>(step.value, start + column, head));
        attend(count, [this](int64_t row, float *scores, int64_t width) {
            const int64_t mask = step.ancestor_masks[start + row / group];
            for (int64_t column = 0; column < width; column++)
                scores[column] = column < count && mask >> column & 1 ? scores[column] : NOTHING;
        });
    }

  private:
    // To the first `valid` columns of the block at hand, but for those whose scores `hide` makes NOTHING.
    template <typename Hide> void attend(int64_t valid, Hide hide) {
        const int64_t head_size = step.head_size, width = round_up(valid, Products::COLUMNS);
        for (int64_t row = 0; row < count * group; row += Products::ROWS) {
            const Matrix attended = {found.attended + row * head_size, head_size};
            products.score(row, {scores, width});
            for (int64_t each = 0; each < std::min(Products::ROWS, count * group - row); each++) {
                float *own = scores + each * width;
                hide(row + each, own, width);
                absorb(own, width, attended.row(each), head_size, found.largest[row + each], found.sum[row + each]);
            }
            products.attend({scores, width}, attended);
        }
    }

    const TreeAttention &step;
    const int64_t head, group, start, count, length;
    const int32_t *const table;
    const int64_t most_columns;
    Products products;
    float *const scores;
    const Partial found;
};

template <typename Products> void run(const TreeAttention &step) {
    using T = typename Products::Element;
    const int64_t heads = step.num_kv_heads, group = step.num_heads / heads;
    const int64_t rows = round_up(step.max_rows * group, Products::ROWS), pairs = step.num_requests * heads;
    int64_t most_blocks = 1;
    for (int64_t request = 0; request < step.num_requests; request++)
        most_blocks = std::max(most_blocks, divide_up(step.context_lens[request], step.block_size));
    // Every core has a task, also where there are fewer heads than cores.
    const int64_t splits = std::min(most_blocks, divide_up(omp_get_max_threads(), pairs));
    const int64_t size = Partial::size(rows, step.head_size);
    // Kept, because the system clears large memory each time that it gives it.
    static thread_local Memory memory;
    float *const partials = memory.reserve<float>(pairs * splits * size);
#pragma omp parallel
    {
        static thread_local Scratch scratch;
        [[maybe_unused]] const typename Products::Unit unit;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < pairs * splits; task++) {
            const int64_t request = task / splits / heads, split = task % splits;
            if (step.num_rows[request] == 0) continue;
            const int64_t blocks = divide_up(step.context_lens[request], step.block_size);
            Task<Products> own(step, request, task / splits % heads, scratch,
                               {partials + task * size, rows, step.head_size});
            own.context(blocks * split / splits, blocks * (split + 1) / splits);
            if (split == splits - 1) own.own_rows();
        }
        float *const total = scratch.scores.reserve<float>(step.head_size);
#pragma omp for
        for (int64_t pair = 0; pair < pairs; pair++) {
            const int64_t request = pair / heads, head = pair % heads;
            const auto part = [&](int64_t split) {
                return Partial(partials + (pair * splits + split) * size, rows, step.head_size);
            };
            for (int64_t row = 0; row < step.num_rows[request] * group; row++) {
                const int64_t step_row = step.row_starts[request] + row / group;
                T *out = at<T>(step.out, step_row, head * group + row % group);
                float largest = NOTHING, sum = 0.0f;
                for (int64_t split = 0; split < splits; split++) largest = std::max(largest, part(split).largest[row]);
                for (int64_t split = 0; split < splits; split++)
                    sum += exponential(part(split).largest[row] - largest) * part(split).sum[row];
                std::fill_n(total, step.head_size, 0.0f);
                for (int64_t split = 0; split < splits; split++) {
                    const float weight = exponential(part(split).largest[row] - largest) / sum;
                    const float *attended = part(split).attended + row * step.head_size;
                    for (int64_t d = 0; d < step.head_size; d++) total[d] += weight * attended[d];
                }
                for (int64_t d = 0; d < step.head_size; d++) narrow(total[d], out + d);
            }
        }
    }
}

} // namespace

extern "C" void tree_attention_float32(const TreeAttention *step) { run<Widened<float>>(*step); }
extern "C" void tree_attention_float16(const TreeAttention *step) { run<Widened<_Float16>>(*step); }
extern "C" void tree_attention_bfloat16(const TreeAttention *step) { run<Widened<BFloat16>>(*step); }
#ifdef __AMX_BF16__
extern "C" void tree_attention_tiled(const TreeAttention *step) { run<Tiled>(*step); }
#endif

struct Move {
    void *const *caches;
    int64_t num_caches, cache_block_stride, cache_head_stride;
    const int64_t *sources, *targets;
    int64_t num_slots, num_kv_heads, head_size, block_size, is_tiled;
};

namespace {

// Calls f with the place of each element of keys and values that `slots` hold of one head, in the same order.
template <typename T, typename F> void visit(const Move &move, T *head, const int64_t *slots, F f) {
    for (int64_t index = 0; index < move.num_slots; index++) {
        T *keys = head + slots[index] / move.block_size * move.cache_block_stride;
        T *values = keys + move.block_size * move.head_size;
        const int64_t slot = slots[index] % move.block_size;
        for (int64_t d = 0; d < move.head_size; d++)
            f(keys + place(move.is_tiled, d, slot, move.head_size, move.block_size));
        for (int64_t d = 0; d < move.head_size; d++)
            f(values + place(move.is_tiled, slot, d, move.block_size, move.head_size));
    }
}

template <typename T> void run(const Move &move) {
    std::vector<T> held(2 * move.num_slots * move.head_size);
    for (int64_t cache = 0; cache < move.num_caches; cache++)
        for (int64_t head = 0; head < move.num_kv_heads; head++) {
            T *first = static_cast<T *>(move.caches[cache]) + head * move.cache_head_stride;
            auto next = held.begin();
            visit(move, first, move.sources, [&](const T *from) { *next++ = *from; });
            next = held.begin();
            visit(move, first, move.targets, [&](T *to) { *to = *next++; });
        }
}

} // namespace

extern "C" void move_slots_2(const Move *move) { run<uint16_t>(*move); }
extern "C" void move_slots_4(const Move *move) { run<uint32_t>(*move); }
