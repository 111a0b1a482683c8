// The C interface over the classes. Compiled once per instruction set (build.py).
#include "sagellm_cpu.h"

#include <memory>
#include <new>

#include "attention.h"
#include "decoder.h"
#include "linear.h"

using namespace sage;

namespace {

// Exceptions must not reach C: all that is thrown here is a want of memory.
template <class F>
int guarded(const F& f) {
  try {
    f();
    return 0;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

const Linear* linear_of(const void* p) { return static_cast<const Linear*>(p); }
Decoder* decoder_of(void* p) { return static_cast<Decoder*>(p); }

}  // namespace

extern "C" {

const char* sage_isa(void) { return kIsa; }

int sage_paged_attention(const float* query, int64_t query_stride, const float* key, int64_t key_stride,
                         const float* value, int64_t value_stride, const SageCache* cache, const SageBatch* batch,
                         int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, float* out, int64_t threads) {
  return guarded([&] {
    const AttentionShape shape{heads, kv_heads, head_dim, scale};
    const std::vector<AttentionTask> tasks = attention_tasks(*batch, shape, static_cast<int>(threads));
    const auto count = static_cast<int64_t>(tasks.size());
    static thread_local std::vector<std::unique_ptr<AttentionScratch>> scratch;
    while (scratch.size() < static_cast<size_t>(threads)) scratch.push_back(std::make_unique<AttentionScratch>());
    for (int64_t i = 0; i < threads; ++i) scratch[i]->reserve(*batch, shape);
    auto& scratch_of = scratch;  // a thread_local is not captured: the team's threads would see their own
    std::atomic<int64_t> next{0};
    dispatch(cache->type, head_dim, [&](auto kv, auto dim) {
      using Kv = decltype(kv);
      constexpr int D = decltype(dim)::value;
      if (key != nullptr) {
        for (int64_t s = 0; s < batch->sequences; ++s)
          for (int64_t t = batch->q_starts[s]; t < batch->q_starts[s + 1]; ++t) {
            const int64_t position = batch->kv_lens[s] - batch->q_starts[s + 1] + t;
            const int64_t* table = batch->tables + s * batch->table_stride;
            write_slot<Kv>(*cache, cache->keys, table, position, key + t * key_stride, kv_heads * D);
            write_slot<Kv>(*cache, cache->values, table, position, value + t * value_stride, kv_heads * D);
          }
      }
      Team::run(static_cast<int>(threads), [&](int thread) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
          const AttentionTask& task = tasks[static_cast<size_t>(count - 1 - i)];
          const int64_t start = batch->q_starts[task.sequence];
          Attention<Kv, D>::run(task, shape, *batch, *cache, static_cast<const typename Kv::Type*>(cache->keys),
                                static_cast<const typename Kv::Type*>(cache->values), query + start * query_stride,
                                query_stride, out + start * heads * D, heads * D, *scratch_of[thread]);
        }
      });
    });
  });
}

void* sage_linear_pack(const float* weights, int64_t rows, int64_t columns, const float* bias, int64_t planes,
                       int64_t threads) {
  Linear* made = nullptr;
  guarded([&] {
    made = new Linear(weights, rows, columns, bias, static_cast<int>(planes), static_cast<int>(threads));
  });
  return made;
}

void sage_linear_free(void* linear) { delete static_cast<Linear*>(linear); }

int64_t sage_linear_bits(const void* linear) { return static_cast<int64_t>(linear_of(linear)->format()); }

int64_t sage_linear_bytes(const void* linear) { return static_cast<int64_t>(linear_of(linear)->size_bytes()); }

int sage_linear(const void* linear, const float* x, int64_t tokens, float* y, int64_t threads) {
  return guarded([&] {
    const Linear& layer = *linear_of(linear);
    static thread_local Activations input;
    input.shape(tokens, layer.columns(), layer.planes());
    for (int64_t t = 0; t < tokens; ++t) input.quantize(t, x + t * layer.columns());
    const Activations& shared = input;
    Team::run(static_cast<int>(threads), [&](int thread) {
      layer.multiply<false>(shared, tokens, y, layer.rows(), thread, static_cast<int>(threads));
    });
  });
}

void* sage_decoder_create(const SageModel* model, const float* cosines, const float* sines, const float* final_norm) {
  Decoder* made = nullptr;
  guarded([&] { made = new Decoder(*model, cosines, sines, final_norm); });
  return made;
}

void sage_decoder_free(void* decoder) { delete decoder_of(decoder); }

void sage_decoder_layer(void* decoder, int64_t layer, const float* attention_norm, const float* mlp_norm,
                        const void* qkv, const void* output, const void* gate_up, const void* down) {
  decoder_of(decoder)->layer(layer) = {attention_norm, mlp_norm, linear_of(qkv), linear_of(output), linear_of(gate_up),
                                       linear_of(down)};
}

int sage_decoder_forward(void* decoder, float* hidden, const SageCache* cache, const SageBatch* batch,
                         SageLayerDone layer_done, int64_t threads) {
  return guarded([&] {
    decoder_of(decoder)->forward(hidden, *cache, *batch, layer_done, static_cast<int>(threads));
  });
}
}
