// Causal attention straight over block tables.
//
// A task is up to sixteen query rows of one KV head: neighbouring tokens times the query heads of a group. Many rows sit
// in the sixteen lanes; of a few (one token that decodes) sixteen positions do, and the task has all KV heads, for these
// lie side by side: memory is read in long runs, once. Both compute a row alike, bit by bit:
//   score    of a position, adds over head_dim in order
//   weights  their sum is sixteen sums, of positions p, p + 16, …, added as a tree
//   output   adds over positions in order
// So a result depends neither on its neighbours in the batch, nor on chunks, blocks or threads.
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

inline int64_t longest(const SageBatch& batch) {
  return *std::max_element(batch.kv_lens, batch.kv_lens + batch.sequences);
}

// Query rows to compute together: `rows` of each of `heads` KV heads, counted over (token, head of the group) from
// `first` on.
struct AttentionTask {
  int64_t sequence, kv_head, heads, first, rows;
};

constexpr int kFew = 8;  // up to so many rows, lanes are better used for positions

struct AttentionShape {
  int64_t heads, kv_heads, head_dim;
  float scale;
  int64_t group() const { return heads / kv_heads; }
};

inline std::vector<AttentionTask> attention_tasks(const SageBatch& batch, const AttentionShape& shape, int threads) {
  std::vector<AttentionTask> tasks;
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t all = (batch.q_starts[s + 1] - batch.q_starts[s]) * shape.group();
    const int64_t heads = all <= kFew && batch.sequences >= threads ? shape.kv_heads : 1;
    // Head after head: one head's keys and values of some thousand positions stay in the second-level cache.
    for (int64_t h = 0; h < shape.kv_heads; h += heads)
      for (int64_t first = 0; first < all; first += kLanes)
        tasks.push_back({s, h, heads, first, std::min<int64_t>(kLanes, all - first)});
  }
  return tasks;
}

// Where the weight of a row for a position is, and one over the sum of a row's.
struct Weights {
  const float* base;
  int64_t head_stride, row_stride, position_stride;
  const float* inverse;

  Weights of_head(int64_t h) const { return {base + h * head_stride, head_stride, row_stride, position_stride, inverse}; }
};

// Per thread. `scores` is [positions][16], or [heads][rows][positions] for a few rows; `query` is [head_dim][16] or
// [heads][rows][head_dim].
struct AttentionScratch {
  Buffer<float> scores, query, total, largest, inverse;
  alignas(64) float rows[64 * 256];  // keys or values of some positions

  void reserve(const SageBatch& batch, const AttentionShape& shape) {
    const int64_t rows = std::max<int64_t>(kLanes, shape.kv_heads * kFew);
    scores.reserve(static_cast<size_t>((longest(batch) + kLanes) * rows));
    query.reserve(static_cast<size_t>(rows * shape.head_dim));
    total.reserve(static_cast<size_t>(rows * shape.head_dim));
    largest.reserve(static_cast<size_t>(rows * kLanes));
    inverse.reserve(static_cast<size_t>(rows));
  }
};

template <class Kv, int D>
class Attention {
  static_assert(D % kLanes == 0 && D <= 256, "the scratch is made for these");
  static constexpr int kAtOnce = kRegisters == 32 ? 16 : 4;  // positions whose scores are in registers
  static constexpr int64_t kChunk = 64;                      // positions whose values stay in the first-level cache
  static constexpr int64_t kBring = 128;                     // positions whose keys or values stay in the second-level
  static constexpr int kVecs = D / kLanes;
  static constexpr int kRowsAtOnce = std::clamp((kRegisters - 8) / kVecs, 1, 8);
  // How a few rows' KV comes from memory. Two bytes a number: prefetched line by line beside the arithmetic. Four: read
  // kBring positions ahead at once, since that many bytes are slower than the arithmetic, and fastest alone.
  static constexpr bool kBeside = sizeof(typename Kv::Type) < sizeof(float);
  static constexpr int64_t kAhead = 2 * kLanes;  // positions

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

    const bool few = task.rows <= kFew;
    const int64_t group_rows = task.rows <= kFew / 2 ? task.rows : kFew;  // of a head, with few
    alignas(64) int32_t visible[kLanes];  // positions each row may see
    int64_t most = 0;
    for (int64_t r = 0; r < kLanes; ++r) {
      const int64_t row = task.first + std::min(r, task.rows - 1);  // idle lanes repeat the last row
      const int64_t token = row / group, head = task.kv_head * group + row % group;
      visible[r] = static_cast<int32_t>(cached + token + 1);
      most = std::max<int64_t>(most, visible[r]);
      const float* q = query + token * query_stride + head * D;
      for (int64_t h = 0; h < task.heads; ++h, q += group * D)
        for (int d = 0; d < D; ++d)
          if (!few) {
            scratch.query.data()[d * kLanes + r] = q[d] * shape.scale;
          } else if (r < group_rows) {
            scratch.query.data()[(h * group_rows + r) * D + d] = q[d] * shape.scale;
          }
    }
    constexpr decltype(&weigh_lanes) weigh_few[] = {weigh_positions<1>, weigh_positions<2>, weigh_positions<3>,
                                                    weigh_positions<4>};
    const auto weigh = !few ? weigh_lanes : group_rows < kFew ? weigh_few[group_rows - 1] : weigh_positions<kFew>;
    const Weights weights = weigh(pages, head_keys, task.heads, visible, most, scratch);

    float* total = scratch.total.data();
    std::fill_n(total, task.heads * task.rows * D, 0.0f);
    for (int64_t p = 0; p < most; p += kChunk) {
      const int64_t count = std::min(kChunk, most - p);
      if (few && !kBeside && p % kBring == 0) bring(pages, head_values, task.heads, p, most);
      for (int64_t h = 0; h < task.heads; ++h) {
        float* head_total = total + h * task.rows * D;
        if (few && task.rows <= kRowsAtOnce) {  // each value is used once: converted on its way
          const Type* rows[2 * kChunk];
          find(pages, head_values + h * D, p, count, most, rows);
          if (kBeside) find(pages, head_values + h * D, p + kChunk, kChunk, most, rows + kChunk);
          some<kRowsAtOnce, Kv, kBeside>(static_cast<int>(task.rows), 0, rows, weights.of_head(h), p, count,
                                         head_total);
          continue;
        }
        const float* rows[kChunk];
        prefetch(pages, head_values + h * D, p + kChunk, kChunk, most);
        fetch(pages, head_values + h * D, p, count, scratch, rows);
        for (int64_t r = 0; r < task.rows; r += kRowsAtOnce)
          some<kRowsAtOnce, Float32, false>(static_cast<int>(std::min<int64_t>(kRowsAtOnce, task.rows - r)), r, rows,
                                            weights.of_head(h), p, count, head_total);
      }
    }
    for (int64_t h = 0; h < task.heads; ++h)
      for (int64_t r = 0; r < task.rows; ++r) {
        const int64_t row = task.first + r;
        float* target = out + row / group * out_stride + ((task.kv_head + h) * group + row % group) * D;
        const Vec inverse = splat(weights.inverse[h * group_rows + r]);
        for (int i = 0; i < kVecs; ++i)
          store(target + i * kLanes, load(total + (h * task.rows + r) * D + i * kLanes) * inverse);
      }
  }

 private:
  using Type = typename Kv::Type;
  static constexpr size_t kLineValues = 64 / sizeof(Type);

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

  // The rows of `count` positions; beyond the end, where nobody looks at what is there, the last one's.
  static void find(const Pages<Kv>& pages, const Type* base, int64_t first, int64_t count, int64_t end,
                   const Type** rows) {
    const int64_t begin = std::min(first, end - 1), present = std::min(count, end - begin);
    pages.each(base, begin, present, [&](int64_t i, const Type* row) { rows[i] = row; });
    std::fill(rows + present, rows + count, rows[present - 1]);
  }

  static void prefetch_line(const Type* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

  // Blocks lie anywhere, so the hardware does not see the next one coming.
  static void prefetch(const Pages<Kv>& pages, const Type* base, int64_t first, int64_t count, int64_t end) {
    if (first >= end) return;
    count = std::min(count, end - first);
    pages.each(base, first, count, [](int64_t, const Type* row) {
      for (size_t d = 0; d < D; d += kLineValues) prefetch_line(row + d);
    });
  }

  // Brings some positions of all heads of a task into the second-level cache: eight runs side by side, for memory answers
  // one run after the other at half that rate, and prefetches that a core cannot remember hold up what comes after them.
  static void bring(const Pages<Kv>& pages, const Type* base, int64_t heads, int64_t first, int64_t end) {
    constexpr int64_t kRun = kBring / 8, kStep = 256;
    if (pages.block_tokens % kRun != 0) return;  // such a run may lie in several blocks: read it where it is used
    const char* runs[8];
    int64_t count = 0;
    for (int64_t p = first; p < std::min(first + kBring, end); p += kRun)
      runs[count++] = reinterpret_cast<const char*>(base + pages.table[p / pages.block_tokens] * pages.block_stride +
                                                    p % pages.block_tokens * pages.slot_stride);
    const auto row = static_cast<int64_t>(heads * D * sizeof(Type));
    const auto row_stride = static_cast<int64_t>(pages.slot_stride * sizeof(Type));
    for (int64_t position = 0; position < kRun; ++position)
      for (int64_t step = 0; step < row; step += kStep)
        for (int64_t run = 0; run < count; ++run)
          for (int64_t line = step; line < std::min(step + kStep, row); line += 64)
            static_cast<void>(*static_cast<const volatile char*>(runs[run] + position * row_stride + line));
  }

  // Softmax weights, not yet divided by their sum, of up to sixteen rows.
  static Weights weigh_lanes(const Pages<Kv>& pages, const Type* keys, int64_t, const int32_t* visible, int64_t most,
                             AttentionScratch& scratch) {
    float* scores = scratch.scores.data();
    const Int limit = iload(visible);
    Vec largest = splat(-INFINITY);
    int64_t p = 0;
    for (; p + kAtOnce <= most; p += kAtOnce) {
      prefetch(pages, keys, p + 2 * kAtOnce, kAtOnce, most);
      largest = score<kAtOnce>(pages, keys, p, limit, scratch, largest);
    }
    for (; p < most; ++p) largest = score<1>(pages, keys, p, limit, scratch, largest);

    Vec sums[kLanes];
    for (int i = 0; i < kLanes; ++i) sums[i] = splat(0);
    for (p = 0; p < most; ++p) {
      const Vec weight =
          where_below(static_cast<int32_t>(p), limit, exp(load(scores + p * kLanes) - largest), splat(0));
      store(scores + p * kLanes, weight);
      sums[p % kLanes] = sums[p % kLanes] + weight;
    }
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    store(scratch.inverse.data(), splat(1.0f) / sums[0]);
    return {scores, 0, 1, kLanes, scratch.inverse.data()};
  }

  // The same for R rows of each head, by sixteen positions. Rows that are not there repeat the last, too.
  template <int R>
  static Weights weigh_positions(const Pages<Kv>& pages, const Type* keys, int64_t heads, const int32_t* visible,
                                 int64_t most, AttentionScratch& scratch) {
    float* scores = scratch.scores.data();
    float* largest = scratch.largest.data();  // [heads][R][16]
    const int64_t row_stride = (most + kLanes - 1) / kLanes * kLanes;
    Int limit[R];  // less the lane's number, so that position p + lane is visible where p is below
    for (int r = 0; r < R; ++r) {
      alignas(64) int32_t limits[kLanes];
      for (int i = 0; i < kLanes; ++i) limits[i] = visible[r] - i;
      limit[r] = iload(limits);
    }
    std::fill_n(largest, heads * R * kLanes, -INFINITY);
    for (int64_t p = 0; p < most; p += kLanes) {
      const Type *rows[kLanes], *ahead[kLanes];
      find(pages, keys, p, kLanes, most, rows);
      if (kBeside) find(pages, keys, p + kAhead, kLanes, most, ahead);
      if (!kBeside && p % kBring == 0) bring(pages, keys, heads, p, most);
      for (int64_t h = 0; h < heads; ++h) {
        const float* query = scratch.query.data() + h * R * D;
        Vec sum[R];
        for (int r = 0; r < R; ++r) sum[r] = splat(0);
        for (int d = 0; d < D; d += kLanes) {
          Vec part[kLanes];
          for (int i = 0; i < kLanes; ++i) part[i] = Kv::load(rows[i] + h * D + d);
          if (kBeside && d % kLineValues == 0)
            for (int i = 0; i < kLanes; ++i) prefetch_line(ahead[i] + h * D + d);
          transpose(part);
          for (int i = 0; i < kLanes; ++i)
            for (int r = 0; r < R; ++r) sum[r] = fma(splat(query[r * D + d + i]), part[i], sum[r]);
        }
        for (int64_t r = 0; r < R; ++r) {
          float* most_so_far = largest + (h * R + r) * kLanes;
          store(scores + (h * R + r) * row_stride + p, sum[r]);
          const Vec seen = where_below(static_cast<int32_t>(p), limit[r], sum[r], splat(-INFINITY));
          store(most_so_far, max(load(most_so_far), seen));
        }
      }
    }
    for (int64_t i = 0; i < heads * R; ++i) {
      float* row = scores + i * row_stride;
      const Vec top = splat(max_of(load(largest + i * kLanes)));
      Vec sums = splat(0);
      for (int64_t p = 0; p < most; p += kLanes) {
        const Vec weight = where_below(static_cast<int32_t>(p), limit[i % R], exp(load(row + p) - top), splat(0));
        store(row + p, weight);
        sums = sums + weight;
      }
      scratch.inverse.data()[i] = 1.0f / sage::sum(sums);
    }
    return {scores, R * row_stride, row_stride, 1, scratch.inverse.data()};
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
      const Vec q = load(scratch.query.data() + d * kLanes);
      for (int i = 0; i < P; ++i) sum[i] = fma(q, splat(scratch.rows[i * D + d]), sum[i]);
    }
    for (int i = 0; i < P; ++i) {
      store(scratch.scores.data() + (first + i) * kLanes, sum[i]);
      largest = max(largest, where_below(static_cast<int32_t>(first + i), limit, sum[i], splat(-INFINITY)));
    }
    return largest;
  }

  // total[row] += weights of `count` positions from `position` on times their values, for R rows from `first` on. With
  // `Next`, kChunk more of `rows` come next.
  template <int R, class Source, bool Next>
  static void add(int64_t first, const typename Source::Type* const* rows, const Weights& weights, int64_t position,
                  int64_t count, float* total) {
    const float* from = weights.base + first * weights.row_stride + position * weights.position_stride;
    Vec sum[R][kVecs];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kVecs; ++i) sum[r][i] = load(total + (first + r) * D + i * kLanes);
    for (int64_t p = 0; p < count; ++p) {
      Vec value[kVecs];
      for (int i = 0; i < kVecs; ++i) value[i] = Source::load(rows[p] + i * kLanes);
      if constexpr (Next)
        for (size_t d = 0; d < D; d += kLineValues) prefetch_line(rows[p + kChunk] + d);
      for (int r = 0; r < R; ++r) {
        const Vec weight = splat(from[p * weights.position_stride + r * weights.row_stride]);
        for (int i = 0; i < kVecs; ++i) sum[r][i] = fma(weight, value[i], sum[r][i]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kVecs; ++i) store(total + (first + r) * D + i * kLanes, sum[r][i]);
  }

  template <int R, class Source, bool Next>
  static void some(int rows_left, int64_t first, const typename Source::Type* const* rows, const Weights& weights,
                   int64_t position, int64_t count, float* total) {
    if (rows_left == R) return add<R, Source, Next>(first, rows, weights, position, count, total);
    if constexpr (R > 1) some<R - 1, Source, Next>(rows_left, first, rows, weights, position, count, total);
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
