// Sets of holders, each kept once and counted: neighbours of a prefix are mostly held by the same, so that a few sets
// stand for millions of blocks, and that two blocks have the same holders is the comparison of two numbers.
//
// A holder is a worker's slot and a tier. A worker that is gone stays in the sets until its blocks are visited; they
// say how many of their members are still there.

#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_set>
#include <vector>

namespace sage {

constexpr int kTiers = 4;
constexpr uint32_t kNoSet = 0;  // the empty set, which no block has

using Holder = uint16_t;  // kTiers * slot + tier

class HolderSets {
public:
    struct Set {
        std::vector<Holder> members;  // ascending
        uint32_t blocks = 0;          // that have this set
        uint32_t living = 0;          // members that are still there
    };

    HolderSets() : interned_(16, Hash{&sets_}, Equal{&sets_}) {
        sets_.emplace_back();
        interned_.insert(kNoSet);
    }
    HolderSets(const HolderSets&) = delete;
    HolderSets& operator=(const HolderSets&) = delete;

    const Set& operator[](uint32_t id) const { return sets_[id]; }
    bool stale(uint32_t id) const { return sets_[id].living != sets_[id].members.size(); }

    // Blocks whose sets name someone who is gone.
    uint64_t stale_blocks() const { return stale_blocks_; }

    uint32_t with(uint32_t id, Holder holder) {
        const uint32_t fresh = copy_of(id);
        auto& members = sets_[fresh].members;
        const auto at = std::lower_bound(members.begin(), members.end(), holder);
        if (at == members.end() || *at != holder) members.insert(at, holder);
        return intern(fresh);
    }

    uint32_t without(uint32_t id, Holder holder) {
        const uint32_t fresh = copy_of(id);
        auto& members = sets_[fresh].members;
        members.erase(std::remove(members.begin(), members.end(), holder), members.end());
        return intern(fresh);
    }

    // Without those who are gone. The empty set for no one left.
    uint32_t living(uint32_t id) {
        if (!stale(id)) return id;
        const uint32_t fresh = copy_of(id);
        auto& members = sets_[fresh].members;
        members.erase(std::remove_if(members.begin(), members.end(), [this](Holder h) { return gone(h); }),
                      members.end());
        return intern(fresh);
    }

    bool has(uint32_t id, Holder holder) const {
        const auto& members = sets_[id].members;
        return std::binary_search(members.begin(), members.end(), holder);
    }

    bool gone(Holder holder) const {
        const size_t slot = holder / kTiers;
        return slot < gone_.size() && gone_[slot];
    }

    // A block has set `to` and no longer `from`. What no block has is forgotten.
    void move(uint32_t from, uint32_t to) {
        if (from == to) return;
        if (to != kNoSet) {
            ++sets_[to].blocks;
            stale_blocks_ += stale(to);
        }
        if (from != kNoSet) {
            stale_blocks_ -= stale(from);
            if (--sets_[from].blocks == 0) forget(from);
        }
    }

    // A set that `with`, `without` or `living` returned and no block took.
    void drop_unused(uint32_t id) {
        if (id != kNoSet && sets_[id].blocks == 0) forget(id);
    }

    // The worker is gone. Returns how many blocks nobody holds any more.
    uint64_t leave(uint32_t slot) {
        if (gone_.size() <= slot) gone_.resize(slot + 1, false);
        gone_[slot] = true;
        uint64_t orphans = 0;
        for (auto& set : sets_) {
            if (!set.blocks) continue;
            const auto first = std::lower_bound(set.members.begin(), set.members.end(), Holder(slot * kTiers));
            const auto last = std::lower_bound(first, set.members.end(), uint32_t(slot + 1) * kTiers);
            if (first == last) continue;
            if (set.living == set.members.size()) stale_blocks_ += set.blocks;
            set.living -= static_cast<uint32_t>(last - first);
            if (set.living == 0) orphans += set.blocks;
        }
        return orphans;
    }

    // The slot may be another worker's: no set names it any more.
    void reuse(uint32_t slot) { gone_[slot] = false; }

    // Grows whenever a set is forgotten, and its number with it.
    uint64_t forgotten() const { return forgotten_; }
    uint64_t size() const { return interned_.size() - 1; }
    uint64_t bytes() const { return sets_.capacity() * sizeof(Set) + interned_.size() * 32 + member_bytes_; }

private:
    struct Hash {
        const std::vector<Set>* sets;
        size_t operator()(uint32_t id) const {
            uint64_t value = 0;
            for (const Holder member : (*sets)[id].members) value = (value ^ member) * 0x9E3779B97F4A7C15u;
            return static_cast<size_t>(value ^ (value >> 29));
        }
    };
    struct Equal {
        const std::vector<Set>* sets;
        bool operator()(uint32_t a, uint32_t b) const { return (*sets)[a].members == (*sets)[b].members; }
    };

    uint32_t copy_of(uint32_t id) {
        uint32_t fresh;
        if (free_.empty()) {
            fresh = static_cast<uint32_t>(sets_.size());
            sets_.emplace_back();
        } else {
            fresh = free_.back();
            free_.pop_back();
        }
        sets_[fresh].members = sets_[id].members;
        return fresh;
    }

    // The one set with these members.
    uint32_t intern(uint32_t fresh) {
        const auto [at, inserted] = interned_.insert(fresh);
        Set& set = sets_[fresh];
        if (!inserted) {
            set.members.clear();
            free_.push_back(fresh);
            return *at;
        }
        set.blocks = 0;
        set.living = static_cast<uint32_t>(
            std::count_if(set.members.begin(), set.members.end(), [this](Holder h) { return !gone(h); }));
        member_bytes_ += set.members.size() * sizeof(Holder);
        return fresh;
    }

    void forget(uint32_t id) {
        interned_.erase(id);
        Set& set = sets_[id];
        member_bytes_ -= set.members.size() * sizeof(Holder);
        set.members = {};
        set.blocks = set.living = 0;
        free_.push_back(id);
        ++forgotten_;
    }

    std::vector<Set> sets_;
    std::vector<uint32_t> free_;
    std::unordered_set<uint32_t, Hash, Equal> interned_;
    std::vector<bool> gone_;
    uint64_t stale_blocks_ = 0, member_bytes_ = 0, forgotten_ = 0;
};

}  // namespace sage
