"""Two processes joined by torch.distributed for one direction of bytes: made on demand, thrown away after any error.

Gloo's waits cannot be aborted, only run out, and a timeout closes the pair; what NCCL was told to write it writes in
its own time. Buffers belong to them until then. So they never get a pointer into KV memory: what they send and receive
are the staging buffers of the pair, and whatever arrives after a pull was given up lands there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]  # not in __all__

from sagellm_common.comm_backend import meter
from sagellm_common.comm_backend.bridge import fill
from sagellm_common.comm_backend.frames import groups
from sagellm_common.comm_backend.meter import PullMeter
from sagellm_common.comm_backend.pieces import Pieces, blocks, copy, digests, in_order
from sagellm_common.comm_backend.wire import split_address
from sagellm_common.comm_backend.write_gate import WriteGate
from sagellm_common.core.errors import LayoutMismatch, PeerLost
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockIds

SOURCE, RECEIVER = 0, 1
MESSAGE_BYTES = 4 << 20
"""Unless configured."""
POLL_S = 100e-6


class Staging(Protocol):
    """Where a pair's buffers are, and how blocks come into them: rows [blocks, block_bytes] of uint8."""

    def rows(self, num_blocks: int, block_bytes: int) -> Tensor: ...

    def take(self, memory: KvMemory, block_ids: BlockIds, rows: Tensor) -> None:
        """Fills the rows with the blocks."""

    def give(self, rows: Tensor, memory: KvMemory, block_ids: BlockIds) -> None:
        """Fills the blocks with the rows. It is over when this returns."""

    def digests(self, rows: Tensor) -> bytes:
        """8 bytes for each row, the same at both ends."""

    def group(self, store: PrefixStore, rank: int, host: str, limit: timedelta) -> Any:
        """Waits for the other end."""

    def wait(self, group: Any, work: Any, limit_s: float, write: WriteGate | None) -> None:
        """Until `work` is done. RuntimeError is how it fails; NCCL's end at once when `write` is shut, too."""


class HostStaging:
    """Memory of the host, for Gloo."""

    def rows(self, num_blocks: int, block_bytes: int) -> Tensor:
        return torch.empty(num_blocks, block_bytes, dtype=torch.uint8)

    def take(self, memory: KvMemory, block_ids: BlockIds, rows: Tensor) -> None:
        with memory.reading(block_ids) as (region, ids):
            copy(blocks(region, ids), _pieces(rows), digest=False)

    def give(self, rows: Tensor, memory: KvMemory, block_ids: BlockIds) -> None:
        fill(memory, block_ids, _pieces(rows))

    def digests(self, rows: Tensor) -> bytes:
        return digests(_pieces(rows))

    def group(self, store: PrefixStore, rank: int, host: str, limit: timedelta) -> Any:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = limit
        return ProcessGroupGloo(store, rank, 2, options)

    def wait(self, group: Any, work: Any, limit_s: float, write: WriteGate | None) -> None:
        work.wait(timedelta(seconds=limit_s))


def _pieces(rows: Tensor) -> Pieces:
    """A piece per row."""
    return in_order(rows.numpy().data.cast("B"), len(rows), rows.shape[1])


class TorchPair:
    """One end of a pair. Used by one transfer at a time; its methods block, each wait at most `timeout_s`.

    Messages have message_blocks blocks, `depth` of them (each in a staging buffer) are under way at a time.

    `group` is a process group, whose methods torch's stubs do not tell. RuntimeError is how it fails.
    """

    def __init__(self, group: Any, staging: Staging, block_bytes: int, message_blocks: int, depth: int) -> None:
        self._group = group
        self._staging = staging
        self._block_bytes = block_bytes
        self._message_blocks = message_blocks
        self._depth = depth
        self._rows = [staging.rows(message_blocks, block_bytes) for _ in range(depth)]

    def send(self, memory: KvMemory, block_ids: BlockIds, timeout_s: float, *, digest: bool) -> bytes:
        """Sends the blocks message by message: one is gathered while those before it are on their way. Returns the
        digests of what was sent."""
        in_flight: deque[Any] = deque()
        found = []
        for rows, ids in self._messages(block_ids):
            if len(in_flight) == self._depth:
                self._staging.wait(self._group, in_flight.popleft(), timeout_s, None)
            self._staging.take(memory, ids, rows)
            if digest:
                with meter.source_digesting():
                    found.append(self._staging.digests(rows))
            in_flight.append(self._group.send([rows.view(-1)], RECEIVER, 0))
        while in_flight:
            self._staging.wait(self._group, in_flight.popleft(), timeout_s, None)
        return b"".join(found)

    def recv(
        self,
        memory: KvMemory,
        block_ids: BlockIds,
        timeout_s: float,
        write: WriteGate,
        metered: PullMeter,
        *,
        digest: bool,
    ) -> bytes:
        """Receives what `send` sends into the blocks, as long as `write` is open; then only takes it off the wire.
        Returns the digests of what arrived."""
        if memory.block_bytes != self._block_bytes:  # see `join`
            raise LayoutMismatch(f"blocks have {memory.block_bytes} bytes here and {self._block_bytes} at the source")
        todo, found = list(self._messages(block_ids)), []
        posted = [self._post(rows) for rows, _ in todo[: self._depth]]
        for n, (rows, ids) in enumerate(todo):
            self._staging.wait(self._group, posted[n], timeout_s, write)
            if digest:
                with metered.digesting():
                    found.append(self._staging.digests(rows))
            with write:
                if write.open:
                    self._staging.give(rows, memory, ids)
                    metered.arrived(len(ids) * self._block_bytes, len(ids))
            if n + self._depth < len(todo):
                posted.append(self._post(todo[n + self._depth][0]))
        return b"".join(found)

    def _messages(self, block_ids: BlockIds) -> Iterator[tuple[Tensor, BlockIds]]:
        """(rows of a staging buffer, blocks) per message; both ends cut alike."""
        for n, ids in enumerate(groups(block_ids, self._message_blocks)):
            yield self._rows[n % self._depth][: len(ids)], ids

    def _post(self, rows: Tensor) -> Any:
        return self._group.recv([rows.view(-1)], SOURCE, 0)


def join(
    staging: Staging,
    address: str,
    pair_id: str,
    rank: int,
    host: str,
    block_bytes: int,
    timeout_s: float,
    message_bytes: int = MESSAGE_BYTES,
    depth: int = 2,
) -> TorchPair:
    """Meets the other end at the source's store. Blocks; raises PeerLost, LayoutMismatch.

    torch asks DNS for the names of both ends when they connect: a DNS that does not answer delays it by its timeout.
    Both ends must have blocks of one size before anything is sent: Gloo ends the *process* that receives less than
    the other side sends. Messages are as large as the one wants them that wants them smaller.
    """
    limit = timedelta(seconds=timeout_s)
    store_host, store_port = split_address(address)
    try:
        # A client of its own: a wait on a store blocks everybody who shares it.
        store = TCPStore(store_host, store_port, is_master=False, wait_for_workers=False, timeout=limit)
        shared = PrefixStore(pair_id, store)
        if shared.add(f"joined/{rank}", 1) != 1:
            raise PeerLost(f"pair {pair_id} was given up by the source; pull again")
        shared.set(f"block_bytes/{rank}", str(block_bytes))
        shared.set(f"message_bytes/{rank}", str(message_bytes))
        theirs = int(shared.get(f"block_bytes/{1 - rank}"))
        message_bytes = min(message_bytes, int(shared.get(f"message_bytes/{1 - rank}")))
        if theirs != block_bytes:
            raise LayoutMismatch(
                f"pair {pair_id}: blocks have {block_bytes} bytes here and {theirs} at the peer; "
                "both need one KV layout"
            )
        group = staging.group(shared, rank, host, limit)
    except (RuntimeError, torch.distributed.DistError) as err:
        raise PeerLost(f"pair {pair_id} at {address} did not come together: {_first_line(err)}") from err
    return TorchPair(group, staging, block_bytes, max(1, message_bytes // block_bytes), depth)


def _first_line(err: BaseException) -> str:
    return str(err).partition("\n")[0]
