// Block hash → who holds the block. `holder_table.py` says what each function does, and has the same in Python.
//
//   heads_[bucket] ──► entries_[i] ──chain──► entries_[j] ...         linear hashing: one bucket more at a time,
//                          │                                          so that growing never stalls
//                          └──set──► HolderSets
//
// An entry is 32 bytes, and a block has 1 1/3 buckets of 4: 37 bytes, whoever holds it. Entries are linked in the order
// of their use. What a probe costs is waiting for memory: keys are therefore looked up 64 at a time, all of them asked
// for before the first is used, and where a prefix was inserted at once its entries are read in a row, without probing.
//
// A worker that leaves is marked as gone; its blocks are visited later, some with each change of the table. One lock
// guards it all, held for thousands of blocks at a time at most, and given in turn.

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "holder_sets.h"
#include "xxh3_128.h"

namespace sage {
namespace {

constexpr int64_t kKeyBytes = 16;
constexpr int64_t kWindow = 64;     // keys in flight at a time
constexpr int64_t kLocked = 4096;   // keys changed under one hold of the lock
constexpr int64_t kSweep = 16;      // entries visited for each key changed, while someone who is gone is named
constexpr uint64_t kFirstBuckets = 1024;
constexpr uint32_t kNone = UINT32_MAX;
constexpr uint32_t kFree = UINT32_MAX;  // the set of an entry that is no block
constexpr uint32_t kSlots = (UINT16_MAX + 1) / kTiers;

struct Entry {
    uint8_t key[kKeyBytes];
    uint32_t chain;  // next in the bucket; of a free entry: the next free one
    uint32_t older, newer;
    uint32_t set;
};
static_assert(sizeof(Entry) == 32, "two to a cache line");

// Address space for all that may ever be there; what was never touched takes no memory, and growing moves nothing.
template <typename T>
class Pages {
public:
    explicit Pages(size_t capacity) : bytes_((capacity * sizeof(T) + kHuge) / kHuge * kHuge + kHuge) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
        flags |= MAP_NORESERVE;
#endif
        begin_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (begin_ == MAP_FAILED) throw std::bad_alloc();
        const uintptr_t aligned = (reinterpret_cast<uintptr_t>(begin_) + kHuge - 1) & ~uintptr_t(kHuge - 1);
        data_ = reinterpret_cast<T*>(aligned);
#if defined(MADV_HUGEPAGE)
        // Probes are all over the place: with small pages most of them miss the TLB as well. Only advice.
        madvise(data_, bytes_ - kHuge, MADV_HUGEPAGE);
#endif
    }
    ~Pages() { munmap(begin_, bytes_); }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }

private:
    static constexpr size_t kHuge = size_t(2) << 20;
    size_t bytes_;
    void* begin_;
    T* data_;
};

// In turn: who waits is next, however soon the last one asks again.
class TurnLock {
public:
    void lock() {
        std::lock_guard<std::mutex> turn(turn_);
        held_.lock();
    }
    void unlock() { held_.unlock(); }

private:
    std::mutex turn_, held_;
};

uint64_t bits(const uint8_t* key) { return xxh3::load64(key + 8); }

bool same(const uint8_t* a, const uint8_t* b) { return std::memcmp(a, b, kKeyBytes) == 0; }

struct Depths {
    uint32_t slot;
    int32_t of_tier[kTiers];
};

class PrefixIndex {
public:
    explicit PrefixIndex(uint64_t max_blocks)
        : max_blocks_(max_blocks),
          room_(max_blocks + max_blocks / 4 + kLocked),
          entries_(room_),
          heads_(room_ / 3 * 4 + 2 * kFirstBuckets) {
        for (uint32_t i = 0; i < buckets_; ++i) heads_[i] = kNone;
    }

    // ---- workers ----

    int64_t open() {
        std::lock_guard<TurnLock> guard(lock_);
        if (free_slots_.empty() && used_slots_ == kSlots) {
            sweep(entries_used_);
            if (free_slots_.empty()) return -1;
        }
        uint32_t slot = used_slots_;
        if (free_slots_.empty()) {
            held_.resize((used_slots_ + 1) * kTiers, 0);
            is_open_.push_back(true);
            ++used_slots_;
        } else {
            slot = free_slots_.back();
            free_slots_.pop_back();
            sets_.reuse(slot);
            is_open_[slot] = true;
        }
        return slot;
    }

    int64_t close(uint32_t slot) {
        std::lock_guard<TurnLock> guard(lock_);
        if (slot >= used_slots_ || !is_open_[slot]) return 0;
        is_open_[slot] = false;
        uint64_t blocks = 0;
        for (int tier = 0; tier < kTiers; ++tier) {
            blocks += held_[slot * kTiers + tier];
            held_[slot * kTiers + tier] = 0;
        }
        blocks_ -= sets_.leave(slot);
        leaving_.push_back(slot);
        reuse_slots();
        return static_cast<int64_t>(blocks);
    }

    // ---- blocks ----

    void insert(Holder holder, const uint8_t* keys, int64_t count) {
        in_turns(keys, count, [&](const uint8_t* first, int64_t n) {
            if (!is_open(holder)) return;
            Step step;
            for (int64_t at = n; at > 0; at -= kWindow) {
                const int64_t begin = at > kWindow ? at - kWindow : 0;
                warm(first + begin * kKeyBytes, at - begin);
                for (int64_t i = at - 1; i >= begin; --i) insert_one(holder, first + i * kKeyBytes, step);
            }
        });
    }

    void remove(Holder holder, const uint8_t* keys, int64_t count) {
        in_turns(keys, count, [&](const uint8_t* first, int64_t n) {
            if (!is_open(holder)) return;
            for (int64_t at = n; at > 0; at -= kWindow) {
                const int64_t begin = at > kWindow ? at - kWindow : 0;
                warm(first + begin * kKeyBytes, at - begin);
                for (int64_t i = at - 1; i >= begin; --i) remove_one(holder, first + i * kKeyBytes);
            }
        });
    }

    // Writes the workers that hold the first block and how deep each reaches; returns their number. Where that is more
    // than there is room for, nothing is written, nor was it a lookup.
    int64_t match(const uint8_t* keys, int64_t count, uint32_t* slots, int32_t* depths, int64_t room) {
        std::lock_guard<TurnLock> guard(lock_);
        alive_.clear();
        done_.clear();
        path_.clear();
        uint32_t found[kWindow], last = kNoSet;
        bool more = count > 0;
        for (int64_t base = 0; more && base < count; base += kWindow) {
            const int64_t n = std::min(kWindow, count - base);
            const int64_t run = base ? find_run(found[kWindow - 1], keys + base * kKeyBytes, n, found) : 0;
            find_many(keys + (base + run) * kKeyBytes, n - run, found + run);
            for (int64_t i = 0; i < n; ++i) {
                const uint32_t set = found[i] == kNone ? kNoSet : entries_[found[i]].set;
                if (set != last || base + i == 0) narrow(set, static_cast<int32_t>(base + i));
                last = set;
                if (!(more = !alive_.empty())) break;
                path_.push_back(found[i]);
            }
        }
        narrow(kNoSet, static_cast<int32_t>(count));
        const int64_t found_workers = static_cast<int64_t>(done_.size());
        if (found_workers > room) return found_workers;
        for (size_t i = path_.size(); i-- > 0;) use(path_[i]);
        ++lookups_;
        queried_ += static_cast<uint64_t>(count);
        matched_ += path_.size();
        for (int64_t i = 0; i < found_workers; ++i) {
            slots[i] = done_[i].slot;
            std::memcpy(depths + i * kTiers, done_[i].of_tier, sizeof done_[i].of_tier);
        }
        return found_workers;
    }

    // The fields of `PrefixReuseMetrics`.
    void metrics(uint64_t* out) {
        std::lock_guard<TurnLock> guard(lock_);
        const uint64_t bytes = entries_used_ * sizeof(Entry) + buckets_ * sizeof(uint32_t) + sets_.bytes();
        const uint64_t values[] = {blocks_, bytes, sets_.size(), lookups_, queried_, matched_, forgotten_};
        std::memcpy(out, values, sizeof values);
    }

    int64_t held(Holder holder) {
        std::lock_guard<TurnLock> guard(lock_);
        return is_open(holder) ? static_cast<int64_t>(held_[holder]) : 0;
    }

private:
    // The last change of a set: in a prefix the next block's is mostly the same.
    struct Step {
        uint32_t from = kFree, to = kFree;
        uint64_t forgotten = 0;
    };

    bool is_open(Holder holder) const { return holder / kTiers < used_slots_ && is_open_[holder / kTiers]; }

    // From the last to the first, so that of one prefix the first is the most recently used.
    template <typename Change>
    void in_turns(const uint8_t* keys, int64_t count, Change change) {
        for (int64_t end = count; end > 0; end -= kLocked) {
            const int64_t begin = end > kLocked ? end - kLocked : 0;
            std::lock_guard<TurnLock> guard(lock_);
            change(keys + begin * kKeyBytes, end - begin);
            sweep((end - begin) * kSweep);
        }
    }

    void insert_one(Holder holder, const uint8_t* key, Step& step) {
        uint32_t at = find(key);
        if (at == kNone) at = add(key);
        use(at);
        Entry& entry = entries_[at];
        const bool found = sets_[entry.set].living > 0;
        if (entry.set != step.from || step.forgotten != sets_.forgotten()) {
            const uint32_t living = sets_.living(entry.set), to = sets_.with(living, holder);
            step = {entry.set, to, 0};
            if (living != to && living != entry.set) sets_.drop_unused(living);
            step.forgotten = sets_.forgotten();
        }
        if (!sets_.has(entry.set, holder)) ++held_[holder];
        const uint32_t from = entry.set;
        entry.set = step.to;
        sets_.move(from, step.to);
        blocks_ += !found;
        while (blocks_ > max_blocks_) forget_oldest();
    }

    void remove_one(Holder holder, const uint8_t* key) {
        const uint32_t at = find(key);
        if (at == kNone || !sets_.has(entries_[at].set, holder)) return;
        const uint32_t living = sets_.living(entries_[at].set), to = sets_.without(living, holder);
        if (living != to && living != entries_[at].set) sets_.drop_unused(living);
        --held_[holder];
        if (to == kNoSet) {
            --blocks_;
            erase(at);
        } else {
            sets_.move(entries_[at].set, to);
            entries_[at].set = to;
        }
    }

    void forget_oldest() {
        const uint32_t at = oldest_;
        const auto& set = sets_[entries_[at].set];
        if (set.living) {
            for (const Holder member : set.members)
                if (!sets_.gone(member)) --held_[member];
            --blocks_;
            ++forgotten_;
        }
        erase(at);
    }

    // Narrows down who holds everything up to block `depth`, which has `set`. With tiers: a worker's depth in a tier is
    // where the first block is that it holds in slower tiers only.
    void narrow(uint32_t set, int32_t depth) {
        if (depth == 0 && alive_.empty()) {
            for (const Holder member : sets_[set].members)
                if (!sets_.gone(member) && (alive_.empty() || alive_.back().depths.slot != member / kTiers))
                    alive_.push_back({{member / uint32_t(kTiers), {}}, member % kTiers});
            return;  // {}: it holds the first block in no faster tier, 0 blocks deep
        }
        auto member = sets_[set].members.begin();
        const auto end = sets_[set].members.end();
        size_t kept = 0;
        for (auto& one : alive_) {
            while (member != end && *member / kTiers < one.depths.slot) ++member;
            const bool holds = member != end && *member / kTiers == one.depths.slot && !sets_.gone(*member);
            const int tier = holds ? *member % kTiers : kTiers;
            for (; one.tier < tier; ++one.tier) one.depths.of_tier[one.tier] = depth;
            if (tier == kTiers) {
                done_.push_back(one.depths);
            } else {
                alive_[kept++] = one;
            }
        }
        alive_.resize(kept);
    }

    // ---- the table ----

    uint32_t bucket_of(const uint8_t* key) const {
        const uint64_t at = bits(key) & (2 * round_ - 1);
        return static_cast<uint32_t>(at < buckets_ ? at : at & (round_ - 1));
    }

    uint32_t find(const uint8_t* key) const {
        uint32_t at = heads_[bucket_of(key)];
        while (at != kNone && !same(entries_[at].key, key)) at = entries_[at].chain;
        return at;
    }

    // Asks for the memory that `find` will want.
    void warm(const uint8_t* keys, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) __builtin_prefetch(&heads_[bucket_of(keys + i * kKeyBytes)]);
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t at = heads_[bucket_of(keys + i * kKeyBytes)];
            if (at != kNone) __builtin_prefetch(&entries_[at], 1);
        }
    }

    // A prefix that was inserted at once lies in entries one before the other: leading keys that lie so before `last`.
    int64_t find_run(uint32_t last, const uint8_t* keys, int64_t count, uint32_t* found) const {
        int64_t n = 0;
        for (; n < count && last > n; ++n) {
            const Entry& entry = entries_[last - n - 1];
            if (entry.set == kFree || !same(entry.key, keys + n * kKeyBytes)) break;
            found[n] = last - static_cast<uint32_t>(n) - 1;
        }
        return n;
    }

    // `find` for up to kWindow keys, each a step further in turn.
    void find_many(const uint8_t* keys, int64_t count, uint32_t* found) const {
        uint32_t buckets[kWindow];
        uint8_t pending[kWindow];
        int64_t waiting = 0;
        for (int64_t i = 0; i < count; ++i) {
            buckets[i] = bucket_of(keys + i * kKeyBytes);
            __builtin_prefetch(&heads_[buckets[i]]);
        }
        for (int64_t i = 0; i < count; ++i) {
            found[i] = heads_[buckets[i]];
            if (found[i] == kNone) continue;
            __builtin_prefetch(&entries_[found[i]], 1);
            pending[waiting++] = static_cast<uint8_t>(i);
        }
        while (waiting) {
            int64_t left = 0;
            for (int64_t n = 0; n < waiting; ++n) {
                const uint8_t i = pending[n];
                const Entry& entry = entries_[found[i]];
                if (same(entry.key, keys + i * kKeyBytes)) continue;
                found[i] = entry.chain;
                if (found[i] == kNone) continue;
                __builtin_prefetch(&entries_[found[i]], 1);
                pending[left++] = i;
            }
            waiting = left;
        }
    }

    uint32_t add(const uint8_t* key) {
        if (free_entry_ == kNone && entries_used_ == room_) sweep(entries_used_);
        uint32_t at = free_entry_;
        if (at != kNone) {
            free_entry_ = entries_[at].chain;
        } else {
            at = static_cast<uint32_t>(entries_used_++);
        }
        ++entries_linked_;
        Entry& entry = entries_[at];
        std::memcpy(entry.key, key, kKeyBytes);
        entry.set = kNoSet;
        uint32_t& head = heads_[bucket_of(key)];
        entry.chain = head;
        head = at;
        entry.newer = entry.older = kNone;
        link(at);
        while (buckets_ * 3 < entries_linked_ * 4) split();
        return at;
    }

    void erase(uint32_t at) {
        Entry& entry = entries_[at];
        uint32_t* link = &heads_[bucket_of(entry.key)];
        while (*link != at) link = &entries_[*link].chain;
        *link = entry.chain;
        unlink(at);
        sets_.move(entry.set, kNoSet);
        entry.set = kFree;
        entry.chain = free_entry_;
        free_entry_ = at;
        --entries_linked_;
    }

    // One bucket's keys go to two.
    void split() {
        const uint32_t from = static_cast<uint32_t>(buckets_ - round_), to = static_cast<uint32_t>(buckets_);
        uint32_t at = heads_[from];
        heads_[from] = heads_[to] = kNone;
        if (++buckets_ == 2 * round_) round_ *= 2;
        while (at != kNone) {
            const uint32_t next = entries_[at].chain;
            uint32_t& head = heads_[bucket_of(entries_[at].key)];
            entries_[at].chain = head;
            head = at;
            at = next;
        }
        // For the next split.
        const uint32_t next = heads_[buckets_ - round_];
        __builtin_prefetch(&heads_[buckets_ - round_ + 8]);
        if (next != kNone) __builtin_prefetch(&entries_[next], 1);
    }

    // ---- the order of use ----

    void link(uint32_t at) {
        entries_[at].newer = kNone;
        entries_[at].older = newest_;
        (newest_ == kNone ? oldest_ : entries_[newest_].newer) = at;
        newest_ = at;
    }

    void unlink(uint32_t at) {
        const Entry& entry = entries_[at];
        (entry.newer == kNone ? newest_ : entries_[entry.newer].older) = entry.older;
        (entry.older == kNone ? oldest_ : entries_[entry.older].newer) = entry.newer;
    }

    void use(uint32_t at) {
        if (newest_ == at) return;
        unlink(at);
        link(at);
    }

    // ---- those who are gone ----

    // Visits entries, and takes those who are gone from their sets.
    void sweep(uint64_t visits) {
        for (; visits > 0 && sets_.stale_blocks() > 0; --visits) {
            if (hand_ >= entries_used_) hand_ = 0;
            const uint32_t at = static_cast<uint32_t>(hand_++);
            const uint32_t set = entries_[at].set;
            if (set == kFree || set == kNoSet || !sets_.stale(set)) continue;
            const uint32_t living = sets_.living(set);
            if (living == kNoSet) {
                erase(at);
            } else {
                sets_.move(set, living);
                entries_[at].set = living;
            }
        }
        reuse_slots();
    }

    void reuse_slots() {
        if (sets_.stale_blocks() > 0) return;
        free_slots_.insert(free_slots_.end(), leaving_.begin(), leaving_.end());
        leaving_.clear();
    }

    struct Alive {
        Depths depths;
        int tier;  // the slowest it has needed so far
    };

    TurnLock lock_;
    const uint64_t max_blocks_;
    const uint64_t room_;  // entries; a quarter more than blocks, for those whose holders are gone
    Pages<Entry> entries_;
    Pages<uint32_t> heads_;
    HolderSets sets_;
    uint64_t buckets_ = kFirstBuckets, round_ = kFirstBuckets;  // round_: the buckets there were when this round of splits began
    uint64_t entries_used_ = 0, entries_linked_ = 0, hand_ = 0;
    uint32_t free_entry_ = kNone, newest_ = kNone, oldest_ = kNone;

    std::vector<uint64_t> held_;  // blocks by holder
    std::vector<bool> is_open_;
    std::vector<uint32_t> free_slots_, leaving_;
    uint32_t used_slots_ = 0;

    uint64_t blocks_ = 0, lookups_ = 0, queried_ = 0, matched_ = 0, forgotten_ = 0;

    // Of `match`, kept for their memory.
    std::vector<Alive> alive_;
    std::vector<Depths> done_;
    std::vector<uint32_t> path_;
};

// Nothing is thrown through C: -1 is what a caller sees when memory ran out.
template <typename Work>
int64_t guarded(Work work) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

PrefixIndex* of(void* index) { return static_cast<PrefixIndex*>(index); }

}  // namespace
}  // namespace sage

extern "C" {

// 1 where this host's integers are as the code expects them.
int sage_index_usable() {
    const uint16_t one = 1;
    uint8_t first;
    std::memcpy(&first, &one, 1);
    return first;
}

// Digests of `count` blocks of `block_bytes` bytes, each of the one before it (at first: `root`) and the block.
// `scratch` has 16 + block_bytes bytes.
void sage_chain(const uint8_t* root, const uint8_t* blocks, int64_t block_bytes, int64_t count, uint8_t* scratch,
                uint8_t* out) {
    std::memcpy(scratch, root, 16);
    for (int64_t i = 0; i < count; ++i, blocks += block_bytes, out += 16) {
        std::memcpy(scratch + 16, blocks, static_cast<size_t>(block_bytes));
        xxh3::write_digest(xxh3::hash128(scratch, static_cast<size_t>(16 + block_bytes)), scratch);
        std::memcpy(out, scratch, 16);
    }
}

void* sage_index_new(uint64_t max_blocks) {
    try {
        return new sage::PrefixIndex(max_blocks);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
void sage_index_free(void* index) { delete sage::of(index); }
int64_t sage_index_open(void* index) {
    return sage::guarded([&] { return sage::of(index)->open(); });
}
int64_t sage_index_close(void* index, uint32_t slot) {
    return sage::guarded([&] { return sage::of(index)->close(slot); });
}
int64_t sage_index_insert(void* index, uint16_t holder, const uint8_t* keys, int64_t count) {
    return sage::guarded([&] { return sage::of(index)->insert(holder, keys, count), 0; });
}
int64_t sage_index_remove(void* index, uint16_t holder, const uint8_t* keys, int64_t count) {
    return sage::guarded([&] { return sage::of(index)->remove(holder, keys, count), 0; });
}
int64_t sage_index_match(void* index, const uint8_t* keys, int64_t count, uint32_t* slots, int32_t* depths,
                         int64_t room) {
    return sage::guarded([&] { return sage::of(index)->match(keys, count, slots, depths, room); });
}
int64_t sage_index_held(void* index, uint16_t holder) { return sage::of(index)->held(holder); }
void sage_index_metrics(void* index, uint64_t* out) { sage::of(index)->metrics(out); }

}  // extern "C"
