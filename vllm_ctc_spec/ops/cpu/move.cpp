// Keys and values of accepted nodes move to other slots of vLLM's CPU cache.

#include <cstdint>
#include <vector>

#include "layout.h"

struct Move {
    void *const *caches;
    int64_t num_caches, cache_block_stride, cache_head_stride;
    const int64_t *sources, *targets;
    int64_t num_slots, num_kv_heads, head_size, block_size, is_tiled;
};

namespace {

// Calls f with a pointer to each key element, then each value element, that `slots` hold of one head, in a fixed order.
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
