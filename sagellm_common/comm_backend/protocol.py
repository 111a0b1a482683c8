"""How KV bytes move (the receiver pulls blocks of a leased source), and how processes exchange tensors in groups."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Protocol

from sagellm_common.comm_backend.bridge import Outgoing
from sagellm_common.comm_backend.kv_dtypes import Deviation
from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.kv import Allocation, KvMemory, KvRegion
from sagellm_common.core.kv_progress import KvProgress
from sagellm_common.core.types import BlockIds, KvConversion, KvSource

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TransferResult:
    """`seconds` in which bytes moved: a pull along the computation spends more, waiting for it.

    `backend` is the byte path they took and `why` says so for people, where there was a choice.
    """

    bytes: int
    seconds: float
    blocks: int
    deviation: Deviation | None = None
    """By how much what is here differs from what the source has; None: its dtype was kept all the way."""
    wire_dtype: str = ""
    transcode_s: float = 0.0
    """Spent on other dtypes and blocks by the receiver, beside the transfer."""
    backend: str = ""
    why: str = ""

    def over(self, backend: str, why: str) -> TransferResult:
        """The same, of this byte path. Not `replace`, which takes longer than a small transfer's share of it."""
        kept = self.bytes, self.seconds, self.blocks, self.deviation, self.wire_dtype, self.transcode_s
        return TransferResult(*kept, backend, why)

    @property
    def conversion(self) -> KvConversion | None:
        """What it cost that the dtype was changed on the way; None: it was not."""
        if self.deviation is None:
            return None
        found = self.deviation
        return KvConversion(self.wire_dtype, found.max_abs, found.relative_rms, found.non_finite)


@dataclass(frozen=True, slots=True)
class Encoding:
    """The dtype in which the receiver wants the source's blocks sent: one of `kv_dtypes.NAMES`.

    `block_bytes` is what a block has in it, `last_block_tokens` how many tokens of the last one count.
    """

    dtype: str
    block_bytes: int
    last_block_tokens: int


Encode = Callable[[str, tuple[int, int]], Outgoing]
"""(dtype, the id of the last block and how many tokens of it count) → a pool's blocks in that dtype.

Raises LayoutMismatch where it cannot be made of the pool's.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Pull:
    """source_blocks[i] of the source is wanted in target_blocks[i] of the own pool, within `timeout_s`.

    `into` is other memory than the pool, for blocks of another layout than the pool's: it is filled group by group, in
    order (`bridge.filling`). With `encoding` (where the channel `encodes`) the source converts them first. Where pulls
    take turns a higher `priority` goes first.
    """

    source: KvSource
    source_blocks: BlockIds
    target_blocks: BlockIds
    _: KW_ONLY
    timeout_s: float
    into: KvMemory | None = None
    encoding: Encoding | None = None
    priority: int = 0

    @property
    def transcoded(self) -> bool:
        """Whether blocks are not sent, or not taken, as they are."""
        return self.encoding is not None or not isinstance(self.into, KvRegion | None)


@dataclass(frozen=True, slots=True, eq=False)
class PullAlong:
    """As `Pull`, of what is still being computed: target_blocks[i] is wanted from the source's block first_block + i in
    token order, to the last one. `on_bytes` hears of each segment that is here, on a thread of the channel."""

    source: KvSource
    first_block: int
    target_blocks: BlockIds
    _: KW_ONLY
    timeout_s: float
    on_bytes: Callable[[int], None]
    into: KvMemory | None = None
    encoding: Encoding | None = None
    priority: int = 0

    @property
    def transcoded(self) -> bool:
        return self.encoding is not None or not isinstance(self.into, KvRegion | None)


class LeasedBlocks(Protocol):
    """What a byte path asks before it sends: the source's lease table (`handoff.HandoffSource`)."""

    def reading(
        self, transfer_id: str, epoch: int, block_ids: BlockIds, num_bytes: int | None = None
    ) -> AbstractContextManager[None]:
        """Holds the blocks for the time of a send: a release or expiry meanwhile frees them only afterwards.

        `num_bytes` of them are read; None: all. Raises LeaseExpired unless all these blocks are pinned under this
        transfer and epoch.
        """

    def progress(self, transfer_id: str, epoch: int) -> tuple[Allocation, KvProgress]:
        """Blocks pinned while they are computed, in token order, and how far they are. Raises LeaseExpired."""


Memory = Callable[[], KvMemory]
"""A pool's memory, asked for at each use (`KVBackendProtocol.regions`): a store has none before its first layout."""

Regions = Callable[[], KvRegion]
"""The same for a byte path that works in place, on host memory only."""

PullRpc = Callable[[KvSource, BlockIds, str, float], Awaitable[bytes]]
"""(source, source_blocks, pair_id, timeout_s) → packed digests: KvTransferService.Pull, for byte paths that need the
source to act (gloo). Injected, for comm_backend knows no gRPC."""


class KVTransferChannel(Protocol):
    """One worker's end of a byte path, both as source and as receiver."""

    name: str
    pulls_along: bool
    """Whether `pull_along` works here; else blocks are pulled when all of them are computed."""
    encodes: bool
    """Whether the source sends in another dtype on request. Else it sends its blocks as they are."""

    @property
    def address(self) -> str:
        """host:port peers connect to; empty before `start`."""

    async def start(self) -> str:
        """Begins to serve as a source; returns the data address (host:port) peers connect to."""

    async def pull(self, asked: Pull) -> TransferResult:
        """Copies the blocks, digests checked.

        Raises LayoutMismatch unless blocks that arrive have the size of those they go into, PeerLost (connection
        refused, reset, silent past the deadline), LeaseExpired, KvCorrupt. After an error the target blocks hold
        garbage, the memory is otherwise intact.
        """

    async def pull_along(self, asked: PullAlong) -> TransferResult:
        """As `pull`, of blocks that are still being computed, as they become ready: some layers of some blocks at a
        time, a digest for each such segment.

        Raises as `pull` does, whatever ended the computation instead, and InvalidRequest where not `pulls_along`.
        """

    async def serve_pull(self, transfer_id: str, epoch: int, block_ids: BlockIds, pair_id: str) -> bytes:
        """Source side of PullRpc: sends the blocks to the peer of `pair_id`, returns their packed 8-byte digests.

        Raises InvalidRequest on a byte path that asks in band (tcp).
        """

    async def close(self) -> None:
        """Stops serving and drops connections. Idempotent."""


def check_encoding(channel: KVTransferChannel, asked: Pull | PullAlong) -> None:
    """Raises InvalidRequest for what only a channel that encodes can do."""
    if asked.encoding is not None and not channel.encodes:
        raise InvalidRequest(f"over {channel.name} blocks come in the source's dtype, not in {asked.encoding.dtype}")


class ReduceOp(enum.Enum):
    SUM = "sum"
    MAX = "max"
    MIN = "min"


class CommGroup(Protocol):
    """Processes that exchange tensors: this one is `rank` of `size`. Used from one event loop.

    Every member calls the same collectives in the same order; what one rank sends to another arrives in the order of
    the calls. Several calls may be under way at once. Before payload moves all who take part compare what they were
    called with: LayoutMismatch on each of them where dtype, shape, root or operation differ.

    `timeout_s` bounds each call, waiting for the others included. Whatever ends a call half-way (LayoutMismatch,
    PeerLost: a member died, left, or was silent for timeout_s; KvCorrupt; a cancellation) breaks the group for all:
    tensors that were being filled hold garbage, nobody writes to them any more, and each further call raises PeerLost.
    Form another group then. InvalidRequest (no such rank, a dtype that cannot be reduced) leaves it whole.

    Comparing costs a round trip for each call. Ranks of one engine, which reduce in every layer and cannot differ, keep
    to torch's own group (`device_cpu.tensor_parallel`).
    """

    rank: int
    size: int

    async def send(self, tensor: Tensor, to: int, *, timeout_s: float) -> None:
        """Returns once rank `to` has taken it, or will without our help."""

    async def recv(self, into: Tensor, source: int, *, timeout_s: float) -> None:
        """Fills `into` with what rank `source` sends, of the same dtype and shape."""

    async def broadcast(self, tensor: Tensor, root: int, *, timeout_s: float) -> None:
        """Fills the tensors of all ranks with that of `root`."""

    async def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM, *, timeout_s: float) -> None:
        """Reduces the tensors of all ranks, each in place, to the same bits on all of them."""

    async def all_gather(self, tensor: Tensor, *, timeout_s: float) -> list[Tensor]:
        """The tensors of all ranks, by rank: of one dtype, but of any shape."""

    async def close(self) -> None:
        """Leaves; calls of the others end with PeerLost. Idempotent."""


class CommBackendProtocol(Protocol):
    """One process's end of a way to form groups, whenever and of whomever: there is no fixed world."""

    name: str

    @property
    def address(self) -> str:
        """host:port; empty before `start`."""

    async def start(self) -> str:
        """Begins to listen; returns the address. Raises ConfigError."""

    async def join(self, group: str, members: Sequence[str], *, timeout_s: float) -> CommGroup:
        """Forms a group with the ends at these addresses, in order of rank; our own is one of them.

        All of them join under the same name, which is used once. Raises InvalidRequest, PeerLost.
        """

    async def close(self) -> None:
        """Stops listening and leaves all groups. Idempotent."""
