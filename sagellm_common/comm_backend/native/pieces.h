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

// Copies that would drive everything else out of a core's cache pass it by: a line that is only written need not be read
// before, which is a third of the traffic.
constexpr int64_t kStreamBytes = 1 << 20;

inline bool may_stream(const Pieces& target) {
    if (target.num_bytes() < kStreamBytes) return false;
    for (int64_t i = 0; i < target.count; ++i)
        if (reinterpret_cast<uintptr_t>(target.piece(i)) % kStripe) return false;
    return true;
}

template <class Isa>
void each(const Pieces& source, const Pieces* target, uint64_t* digests) {
    for (int64_t i = 0; i < source.count; ++i) {
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

// `target` null: only digests. digests[i] is that of piece i in big-endian order; every size is above 240.
inline void copy_and_digest(const Pieces& source, const Pieces* target, uint64_t* digests, int isa) {
#if defined(__x86_64__)
    if (isa > 0 && target && may_stream(*target)) {
        isa == 2 ? each<Avx512<true>>(source, target, digests) : each<Avx2<true>>(source, target, digests);
        _mm_sfence();
        return;
    }
    if (isa == 2) return each<Avx512<false>>(source, target, digests);
    if (isa == 1) return each<Avx2<false>>(source, target, digests);
#else
    (void)isa;
#endif
    each<Portable>(source, target, digests);
}

}  // namespace sage
