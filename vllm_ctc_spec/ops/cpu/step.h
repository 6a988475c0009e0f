// The arguments of tree attention, which kernels.py fills in, and the memory of the threads that compute it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

// A tensor [rows, heads, head_size] whose innermost dimension is contiguous. Strides count elements.
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
    // [H], one more logit of each head, or null.
    const float *sinks;
    int64_t num_requests, max_rows, num_heads, num_kv_heads, head_size, block_size;
    // Positions that a row sees, its own among them; 0: all.
    int64_t sliding_window;
    // The bound of the logits; 0: none.
    float scale, soft_cap;
};

namespace {

template <typename T> T *at(const Rows &rows, int64_t row, int64_t head) {
    return static_cast<T *>(rows.data) + row * rows.row_stride + head * rows.head_stride;
}

// Memory that is aligned to vectors and grows when it must.
class Memory {
  public:
    template <typename T> T *reserve(int64_t count) {
        memory.resize(std::max<size_t>(memory.size(), divide_up(count * sizeof(T), sizeof(Vec))));
        return reinterpret_cast<T *>(memory.data());
    }

  private:
    std::vector<Vec> memory;
};

// One thread's.
struct Scratch {
    Memory query, keys, values, scores, weights;
};

} // namespace
