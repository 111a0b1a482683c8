// Causal attention straight over block tables.
//
// Sixteen query rows of one KV head (neighbouring tokens times the query heads of a group) sit in the sixteen lanes.
// Scores are kept as [position][lane], so softmax needs no reduction across lanes, and every row adds in the order of
// positions: its result depends neither on its neighbours in the batch, nor on chunks, blocks or threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "buffer.h"
#include "sagellm_cpu.h"
#include "team.h"
#include "vec.h"

namespace sage {

// Where the KV of one sequence's positions is, for one layer and head.
template <class Kv>
struct Pages {
  using Type = typename Kv::Type;
  const int64_t* table;
  int64_t block_stride, block_tokens, slot_stride;

  // Calls f(i, row) for the rows of `count` positions from `first` on.
  template <class F>
  void each(const Type* base, int64_t first, int64_t count, const F& f) const {
    int64_t block = first / block_tokens, slot = first % block_tokens;
    for (int64_t i = 0; i < count; ++block, slot = 0) {
      const Type* row = base + table[block] * block_stride + slot * slot_stride;
      for (; slot < block_tokens && i < count; ++slot, ++i, row += slot_stride) f(i, row);
    }
  }
};

// Query rows to compute together: `rows` of them, counted over (token, head of the group) from `first` on.
struct AttentionTask {
  int64_t sequence, kv_head, first, rows;
};

struct AttentionShape {
  int64_t heads, kv_heads, head_dim;
  float scale;
  int64_t group() const { return heads / kv_heads; }
};

inline std::vector<AttentionTask> attention_tasks(const SageBatch& batch, const AttentionShape& shape) {
  std::vector<AttentionTask> tasks;
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t rows = (batch.q_starts[s + 1] - batch.q_starts[s]) * shape.group();
    for (int64_t first = 0; first < rows; first += kLanes)
      for (int64_t h = 0; h < shape.kv_heads; ++h)
        tasks.push_back({s, h, first, std::min<int64_t>(kLanes, rows - first)});
  }
  return tasks;
}

inline int64_t longest(const SageBatch& batch) {
  return *std::max_element(batch.kv_lens, batch.kv_lens + batch.sequences);
}

// Per thread. `scores` is [positions][16].
struct AttentionScratch {
  Buffer<float> scores;
  alignas(64) float query[256 * kLanes];     // [head_dim][16]
  alignas(64) float rows[64 * 256];          // keys or values of some positions
  alignas(64) float total[kLanes * 256];     // [16][head_dim]
};

template <class Kv, int D>
class Attention {
  static_assert(D % kLanes == 0 && D <= 256, "the scratch is made for these");
  static constexpr int kAtOnce = kRegisters == 32 ? 16 : 4;  // positions whose scores are in registers
  static constexpr int64_t kChunk = 64;                      // positions whose values stay in the first-level cache
  static constexpr int kVecs = D / kLanes;
  static constexpr int kRowsAtOnce = std::clamp((kRegisters - 8) / kVecs, 1, 8);

 public:
  // `query` and `out` point at the rows of the task's token 0 of its sequence and are `query_stride`, `out_stride`
  // elements from token to token. `keys`, `values`: the layer's.
  static void run(const AttentionTask& task, const AttentionShape& shape, const SageBatch& batch,
                  const SageCache& cache, const typename Kv::Type* keys, const typename Kv::Type* values,
                  const float* query, int64_t query_stride, float* out, int64_t out_stride, AttentionScratch& scratch) {
    const int64_t group = shape.group();
    const int64_t cached =
        batch.kv_lens[task.sequence] - (batch.q_starts[task.sequence + 1] - batch.q_starts[task.sequence]);
    const Pages<Kv> pages{batch.tables + task.sequence * batch.table_stride, cache.block_stride, cache.block_tokens,
                          shape.kv_heads * D};
    const auto* head_keys = keys + task.kv_head * D;
    const auto* head_values = values + task.kv_head * D;

    alignas(64) int32_t visible[kLanes];  // positions each row may see
    int64_t most = 0;
    for (int64_t r = 0; r < kLanes; ++r) {
      const int64_t row = task.first + std::min(r, task.rows - 1);  // idle lanes repeat the last row
      const int64_t token = row / group, head = task.kv_head * group + row % group;
      visible[r] = static_cast<int32_t>(cached + token + 1);
      most = std::max<int64_t>(most, visible[r]);
      const float* q = query + token * query_stride + head * D;
      for (int d = 0; d < D; ++d) scratch.query[d * kLanes + r] = q[d] * shape.scale;
    }
    const Int limit = iload(visible);

    float* scores = scratch.scores.data();
    Vec largest = splat(-INFINITY);
    int64_t p = 0;
    for (; p + kAtOnce <= most; p += kAtOnce) {
      prefetch(pages, head_keys, p + 2 * kAtOnce, kAtOnce, most);
      largest = score<kAtOnce>(pages, head_keys, p, limit, scratch, largest);
    }
    for (; p < most; ++p) largest = score<1>(pages, head_keys, p, limit, scratch, largest);

    Vec sum = splat(0);
    for (p = 0; p < most; ++p) {
      const Vec weight =
          where_below(static_cast<int32_t>(p), limit, exp(load(scores + p * kLanes) - largest), splat(0));
      store(scores + p * kLanes, weight);
      sum = sum + weight;
    }
    alignas(64) float inverse[kLanes];
    store(inverse, splat(1.0f) / sum);

    std::fill_n(scratch.total, task.rows * D, 0.0f);
    for (p = 0; p < most; p += kChunk) {
      const float* rows[kChunk];
      const int64_t count = std::min(kChunk, most - p);
      prefetch(pages, head_values, p + kChunk, kChunk, most);
      fetch(pages, head_values, p, count, scratch, rows);
      for (int64_t r = 0; r < task.rows; r += kRowsAtOnce)
        some<kRowsAtOnce>(static_cast<int>(std::min<int64_t>(kRowsAtOnce, task.rows - r)), r, rows,
                          scores + p * kLanes, count, scratch.total);
    }
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t row = task.first + r;
      float* target = out + row / group * out_stride + (task.kv_head * group + row % group) * D;
      for (int i = 0; i < kVecs; ++i)
        store(target + i * kLanes, load(scratch.total + r * D + i * kLanes) * splat(inverse[r]));
    }
  }

 private:
  using Type = typename Kv::Type;

  static void convert(const Type* row, float* copy) {
    for (int v = 0; v < kVecs; ++v) store(copy + v * kLanes, Kv::load(row + v * kLanes));
  }

  // Values of `count` positions as float32: where they are, or converted into the scratch.
  static void fetch(const Pages<Kv>& pages, const Type* base, int64_t first, int64_t count, AttentionScratch& scratch,
                    const float** rows) {
    pages.each(base, first, count, [&](int64_t i, const Type* row) {
      if constexpr (sizeof(Type) == sizeof(float)) {
        rows[i] = row;
      } else {
        rows[i] = scratch.rows + i * D;
        convert(row, scratch.rows + i * D);
      }
    });
  }

  // Blocks lie anywhere, so the hardware does not see the next one coming.
  static void prefetch(const Pages<Kv>& pages, const Type* base, int64_t first, int64_t count, int64_t end) {
    if (first + count > end) return;
    pages.each(base, first, count, [](int64_t, const Type* row) {
      for (size_t i = 0; i < D * sizeof(Type); i += 64) _mm_prefetch(reinterpret_cast<const char*>(row) + i, _MM_HINT_T0);
    });
  }

  // Scores of P positions for all lanes; the largest visible ones so far come back.
  template <int P>
  static Vec score(const Pages<Kv>& pages, const Type* keys, int64_t first, Int limit, AttentionScratch& scratch,
                   Vec largest) {
    // Side by side, or P pointers would not fit into registers.
    pages.each(keys, first, P, [&](int64_t i, const Type* row) { convert(row, scratch.rows + i * D); });
    Vec sum[P];
    for (int i = 0; i < P; ++i) sum[i] = splat(0);
    for (int d = 0; d < D; ++d) {
      const Vec q = load(scratch.query + d * kLanes);
      for (int i = 0; i < P; ++i) sum[i] = fma(q, splat(scratch.rows[i * D + d]), sum[i]);
    }
    for (int i = 0; i < P; ++i) {
      store(scratch.scores.data() + (first + i) * kLanes, sum[i]);
      largest = max(largest, where_below(static_cast<int32_t>(first + i), limit, sum[i], splat(-INFINITY)));
    }
    return largest;
  }

  // total[row] += weights of `count` positions times their values, for R rows from `first` on.
  template <int R>
  static void add(int64_t first, const float* const* rows, const float* weights, int64_t count, float* total) {
    Vec sum[R][kVecs];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kVecs; ++i) sum[r][i] = load(total + (first + r) * D + i * kLanes);
    for (int64_t p = 0; p < count; ++p) {
      Vec value[kVecs];
      for (int i = 0; i < kVecs; ++i) value[i] = load(rows[p] + i * kLanes);
      for (int r = 0; r < R; ++r) {
        const Vec weight = splat(weights[p * kLanes + first + r]);
        for (int i = 0; i < kVecs; ++i) sum[r][i] = fma(weight, value[i], sum[r][i]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kVecs; ++i) store(total + (first + r) * D + i * kLanes, sum[r][i]);
  }

  template <int R>
  static void some(int count, int64_t first, const float* const* rows, const float* weights, int64_t positions,
                   float* total) {
    if (count == R) return add<R>(first, rows, weights, positions, total);
    if constexpr (R > 1) some<R - 1>(count, first, rows, weights, positions, total);
  }
};

// Writes the keys or values [kv_heads * head_dim] of one token into its slot.
template <class Kv>
void write_slot(const SageCache& cache, void* layer, const int64_t* table, int64_t position, const float* row,
                int64_t width) {
  auto* slot = static_cast<typename Kv::Type*>(layer) + table[position / cache.block_tokens] * cache.block_stride +
               position % cache.block_tokens * width;
  for (int64_t i = 0; i < width; i += kLanes) Kv::store(slot + i, load(row + i));
}

// Calls f with the storage type and head size as template arguments; false for a head size that is not compiled.
template <class F>
bool dispatch(int64_t type, int64_t head_dim, const F& f) {
  const auto with_type = [&](auto dim) {
    switch (type) {
      case SAGE_KV_FLOAT32: f(Float32{}, dim); return;
      case SAGE_KV_FLOAT16: f(Float16{}, dim); return;
      default: f(BFloat16{}, dim); return;
    }
  };
  switch (head_dim) {
    case 16: with_type(std::integral_constant<int, 16>{}); return true;
    case 32: with_type(std::integral_constant<int, 32>{}); return true;
    case 64: with_type(std::integral_constant<int, 64>{}); return true;
    case 80: with_type(std::integral_constant<int, 80>{}); return true;
    case 96: with_type(std::integral_constant<int, 96>{}); return true;
    case 128: with_type(std::integral_constant<int, 128>{}); return true;
    case 256: with_type(std::integral_constant<int, 256>{}); return true;
    default: return false;
  }
}

}  // namespace sage
