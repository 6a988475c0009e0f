// Tree attention over vLLM's paged CPU cache.
//
// A task is one request, one key-value head and a part of the context. Its query rows, with the query heads of the
// key-value head folded in, run over the blocks of the context with an online softmax; the step's own keys and values,
// under the ancestor masks, are the last block. `Widened` and `Tiled` are the two ways to multiply with a block. Where
// the context is split between tasks, their results are merged at the end.
//
// A row stands at the position of its depth, which is the number of its ancestors.
//
// Letters: R requests, H query heads, K key-value heads, G = H / K, D head size, B block size.

#include <algorithm>
#include <cstdint>
#include <omp.h>

#include "step.h"
#include "tiled.h"
#include "widened.h"

namespace {

// Of a request's context, the first block that any of its rows sees. The first row stands right behind the context.
int64_t first_block(const TreeAttention &step, int64_t request) {
    if (step.sliding_window == 0) return 0;
    return std::max<int64_t>(0, step.context_lens[request] + 1 - step.sliding_window) / step.block_size;
}

// The unnormalised result of a task: attended [rows * G, D], and each row's largest score and sum of weights.
struct Partial {
    float *attended, *largest, *sum;

    Partial(float *memory, int64_t rows, int64_t head_size)
        : attended(memory), largest(memory + rows * head_size), sum(largest + rows) {}
    static int64_t size(int64_t rows, int64_t head_size) { return round_up(rows * (head_size + 2), LANES); }
};

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
            attend(valid, [&](int64_t row, float *scores, int64_t width) {
                const int64_t unseen = first_seen(row) - block * step.block_size;
                std::fill_n(scores, std::clamp<int64_t>(unseen, 0, valid), NOTHING);
                std::fill(scores + valid, scores + width, NOTHING);
            });
        }
    }

    void own_rows() {
        products.start_own(count);
        for (int64_t column = 0; column < count; column++)
            products.take_own(column, at<T>(step.key, start + column, head), at<T>(step.value, start + column, head));
        attend(count, [this](int64_t row, float *scores, int64_t width) {
            const int64_t mask = seen_rows(row / group);
            for (int64_t column = 0; column < width; column++)
                scores[column] = column < count && mask >> column & 1 ? scores[column] : NOTHING;
        });
    }

  private:
    int64_t num_ancestors(int64_t row) const { return __builtin_popcountll(step.ancestor_masks[start + row]) - 1; }

    // Of the context, the first position that a row of the queries sees.
    int64_t first_seen(int64_t row) const {
        return step.sliding_window == 0 ? 0 : length + num_ancestors(row / group) + 1 - step.sliding_window;
    }

    // The ancestor mask of a row of the step, without those before its window.
    int64_t seen_rows(int64_t row) const {
        int64_t mask = step.ancestor_masks[start + row];
        if (step.sliding_window == 0 || step.sliding_window >= count) return mask;
        for (int64_t other = 0; other < count; other++)
            if (num_ancestors(other) <= num_ancestors(row) - step.sliding_window) mask &= ~(int64_t{1} << other);
        return mask;
    }

    // Attention of all rows to the first `valid` columns of the current block, except those whose scores `hide` sets to
    // NOTHING.
    template <typename Hide> void attend(int64_t valid, Hide hide) {
        const int64_t head_size = step.head_size, width = round_up(valid, Products::COLUMNS);
        for (int64_t row = 0; row < count * group; row += Products::ROWS) {
            const Matrix attended = {found.attended + row * head_size, head_size};
            products.score(row, {scores, width});
            if (step.soft_cap > 0) bound(scores, Products::ROWS * width, step.soft_cap);
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
        most_blocks = std::max(most_blocks, divide_up(step.context_lens[request], step.block_size) -
                                                first_block(step, request));
    // The context is split so that every core has a task where there are fewer heads than cores.
    const int64_t splits = std::min(most_blocks, divide_up(omp_get_max_threads(), pairs));
    const int64_t size = Partial::size(rows, step.head_size);
    // Kept between calls: the system clears large allocations each time.
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
            const int64_t first = first_block(step, request);
            const int64_t blocks = divide_up(step.context_lens[request], step.block_size) - first;
            Task<Products> own(step, request, task / splits % heads, scratch,
                               {partials + task * size, rows, step.head_size});
            own.context(first + blocks * split / splits, first + blocks * (split + 1) / splits);
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
                const float sink = step.sinks ? step.sinks[head * group + row % group] : NOTHING;
                float largest = sink;
                for (int64_t split = 0; split < splits; split++) largest = std::max(largest, part(split).largest[row]);
                float sum = step.sinks ? exponential(sink - largest) : 0.0f;
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
