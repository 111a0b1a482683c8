// Runs of memory, as `pieces.py` has them, copied and digested in one pass.
#pragma once

#include "xxh3.h"

namespace sage {

// Piece i: sizes[i] bytes from base + at[i] on.
struct Pieces {
    uint8_t* base;
    const int64_t* at;
    const int64_t* sizes;
    int64_t count;

    uint8_t* piece(int64_t i) const { return base + at[i]; }
    Pieces part(int64_t first, int64_t end) const { return {base, at + first, sizes + first, end - first}; }
    int64_t num_bytes() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += sizes[i];
        return sum;
    }
};

inline void copy(const Pieces& source, const Pieces& target) {
    for (int64_t i = 0; i < source.count; ++i) std::memcpy(target.piece(i), source.piece(i), static_cast<size_t>(source.sizes[i]));
}

// Copies that would drive everything else out of a core's cache pass it by: a line that is only written need not be read
// before, which is a third of the traffic.
constexpr int64_t kStreamBytes = 1 << 20;

inline bool may_stream(const Pieces& target) {
    if (target.num_bytes() < kStreamBytes) return false;
    for (int64_t i = 0; i < target.count; ++i)
        if (reinterpret_cast<uintptr_t>(target.piece(i)) % kStripe) return false;
    return true;
}

// Digests of several pieces each, as if those were one run of memory: parts[k] of them make digest k. They may come in
// batches. Every size is a multiple of kStripe, and what a digest is of has more than 240 bytes: see `may_join`.
struct Joint {
    const int64_t* parts;
    const int64_t* sizes;  // of the pieces, from the next one on
    uint64_t* digests;
    Lanes acc{};
    int64_t pieces = 0, size = 0, left = 0, stripe = 0;  // of the digest under way; stripes of its round

    template <class Isa>
    void take(const uint8_t* from, uint8_t* to) {
        if (!pieces) begin();
        int64_t count = *sizes / kStripe;
        left -= count;
        const bool last = !left;  // the last stripe is taken alone, with a secret of its own
        if (last) --count;
        while (count) {
            const int64_t some = count < kStripesPerRound - stripe ? count : kStripesPerRound - stripe;
            Isa::stripes(acc, from, to, some, kSecret + stripe * kSecretStep);
            from += some * kStripe, to = to ? to + some * kStripe : nullptr;
            count -= some, stripe += some;
            if (stripe == kStripesPerRound) Isa::scramble(acc), stripe = 0;
        }
        if (last) Isa::stripes(acc, from, to, 1, kSecret + kSecretBytes - kStripe - 7);
        ++sizes;
        if (!--pieces) *digests++ = __builtin_bswap64(finished(acc, size)), ++parts;
    }

private:
    void begin() {
        acc = Lanes{}, pieces = *parts, size = stripe = 0;
        for (int64_t i = 0; i < pieces; ++i) size += sizes[i];
        left = size / kStripe;
    }
};

inline bool may_join(const Pieces& pieces, const int64_t* parts) {
    for (int64_t i = 0; i < pieces.count; ++parts) {
        int64_t size = 0;
        for (const int64_t end = i + *parts; i < end; ++i) {
            if (pieces.sizes[i] % kStripe) return false;
            size += pieces.sizes[i];
        }
        if (size <= 240) return false;
    }
    return true;
}

template <class Isa>
void each(const Pieces& source, const Pieces* target, uint64_t* digests, Joint* joint) {
    for (int64_t i = 0; joint && i < source.count; ++i)
        joint->template take<Isa>(source.piece(i), target ? target->piece(i) : nullptr);
    for (int64_t i = 0; !joint && i < source.count; ++i) {
        if (i + 1 < source.count)
            for (int64_t at = 0; at < kAhead; at += kStripe) __builtin_prefetch(source.piece(i + 1) + at);
        uint8_t* to = target ? target->piece(i) : nullptr;
        digests[i] = __builtin_bswap64(digest<Isa>(source.piece(i), to, source.sizes[i]));
    }
}

// How many ways there are for this CPU, each faster than the one before; 0 where digests would not be xxhash's.
inline int num_isas() {
    if (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__) return 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return __builtin_cpu_supports("avx512f") ? 3 : 2;
#endif
    return 1;
}

// `target` null: only digests. digests[i] is that of piece i in big-endian order; every size is above 240. With `joint`
// that one takes the pieces instead.
inline void copy_and_digest(const Pieces& source, const Pieces* target, uint64_t* digests, int isa, Joint* joint) {
#if defined(__x86_64__)
    if (isa > 0 && target && may_stream(*target)) {
        isa == 2 ? each<Avx512<true>>(source, target, digests, joint) : each<Avx2<true>>(source, target, digests, joint);
        _mm_sfence();
        return;
    }
    if (isa == 2) return each<Avx512<false>>(source, target, digests, joint);
    if (isa == 1) return each<Avx2<false>>(source, target, digests, joint);
#else
    (void)isa;
#endif
    each<Portable>(source, target, digests, joint);
}

}  // namespace sage
