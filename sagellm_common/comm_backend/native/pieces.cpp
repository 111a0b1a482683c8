// What Python calls: `__init__.py` declares it, keep both alike.

#include "stream.h"

extern "C" {

// See `sage::num_isas`; the `isa` of the others is below it.
int sage_pieces_isas() { return sage::num_isas(); }

// Piece i: sizes[i] bytes from source + source_at[i] on, to target + target_at[i]. `target` null: only digests.
// `digests` null: only copies. Else digests[i] is the digest in big-endian order, and every size above 240.
void sage_pieces(uint8_t* source, const int64_t* source_at, uint8_t* target, const int64_t* target_at,
                 const int64_t* sizes, int64_t count, uint64_t* digests, int isa) {
    const sage::Pieces from{source, source_at, sizes, count}, to{target, target_at, sizes, count};
    if (digests) return sage::copy_and_digest(from, target ? &to : nullptr, digests, isa);
    for (int64_t i = 0; i < count; ++i) std::memcpy(to.piece(i), from.piece(i), static_cast<size_t>(sizes[i]));
}

// All of head, pieces and tail through a blocking socket, out (`out` not 0) or in. `digests` null: none are taken.
// Waits as `sage::Stream` says. Returns 0, -1 when the peer closed before the first byte, or an errno.
int sage_stream(int out, int socket, uint8_t* head, int64_t head_bytes, uint8_t* base, const int64_t* at,
                const int64_t* sizes, int64_t count, uint8_t* tail, int64_t tail_bytes, uint64_t* digests, int isa,
                double silence_s, double deadline_s, double* digest_s) {
    const sage::Stream stream{socket, silence_s, deadline_s};
    const sage::Pieces pieces{base, at, sizes, count};
    const sage::Bytes before{head, head_bytes}, after{tail, tail_bytes};
    return out ? sage::move<true>(stream, before, pieces, after, digests, isa, digest_s)
               : sage::move<false>(stream, before, pieces, after, digests, isa, digest_s);
}

}  // extern "C"
