"""Between KV blocks of one layout and of another: what may be bridged, and how.

Bridged are other dtypes, other block sizes and other tensor-parallel sizes. A block is a row of *planes*, for each rank
one per kind and layer, each with one row of bytes per token: the rank's heads, one after the other. So a token's KV is
the same heads, wherever blocks are cut and however many ranks share them:

    two blocks of 4, one rank:   | k0 k1 k2 k3 | v0 v1 v2 v3 |   | k4 k5 k6 k7 | v4 v5 v6 v7 |
    one block of 8, two ranks:   | first heads of k0 … k7 | of v0 … v7 | second heads of k0 … k7 | of v0 … v7 |

Bytes of one dtype are moved as they are; between two, `kv_dtypes` says what a head's numbers become.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sagellm_common.comm_backend.kv_dtypes import Deviation, KvDtype, parse
from sagellm_common.core.errors import LayoutMismatch
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockIds, KvLayout

TILE_BYTES = 256 << 10
"""Of float32 are converted at a time: what is made of them stays in a core's cache."""

_FIXES = {
    "model_fingerprint": "give all workers the same model.path and engine.weights",
    "dtype": "only float32, bfloat16, float16, float8_e4m3fn, int8 and int4 are converted, and those only where blocks "
    "are laid out as on the CPU and CUDA: set one engine.dtype, engine.kv_quant_bits and engine.device for all workers",
    "pp": "run all workers with one pipeline-parallel size",
}
_ANY_FIX = "run all workers with one model and one engine section"


def row_bytes(layout: KvLayout) -> tuple[int, ...]:
    """Bytes of one token in one layer, all heads, of each kind, in the order of the kinds in a block: keys, values, and
    where they are quantised key scales and value scales (two numbers per head). Empty for a dtype that is not known.
    """
    dtype = parse(layout.dtype)
    if dtype is None or layout.head_dim * dtype.bits % 8:
        return ()
    return tuple(layout.num_kv_heads * part for part in dtype.head_bytes(layout.head_dim) for _ in ("keys", "values"))


def with_dtype(layout: KvLayout, dtype: KvDtype) -> KvLayout:
    """The same blocks of tokens in another dtype."""
    other = replace(layout, dtype=dtype.name)
    return replace(other, block_bytes=sum(row_bytes(other)) * layout.num_layers * layout.block_size_tokens)


def obstacles(mine: KvLayout, theirs: KvLayout) -> dict[str, tuple[object, object]]:
    """Fields whose difference keeps blocks from moving between the two, as {name: (mine, theirs)}; empty: they may.

    Another dtype, block size or number of ranks does not, as long as both sides' blocks consist of what their fields
    say. `model_fingerprint` names the weights, not the dtype a model computes in: KV of the same weights computed in
    bfloat16 may go on in float32, as its configuration says, and is then what neither alone would have computed.
    """
    found = mine.differences(theirs)
    if found and _understood(mine) and _understood(theirs):
        for bridged in ("dtype", "block_size_tokens", "tp", "block_bytes"):  # the last follows from the other fields
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


def runs(begin_token: int, end_token: int, *block_sizes: int) -> Iterator[range]:
    """Tokens [begin, end) in the longest runs that lie within one block, whatever their size."""
    while begin_token < end_token:
        stop = min(end_token, *(begin_token - begin_token % size + size for size in block_sizes))
        yield range(begin_token, stop)
        begin_token = stop


Plane = NDArray[np.uint8]
"""[block, layer, token, bytes]: one kind of a group of heads; a writable view."""


class Transcoder:
    """Moves tokens between blocks of two layouts. Raises LayoutMismatch when there is no bridge between them."""

    def __init__(self, source: KvLayout, target: KvLayout) -> None:
        check_bridgeable(source, target, "the source", "the target")
        self.source, self.target = source, target
        self._dtypes = _dtypes(source, target)

    @property
    def exact(self) -> bool:
        """Whether the target's dtype has all numbers of the source's."""
        return self._dtypes is None or self._dtypes[1].holds(self._dtypes[0])

    def move(
        self,
        source: KvRegion,
        source_blocks: BlockIds,
        target: KvRegion,
        target_blocks: BlockIds,
        tokens: range,
        *,
        source_start: int = 0,
        target_start: int = 0,
    ) -> Deviation:
        """Brings `tokens` of a sequence from one side's blocks into the other's; nothing else is written.

        The block tables hold the sequence from its tokens `source_start` and `target_start` on, the beginnings of a
        block each. Returns by how much what is written differs from what was read.
        """
        deviation = Deviation()
        groups = math.lcm(self.source.tp, self.target.tp)
        theirs, mine = _planes(source, self.source, groups), _planes(target, self.target, groups)
        sizes = self.source.block_size_tokens, self.target.block_size_tokens
        for run in runs(tokens.start, tokens.stop, *sizes):
            from_index, from_slot = divmod(run.start - source_start, sizes[0])
            to_index, to_slot = divmod(run.start - target_start, sizes[1])
            reads = int(source_blocks[from_index]), slice(from_slot, from_slot + len(run))
            writes = int(target_blocks[to_index]), slice(to_slot, to_slot + len(run))
            for from_kinds, to_kinds in zip(theirs, mine, strict=True):
                read = [plane[reads[0], :, reads[1]] for plane in from_kinds]
                write = [plane[writes[0], :, writes[1]] for plane in to_kinds]
                if self._dtypes is None:
                    for into, found in zip(write, read, strict=True):
                        into[...] = found
                else:
                    for kind in (0, 1):  # keys and values, each with its scales
                        self._convert(read[kind::2], write[kind::2], *self._dtypes, deviation)
        return deviation

    def _convert(
        self, read: list[Plane], write: list[Plane], source: KvDtype, target: KvDtype, deviation: Deviation
    ) -> None:
        """Views [layer, token, bytes]: of numbers or codes, and of scales where there are any."""
        layers, num_tokens, row = read[0].shape
        head_dim = self.source.head_dim
        heads = row // source.head_bytes(head_dim)[0]
        step = max(1, TILE_BYTES // (num_tokens * heads * head_dim * 4))
        for at in range(0, layers, step):
            some = slice(at, at + step)
            codes, *scales = (np.ascontiguousarray(part[some]).ravel() for part in read)
            numbers = source.decode(codes, scales[0] if scales else None, head_dim)
            parts = target.encode(numbers)
            for into, part in zip(write, (part for part in parts if part is not None), strict=True):
                into[some] = part.reshape(into[some].shape)
            if not self.exact:
                deviation.observe(numbers, target.decode(*parts, head_dim))


def _dtypes(source: KvLayout, target: KvLayout) -> tuple[KvDtype, KvDtype] | None:
    """None: bytes are moved as they are."""
    if source.dtype == target.dtype:
        return None
    found = parse(source.dtype), parse(target.dtype)
    assert found[0] is not None and found[1] is not None  # or the layouts would not be bridgeable
    return found[0], found[1]


def _understood(layout: KvLayout) -> bool:
    """Whether blocks are as large as rows of these fields are, and ranks share heads evenly."""
    rows = sum(row_bytes(layout)) * layout.num_layers * layout.block_size_tokens
    return rows == layout.block_bytes and layout.num_kv_heads % layout.tp == 0


def _planes(region: KvRegion, layout: KvLayout, groups: int) -> list[list[Plane]]:
    """One list per group of heads, of which no rank's end cuts any: keys, values, and their scales."""
    ranks, size = layout.tp, layout.block_size_tokens
    found = []
    for group in range(groups):
        rank, part = divmod(group, groups // ranks)
        at = layout.block_bytes // ranks * rank
        kinds = []
        for all_heads in row_bytes(layout):
            row, of_group = all_heads // ranks, all_heads // groups
            shape = (region.num_blocks, layout.num_layers, size, of_group)
            strides = (layout.block_bytes, row * size, row, 1)
            kinds.append(np.ndarray(shape, np.uint8, region.view, at + part * of_group, strides))
            at += layout.num_layers * row * size
        found.append(kinds)
    return found
