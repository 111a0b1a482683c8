// Linear layers on int8: y = x W^T + b, with weights and activations in groups of 32 along the input.
//
// Activations are quantised per token and group, a = max|x| / 127:
//   one plane    x ≈ a * h            h in -127..127
//   two planes   x ≈ a * (h + l/256)  l in -127..127, so the error is 2^-9 of one plane's
// Weights, per row and group, in the smallest format that keeps them:
//   kNibbles     w = d * q + m        q in 0..15; only where this is w exactly (checkpoints made from 4-bit files)
//   kBytes       w = d * h            exact for 8-bit files, rounded for others when one plane is asked for
//   kTwoPlanes   w = d * (h + l/256)  for other checkpoints when two planes are asked for
// Dot products of 32 are exact integers. They are scaled and added in float32, group after group, for each token on its
// own: a result does not depend on which other tokens are there, on threads, or on the instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.h"
#include "team.h"
#include "vec.h"

namespace sage {

constexpr int64_t kGroup = 32;  // inputs that share a scale
constexpr int64_t kRows = 16;   // outputs computed together, one per lane
constexpr int kTokens = kRegisters / 4;  // computed together: as many as the sums of which fit into registers

enum class Format { kNibbles = 4, kBytes = 8, kTwoPlanes = 16 };  // bits per weight

// What a dot product needs to know of one token's group beside the int8.
struct GroupMeta {
  float scale;            // a, or a / 256 with two planes
  float sum;              // scale times the sum of the integers: what m is multiplied with
  int32_t high_start;     // see dot_start: of plane h
  int32_t low_start;      // of plane l
};

// Quantised tokens: per token and group 32 int8 of plane h and, with two planes, 32 of plane l. Ordered as they are read:
// [kTokens of the tokens][group][token], so that all of a group are at fixed distances from one address.
struct Activations {
  int planes = 1;
  int64_t columns = 0;
  Buffer<int8_t> codes;
  Buffer<GroupMeta> meta;

  void shape(int64_t tokens, int64_t width, int num_planes) {
    planes = num_planes;
    columns = width;
    const int64_t padded = (tokens + kTokens - 1) / kTokens * kTokens;
    codes.reserve(static_cast<size_t>(padded * width * num_planes));
    meta.reserve(static_cast<size_t>(padded * width / kGroup));
  }
  // Of the first group of token t; the next group is kTokens of these further on.
  int64_t first_group(int64_t t) const { return t / kTokens * kTokens * (columns / kGroup) + t % kTokens; }

  void quantize(int64_t t, const float* x) {
    int8_t* out = codes.data() + first_group(t) * kGroup * planes;
    GroupMeta* m = meta.data() + first_group(t);
    for (int64_t i = 0; i < columns; i += kGroup, out += kTokens * kGroup * planes, m += kTokens) {
      const Vec a = load(x + i), b = load(x + i + kLanes);
      const float largest = max_of(max(abs(a), abs(b)));
      const float scale = largest / 127.0f;
      const Vec inverse = splat(largest > 0 ? 127.0f / largest : 0.0f);
      const Vec ta = a * inverse, tb = b * inverse;
      const Vec ha = round(ta), hb = round(tb);
      store_int8(out, to_int(ha));
      store_int8(out + kLanes, to_int(hb));
      const int32_t high = sum(to_int(ha) + to_int(hb));
      if (planes == 1) {
        *m = {scale, scale * static_cast<float>(high), -128 * high, 0};
        continue;
      }
      const Vec top = splat(127.0f), bottom = splat(-127.0f), fine = splat(256.0f);
      const Int la = to_int(max(min((ta - ha) * fine, top), bottom));
      const Int lb = to_int(max(min((tb - hb) * fine, top), bottom));
      store_int8(out + kGroup, la);
      store_int8(out + kGroup + kLanes, lb);
      const int32_t low = sum(la + lb);
      const float unit = scale / 256.0f;
      *m = {unit, unit * static_cast<float>(high * 256 + low), -128 * high, -128 * low};
    }
  }
};

// One layer's weights, sixteen rows at a time, in the order the dot products read them.
class Linear {
 public:
  // weights: float32 [rows, columns], columns a multiple of 32. bias: [rows] or null. planes: 1 or 2, of activations.
  Linear(const float* weights, int64_t rows, int64_t columns, const float* bias, int planes, int threads)
      : rows_(rows), columns_(columns), groups_(columns / kGroup), planes_(planes), format_(choose(weights, threads)) {
    const int64_t tiles = num_tiles();
    codes_.reserve(static_cast<size_t>(tiles * groups_ * code_bytes() + kSlackBytes));
    scales_.reserve(static_cast<size_t>(tiles * groups_ * scale_bytes() + kSlackBytes));
    bias_.reserve(static_cast<size_t>(tiles * kRows));
    std::fill_n(bias_.data(), tiles * kRows, 0.0f);
    if (bias != nullptr) std::copy_n(bias, rows, bias_.data());
    Team::run(threads, [&](int thread) {
      for (int64_t tile = tiles * thread / threads; tile < tiles * (thread + 1) / threads; ++tile) pack(weights, tile);
    });
  }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int planes() const { return planes_; }
  Format format() const { return format_; }
  // Of what a product reads.
  size_t size_bytes() const {
    return static_cast<size_t>(num_tiles() * (groups_ * (code_bytes() + scale_bytes()) + kRows * 4));
  }

  // y[t * stride + row] = (or += with ADD) what the layer makes of token t: this thread's share of the rows.
  template <bool ADD>
  void multiply(const Activations& x, int64_t tokens, float* y, int64_t stride, int thread, int threads) const {
    switch (format_) {
      case Format::kNibbles:
        return planes_ == 1 ? multiply<Format::kNibbles, 1, ADD>(x, tokens, y, stride, thread, threads)
                            : multiply<Format::kNibbles, 2, ADD>(x, tokens, y, stride, thread, threads);
      case Format::kBytes:
        return planes_ == 1 ? multiply<Format::kBytes, 1, ADD>(x, tokens, y, stride, thread, threads)
                            : multiply<Format::kBytes, 2, ADD>(x, tokens, y, stride, thread, threads);
      case Format::kTwoPlanes:
        return multiply<Format::kTwoPlanes, 2, ADD>(x, tokens, y, stride, thread, threads);
    }
  }

 private:
  static constexpr int64_t kSlackBytes = 16384;  // prefetches run past the end
  static constexpr int64_t kPrefetchBytes = 8192;  // as much as arrives while memory answers once

  int64_t num_tiles() const { return (rows_ + kRows - 1) / kRows; }
  int64_t code_bytes() const { return kRows * kGroup * static_cast<int64_t>(format_) / 8; }
  int64_t scale_bytes() const { return kRows * (format_ == Format::kBytes ? 2 : 4); }

  // ---- packing ----

  struct Nibbles {
    float d, m;
    uint8_t q[kGroup];
  };

  // w as d * q + m with d and m in float16, exactly. 4-bit files hold the minimum (Q4_1), or the middle code 8 is 0 (Q4_0).
  static bool exact_nibbles(const float* w, Nibbles& out) {
    const auto [low, high] = std::minmax_element(w, w + kGroup);
    const float largest = std::max(-*low, *high);
    const float ways[][2] = {{(*high - *low) / 15.0f, *low}, {largest / 8.0f, -largest}};
    for (const auto& [step, minimum] : ways) {
      out.d = half_to_float(float_to_half(step));
      out.m = half_to_float(float_to_half(minimum));
      bool exact = true;
      for (int i = 0; i < kGroup && exact; ++i) {
        const float q = out.d > 0 ? std::nearbyint((w[i] - out.m) / out.d) : 0.0f;
        exact = q >= 0 && q <= 15 && out.d * q + out.m == w[i];
        out.q[i] = static_cast<uint8_t>(q);
      }
      if (exact) return true;
    }
    return false;
  }

  static float byte_scale(const float* w) {
    float largest = 0;
    for (int i = 0; i < kGroup; ++i) largest = std::max(largest, std::fabs(w[i]));
    return half_to_float(float_to_half(largest / 127.0f));
  }

  static int8_t byte_code(float w, float d) {
    return static_cast<int8_t>(d > 0 ? std::clamp(std::nearbyint(w / d), -127.0f, 127.0f) : 0.0f);
  }

  static bool exact_bytes(const float* w) {
    const float d = byte_scale(w);
    return std::all_of(w, w + kGroup, [d](float value) { return d * byte_code(value, d) == value; });
  }

  template <class Test>
  bool all_groups(const float* weights, int threads, const Test& test) const {
    std::atomic<bool> all{true};
    const int64_t total = rows_ * groups_;
    Team::run(threads, [&](int thread) {
      for (int64_t i = total * thread / threads; i < total * (thread + 1) / threads; ++i) {
        if (!all.load(std::memory_order_relaxed)) return;
        if (!test(weights + i * kGroup)) all.store(false, std::memory_order_relaxed);
      }
    });
    return all;
  }

  Format choose(const float* weights, int threads) const {
    if (all_groups(weights, threads, [](const float* w) {
          Nibbles n;
          return exact_nibbles(w, n);
        })) {
      return Format::kNibbles;
    }
    if (planes_ == 1 || all_groups(weights, threads, exact_bytes)) return Format::kBytes;
    return Format::kTwoPlanes;
  }

  // Byte j*64 + 4r + i of a plane is column 4j + i of row r; nibbles keep quads 2j and 2j + 1 in one such run of 64.
  void pack(const float* weights, int64_t tile) {
    static const float zeros[kGroup] = {};
    for (int64_t g = 0; g < groups_; ++g) {
      uint8_t* codes = codes_.data() + (tile * groups_ + g) * code_bytes();
      uint8_t* scales = scales_.data() + (tile * groups_ + g) * scale_bytes();
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t row = tile * kRows + r;
        const float* w = row < rows_ ? weights + row * columns_ + g * kGroup : zeros;
        switch (format_) {
          case Format::kNibbles: {
            Nibbles n;
            exact_nibbles(w, n);
            for (int64_t i = 0; i < kGroup; ++i) {
              uint8_t& byte = codes[i / 8 * 64 + r * 4 + i % 4];
              byte = static_cast<uint8_t>(i / 4 % 2 ? byte | n.q[i] << 4 : n.q[i]);
            }
            put_half(scales + 2 * r, n.d);
            put_half(scales + 2 * (kRows + r), n.m);
            break;
          }
          case Format::kBytes: {
            const float d = byte_scale(w);
            for (int64_t i = 0; i < kGroup; ++i) put_byte(codes, i, r, byte_code(w[i], d));
            put_half(scales + 2 * r, d);
            break;
          }
          case Format::kTwoPlanes: {
            float largest = 0;
            for (int64_t i = 0; i < kGroup; ++i) largest = std::max(largest, std::fabs(w[i]));
            const float d = largest / 127.0f;
            for (int64_t i = 0; i < kGroup; ++i) {
              const int8_t h = byte_code(w[i], d);
              const float rest = d > 0 ? (w[i] - d * static_cast<float>(h)) / d * 256.0f : 0.0f;
              put_byte(codes, i, r, h);
              put_byte(codes + kRows * kGroup, i, r, byte_code(rest, 1.0f));
            }
            std::memcpy(scales + 4 * r, &d, sizeof d);
            break;
          }
        }
      }
    }
  }

  static void put_byte(uint8_t* codes, int64_t column, int64_t row, int8_t code) {
    codes[column / 4 * 64 + row * 4 + column % 4] = static_cast<uint8_t>(code + 128);
  }
  static void put_half(uint8_t* p, float value) {
    const uint16_t h = float_to_half(value);
    std::memcpy(p, &h, sizeof h);
  }

  // ---- multiplying ----

  // Sixteen rows by T tokens from `token` on, a multiple of kTokens.
  template <Format FORMAT, int PLANES, int T>
  void tile(int64_t index, const Activations& x, int64_t token, bool prefetch, Vec* out) const {
    constexpr int64_t kCodeBytes = kRows * kGroup * static_cast<int64_t>(FORMAT) / 8;
    constexpr int64_t kScaleBytes = kRows * (FORMAT == Format::kBytes ? 2 : 4);
    const uint8_t* codes = codes_.data() + index * groups_ * kCodeBytes;
    const uint8_t* scales = scales_.data() + index * groups_ * kScaleBytes;
    constexpr int64_t kTokenBytes = kGroup * PLANES;
    const int8_t* x_codes = x.codes.data() + x.first_group(token) * kTokenBytes;
    const GroupMeta* x_meta = x.meta.data() + x.first_group(token);
    Vec total[T];
    for (int t = 0; t < T; ++t) total[t] = load(bias_.data() + index * kRows);
    for (int64_t g = 0; g < groups_; ++g, codes += kCodeBytes, scales += kScaleBytes) {
      if (prefetch) {
        for (int64_t i = 0; i < kCodeBytes; i += 64) prefetch_line(codes + kPrefetchBytes + i);
        prefetch_line(scales + kPrefetchBytes / 4);
      }
      Int w[8], fine[8];
      Vec d, m;
      if constexpr (FORMAT == Format::kNibbles) {
        for (int j = 0; j < 4; ++j) {
          const Int both = iload(codes + 64 * j);
          w[2 * j] = low_nibbles(both);
          w[2 * j + 1] = high_nibbles(both);
        }
        d = load_half(reinterpret_cast<const uint16_t*>(scales));
        m = load_half(reinterpret_cast<const uint16_t*>(scales) + kRows);
      } else {
        for (int j = 0; j < 8; ++j) w[j] = iload(codes + 64 * j);
        if constexpr (FORMAT == Format::kTwoPlanes) {
          for (int j = 0; j < 8; ++j) fine[j] = iload(codes + kRows * kGroup + 64 * j);
          d = load(reinterpret_cast<const float*>(scales));
        } else {
          d = load_half(reinterpret_cast<const uint16_t*>(scales));
        }
      }
      for (int t = 0; t < T; ++t) {
        const int8_t* high = x_codes + t * kTokenBytes;
        const GroupMeta& meta = x_meta[t];
        Int dot = products<FORMAT>(w, high, meta.high_start);
        if constexpr (PLANES == 2) {
          dot = times_256(dot) + products<FORMAT>(w, high + kGroup, meta.low_start);
          // In units of 1/256, so that l of the weights times l of the activations would be 1/256: left out.
          if constexpr (FORMAT == Format::kTwoPlanes) dot = dot + products<FORMAT>(fine, high, meta.high_start);
        }
        total[t] = fma(to_float(dot), d * splat(meta.scale), total[t]);
        if constexpr (FORMAT == Format::kNibbles) total[t] = fma(m, splat(meta.sum), total[t]);
      }
      x_codes += kTokens * kTokenBytes;
      x_meta += kTokens;
    }
    for (int t = 0; t < T; ++t) out[t] = total[t];
  }

  // Per lane the dot product of 32 weights and 32 activations. Two chains, for the instruction takes five cycles.
  template <Format FORMAT>
  static Int products(const Int* w, const int8_t* x, int32_t correction) {
    if constexpr (FORMAT == Format::kNibbles) {
      Int a = isplat(0), b = isplat(0);
      for (int j = 0; j < 8; j += 2) {
        a = dot_u4(a, w[j], four(x, j));
        b = dot_u4(b, w[j + 1], four(x, j + 1));
      }
      return a + b;
    } else {
      Int a = dot_start(correction), b = isplat(0);
      for (int j = 0; j < 8; j += 2) {
        a = dot_s8(a, w[j], four(x, j));
        b = dot_s8(b, w[j + 1], four(x, j + 1));
      }
      return a + b;
    }
  }

  // Read one by one, or compilers load two at once and take the long way round through a general register.
  static int32_t four(const int8_t* x, int j) {
    int32_t value;
    std::memcpy(&value, x + 4 * j, sizeof value);
    return value;
  }

  static void prefetch_line(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

  template <Format FORMAT, int PLANES, int T>
  void some(int count, int64_t index, const Activations& x, int64_t token, bool prefetch, Vec* out) const {
    if (count == T) return tile<FORMAT, PLANES, T>(index, x, token, prefetch, out);
    if constexpr (T > 1) some<FORMAT, PLANES, T - 1>(count, index, x, token, prefetch, out);
  }

  template <Format FORMAT, int PLANES, bool ADD>
  void multiply(const Activations& x, int64_t tokens, float* y, int64_t stride, int thread, int threads) const {
    const int64_t tiles = num_tiles();
    for (int64_t index = tiles * thread / threads; index < tiles * (thread + 1) / threads; ++index) {
      const int64_t row = index * kRows, valid = std::min(kRows, rows_ - row);
      for (int64_t token = 0; token < tokens; token += kTokens) {
        const int count = static_cast<int>(std::min<int64_t>(kTokens, tokens - token));
        Vec out[kTokens];
        some<FORMAT, PLANES, kTokens>(count, index, x, token, token == 0, out);
        for (int t = 0; t < count; ++t) {
          float* target = y + (token + t) * stride + row;
          if (valid == kRows) {
            store(target, ADD ? out[t] + load(target) : out[t]);
          } else {
            float last[kRows];
            store(last, out[t]);
            for (int64_t r = 0; r < valid; ++r) target[r] = ADD ? last[r] + target[r] : last[r];
          }
        }
      }
    }
  }

  const int64_t rows_, columns_, groups_;
  const int planes_;
  const Format format_;
  Buffer<uint8_t> codes_, scales_;
  Buffer<float> bias_;
};

}  // namespace sage
