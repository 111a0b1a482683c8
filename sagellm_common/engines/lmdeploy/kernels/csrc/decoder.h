// The decoder layers of a Llama or Qwen2 model over a batch of sequences, any number of new tokens each.
//
//   norm → q, k, v → rotate, write KV → attention → output (+ residual) → norm → gate, up → silu → down (+ residual)
//
// Threads share the tokens where work is per token, the rows where it is per output row, and meet in between.
#pragma once

#include <vector>

#include "attention.h"
#include "linear.h"

namespace sage {

class Decoder {
 public:
  struct Layer {
    const float* attention_norm = nullptr;
    const float* mlp_norm = nullptr;
    const Linear* qkv = nullptr;
    const Linear* output = nullptr;
    const Linear* gate_up = nullptr;
    const Linear* down = nullptr;
  };

  Decoder(const SageModel& model, const float* cosines, const float* sines, const float* final_norm)
      : model_(model), cosines_(cosines), sines_(sines), final_norm_(final_norm), layers_(model.layers) {}

  Layer& layer(int64_t index) { return layers_[static_cast<size_t>(index)]; }

  void forward(float* hidden, const SageCache& cache, const SageBatch& batch, SageLayerDone layer_done, int threads) {
    const int64_t tokens = batch.q_starts[batch.sequences];
    qkv_.reserve(tokens * qkv_width());
    attended_.reserve(tokens * attention_width());
    gate_up_.reserve(tokens * 2 * model_.intermediate);
    input_.shape(tokens, std::max({model_.hidden, attention_width(), model_.intermediate}),
                 static_cast<int>(model_.planes));
    while (scratch_.size() < static_cast<size_t>(threads)) scratch_.push_back(std::make_unique<AttentionScratch>());
    const AttentionShape shape = attention_shape();
    for (int i = 0; i < threads; ++i) scratch_[i]->reserve(batch, shape);
    place(batch, tokens);
    const std::vector<AttentionTask> tasks = attention_tasks(batch, shape, threads);
    std::vector<std::atomic<int64_t>> next(static_cast<size_t>(model_.layers));
    Barrier barrier(threads);

    Team::run(threads, [&](int thread) {
      const int64_t first = tokens * thread / threads, last = tokens * (thread + 1) / threads;
      std::vector<float> row(static_cast<size_t>(std::max(model_.hidden, model_.intermediate)));
      const auto normalised = [&](const float* weight, int64_t t) {
        normalise(hidden + t * model_.hidden, weight, row.data());
        input_.quantize(t, row.data());
      };

      for (int64_t l = 0; l < model_.layers; ++l) {
        const Layer& layer = layers_[static_cast<size_t>(l)];
        input(barrier, model_.hidden, thread);
        for (int64_t t = first; t < last; ++t) normalised(layer.attention_norm, t);
        barrier.wait();
        layer.qkv->multiply<false>(input_, tokens, qkv_.data(), qkv_width(), thread, threads);
        barrier.wait();
        dispatch(cache.type, model_.head_dim, [&](auto kv, auto dim) {
          using Kv = decltype(kv);
          auto* keys = static_cast<typename Kv::Type*>(cache.keys) + l * cache.layer_stride;
          auto* values = static_cast<typename Kv::Type*>(cache.values) + l * cache.layer_stride;
          for (int64_t t = first; t < last; ++t) rotate_and_write<Kv>(t, cache, keys, values, batch);
          barrier.wait();
          if (thread == 0 && layer_done != nullptr) layer_done(l);
          attend<Kv, decltype(dim)::value>(tasks, next[static_cast<size_t>(l)], shape, batch, cache, keys, values,
                                           *scratch_[static_cast<size_t>(thread)]);
        });
        input(barrier, attention_width(), thread);
        for (int64_t t = first; t < last; ++t) input_.quantize(t, attended_.data() + t * attention_width());
        barrier.wait();
        layer.output->multiply<true>(input_, tokens, hidden, model_.hidden, thread, threads);
        input(barrier, model_.hidden, thread);
        for (int64_t t = first; t < last; ++t) normalised(layer.mlp_norm, t);
        barrier.wait();
        layer.gate_up->multiply<false>(input_, tokens, gate_up_.data(), 2 * model_.intermediate, thread, threads);
        input(barrier, model_.intermediate, thread);
        for (int64_t t = first; t < last; ++t) {
          activate(gate_up_.data() + t * 2 * model_.intermediate, row.data());
          input_.quantize(t, row.data());
        }
        barrier.wait();
        layer.down->multiply<true>(input_, tokens, hidden, model_.hidden, thread, threads);
      }
      barrier.wait();
      for (int64_t t = first; t < last; ++t) {
        float* x = hidden + t * model_.hidden;
        normalise(x, final_norm_, x);
      }
    });
  }

 private:
  int64_t attention_width() const { return model_.heads * model_.head_dim; }
  int64_t kv_width() const { return model_.kv_heads * model_.head_dim; }
  int64_t qkv_width() const { return attention_width() + 2 * kv_width(); }
  AttentionShape attention_shape() const {
    return {model_.heads, model_.kv_heads, model_.head_dim, 1.0f / std::sqrt(static_cast<float>(model_.head_dim))};
  }

  // When all threads are done with it, the input of the next layer takes its shape.
  void input(Barrier& barrier, int64_t width, int thread) {
    barrier.wait();
    if (thread == 0) input_.columns = width;
    barrier.wait();
  }

  // Which sequence a token belongs to, and its position there.
  void place(const SageBatch& batch, int64_t tokens) {
    sequence_.resize(static_cast<size_t>(tokens));
    position_.resize(static_cast<size_t>(tokens));
    for (int64_t s = 0; s < batch.sequences; ++s)
      for (int64_t t = batch.q_starts[s]; t < batch.q_starts[s + 1]; ++t) {
        sequence_[static_cast<size_t>(t)] = s;
        position_[static_cast<size_t>(t)] = batch.kv_lens[s] - batch.q_starts[s + 1] + t;
      }
  }

  void normalise(const float* x, const float* weight, float* out) const {
    Vec squares = splat(0);
    for (int64_t i = 0; i < model_.hidden; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
    const Vec inverse = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(model_.hidden) + model_.norm_eps));
    for (int64_t i = 0; i < model_.hidden; i += kLanes) store(out + i, load(x + i) * inverse * load(weight + i));
  }

  // out = silu(gate) * up
  void activate(const float* gate_up, float* out) const {
    for (int64_t i = 0; i < model_.intermediate; i += kLanes) {
      const Vec gate = load(gate_up + i), up = load(gate_up + model_.intermediate + i);
      store(out + i, gate / (splat(1.0f) + exp(splat(0) - gate)) * up);
    }
  }

  template <class Kv>
  void rotate_and_write(int64_t t, const SageCache& cache, void* keys, void* values, const SageBatch& batch) {
    const int64_t position = position_[static_cast<size_t>(t)], half = model_.head_dim / 2;
    const int64_t* table = batch.tables + sequence_[static_cast<size_t>(t)] * batch.table_stride;
    const float* c = cosines_ + position * half;
    const float* s = sines_ + position * half;
    float* row = qkv_.data() + t * qkv_width();
    for (int64_t h = 0; h < model_.heads + model_.kv_heads; ++h) {
      float* x = row + h * model_.head_dim;
      for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * c[i] - b * s[i];
        x[half + i] = b * c[i] + a * s[i];
      }
    }
    write_slot<Kv>(cache, keys, table, position, row + attention_width(), kv_width());
    write_slot<Kv>(cache, values, table, position, row + attention_width() + kv_width(), kv_width());
  }

  template <class Kv, int D>
  void attend(const std::vector<AttentionTask>& tasks, std::atomic<int64_t>& next, const AttentionShape& shape,
              const SageBatch& batch, const SageCache& cache, const typename Kv::Type* keys,
              const typename Kv::Type* values, AttentionScratch& scratch) {
    const auto count = static_cast<int64_t>(tasks.size());
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      const AttentionTask& task = tasks[static_cast<size_t>(count - 1 - i)];  // the last tokens see most: first
      const int64_t start = batch.q_starts[task.sequence];
      Attention<Kv, D>::run(task, shape, batch, cache, keys, values, qkv_.data() + start * qkv_width(), qkv_width(),
                            attended_.data() + start * attention_width(), attention_width(), scratch);
    }
  }

  const SageModel model_;
  const float* cosines_;
  const float* sines_;
  const float* final_norm_;
  std::vector<Layer> layers_;
  Buffer<float> qkv_, attended_, gate_up_;
  Activations input_;
  std::vector<std::unique_ptr<AttentionScratch>> scratch_;
  std::vector<int64_t> sequence_, position_;
};

}  // namespace sage
