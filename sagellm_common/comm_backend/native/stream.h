// Pieces through a stream socket. Each batch is digested while it is in the core's cache: before it goes out, and after
// it came in.
#pragma once

#include <cerrno>
#include <ctime>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>

#include <vector>

#include "pieces.h"

namespace sage {

constexpr int64_t kBatchBytes = 256 << 10;  // half of a small L2
constexpr int64_t kBatchPieces = 512;       // with head and tail below IOV_MAX
// Pieces that are smaller on average come through a buffer in the core's cache: the system needs longer for a run than
// it takes to copy it.
constexpr int64_t kSmallPiece = 2 << 10;

inline double now_s() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);  // time.monotonic() of Python
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

struct Stream {
    int socket;
    double silence_s;   // a wait for the peer ends after so long, and
    double deadline_s;  // at this time

    // 0, or the errno that ended it; kClosed: the peer closed before the first byte of it.
    template <class Call>
    int all(iovec* runs, int64_t count, int option, Call call) const {
        bool first = true;
        while (count) {
            if (const int error = arm(option)) return error;
            msghdr message{};
            message.msg_iov = runs;
            message.msg_iovlen = static_cast<size_t>(count);
            ssize_t done = call(socket, &message);
            if (done < 0 && errno == EINTR) continue;
            if (done < 0) return errno == EAGAIN ? ETIMEDOUT : errno;
            if (done == 0) return first ? kClosed : ECONNRESET;
            first = false;
            while (count && done >= static_cast<ssize_t>(runs->iov_len)) {
                done -= static_cast<ssize_t>(runs->iov_len);
                ++runs, --count;
            }
            if (count) {
                runs->iov_base = static_cast<uint8_t*>(runs->iov_base) + done;
                runs->iov_len -= static_cast<size_t>(done);
            }
        }
        return 0;
    }

    int send(iovec* runs, int64_t count) const {
        return all(runs, count, SO_SNDTIMEO, [](int s, msghdr* message) { return sendmsg(s, message, MSG_NOSIGNAL); });
    }
    int recv(iovec* runs, int64_t count) const {
        return all(runs, count, SO_RCVTIMEO, [](int s, msghdr* message) { return recvmsg(s, message, MSG_WAITALL); });
    }

    static constexpr int kClosed = -1;

private:
    // The kernel's timeout for the next call: its clock starts anew with each.
    int arm(int option) const {
        const double left_s = deadline_s - now_s();
        const double wait_s = left_s < silence_s ? left_s : silence_s;
        if (wait_s <= 0) return ETIMEDOUT;
        timeval wait{static_cast<time_t>(wait_s), 0};
        wait.tv_usec = static_cast<suseconds_t>(1e6 * (wait_s - static_cast<double>(wait.tv_sec)));
        if (!wait.tv_sec && !wait.tv_usec) wait.tv_usec = 1;  // zero would mean to wait forever
        return setsockopt(socket, SOL_SOCKET, option, &wait, sizeof wait) ? errno : 0;
    }
};

struct Bytes {
    uint8_t* data;
    int64_t size;
};

// The runs of head, pieces and tail; neighbours in memory share one.
inline int64_t runs_of(const Bytes& head, const Pieces& pieces, const Bytes& tail, iovec* runs) {
    int64_t count = 0;
    if (head.size) runs[count++] = {head.data, static_cast<size_t>(head.size)};
    for (int64_t i = 0; i < pieces.count; ++i) {
        if (i && pieces.piece(i) == pieces.piece(i - 1) + pieces.sizes[i - 1])
            runs[count - 1].iov_len += static_cast<size_t>(pieces.sizes[i]);
        else
            runs[count++] = {pieces.piece(i), static_cast<size_t>(pieces.sizes[i])};
    }
    if (tail.size) runs[count++] = {tail.data, static_cast<size_t>(tail.size)};
    return count;
}

// Pieces side by side in a buffer of the thread's.
class Staged {
public:
    explicit Staged(const Pieces& pieces) : size_(pieces.num_bytes()), at_(static_cast<size_t>(pieces.count)), sizes_(pieces.sizes) {
        thread_local std::vector<uint8_t> memory;
        if (memory.size() < static_cast<size_t>(size_)) memory.resize(static_cast<size_t>(size_));
        base_ = memory.data();
        int64_t at = 0;
        for (size_t i = 0; i < at_.size(); at += sizes_[i++]) at_[i] = at;
    }
    Pieces pieces() const { return {base_, at_.data(), sizes_, static_cast<int64_t>(at_.size())}; }
    Pieces whole() const { return {base_, &kBegin, &size_, size_ ? 1 : 0}; }

private:
    static constexpr int64_t kBegin = 0;
    uint8_t* base_;
    int64_t size_;
    std::vector<int64_t> at_;
    const int64_t* sizes_;
};

// `head`, the pieces and `tail` through the socket, out or in; with `digests` those of the pieces, which may lie in the
// tail, or by `joint`. *digest_s grows by what the digests took. Returns as `Stream::all` does.
template <bool kOut>
int move(const Stream& stream, const Bytes& head, const Pieces& pieces, const Bytes& tail, uint64_t* digests, Joint* joint,
         int isa, double* digest_s) {
    iovec runs[kBatchPieces + 2];
    const bool staged = !kOut && pieces.num_bytes() < pieces.count * kSmallPiece;
    const int64_t most = staged ? pieces.count : kBatchPieces;
    int64_t first = 0;
    do {
        int64_t end = first, bytes = 0;
        while (end < pieces.count && end - first < most && (end == first || bytes + pieces.sizes[end] <= kBatchBytes))
            bytes += pieces.sizes[end++];
        const Pieces batch = pieces.part(first, end);
        const auto digest_batch = [&](const Pieces& from, const Pieces* to) {
            if (!digests || !batch.count) return;
            const double began_s = now_s();
            copy_and_digest(from, to, digests + first, isa, joint);
            *digest_s += now_s() - began_s;
        };
        const Bytes before = first ? Bytes{nullptr, 0} : head, after = end == pieces.count ? tail : Bytes{nullptr, 0};
        if (kOut) digest_batch(batch, nullptr);
        Staged through(staged ? batch : Pieces{nullptr, nullptr, nullptr, 0});
        const int64_t count = runs_of(before, staged ? through.whole() : batch, after, runs);
        const int error = kOut ? stream.send(runs, count) : stream.recv(runs, count);
        if (error) return error == Stream::kClosed && first ? ECONNRESET : error;
        if (staged && digests)
            digest_batch(through.pieces(), &batch);
        else if (staged)
            copy(through.pieces(), batch);
        else if (!kOut)
            digest_batch(batch, nullptr);
        first = end;
    } while (first < pieces.count);
    return 0;
}

// Whether `bytes` can be read without waiting, at the latest at `until_s`. The processor is offered to others in between
// for kYieldingS, and given up only then: to be woken up costs more than the answer to a small request.
constexpr double kYieldingS = 100e-6;

inline bool has_soon(int socket, int64_t bytes, double until_s) {
    const double began_s = now_s();
    for (double at_s = began_s;; at_s = now_s()) {
        int available = 0;
        if (ioctl(socket, FIONREAD, &available) == 0 && available >= bytes) return true;
        if (at_s >= until_s) return false;
        if (at_s - began_s < kYieldingS) {
            sched_yield();
            continue;
        }
        pollfd watched{socket, POLLIN | POLLRDHUP, 0};
        const timespec left{0, static_cast<long>(1e9 * (until_s - at_s))};
        if (ppoll(&watched, 1, &left, nullptr) <= 0 || watched.revents & (POLLRDHUP | POLLHUP | POLLERR)) return false;
    }
}

}  // namespace sage
