"""What every tier of a KV hierarchy is: blocks found by the hash of their content, copied in and out.

    worker    device   `pool.KVPool`, the engine's own memory: gives up blocks, and takes them back
              host     `host_cache.HostCache`, below it: what the device gives up (`kv.host_budget_bytes`)
              store    the kv_stores, below that: remote memory, and disks that outlive both
    kv_store  dram     `backends.host_tier.HostTier`: blocks in host memory, also served in place
              nvme     `backends.file.FileTier`: blocks in files, there after a restart

A kv_store's tiers are one `hierarchy.HierarchyManager`. A worker's lowest tier is written ahead, not at eviction:
decode offloads what a finished sequence leaves (`services/decode/offload.py`), so what a worker drops is in a store
already, but where stores were too slow or full. Prefill and decode fetch from there what neither device nor host has
(`rpc.store_fetch`). A worker has no disk of its own: a kv_store on its host is that, and serves all others, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sagellm_common.core.kv import BlockEvent, KvRegion, Tier
from sagellm_common.core.types import BlockHash, BlockIds, KvTierStats, TokenIds, pack_int32
from sagellm_common.prefix_reuse.matcher import contexts

NOTE_BYTES = 24


@dataclass(frozen=True, slots=True)
class BlockKey:
    """By what a block is found, and what tells a collision from a hit.

    `parent` is the hash of the block before it, empty where it is the first or not known. `note` is for whoever keeps
    something about a block beside it, at most NOTE_BYTES. `context` tells all tokens up to it apart from others
    (`prefix_reuse.matcher`); empty where they are not known. `depth` is its number in its sequence, 0 where that is not
    known: it says what the block is worth, not which one it is.
    """

    hash: BlockHash
    token_bytes: bytes
    parent: BlockHash = b""
    note: bytes = b""
    context: bytes = b""
    depth: int = field(default=0, compare=False)


class TierBackend(Protocol):
    """Thread-safe. `read` and `write` may wait for a device, and let go of the GIL meanwhile; nothing else waits."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Tier:
        """How block events name it."""

    @property
    def exact(self) -> bool:
        """Whether blocks are read as they were written. Else their keys' notes say by how much they differ."""

    @property
    def block_bytes(self) -> int:
        """Of the blocks as they are read and written, whatever they take here."""

    def holds(self, hashes: Sequence[BlockHash]) -> list[bool]: ...

    def hashes(self) -> list[BlockHash]: ...

    def read(self, keys: Sequence[BlockKey], region: KvRegion, block_ids: BlockIds) -> int:
        """Fills region's blocks block_ids[i] with keys[i], up to the first that is not here; returns how many.

        What is returned was checked: it is what was written for this hash and these tokens.
        """

    def write(self, keys: Sequence[BlockKey], region: KvRegion, block_ids: BlockIds) -> int:
        """Stores copies of region's blocks; returns how many are here now. Fewer when the tier is short of room.

        Blocks that are here already are not written again. The region must not change meanwhile.
        """

    def keys(self, hashes: Sequence[BlockHash]) -> list[BlockKey]:
        """Of those of the blocks that are here."""

    def used(self, hashes: Sequence[BlockHash]) -> None:
        """Blocks of one sequence were used, wherever they were read from: what is here of them is worth keeping."""

    def remove(self, hashes: Sequence[BlockHash]) -> None:
        """Unknown ones are fine."""

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        """Calls back on each change, from whatever thread made it, in order; it must not call back into the tier."""

    def stats(self) -> KvTierStats: ...

    def close(self) -> None:
        """Nothing is read or written any more. Idempotent."""


def keys_of(
    hashes: Sequence[BlockHash],
    token_ids: TokenIds,
    block_size_tokens: int,
    parent: BlockHash = b"",
    before: bytes = b"",
    known: Sequence[bytes] = (),
    depths: Sequence[int] = (),
) -> list[BlockKey]:
    """Keys of consecutive blocks; `parent` is that of the first, where it is known, `before` its context, or the root.

    `known` are the contexts where somebody else has made them; without either they are not known. `depths` are the
    blocks' numbers in their sequence, unset: 0, 1, …
    """
    step = 4 * block_size_tokens
    packed, parents = pack_int32(token_ids[: len(hashes) * block_size_tokens]), (parent, *hashes)
    context = iter(known) if known else contexts(before, packed, step) if before else itertools.repeat(b"")
    return [
        BlockKey(
            block_hash,
            packed[n * step : (n + 1) * step],
            parents[n],
            context=next(context),
            depth=depths[n] if depths else n,
        )
        for n, block_hash in enumerate(hashes)
    ]


def paths(keys: Sequence[BlockKey]) -> list[list[BlockHash]]:
    """The hashes of `keys`, cut where a block is not the child of the one before it."""
    found: list[list[BlockHash]] = []
    last = None
    for key in keys:
        if last is None or key.parent != last:
            found.append([])
        found[-1].append(key.hash)
        last = key.hash
    return found
