"""A tier that keeps blocks in another dtype than it is given them: smaller, and not exact.

What each block lost is noted beside it, so that whoever uses it can be told, after a restart too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from sagellm_common.comm_backend.kv_dtypes import NAMES, Deviation
from sagellm_common.comm_backend.transcode import Transcoder, row_bytes
from sagellm_common.comm_backend.wire_dtype import with_wire_dtype
from sagellm_common.core import shared_memory
from sagellm_common.core.kv import BlockEvent, KvRegion, Tier
from sagellm_common.core.types import BlockHash, BlockIds, KvConversion, KvLayout, KvTierStats
from sagellm_common.kv_runtime.tiers import BlockKey, TierBackend

_NOTE = struct.Struct("<fddHH")
"""max_abs, squares, number_squares, non_finite of a `Deviation`; the place of the dtype in NAMES"""


class TranscodedTier:
    """A `TierBackend` for blocks of `layout` over one of blocks of `kept`."""

    def __init__(self, tier: TierBackend, layout: KvLayout, kept: KvLayout) -> None:
        """Raises LayoutMismatch where there is no way from one to the other."""
        self._tier = tier
        self._down = Transcoder(layout, kept)
        self._up = Transcoder(kept, layout)
        self.exact = self._down.exact

    @property
    def name(self) -> str:
        return self._tier.name

    @property
    def kind(self) -> Tier:
        return self._tier.kind

    @property
    def block_bytes(self) -> int:
        return self._down.source.block_bytes

    def write(self, keys: Sequence[BlockKey], region: KvRegion, block_ids: BlockIds) -> int:
        """See `TierBackend`. Transcodes what is not here yet."""
        here = self.holds([key.hash for key in keys])
        absent = [n for n, held in enumerate(here) if not held]
        staged, tokens = self._staging(len(absent)), range(self._down.source.block_size_tokens)
        noted = []
        for to, n in enumerate(absent):
            lost = self._down.move(region, block_ids[n : n + 1], staged, np.array([to]), tokens)
            noted.append(replace(keys[n], note=_noted(lost, self._down.target.dtype)))
        written = self._tier.write(noted, staged, np.arange(len(absent), dtype=np.int32))
        return len(keys) - len(absent) + written

    def read(self, keys: Sequence[BlockKey], region: KvRegion, block_ids: BlockIds) -> int:
        """See `TierBackend`."""
        staged = self._staging(len(keys))
        ids = np.arange(len(keys), dtype=np.int32)
        count = self._tier.read(keys, staged, ids)
        if count:
            tokens = range(count * self._up.source.block_size_tokens)
            self._up.move(staged, ids[:count], region, block_ids[:count], tokens)
        return count

    def _staging(self, num_blocks: int) -> KvRegion:
        size = self._down.target.block_bytes
        memory = shared_memory.allocate(max(1, num_blocks) * size)  # of whole pages, as direct I/O wants it
        return KvRegion(memoryview(memory.arena), size, num_blocks)

    # ---- as it is ----

    def holds(self, hashes: Sequence[BlockHash]) -> list[bool]:
        return self._tier.holds(hashes)

    def hashes(self) -> list[BlockHash]:
        return self._tier.hashes()

    def keys(self, hashes: Sequence[BlockHash]) -> list[BlockKey]:
        return self._tier.keys(hashes)

    def used(self, hashes: Sequence[BlockHash]) -> None:
        self._tier.used(hashes)

    def remove(self, hashes: Sequence[BlockHash]) -> None:
        self._tier.remove(hashes)

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        self._tier.watch(callback)

    def stats(self) -> KvTierStats:
        return self._tier.stats()

    def close(self) -> None:
        self._tier.close()


def kept_layout(layout: KvLayout, dtype: str) -> KvLayout:
    """That of blocks kept in `dtype` (`kv_store.disk.dtype`); the same where that is not smaller, or not known."""
    if dtype == "same" or not row_bytes(layout):
        return layout
    kept = with_wire_dtype(dtype, layout)
    return kept if kept.block_bytes < layout.block_bytes else layout


def conversion(notes: Sequence[bytes]) -> KvConversion | None:
    """What blocks with these notes lost, together; None where there are none."""
    if not notes:
        return None
    total, dtypes = Deviation(), set()
    for note in notes:
        max_abs, squares, number_squares, non_finite, dtype = _NOTE.unpack(note)
        total.add(Deviation(max_abs, squares, number_squares, non_finite))
        dtypes.add(NAMES[dtype])
    return KvConversion(", ".join(sorted(dtypes)), total.max_abs, total.relative_rms, total.non_finite)


def _noted(lost: Deviation, dtype: str) -> bytes:
    values = lost.max_abs, lost.squares, lost.number_squares, min(lost.non_finite, 0xFFFF), NAMES.index(dtype)
    return _NOTE.pack(*values)
