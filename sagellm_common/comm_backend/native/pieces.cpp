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

// `native.MESSAGE` packs it: one argument is passed sooner than fifteen.
struct SageMessage {
    sage::Bytes head;
    sage::Pieces pieces;
    sage::Bytes tail;
    uint64_t* digests;  // of the pieces, which may lie in the tail; null: none are taken
    double silence_s, deadline_s;
    double digest_s;  // out: what they took
    int32_t socket, isa;
};

// The whole message through a blocking socket, out (`out` not 0) or in. Waits as `sage::Stream` says. Returns 0, an errno,
// -1 when the peer closed before the first byte, or -2, and nothing was done, for pieces too short to be digested here.
int sage_stream(SageMessage* message, int out) {
    const sage::Pieces& pieces = message->pieces;
    for (int64_t i = 0; message->digests && i < pieces.count; ++i)
        if (pieces.sizes[i] <= 240) return -2;
    const sage::Stream stream{message->socket, message->silence_s, message->deadline_s};
    const auto move = out ? sage::move<true> : sage::move<false>;
    return move(stream, message->head, pieces, message->tail, message->digests, message->isa, &message->digest_s);
}

// See `sage::has_soon`; `until_s` is less than a second away.
int sage_has_soon(int socket, int64_t bytes, double until_s) { return sage::has_soon(socket, bytes, until_s); }

}  // extern "C"
