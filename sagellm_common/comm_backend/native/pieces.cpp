// What Python calls: `__init__.py` declares it, keep both alike.

#include "stream.h"

static bool may_digest(const sage::Pieces& pieces, const int64_t* parts) {
    if (parts) return sage::may_join(pieces, parts);
    for (int64_t i = 0; i < pieces.count; ++i)
        if (pieces.sizes[i] <= 240) return false;
    return true;
}

extern "C" {

// See `sage::num_isas`; the `isa` of the others is below it.
int sage_pieces_isas() { return sage::num_isas(); }

// Piece i: sizes[i] bytes from source + source_at[i] on, to target + target_at[i]. `target` null: only digests.
// `digests` null: only copies. Else digests[i] is the digest of piece i, or where `parts` is not null of the next parts[i]
// of them together, in big-endian order. False, and nothing was done, for pieces that cannot be digested here.
bool sage_pieces(uint8_t* source, const int64_t* source_at, uint8_t* target, const int64_t* target_at,
                 const int64_t* sizes, int64_t count, const int64_t* parts, uint64_t* digests, int isa) {
    const sage::Pieces from{source, source_at, sizes, count}, to{target, target_at, sizes, count};
    if (digests) {
        if (!may_digest(from, parts)) return false;
        sage::Joint joint{parts, sizes, digests};
        sage::copy_and_digest(from, target ? &to : nullptr, digests, isa, parts ? &joint : nullptr);
        return true;
    }
    sage::copy(from, to);
    return true;
}

// `native.MESSAGE` packs it: one argument is passed sooner than sixteen.
struct SageMessage {
    sage::Bytes head;
    sage::Pieces pieces;
    const int64_t* parts;  // as above
    sage::Bytes tail;
    uint64_t* digests;  // of the pieces, which may lie in the tail; null: none are taken
    double silence_s, deadline_s;
    double digest_s;  // out: what they took
    int32_t socket, isa;
};

// The whole message through a blocking socket, out (`out` not 0) or in. Waits as `sage::Stream` says. Returns 0, an errno,
// -1 when the peer closed before the first byte, or -2, and nothing was done, for pieces that cannot be digested here.
int sage_stream(SageMessage* message, int out) {
    if (message->digests && !may_digest(message->pieces, message->parts)) return -2;
    const sage::Stream stream{message->socket, message->silence_s, message->deadline_s};
    sage::Joint joint{message->parts, message->pieces.sizes, message->digests};
    const auto move = out ? sage::move<true> : sage::move<false>;
    return move(stream, message->head, message->pieces, message->tail, message->digests,
                message->parts && message->digests ? &joint : nullptr, message->isa, &message->digest_s);
}

// A whole message that begins with `head` and is small: waits for it as `sage::has_soon` does, then takes it in. -3, and
// nothing was taken: it is not here yet, or it begins otherwise. Else as `sage_stream` returns.
int sage_answer(SageMessage* message, double until_s) {
    const sage::Bytes& head = message->head;
    if (!sage::has_soon(message->socket, head.size + message->pieces.num_bytes() + message->tail.size, until_s)) return -3;
    uint8_t found[64];
    const ssize_t peeked = recv(message->socket, found, static_cast<size_t>(head.size), MSG_PEEK | MSG_DONTWAIT);
    if (peeked != head.size || std::memcmp(found, head.data, static_cast<size_t>(head.size))) return -3;
    return sage_stream(message, 0);
}

// See `sage::has_soon`; `until_s` is less than a second away.
int sage_has_soon(int socket, int64_t bytes, double until_s) { return sage::has_soon(socket, bytes, until_s); }

}  // extern "C"
