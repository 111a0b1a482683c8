// XXH3-64 with seed 0 of inputs longer than 240 bytes, as the algorithm's specification has it
// (github.com/Cyan4973/xxHash, doc/xxhash_spec.md): the bytes on the wire are those of any xxhash library. Its inner
// loop takes 64 bytes at a time into eight lanes; copying them on the way costs the stores and nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sage {


constexpr uint64_t kPrime32_1 = 0x9E3779B1u, kPrime32_2 = 0x85EBCA77u, kPrime32_3 = 0xC2B2AE3Du;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87u, kPrime64_2 = 0xC2B2AE3D27D4EB4Fu, kPrime64_3 = 0x165667B19E3779F9u;
constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63u, kPrime64_5 = 0x27D4EB2F165667C5u;
constexpr uint64_t kAvalanche = 0x165667919E3779F9u;

constexpr int64_t kStripe = 64, kSecretStep = 8, kSecretBytes = 192;
constexpr int64_t kStripesPerRound = (kSecretBytes - kStripe) / kSecretStep;
constexpr int64_t kRound = kStripesPerRound * kStripe;
constexpr int64_t kAhead = 1536;  // bytes: the processor itself looks ahead within a page only, and a block is a few pages

alignas(64) constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

struct alignas(64) Lanes {
    uint64_t lane[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
};

inline uint64_t load64(const uint8_t* from) {
    uint64_t value;
    std::memcpy(&value, from, sizeof value);
    return value;  // little-endian hosts only, see `sage_pieces_isas`
}

// ---- `count` stripes into the lanes, and to `to` where that is not null ----
// One of these per instruction set, with `scramble` between rounds; all give the same bits. With kStream the stores pass
// the caches by: `to` is aligned to a stripe, and an sfence is due before anybody is told.

struct Portable {
    static void stripes(Lanes& acc, const uint8_t* from, uint8_t* to, int64_t count, const uint8_t* secret) {
        for (int64_t n = 0; n < count; ++n, from += kStripe, secret += kSecretStep) {
            uint64_t value[8];
            std::memcpy(value, from, sizeof value);  // read once: what is digested is what is written
            if (to) std::memcpy(to + n * kStripe, value, sizeof value);
            for (int i = 0; i < 8; ++i) {
                const uint64_t key = value[i] ^ load64(secret + 8 * i);
                acc.lane[i ^ 1] += value[i];
                acc.lane[i] += (key & 0xFFFFFFFFu) * (key >> 32);
            }
        }
    }
    static void scramble(Lanes& acc) {
        for (int i = 0; i < 8; ++i) {
            const uint64_t lane = acc.lane[i];
            acc.lane[i] = (lane ^ (lane >> 47) ^ load64(kSecret + kSecretBytes - kStripe + 8 * i)) * kPrime32_1;
        }
    }
};

#if defined(__x86_64__)
template <bool kStream>
struct Avx2 {
    __attribute__((target("avx2"))) static void stripes(Lanes& acc, const uint8_t* from, uint8_t* to, int64_t count,
                                                        const uint8_t* secret) {
        auto* lanes = reinterpret_cast<__m256i*>(acc.lane);
        __m256i sum[2] = {lanes[0], lanes[1]};
        for (int64_t n = 0; n < count; ++n, from += kStripe, secret += kSecretStep) {
            __builtin_prefetch(from + kAhead);
            for (int half = 0; half < 2; ++half) {
                const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + half);
                auto* at = reinterpret_cast<__m256i*>(to + n * kStripe) + half;
                if (to && kStream) _mm256_stream_si256(at, value);
                if (to && !kStream) _mm256_storeu_si256(at, value);
                const __m256i key =
                    _mm256_xor_si256(value, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret) + half));
                const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
                const __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
                sum[half] = _mm256_add_epi64(sum[half], _mm256_add_epi64(product, swapped));
            }
        }
        lanes[0] = sum[0];
        lanes[1] = sum[1];
    }
    static void scramble(Lanes& acc) { Portable::scramble(acc); }
};

template <bool kStream>
struct Avx512 {
    __attribute__((target("avx512f"))) static void stripes(Lanes& acc, const uint8_t* from, uint8_t* to, int64_t count,
                                                           const uint8_t* secret) {
        __m512i sum = _mm512_load_si512(acc.lane);
        for (int64_t n = 0; n < count; ++n, from += kStripe, secret += kSecretStep) {
            __builtin_prefetch(from + kAhead);
            const __m512i value = _mm512_loadu_si512(from);
            if (to && kStream) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + n * kStripe), value);
            if (to && !kStream) _mm512_storeu_si512(to + n * kStripe, value);
            const __m512i key = _mm512_xor_si512(value, _mm512_loadu_si512(secret));
            const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
            const __m512i swapped = _mm512_shuffle_epi32(value, static_cast<_MM_PERM_ENUM>(_MM_SHUFFLE(1, 0, 3, 2)));
            sum = _mm512_add_epi64(sum, _mm512_add_epi64(product, swapped));
        }
        _mm512_store_si512(acc.lane, sum);
    }
    static void scramble(Lanes& acc) { Portable::scramble(acc); }
};
#endif

inline uint64_t folded(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t finished(const Lanes& acc, int64_t size) {
    uint64_t hash = static_cast<uint64_t>(size) * kPrime64_1;
    for (int i = 0; i < 4; ++i)
        hash += folded(acc.lane[2 * i] ^ load64(kSecret + 11 + 16 * i), acc.lane[2 * i + 1] ^ load64(kSecret + 19 + 16 * i));
    hash = (hash ^ (hash >> 37)) * kAvalanche;
    return hash ^ (hash >> 32);
}

// XXH3-64 of size > 240 bytes, which are copied to `to` where that is not null.
template <class Isa>
uint64_t digest(const uint8_t* from, uint8_t* to, int64_t size) {
    Lanes acc;
    const int64_t rounds = (size - 1) / kRound;
    for (int64_t n = 0; n < rounds; ++n) {
        Isa::stripes(acc, from + n * kRound, to ? to + n * kRound : nullptr, kStripesPerRound, kSecret);
        Isa::scramble(acc);
    }
    const int64_t at = rounds * kRound, whole = (size - 1 - at) / kStripe;
    Isa::stripes(acc, from + at, to ? to + at : nullptr, whole, kSecret);
    // The last stripe ends with the input and may overlap the one before. Where there is a copy it is read from there:
    // the source may be changing, and what counts is what was written.
    if (to) {
        const int64_t rest = at + whole * kStripe;
        std::memcpy(to + rest, from + rest, static_cast<size_t>(size - rest));
        from = to;
    }
    Isa::stripes(acc, from + size - kStripe, nullptr, 1, kSecret + kSecretBytes - kStripe - 7);
    return finished(acc, size);
}

}  // namespace sage
