"""KV blocks in plain files: extents of equal slots, and a table with one record per slot.

    table          | record 0 | record 1 | …      what is in each slot, and the digests of slot and record
    extent-00000   | slot 0 | slot 1 | …          blocks, each from a page's beginning on
    extent-00001   | …

Nothing is ever synchronised to the device: a process that dies loses nothing that was written, and a machine that
does loses some of it. A slot's record is cleared before the slot is written and comes after it, but the device may keep
them in any order, or half: so a record counts only with its own digest, and a slot only with the record's.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BLOCK_HASH_BYTES, BlockIds
from sagellm_common.kv_runtime.tiers import NOTE_BYTES, BlockKey
from sagellm_common.prefix_reuse.matcher import CONTEXT_BYTES

PAGE_BYTES = 4096
EXTENT_BYTES = 1 << 30
"""An extent is as large at most, or one slot. Files are few, and the disk is taken as it is needed."""
IO_BYTES = 4 << 20
"""Read or written with one call at most: it is digested while it is in a core's cache."""
IO_BUFFERS = 512
"""Of one call at most; the system takes 1024."""

_MAGIC = b"sagekv\x00\x02"
_HEAD = struct.Struct(f"<8sQQII{BLOCK_HASH_BYTES}s{BLOCK_HASH_BYTES}s{NOTE_BYTES}s{CONTEXT_BYTES}sHHH")
"""magic, digest, sequence, block bytes, token bytes, hash, parent, note, context; lengths of the last three"""
_CHECK = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Slot:
    """What a slot holds. `sequence` counts the writes; of two slots with one hash the later is the one."""

    number: int
    key: BlockKey
    digest: int
    sequence: int


class SlotFiles:
    """Not thread-safe but for `read` and `write` of different slots. Raises OSError where the system does."""

    def __init__(
        self, directory: Path, block_bytes: int, token_bytes: int, budget_bytes: int, *, direct: bool = False
    ) -> None:
        """`direct` bypasses the system's cache; blocks must then be a multiple of PAGE_BYTES, and so must the
        addresses they are read to and written from."""
        self.slot_bytes = -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
        self.record_bytes = -(-(_HEAD.size + token_bytes + _CHECK.size) // 64) * 64
        self.max_slots = budget_bytes // (self.slot_bytes + self.record_bytes)
        self._slots_per_extent = max(1, EXTENT_BYTES // self.slot_bytes)
        self._directory = directory
        self._block_bytes = block_bytes
        self._token_bytes = token_bytes
        self._flags = os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        self._pad = bytearray(self.slot_bytes - block_bytes)
        self._extents: list[int] = []
        self._recorded: set[int] = set()
        """Slots whose record says something, true or not."""
        self._table = os.open(directory / "table", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @property
    def num_slots(self) -> int:
        """There is room for on the disk so far."""
        return min(len(self._extents) * self._slots_per_extent, self.max_slots)

    @property
    def next_extent_bytes(self) -> int:
        """0: there is none."""
        return min(self._slots_per_extent, self.max_slots - self.num_slots) * self.slot_bytes

    def open_extents(self) -> None:
        """Those that are there, as far as the budget goes; one that lost its end gets it back, empty."""
        while (path := self._extent_path(len(self._extents))).exists():
            if self.next_extent_bytes:
                self._open_extent(path)
            else:
                self._remove_from(len(self._extents))

    def grow(self) -> None:
        """One extent more. Raises OSError, having changed nothing."""
        path = self._extent_path(len(self._extents))
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        os.close(file)
        try:
            self._open_extent(path)
        except OSError:
            path.unlink()
            raise

    def recover(self) -> Iterator[Slot | None]:
        """What the table says of each slot that has ever been written; None: a record that is not what was written."""
        size, at = self.record_bytes, 0
        if os.fstat(self._table).st_size > self.max_slots * size:
            os.ftruncate(self._table, self.max_slots * size)  # the budget was larger
        batch = max(1, IO_BYTES // size)
        while records := os.pread(self._table, batch * size, at * size):
            for n in range(0, len(records), size):
                record, number = records[n : n + size], at + n // size
                if record.count(0) != len(record):
                    self._recorded.add(number)
                    yield self._parsed(number, record)
            at += batch

    def write(self, numbers: Sequence[int], keys: Sequence[BlockKey], region: KvRegion, block_ids: BlockIds,
              sequence: int) -> list[Slot]:  # fmt: skip
        """Into slots that nobody reads, in ascending order."""
        self.clear([number for number in numbers if number in self._recorded])
        blocks = [region.block(block_id) for block_id in block_ids.tolist()]
        slots: list[Slot] = []
        for run in self._runs(numbers):
            for n in run:
                digest = xxhash.xxh3_64_intdigest(blocks[n])
                slots.append(Slot(numbers[n], keys[n], digest, sequence + n))
            _all(os.pwritev, *self._place(numbers[run.start]), self._buffers([blocks[n] for n in run]))
        for run in _consecutive(numbers):
            records = b"".join(self._record(slots[n]) for n in run)
            _all(os.pwritev, self._table, numbers[run.start] * self.record_bytes, [memoryview(records)])
        self._recorded.update(numbers)
        return slots

    def read(self, slots: Sequence[Slot], region: KvRegion, block_ids: BlockIds) -> list[bool]:
        """Fills the blocks; says of each whether it is what was written. An error of the device is none of them."""
        blocks = [region.block(block_id) for block_id in block_ids.tolist()]
        good = [False] * len(slots)
        for run in self._runs([slot.number for slot in slots]):
            with contextlib.suppress(EOFError):  # short of its end: digests tell which blocks are there
                _all(os.preadv, *self._place(slots[run.start].number), self._buffers([blocks[n] for n in run]))
            for n in run:
                good[n] = xxhash.xxh3_64_intdigest(blocks[n]) == slots[n].digest
        return good

    def clear(self, numbers: Sequence[int]) -> None:
        """The slots hold nothing any more, after a restart neither."""
        for run in _consecutive(numbers):
            empty = memoryview(bytes(len(run) * self.record_bytes))
            _all(os.pwritev, self._table, numbers[run.start] * self.record_bytes, [empty])
        self._recorded.difference_update(numbers)

    def close(self) -> None:
        """Idempotent."""
        files, self._extents, self._table = [*self._extents, self._table], [], -1
        for file in files:
            if file >= 0:
                os.close(file)

    # ---- how it lies there ----

    def _extent_path(self, number: int) -> Path:
        return self._directory / f"extent-{number:05d}"

    def _open_extent(self, path: Path) -> None:
        try:
            file = os.open(path, self._flags)
        except OSError as err:
            if err.errno != errno.EINVAL or not self._flags & os.O_DIRECT:
                raise
            self._flags &= ~os.O_DIRECT  # such as tmpfs
            file = os.open(path, self._flags)
        num_bytes = self.next_extent_bytes
        try:
            if os.fstat(file).st_size > num_bytes:
                os.ftruncate(file, num_bytes)
            os.posix_fallocate(file, 0, num_bytes)
        except OSError:
            os.close(file)
            raise
        self._extents.append(file)

    def _remove_from(self, number: int) -> None:
        while (path := self._extent_path(number)).exists():
            path.unlink()
            number += 1

    @property
    def direct(self) -> bool:
        """Whether the system's cache is bypassed; known once there is an extent."""
        return bool(self._flags & os.O_DIRECT)

    def _place(self, number: int) -> tuple[int, int]:
        """File and offset of a slot."""
        extent, within = divmod(number, self._slots_per_extent)
        return self._extents[extent], within * self.slot_bytes

    def _runs(self, numbers: Sequence[int]) -> Iterator[range]:
        """Positions of slots that are neighbours in one extent, as many as one call moves."""
        most = max(1, min(IO_BYTES // self.slot_bytes, IO_BUFFERS // 2))
        for run in _consecutive(numbers):
            start = run.start
            while start < run.stop:
                room = self._slots_per_extent - numbers[start] % self._slots_per_extent
                stop = min(run.stop, start + min(most, room))
                yield range(start, stop)
                start = stop

    def _buffers(self, blocks: list[memoryview]) -> list[memoryview]:
        if not self._pad:
            return blocks
        pad = memoryview(self._pad)  # what is read into it nobody looks at
        return [buffer for block in blocks for buffer in (block, pad)]

    def _record(self, slot: Slot) -> bytes:
        key = slot.key
        beside = key.parent, key.note, key.context
        head = _HEAD.pack(_MAGIC, slot.digest, slot.sequence, self._block_bytes, len(key.token_bytes), key.hash,
                          *beside, *map(len, beside))  # fmt: skip
        body = (head + key.token_bytes).ljust(self.record_bytes - _CHECK.size, b"\0")
        return body + _CHECK.pack(xxhash.xxh3_64_intdigest(body))

    def _parsed(self, number: int, record: bytes) -> Slot | None:
        if len(record) < self.record_bytes or number >= self.num_slots:
            return None
        body = record[: -_CHECK.size]
        if _CHECK.unpack(record[-_CHECK.size :])[0] != xxhash.xxh3_64_intdigest(body):
            return None
        magic, digest, sequence, block_bytes, token_bytes, name, *rest = _HEAD.unpack(body[: _HEAD.size])
        parent, note, context = (field[:length] for field, length in zip(rest[:3], rest[3:], strict=True))
        if (magic, block_bytes, token_bytes) != (_MAGIC, self._block_bytes, self._token_bytes):
            return None
        tokens = body[_HEAD.size : _HEAD.size + token_bytes]
        return Slot(number, BlockKey(name, tokens, parent, note, context), digest, sequence)


def _consecutive(numbers: Sequence[int]) -> Iterator[range]:
    """Positions of runs n, n + 1, n + 2, …"""
    cuts = [n for n in range(1, len(numbers)) if numbers[n] != numbers[n - 1] + 1]
    for start, stop in itertools.pairwise([0, *cuts, len(numbers)]):
        if start < stop:
            yield range(start, stop)


def _all(call: Callable[[int, list[memoryview], int], int], file: int, offset: int, buffers: list[memoryview]) -> None:
    """preadv or pwritev of all of it. Raises EOFError at the file's end."""
    left = sum(map(len, buffers))
    while left:
        moved = call(file, buffers, offset)
        if not moved:
            raise EOFError
        left, offset = left - moved, offset + moved
        if left:
            buffers = _after(buffers, moved)


def _after(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of them."""
    for n, buffer in enumerate(buffers):
        if num_bytes < len(buffer):
            return [buffer[num_bytes:], *buffers[n + 1 :]]
        num_bytes -= len(buffer)
    return []
