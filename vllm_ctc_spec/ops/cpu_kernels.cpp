// Tree attention over vLLM's paged CPU cache, and the K/V move in it; cpu_kernels.py compiles and calls both, and says
// what the arguments are.
//
// A task of attention is one request, one key-value head and a part of the context: its rows, the query heads of the
// key-value head folded in, run over the blocks with an online softmax. A block's keys and values are widened to float32,
// and laid out row by row, once for all rows. The step's own keys and values, under the ancestor masks, are one more block after the context.
//
// Letters: R requests, H query heads, K key-value heads, G = H / K, D head size, B block size.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <omp.h>
#include <vector>

namespace {

constexpr int64_t LANES = 16, TILE = 4;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
// Whatever the width of the processor's own vectors.
typedef float Vec __attribute__((vector_size(4 * LANES)));

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

// Such a matrix to float32, row by row.
template <typename T> void unpack(const T *from, bool is_tiled, int64_t rows, int64_t columns, float *to) {
    if (!is_tiled) return widen_all(from, rows * columns, to);
    for (int64_t column = 0; column < columns; column += LANES)
        for (int64_t row = 0; row < rows; row += 2, from += 2 * LANES) {
            float *const even = to + row * columns + column, *const odd = even + columns;
            for (int64_t lane = 0; lane < LANES; lane++) {
                even[lane] = widen(from[2 * lane]);
                odd[lane] = widen(from[2 * lane + 1]);
            }
        }
}

inline int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline int64_t round_up(int64_t count, int64_t multiple) { return divide_up(count, multiple) * multiple; }

inline Vec *vectors(float *at) { return reinterpret_cast<Vec *>(at); }

// e^x for x <= 0: 2^n times a polynomial (Cephes, expf.c). Zero where it would be below the smallest normal number.
inline float exponential(float x) {
    constexpr float ROUND = 12582912.0f;
    const float clamped = x < -87.0f ? -87.0f : x;
    const float n = (clamped * 1.44269504f + ROUND) - ROUND;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : y * power;
}

struct Matrix {
    float *data;
    int64_t stride;

    Matrix column(int64_t index) const { return {data + index, stride}; }
};

// to [TILE, columns] += a [TILE, depth] b [depth, columns], for `VECTORS` vectors of columns.
template <int VECTORS> inline void multiply_columns(Matrix a, Matrix b, int64_t depth, Matrix to) {
    Vec sum[TILE][VECTORS];
    for (int row = 0; row < TILE; row++)
        for (int v = 0; v < VECTORS; v++) sum[row][v] = vectors(to.data + row * to.stride)[v];
    for (int64_t k = 0; k < depth; k++, b.data += b.stride) {
        for (int v = 0; v < VECTORS; v++) {
            const Vec own = vectors(b.data)[v];
            for (int row = 0; row < TILE; row++) sum[row][v] += a.data[row * a.stride + k] * own;
        }
    }
    for (int row = 0; row < TILE; row++)
        for (int v = 0; v < VECTORS; v++) vectors(to.data + row * to.stride)[v] = sum[row][v];
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
    for (int64_t column = 0; column < width; column++) scores[column] = exponential(scores[column] - now);
    Vec total = {};
    for (int64_t v = 0; v < width / LANES; v++) total += vectors(scores)[v];
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
    int64_t num_requests, max_rows, num_heads, num_kv_heads, head_size, block_size, is_tiled;
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
class Floats {
  public:
    float *reserve(int64_t count) {
        memory.resize(std::max<size_t>(memory.size(), divide_up(count, LANES)));
        return reinterpret_cast<float *>(memory.data());
    }

  private:
    std::vector<Vec> memory;
};

struct Scratch {
    Floats query, keys, values, scores;
};

template <typename T> class Task {
  public:
    Task(const TreeAttention &step, int64_t request, int64_t head, Scratch &scratch, Partial found)
        : step(step), head(head), group(step.num_heads / step.num_kv_heads), start(step.row_starts[request]),
          count(step.num_rows[request]), rows(round_up(count * group, TILE)), length(step.context_lens[request]),
          table(step.block_table + request * step.block_table_stride),
          most_columns(std::max(step.block_size, round_up(count, LANES))),
          query(scratch.query.reserve(rows * step.head_size)),
          keys(scratch.keys.reserve(most_columns * step.head_size)),
          values(scratch.values.reserve(most_columns * step.head_size)),
          scores(scratch.scores.reserve(TILE * most_columns)), found(found) {
        std::fill_n(query, rows * step.head_size, 0.0f);
        std::fill_n(found.attended, rows * step.head_size, 0.0f);
        std::fill_n(found.largest, rows, NOTHING);
        std::fill_n(found.sum, rows, 0.0f);
        for (int64_t row = 0; row < count * group; row++) {
            const T *from = at<T>(step.query, start + row / group, head * group + row % group);
            for (int64_t d = 0; d < step.head_size; d++)
                query[row * step.head_size + d] = step.scale * widen(from[d]);
        }
    }

    void context(int64_t first_block, int64_t end_block) {
        const int64_t size = step.block_size * step.head_size;
        for (int64_t block = first_block; block < end_block; block++) {
            const T *cached = static_cast<const T *>(step.cache) + table[block] * step.cache_block_stride +
                              head * step.cache_head_stride;
            unpack(cached, step.is_tiled, step.head_size, step.block_size, keys);
            unpack(cached + size, step.is_tiled, step.block_size, step.head_size, values);
            const int64_t valid = std::min(step.block_size, length - block * step.block_size);
            attend({keys, step.block_size}, valid, valid % LANES != 0,
                   [valid](int64_t, int64_t column) { return column < valid; });
        }
    }

    void own_rows() {
        const int64_t width = round_up(count, LANES);
        for (int64_t column = 0; column < width; column++)
            for (int64_t d = 0; d < step.head_size; d++) {
                const bool exists = column < count;
                keys[d * width + column] = exists ? widen(at<T>(step.key, start + column, head)[d]) : 0.0f;
                values[column * step.head_size + d] =
                    exists ? widen(at<T>(step.value, start + column, head)[d]) : 0.0f;
            }
        attend({keys, width}, count, true, [this](int64_t row, int64_t column) {
            const int64_t own = std::min(row / group, count - 1);
            return column < count && (step.ancestor_masks[start + own] >> column & 1);
        });
    }

  private:
    // To the first `valid` of keys [D, columns] and values [columns, D].
    template <typename Sees> void attend(Matrix keys, int64_t valid, bool is_masked, Sees sees) {
        const int64_t head_size = step.head_size, width = round_up(valid, LANES);
        for (int64_t row = 0; row < rows; row += TILE) {
            const Matrix attended = {found.attended + row * head_size, head_size};
            std::fill_n(scores, TILE * width, 0.0f);
            multiply({query + row * head_size, head_size}, keys, head_size, width, {scores, width});
            for (int64_t each = 0; each < TILE; each++) {
                float *own = scores + each * width;
                for (int64_t column = 0; is_masked && column < width; column++)
                    if (!sees(row + each, column)) own[column] = NOTHING;
                absorb(own, width, attended.data + each * head_size, head_size, found.largest[row + each],
                       found.sum[row + each]);
            }
            // Behind `valid` the cache may hold anything, also what is not a number.
            multiply({scores, width}, {values, head_size}, valid, head_size, attended);
        }
    }

    const TreeAttention &step;
    const int64_t head, group, start, count, rows, length;
    const int32_t *const table;
    const int64_t most_columns;
    float *const query, *const keys, *const values, *const scores;
    const Partial found;
};

template <typename T> void run(const TreeAttention &step) {
    const int64_t heads = step.num_kv_heads, group = step.num_heads / heads;
    const int64_t rows = round_up(step.max_rows * group, TILE), pairs = step.num_requests * heads;
    int64_t most_blocks = 1;
    for (int64_t request = 0; request < step.num_requests; request++)
        most_blocks = std::max(most_blocks, divide_up(step.context_lens[request], step.block_size));
    // Every core has a task, also where there are fewer heads than cores.
    const int64_t splits = std::min(most_blocks, divide_up(omp_get_max_threads(), pairs));
    const int64_t size = Partial::size(rows, step.head_size);
    // Kept, because the system clears large memory each time that it gives it.
    static thread_local Floats memory;
    float *const partials = memory.reserve(pairs * splits * size);
#pragma omp parallel
    {
        static thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < pairs * splits; task++) {
            const int64_t request = task / splits / heads, split = task % splits;
            if (step.num_rows[request] == 0) continue;
            const int64_t blocks = divide_up(step.context_lens[request], step.block_size);
            Task<T> own(step, request, task / splits % heads, scratch, {partials + task * size, rows, step.head_size});
            own.context(blocks * split / splits, blocks * (split + 1) / splits);
            if (split == splits - 1) own.own_rows();
        }
        float *const total = scratch.scores.reserve(step.head_size);
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

extern "C" void tree_attention_float32(const TreeAttention *step) { run<float>(*step); }
extern "C" void tree_attention_float16(const TreeAttention *step) { run<_Float16>(*step); }
extern "C" void tree_attention_bfloat16(const TreeAttention *step) { run<BFloat16>(*step); }

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
