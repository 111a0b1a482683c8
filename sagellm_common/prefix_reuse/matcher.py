"""A hash is no proof: what is found by one is checked before it is reused.

A block's KV depends on its tokens and on all before them. Each block found must hold the prompt's tokens, have been
computed after the block found before it, and after the very tokens that come before it in the prompt: names alone would
let a block through whose parent has another block's name. For that blocks are stored with their context, and whoever
asks for blocks from the middle of a prompt tells theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import xxhash

from sagellm_common.core.types import BlockHash, TokenIds, pack_int32


class NamedBlock(Protocol):
    """A stored block: its name, its tokens as packed int32, the name of the block before it, and its context.

    Parent and context are empty where they are not known.
    """

    @property
    def hash(self) -> BlockHash: ...

    @property
    def token_bytes(self) -> bytes: ...

    @property
    def parent(self) -> BlockHash: ...

    @property
    def context(self) -> bytes: ...


B = TypeVar("B", bound=NamedBlock)

CONTEXT_BYTES = 8


def contexts(before: bytes, packed: bytes, block_bytes: int) -> Iterator[bytes]:
    """A digest of everything up to and with each block, which owes nothing to the blocks' names.

    `before` is the context of the block before, or the root of the first one.
    """
    for start in range(0, len(packed) - block_bytes + 1, block_bytes):
        before = xxhash.xxh64_digest(before + packed[start : start + block_bytes])
        yield before


class PrefixMatcher:
    """`rejected` counts the hits that were none."""

    def __init__(self, block_size_tokens: int) -> None:
        self._block_bytes = 4 * block_size_tokens
        self.rejected = 0

    def verify(
        self,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        stored: Callable[[BlockHash], B | None],
        root: bytes = b"",
        known: Sequence[bytes] = (),
    ) -> list[B]:
        """The leading blocks that are stored for exactly these tokens, in order.

        `root` is that of the hashes' chain. Where they begin in the middle of one, `known` are the blocks' contexts;
        with neither, what came before them is a matter of names alone.
        """
        size = self._block_bytes
        packed = pack_int32(token_ids[: len(hashes) * size // 4])
        wanted: Iterable[bytes] = known or (contexts(root, packed, size) if root else itertools.repeat(b""))
        found: list[B] = []
        for n, (block_hash, context) in enumerate(zip(hashes, wanted, strict=False)):
            block = stored(block_hash)
            if block is None:
                break
            parent = hashes[n - 1] if n else b""
            tokens = packed[n * size : (n + 1) * size]
            if not (block.token_bytes == tokens and _alike(block.parent, parent) and _alike(block.context, context)):
                self.rejected += 1
                break
            found.append(block)
        return found


def same_block(a: NamedBlock, b: NamedBlock) -> bool:
    """Whether two blocks of one name may stand for each other."""
    return a.token_bytes == b.token_bytes and _alike(a.parent, b.parent) and _alike(a.context, b.context)


def _alike(a: bytes, b: bytes) -> bool:
    return not a or not b or a == b
