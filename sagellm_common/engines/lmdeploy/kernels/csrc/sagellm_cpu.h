// The C interface of the CPU kernels. Python fills these structures through ctypes (library.py): keep both alike.
//
// Functions return 0, or -1 when memory is short. They never keep a pointer beyond the call, unless they say so.
#pragma once

#include <cstdint>

extern "C" {

enum SageKvType { SAGE_KV_FLOAT32 = 0, SAGE_KV_FLOAT16 = 1, SAGE_KV_BFLOAT16 = 2 };

// One layer of a paged cache: element [block][slot][kv_head][head_dim], a block every `block_stride` elements.
typedef struct {
  void* keys;
  void* values;
  int64_t block_stride;
  int64_t layer_stride;  // elements from one layer to the next (decoder only)
  int64_t block_tokens;
  int64_t type;  // SageKvType
} SageCache;

// The new tokens of a step, sequence after sequence. Sequence s has tokens q_starts[s] .. q_starts[s + 1], the last of
// which stands at position kv_lens[s] - 1; its KV of position p is in block tables[s * table_stride + p / block_tokens].
typedef struct {
  int64_t sequences;
  const int64_t* q_starts;  // [sequences + 1]
  const int64_t* kv_lens;   // [sequences], this step's tokens included
  const int64_t* tables;
  int64_t table_stride;
} SageBatch;

typedef struct {
  int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, planes;
  float norm_eps;
} SageModel;

const char* sage_isa(void);

// query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim] (rows `query_stride`, `key_stride` and
// `value_stride` elements apart) → out [tokens, heads, head_dim], all float32. Writes key and value into the cache
// first; with key null they are there already. head_dim is 16, 32, 64, 80, 96, 128 or 256.
int sage_paged_attention(const float* query, int64_t query_stride, const float* key, int64_t key_stride,
                         const float* value, int64_t value_stride, const SageCache* cache, const SageBatch* batch,
                         int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, float* out, int64_t threads);

// Packs float32 weights [rows, columns] and an optional bias [rows]; null when memory is short.
void* sage_linear_pack(const float* weights, int64_t rows, int64_t columns, const float* bias, int64_t planes,
                       int64_t threads);
void sage_linear_free(void* linear);
int64_t sage_linear_bits(const void* linear);   // per weight: 4, 8 or 16
int64_t sage_linear_bytes(const void* linear);
// x [tokens, columns] → y [tokens, rows]
int sage_linear(const void* linear, const float* x, int64_t tokens, float* y, int64_t threads);

// A Llama or Qwen2 decoder without its embedding and head. It keeps all pointers it is given until it is freed:
// norms are [hidden], rotary tables [positions, head_dim / 2].
void* sage_decoder_create(const SageModel* model, const float* cosines, const float* sines, const float* final_norm);
void sage_decoder_free(void* decoder);
void sage_decoder_layer(void* decoder, int64_t layer, const float* attention_norm, const float* mlp_norm,
                        const void* qkv, const void* output, const void* gate_up, const void* down);
// Told of each layer in order, on the calling thread, once its KV is complete.
typedef void (*SageLayerDone)(int64_t layer);
// hidden [tokens, hidden]: embeddings in, normalised hidden states out. Writes the tokens' KV into the cache.
// `layer_done` may be null.
int sage_decoder_forward(void* decoder, float* hidden, const SageCache* cache, const SageBatch* batch,
                         SageLayerDone layer_done, int64_t threads);
}
