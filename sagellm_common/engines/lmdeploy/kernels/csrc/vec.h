// Sixteen floats or sixteen int32: one AVX-512 register, or two of AVX2.
//
// Every operation rounds alike on both, and reductions add in one order, so a result has the same bits on either.
// (Compiled with -ffp-contract=off: a multiply and an add become one rounding only where `fma` says so.)
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace sage {

constexpr int kLanes = 16;

inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t float_to_half(float x) { return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }

inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

inline float max8(__m256 v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// Eight floats as bfloat16, to nearest, ties to even; no NaN expected.
inline __m128i to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

#if defined(__AVX512VNNI__)

constexpr const char* kIsa = "avx512_vnni";
constexpr int kRegisters = 32;  // that hold a Vec

struct Vec {
  __m512 v;
};
struct Int {
  __m512i v;
};

inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec to_float(Int a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Int to_int(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Vec power_of_two(Int n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}
inline __m256 low(Vec a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high(Vec a) { return _mm512_extractf32x8_ps(a.v, 1); }
inline Vec load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
// lane < limit[lane] ? a : b
inline Vec where_below(int32_t value, Int limit, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(_mm512_set1_epi32(value), limit.v), b.v, a.v)};
}

// Lane j of rows[i] becomes lane i of rows[j].
inline void transpose(Vec* rows) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {  // pairs of rows, then fours: each 128-bit part holds four rows of one column
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(a[i + j]), y = _mm512_castps_pd(a[i + 2 + j]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  for (int j = 0; j < 4; ++j) {  // b[4 * i + j]: rows 4i … 4i + 3 of columns j, j + 4, j + 8, j + 12
    const __m512 low02 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88), low13 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 high02 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 high13 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    rows[j].v = _mm512_shuffle_f32x4(low02, high02, 0x88);
    rows[4 + j].v = _mm512_shuffle_f32x4(low13, high13, 0x88);
    rows[8 + j].v = _mm512_shuffle_f32x4(low02, high02, 0xdd);
    rows[12 + j].v = _mm512_shuffle_f32x4(low13, high13, 0xdd);
  }
}

inline Int isplat(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Int iload(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Int operator+(Int a, Int b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Int times_256(Int a) { return {_mm512_slli_epi32(a.v, 8)}; }
inline Int low_nibbles(Int a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Int high_nibbles(Int a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
inline void store_int8(int8_t* p, Int a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }
inline int32_t sum(Int a) { return _mm512_reduce_add_epi32(a.v); }

// acc[lane] += the dot product of the lane's four bytes with the four int8 in `x`. Weights are 0..15.
inline Int dot_u4(Int acc, Int w, int32_t x) { return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(x))}; }
// The same for weights -127..127, stored as byte + 128, in an accumulator that began as `dot_start`.
inline Int dot_s8(Int acc, Int w, int32_t x) { return dot_u4(acc, w, x); }
// `correction` is -128 times the sum of the int8 that will be multiplied.
inline Int dot_start(int32_t correction) { return isplat(correction); }

#elif defined(__AVX2__)

constexpr const char* kIsa = "avx2";
constexpr int kRegisters = 8;

struct Vec {
  __m256 lo, hi;
};
struct Int {
  __m256i lo, hi;
};

inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline Vec round(Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline Vec to_float(Int a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline Int to_int(Vec a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline __m256 power_of_two8(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline Vec power_of_two(Int n) { return {power_of_two8(n.lo), power_of_two8(n.hi)}; }
inline __m256 low(Vec a) { return a.lo; }
inline __m256 high(Vec a) { return a.hi; }
inline Vec load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline __m256 from_bf16(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
inline Vec load_bf16(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {from_bf16(_mm_loadu_si128(q)), from_bf16(_mm_loadu_si128(q + 1))};
}
inline Vec where_below(int32_t value, Int limit, Vec a, Vec b) {
  const __m256i v = _mm256_set1_epi32(value);
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit.lo, v))),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit.hi, v)))};
}

inline void transpose8(__m256* rows) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m256d x = _mm256_castps_pd(a[i + j]), y = _mm256_castps_pd(a[i + 2 + j]);
      b[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
      b[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
    }
  for (int j = 0; j < 4; ++j) {
    rows[j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
    rows[4 + j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
  }
}
// Lane j of rows[i] becomes lane i of rows[j].
inline void transpose(Vec* rows) {
  __m256 quarter[4][8];  // rows 0 to 7 and 8 to 15 of columns 0 to 7, then of columns 8 to 15
  for (int i = 0; i < 8; ++i) {
    quarter[0][i] = rows[i].lo;
    quarter[1][i] = rows[8 + i].lo;
    quarter[2][i] = rows[i].hi;
    quarter[3][i] = rows[8 + i].hi;
  }
  for (auto& part : quarter) transpose8(part);
  for (int i = 0; i < 8; ++i) {
    rows[i] = {quarter[0][i], quarter[1][i]};
    rows[8 + i] = {quarter[2][i], quarter[3][i]};
  }
}

inline Int isplat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Int iload(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline Int operator+(Int a, Int b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline Int times_256(Int a) { return {_mm256_slli_epi32(a.lo, 8), _mm256_slli_epi32(a.hi, 8)}; }
inline Int low_nibbles(Int a) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
inline Int high_nibbles(Int a) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(a.lo, 4), m), _mm256_and_si256(_mm256_srli_epi16(a.hi, 4), m)};
}
inline __m128i narrow8(__m256i a) {
  return _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}
inline void store_int8(int8_t* p, Int a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(narrow8(a.lo), narrow8(a.hi)));
}
inline int32_t sum(Int a) {
  const __m256i both = _mm256_add_epi32(a.lo, a.hi);
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

inline __m256i dot8(__m256i acc, __m256i u, __m256i s) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
inline Int dot_u4(Int acc, Int w, int32_t x) {
  const __m256i v = _mm256_set1_epi32(x);
  return {dot8(acc.lo, w.lo, v), dot8(acc.hi, w.hi, v)};
}
// maddubs saturates at 16 bits. |w| * (x with w's sign) cannot: 2 * 127 * 127 < 2^15. So no correction either.
inline __m256i dot8_signed(__m256i acc, __m256i w_plus_128, __m256i x) {
  const __m256i w = _mm256_xor_si256(w_plus_128, _mm256_set1_epi8(-128));
  return dot8(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
inline Int dot_s8(Int acc, Int w, int32_t x) {
  const __m256i v = _mm256_set1_epi32(x);
  return {dot8_signed(acc.lo, w.lo, v), dot8_signed(acc.hi, w.hi, v)};
}
inline Int dot_start(int32_t) { return isplat(0); }

#else
#error "compile for AVX-512 with VNNI, or for AVX2 with FMA and F16C: see build.py"
#endif

inline float sum(Vec a) { return sum8(_mm256_add_ps(low(a), high(a))); }
inline float max_of(Vec a) { return max8(_mm256_max_ps(low(a), high(a))); }

// e^x with a relative error of 2e-7 (Cephes' expf); x beyond ±87 counts as ±87.
inline Vec exp(Vec x) {
  x = max(min(x, splat(87.0f)), splat(-87.0f));
  const Vec n = round(x * splat(1.44269504f));
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p * r, r, r + splat(1.0f));
  return p * power_of_two(to_int(n));
}

// How a number of the KV cache is stored.
struct Float32 {
  using Type = float;
  static Vec load(const float* p) { return sage::load(p); }
  static void store(float* p, Vec a) { sage::store(p, a); }
};
struct Float16 {
  using Type = uint16_t;
  static Vec load(const uint16_t* p) { return load_half(p); }
  static void store(uint16_t* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(low(a), _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(high(a), _MM_FROUND_TO_NEAREST_INT));
  }
};
struct BFloat16 {
  using Type = uint16_t;
  static Vec load(const uint16_t* p) { return load_bf16(p); }
  static void store(uint16_t* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(low(a)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), to_bf16(high(a)));
  }
};

}  // namespace sage
