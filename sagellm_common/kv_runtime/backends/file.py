"""KV blocks on a disk, found by hash, still there after a restart: the NVMe tier.

absent ──write──► being written ──► stored, in the policy's order ◄──► being read
  ▲                    │ error               │ evicted, or torn: its bytes are not those that were written
  └────────────────────┴─────────────────────┘
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from sagellm_common.core import failpoints
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import BlockEvent, KvRegion, Tier
from sagellm_common.core.types import BlockHash, BlockIds, KvLayout, KvTierStats
from sagellm_common.kv_policy.eviction import EvictionPolicy, make_eviction
from sagellm_common.kv_runtime.backends.file_slots import PAGE_BYTES, Slot, SlotFiles
from sagellm_common.kv_runtime.tiers import BlockKey, paths
from sagellm_common.prefix_reuse.matcher import same_block

log = logging.getLogger(__name__)


class FileTier:
    """A `TierBackend` in `directory`, which no other process may use meanwhile (`TierDirectory` sees to it).

    `make_room` is called before it takes so many bytes more of the disk.
    """

    def __init__(
        self,
        directory: Path,
        layout: KvLayout,
        budget_bytes: int,
        *,
        name: str = "nvme",
        eviction: str = "lru",
        direct_io: bool = False,
        make_room: Callable[[int], None] = lambda num_bytes: None,
        setting: str = "kv_store.disk",
    ) -> None:
        """Recovers what is there. Raises ConfigError when not one block fits the budget, and OSError."""
        self.name = name
        self.kind = Tier.DISK
        self.exact = True
        self.layout = layout
        self.block_bytes = layout.block_bytes
        direct = direct_io and layout.block_bytes % PAGE_BYTES == 0
        if direct_io and not direct:
            log.warning(
                "%s.direct_io has no effect: blocks of %d bytes are no multiple of %d",
                setting, layout.block_bytes, PAGE_BYTES,
            )  # fmt: skip
        tokens = 4 * layout.block_size_tokens
        self._slots = SlotFiles(directory, layout.block_bytes, tokens, budget_bytes, direct=direct)
        if self._slots.max_slots < 1:
            self._slots.close()
            raise ConfigError(
                f"{setting}.budget_bytes is {budget_bytes}, but one block of {layout.block_bytes} bytes takes "
                f"{self._slots.slot_bytes + self._slots.record_bytes} with its record: raise it"
            )
        self._make_room = make_room
        self._lock = threading.Lock()
        self._watchers: list[Callable[[BlockEvent], None]] = []
        self._stored: dict[BlockHash, Slot] = {}
        self._free: list[int] = []
        """A heap: neighbours on the disk are written together."""
        self._writing: set[BlockHash] = set()
        self._reading: Counter[int] = Counter()
        self._left: set[int] = set()
        """Slots that are being read while their blocks are gone: nobody may write them yet."""
        self._order: EvictionPolicy[BlockHash] = make_eviction(eviction, self._slots.max_slots)
        self._sequence = 0
        self._closed = False
        self._users = 0
        self._counts: Counter[str] = Counter()
        self._seconds = {"read": 0.0, "write": 0.0}
        self._recover()
        if not self._slots.num_slots:
            self._make_room(self._slots.next_extent_bytes)
            self._slots.grow()
            self._give_back(range(self._slots.num_slots))

    # ---- TierBackend ----

    def holds(self, hashes: Sequence[BlockHash]) -> list[bool]:
        with self._lock:
            return [block_hash in self._stored for block_hash in hashes]

    def hashes(self) -> list[BlockHash]:
        with self._lock:
            return list(self._stored)

    def keys(self, hashes: Sequence[BlockHash]) -> list[BlockKey]:
        with self._lock:
            return [self._stored[block_hash].key for block_hash in hashes if block_hash in self._stored]

    def used(self, hashes: Sequence[BlockHash]) -> None:
        with self._lock:
            self._order.access([block_hash for block_hash in hashes if block_hash in self._stored])

    def read(self, keys: Sequence[BlockKey], region: KvRegion, block_ids: BlockIds) -> int:
        """See `TierBackend`. A block that is torn, or that the device cannot read, is dropped."""
        with self._lock:
            slots = self._leading(keys)
            hashes = [slot.key.hash for slot in slots]
            self._reading.update(slot.number for slot in slots)
            self._users += 1
        began_s, good, kind = time.perf_counter(), [False] * len(slots), "torn"
        try:
            good = self._slots.read(slots, region, block_ids[: len(slots)])
            # Now, while nobody else may write them: they are not to be found again after a restart.
            self._slots.clear(sorted(slot.number for slot, fine in zip(slots, good, strict=True) if not fine))
        except OSError as err:
            log.warning("%s: %d blocks cannot be read, and are dropped: %s", self.name, len(slots), err)
            kind = "failed"
        finally:
            with self._lock:
                self._ended(slots)
                self._seconds["read"] += time.perf_counter() - began_s
                count = (*good, False).index(False)
                # Meanwhile it may have been evicted, and written again elsewhere.
                lost = [s.key.hash for s, fine in zip(slots, good, strict=True) if not fine and self._is_at(s)]
                self._lose(lost, kind)
                self._order.access(hashes[:count])
                self._counts["hit"] += count
        return count

    def write(self, keys: Sequence[BlockKey], region: KvRegion, block_ids: BlockIds) -> int:
        """See `TierBackend`. A device that fails costs the blocks, and is written to again the next time."""
        with self._lock:
            absent = [n for n, key in enumerate(keys) if key.hash not in self._stored and key.hash not in self._writing]
            numbers = self._claim(len(absent), keys)
            absent = absent[: len(numbers)]
            hashes = [keys[n].hash for n in absent]
            self._writing.update(hashes)
            sequence, self._sequence = self._sequence + 1, self._sequence + len(absent)
            self._users += 1
        began_s, slots = time.perf_counter(), []
        try:
            failpoints.hit("tier.writing")
            ids = block_ids[np.array(absent, dtype=np.int64)]
            slots = self._slots.write(numbers, [keys[n] for n in absent], region, ids, sequence)
        except OSError as err:
            log.warning("%s: %d blocks cannot be written: %s", self.name, len(absent), err)
        finally:
            with self._lock:
                self._ended(())
                self._seconds["write"] += time.perf_counter() - began_s
                self._writing.difference_update(hashes)
                if slots:
                    self._stored.update((slot.key.hash, slot) for slot in slots)
                    self._counts["stored"] += len(slots)
                    self._tell(BlockEvent(stored=tuple(hashes)))
                else:
                    self._give_back(numbers)
                    self._counts["failed"] += len(numbers)
                here = [key for key in keys if key.hash in self._stored]
                self._access(here)
        return len(here)

    def remove(self, hashes: Sequence[BlockHash]) -> None:
        with self._lock:
            self._forget([block_hash for block_hash in hashes if block_hash in self._stored])

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        with self._lock:
            self._watchers.append(callback)

    def stats(self) -> KvTierStats:
        with self._lock:
            counts, size = self._counts, self.block_bytes
            return KvTierStats(
                name=self.name,
                dtype=self.layout.dtype,
                total_blocks=self._slots.max_slots,
                used_blocks=len(self._stored),
                used_bytes=len(self._stored) * size,
                hit_blocks=counts["hit"],
                stored_blocks=counts["stored"],
                evicted_blocks=counts["evicted"],
                torn_blocks=counts["torn"],
                failed_blocks=counts["failed"],
                recovered_blocks=counts["recovered"],
                bytes_read=counts["hit"] * size,
                bytes_written=counts["stored"] * size,
                read_s=self._seconds["read"],
                write_s=self._seconds["write"],
            )

    def close(self) -> None:
        with self._lock:
            closed, self._closed = self._closed, True
            if not closed and not self._users:
                self._slots.close()

    # ---- the lock is held from here on ----

    def _recover(self) -> None:
        self._slots.open_extents()
        found: dict[BlockHash, Slot] = {}
        stale: list[int] = []
        for slot in self._slots.recover():
            if slot is None:
                self._counts["torn"] += 1
                continue
            other = found.get(slot.key.hash)
            if other is None or other.sequence < slot.sequence:
                found[slot.key.hash] = slot
                slot = other
            if slot is not None:
                stale.append(slot.number)
        self._slots.clear(sorted(stale))
        self._stored = found
        self._sequence = max((slot.sequence for slot in found.values()), default=0)
        ordered = sorted(found.values(), key=lambda slot: slot.sequence)
        self._access([slot.key for slot in ordered])
        taken = {slot.number for slot in found.values()}
        self._free = [number for number in range(self._slots.num_slots) if number not in taken]
        self._counts["recovered"] = len(found)
        if found or self._counts["torn"]:
            log.info("%s: %d blocks are here still, %d are torn", self.name, len(found), self._counts["torn"])

    def _access(self, keys: Sequence[BlockKey]) -> None:
        """They are used, and what they build on."""
        for path in self._paths(keys):
            self._order.access(path)

    def _paths(self, keys: Sequence[BlockKey]) -> list[list[BlockHash]]:
        """`paths` from the first block of the sequence on that is stored."""
        by_hash = {key.hash: key for key in keys}
        return [[*self._ancestors(by_hash[path[0]]), *path] for path in paths(keys)]

    def _ancestors(self, key: BlockKey) -> list[BlockHash]:
        """Those of them that are stored, the first of the sequence first."""
        found = []
        while (slot := self._stored.get(key.parent)) is not None:
            key = slot.key
            found.append(key.hash)
        return found[::-1]

    def _leading(self, keys: Sequence[BlockKey]) -> list[Slot]:
        slots: list[Slot] = []
        for key in () if self._closed else keys:
            slot = self._stored.get(key.hash)
            if slot is None or not same_block(slot.key, key):
                break
            slots.append(slot)
        return slots

    def _claim(self, wanted: int, keys: Sequence[BlockKey]) -> list[int]:
        """Up to `wanted` slots, in ascending order: free ones, then more of the disk, then those of evicted blocks.

        Neither `keys` nor what they build on make room for them.
        """
        if self._closed:
            return []
        while len(self._free) < wanted and self._slots.next_extent_bytes and self._grow():
            pass
        missing = wanted - len(self._free)
        if missing > 0:
            keep = {block_hash for path in self._paths(keys) for block_hash in path}
            evicted = self._order.evict(missing, keep)
            self._counts["evicted"] += len(evicted)
            self._forget(evicted)
        return sorted(heapq.heappop(self._free) for _ in range(min(wanted, len(self._free))))

    def _grow(self) -> bool:
        first = self._slots.num_slots
        self._make_room(self._slots.next_extent_bytes)
        try:
            self._slots.grow()
        except OSError as err:
            log.warning("%s: takes no more of the disk than %d blocks: %s", self.name, first, err)
            return False
        self._give_back(range(first, self._slots.num_slots))
        return True

    def _give_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            heapq.heappush(self._free, number)

    def _is_at(self, slot: Slot) -> bool:
        stored = self._stored.get(slot.key.hash)
        return stored is not None and stored.number == slot.number

    def _lose(self, lost: Sequence[BlockHash], kind: str) -> None:
        self._counts[kind] += len(lost)
        if lost and kind == "torn":
            log.warning("%s: %d blocks are not what was written, and are dropped", self.name, len(lost))
        self._forget(lost)

    def _forget(self, hashes: Sequence[BlockHash]) -> None:
        for block_hash in hashes:
            number = self._stored.pop(block_hash).number
            self._order.remove(block_hash)
            if number in self._reading:
                self._left.add(number)
            else:
                self._give_back([number])
        if hashes:
            self._tell(BlockEvent(removed=tuple(hashes)))

    def _ended(self, read: Iterable[Slot]) -> None:
        """A use of the files is over, by which these were read."""
        for slot in read:
            self._reading[slot.number] -= 1
            if not self._reading[slot.number]:
                del self._reading[slot.number]
                if slot.number in self._left:
                    self._left.remove(slot.number)
                    self._give_back([slot.number])
        self._users -= 1
        if self._closed and not self._users:
            self._slots.close()

    def _tell(self, event: BlockEvent) -> None:
        for callback in self._watchers:
            callback(event)
