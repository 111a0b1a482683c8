// XXH3-128 with seed 0 and the default secret, of inputs of 17 bytes and more, as the algorithm's specification has it
// (github.com/Cyan4973/xxHash, doc/xxhash_spec.md): the bytes are those of any xxhash library. Shorter inputs have
// formulas of their own and are never asked for: a parent's hash alone is 16 bytes, and a token follows.
//
// For little-endian hosts, and compilers with __int128.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace xxh3 {

constexpr uint64_t kPrime32_1 = 0x9E3779B1u, kPrime32_2 = 0x85EBCA77u, kPrime32_3 = 0xC2B2AE3Du;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87u, kPrime64_2 = 0xC2B2AE3D27D4EB4Fu, kPrime64_3 = 0x165667B19E3779F9u;
constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63u, kPrime64_5 = 0x27D4EB2F165667C5u;

constexpr size_t kSecretBytes = 192;
constexpr uint8_t kSecret[kSecretBytes] = {
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

struct Hash128 {
    uint64_t low, high;
};

inline uint64_t load64(const uint8_t* from) {
    uint64_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline uint64_t folded_product(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t avalanche(uint64_t value) {
    value = (value ^ (value >> 37)) * 0x165667919E3779F9u;
    return value ^ (value >> 32);
}

inline uint64_t mix16(const uint8_t* in, const uint8_t* secret) {
    return folded_product(load64(in) ^ load64(secret), load64(in + 8) ^ load64(secret + 8));
}

inline void mix32(Hash128& acc, const uint8_t* first, const uint8_t* second, const uint8_t* secret) {
    acc.low = (acc.low + mix16(first, secret)) ^ (load64(second) + load64(second + 8));
    acc.high = (acc.high + mix16(second, secret + 16)) ^ (load64(first) + load64(first + 8));
}

inline Hash128 finished(const Hash128& acc, size_t length) {
    const uint64_t high = acc.low * kPrime64_1 + acc.high * kPrime64_4 + length * kPrime64_2;
    return {avalanche(acc.low + acc.high), 0 - avalanche(high)};
}

inline Hash128 of_17_to_128(const uint8_t* in, size_t length) {
    Hash128 acc{length * kPrime64_1, 0};
    if (length > 96) mix32(acc, in + 48, in + length - 64, kSecret + 96);
    if (length > 64) mix32(acc, in + 32, in + length - 48, kSecret + 64);
    if (length > 32) mix32(acc, in + 16, in + length - 32, kSecret + 32);
    mix32(acc, in, in + length - 16, kSecret);
    return finished(acc, length);
}

inline Hash128 of_129_to_240(const uint8_t* in, size_t length) {
    Hash128 acc{length * kPrime64_1, 0};
    for (size_t at = 0; at < 128; at += 32) mix32(acc, in + at, in + at + 16, kSecret + at);
    acc = {avalanche(acc.low), avalanche(acc.high)};
    for (size_t at = 128; at + 32 <= length; at += 32) mix32(acc, in + at, in + at + 16, kSecret + 3 + at - 128);
    mix32(acc, in + length - 16, in + length - 32, kSecret + 136 - 17 - 16);
    return finished(acc, length);
}

inline void add_stripe(uint64_t* lane, const uint8_t* in, const uint8_t* secret) {
    for (int i = 0; i < 8; ++i) {
        const uint64_t value = load64(in + 8 * i), key = value ^ load64(secret + 8 * i);
        lane[i ^ 1] += value;
        lane[i] += (key & 0xFFFFFFFFu) * (key >> 32);
    }
}

inline uint64_t merged(const uint64_t* lane, const uint8_t* secret, uint64_t start) {
    for (int i = 0; i < 8; i += 2)
        start += folded_product(lane[i] ^ load64(secret + 8 * i), lane[i + 1] ^ load64(secret + 8 * i + 8));
    return avalanche(start);
}

inline Hash128 of_more_than_240(const uint8_t* in, size_t length) {
    constexpr size_t stripe = 64, stripes_per_round = (kSecretBytes - stripe) / 8, round = stripes_per_round * stripe;
    uint64_t lane[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
    size_t at = 0;
    for (; at + round < length; at += round) {
        for (size_t n = 0; n < stripes_per_round; ++n) add_stripe(lane, in + at + n * stripe, kSecret + 8 * n);
        for (int i = 0; i < 8; ++i)
            lane[i] = (lane[i] ^ (lane[i] >> 47) ^ load64(kSecret + kSecretBytes - stripe + 8 * i)) * kPrime32_1;
    }
    const size_t whole = (length - 1 - at) / stripe;
    for (size_t n = 0; n < whole; ++n) add_stripe(lane, in + at + n * stripe, kSecret + 8 * n);
    add_stripe(lane, in + length - stripe, kSecret + kSecretBytes - stripe - 7);
    return {merged(lane, kSecret + 11, length * kPrime64_1),
            merged(lane, kSecret + kSecretBytes - stripe - 11, ~(length * kPrime64_2))};
}

// Of 17 bytes and more.
inline Hash128 hash128(const uint8_t* in, size_t length) {
    return length <= 128 ? of_17_to_128(in, length)
         : length <= 240 ? of_129_to_240(in, length)
                         : of_more_than_240(in, length);
}

// The 16 bytes in which a digest is written: big-endian, the high half first.
inline void write_digest(const Hash128& hash, uint8_t* to) {
    const uint64_t high = __builtin_bswap64(hash.high), low = __builtin_bswap64(hash.low);
    std::memcpy(to, &high, 8);
    std::memcpy(to + 8, &low, 8);
}

}  // namespace xxh3
