"""Between KV blocks of one layout and of another: what may be bridged, and how.

Bridged are other block sizes and other tensor-parallel sizes. A block is a row of *planes*, for each rank one per kind
and layer, each with one row of bytes per token: the rank's heads, one after the other. So a token's KV is the same
heads, wherever blocks are cut and however many ranks share them:

    two blocks of 4, one rank:   | k0 k1 k2 k3 | v0 v1 v2 v3 |   | k4 k5 k6 k7 | v4 v5 v6 v7 |
    one block of 8, two ranks:   | first heads of k0 … k7 | of v0 … v7 | second heads of k0 … k7 | of v0 … v7 |

Bytes are moved as they are. A bridge between dtypes would convert them in `Transcoder.move`, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sagellm_common.core.errors import LayoutMismatch
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockIds, KvLayout

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CODES_PER_BYTE = {"int8": 1, "int4": 2}

_FIXES = {
    "model_fingerprint": "give all workers the same model.path",
    "dtype": "set one engine.dtype and one engine.kv_quant_bits for all workers",
    "pp": "run all workers with one pipeline-parallel size",
}
_ANY_FIX = "run all workers with one model and one engine section"


def row_bytes(layout: KvLayout) -> tuple[int, ...]:
    """Bytes of one token in one layer, all heads, of each kind, in the order of the kinds in a block: keys, values, and
    where they are quantised key scales and value scales (two numbers per head). Empty for a dtype that is not known.
    """
    codes, _, scales = layout.dtype.partition("/")
    values = layout.num_kv_heads * layout.head_dim
    if codes in _ITEM_BYTES and not scales:
        return (values * _ITEM_BYTES[codes],) * 2
    if codes in _CODES_PER_BYTE and scales in _ITEM_BYTES:
        return (values // _CODES_PER_BYTE[codes],) * 2 + (layout.num_kv_heads * 2 * _ITEM_BYTES[scales],) * 2
    return ()


def obstacles(mine: KvLayout, theirs: KvLayout) -> dict[str, tuple[object, object]]:
    """Fields whose difference keeps blocks from moving between the two, as {name: (mine, theirs)}; empty: they may.

    Another block size or number of ranks does not, as long as both sides' blocks consist of what their fields say.
    """
    found = mine.differences(theirs)
    if found and _understood(mine) and _understood(theirs):
        for bridged in ("block_size_tokens", "tp", "block_bytes"):  # the last follows from the other fields
            found.pop(bridged, None)
    return found


def check_bridgeable(mine: KvLayout, theirs: KvLayout, me: str, them: str) -> None:
    """Raises LayoutMismatch naming each field that stands between the two, both values and what to do."""
    found = obstacles(mine, theirs)
    if found:
        listed = ", ".join(f"{name} is {a!r} on {me} and {b!r} on {them}" for name, (a, b) in found.items())
        fixes = dict.fromkeys(_FIXES[name] for name in found if name in _FIXES) or {_ANY_FIX: None}
        raise LayoutMismatch(
            f"KV blocks do not fit: {listed}; {'; '.join(fixes)}",
            metadata={name: f"{a}|{b}" for name, (a, b) in found.items()},
        )


@dataclass(frozen=True, slots=True)
class Pieces:
    """A run of tokens cut so that no piece crosses a block's end on either side: the longest such pieces all have
    `num_tokens` tokens. Arrays have one entry per piece: the index of its block in the side's block table, and its
    place within that block, counted in pieces.
    """

    num_tokens: int
    source_index: NDArray[np.int64]
    source_place: NDArray[np.int64]
    target_index: NDArray[np.int64]
    target_place: NDArray[np.int64]


def cut(begin_token: int, end_token: int, source_size_tokens: int, target_size_tokens: int) -> Pieces:
    """The pieces that tokens [begin, end) of a sequence lie in, for blocks of these sizes.

    The last piece may reach beyond `end_token`, within both of its blocks: there the target gets what the source has.
    Raises ValueError unless a piece begins at `begin_token`: the beginning of a block on either side will do.
    """
    size = math.gcd(source_size_tokens, target_size_tokens)
    if begin_token % size:
        raise ValueError(f"token {begin_token} is within a piece of {size} tokens")
    pieces = np.arange(begin_token // size, -(-end_token // size))
    source_index, source_place = np.divmod(pieces, source_size_tokens // size)
    target_index, target_place = np.divmod(pieces, target_size_tokens // size)
    return Pieces(size, source_index, source_place, target_index, target_place)


class Transcoder:
    """Moves tokens between blocks of two layouts. Raises LayoutMismatch when there is no bridge between them."""

    def __init__(self, source: KvLayout, target: KvLayout) -> None:
        check_bridgeable(source, target, "the source", "the target")
        self.source, self.target = source, target

    def move(
        self,
        source: KvRegion,
        source_blocks: BlockIds,
        target: KvRegion,
        target_blocks: BlockIds,
        begin_token: int,
        end_token: int,
    ) -> None:
        """Copies tokens [begin, end) of a sequence; the block tables hold it from its token 0 on. See `cut`."""
        pieces = cut(begin_token, end_token, self.source.block_size_tokens, self.target.block_size_tokens)
        from_blocks, to_blocks = source_blocks[pieces.source_index], target_blocks[pieces.target_index]
        for theirs, mine in zip(
            _planes(source, self.source, pieces.num_tokens, self.target.tp),
            _planes(target, self.target, pieces.num_tokens, self.source.tp),
            strict=True,
        ):
            mine[to_blocks, :, pieces.target_place] = theirs[from_blocks, :, pieces.source_place]


def _understood(layout: KvLayout) -> bool:
    """Whether blocks are as large as rows of these fields are, and ranks share heads evenly."""
    rows = sum(row_bytes(layout)) * layout.num_layers * layout.block_size_tokens
    return rows == layout.block_bytes and layout.num_kv_heads % layout.tp == 0


def _planes(region: KvRegion, layout: KvLayout, piece_tokens: int, other_tp: int) -> Iterator[NDArray[np.void]]:
    """Writable views, one per kind of each group of heads that no rank's end cuts on either side.

    [block, layer, piece, token of the piece], an element being what one token has of the group. With equal ranks both
    sides have whole pieces in one run: [block, layer, piece], an element being a piece.
    """
    ranks, places = layout.tp, layout.block_size_tokens // piece_tokens
    groups = math.lcm(ranks, other_tp)
    for group in range(groups):
        rank, part = divmod(group, groups // ranks)
        at = layout.block_bytes // ranks * rank
        for all_heads in row_bytes(layout):
            row, of_group = all_heads // ranks, all_heads // groups
            piece = row * piece_tokens
            shape: tuple[int, ...] = (region.num_blocks, layout.num_layers, places)
            strides: tuple[int, ...] = (layout.block_bytes, piece * places, piece)
            element = piece
            if ranks != other_tp:
                shape, strides, element = (*shape, piece_tokens), (*strides, row), of_group
            yield np.ndarray(shape, np.dtype((np.void, element)), region.view, at + part * of_group, strides)
            at += layout.num_layers * places * piece
