"""Two processes joined by Gloo for one direction of bytes: made on demand, thrown away after any error.

Gloo's waits cannot be aborted, only run out, and a timeout closes the pair. Its buffers belong to it until then. So
it never gets a pointer into KV memory: what it sends and receives are the staging buffers of the pair, and whatever
arrives after a pull was given up lands there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]  # not in __all__

from sagellm_common.comm_backend.frames import groups
from sagellm_common.comm_backend.meter import PullMeter
from sagellm_common.comm_backend.wire import split_address
from sagellm_common.comm_backend.write_gate import WriteGate
from sagellm_common.core.errors import LayoutMismatch, PeerLost
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockIds

SOURCE, RECEIVER = 0, 1
MESSAGE_BYTES = 4 << 20
"""Unless configured."""


class GlooPair:
    """One end of a pair. Used by one transfer at a time; its methods block, each wait at most `timeout_s`.

    Messages have message_blocks blocks, `depth` of them (each in a staging buffer) are under way at a time.

    `group` is a ProcessGroupGloo, whose methods torch's stubs do not tell. RuntimeError is how it fails.
    """

    def __init__(self, group: Any, block_bytes: int, message_blocks: int, depth: int) -> None:
        self._group = group
        self._block_bytes = block_bytes
        self._message_blocks = message_blocks
        self._depth = depth
        self._staging = [torch.empty(message_blocks * block_bytes, dtype=torch.uint8) for _ in range(depth)]
        self._rows = [staging.numpy().reshape(-1, block_bytes) for staging in self._staging]

    def send(self, region: KvRegion, block_ids: BlockIds, timeout_s: float) -> None:
        """Sends the blocks message by message: one is gathered while those before it are on their way."""
        pool, limit = _rows(region), timedelta(seconds=timeout_s)
        in_flight: deque[Any] = deque()
        for turn, ids in self._groups(block_ids):
            if len(in_flight) == self._depth:
                in_flight.popleft().wait(limit)
            np.take(pool, ids, axis=0, out=self._rows[turn][: len(ids)], mode="clip")
            in_flight.append(self._group.send([self._message(turn, len(ids))], RECEIVER, 0))
        while in_flight:
            in_flight.popleft().wait(limit)

    def recv(
        self, region: KvRegion, block_ids: BlockIds, timeout_s: float, write: WriteGate, metered: PullMeter
    ) -> None:
        """Receives what `send` sends into the blocks, as long as `write` is open; then only takes it off the wire."""
        if region.block_bytes != self._block_bytes:  # see `join`
            raise LayoutMismatch(f"blocks have {region.block_bytes} bytes here and {self._block_bytes} at the source")
        pool, limit = _rows(region), timedelta(seconds=timeout_s)
        todo = list(self._groups(block_ids))
        posted = [self._post(turn, ids) for turn, ids in todo[: self._depth]]
        for n, (turn, ids) in enumerate(todo):
            posted[n].wait(limit)
            with write:
                if write.open:
                    pool[ids] = self._rows[turn][: len(ids)]
                    metered.arrived(len(ids) * self._block_bytes, len(ids))
            if n + self._depth < len(todo):
                posted.append(self._post(*todo[n + self._depth]))

    def _groups(self, block_ids: BlockIds) -> Iterator[tuple[int, BlockIds]]:
        """(which staging buffer, blocks) per message; both ends cut alike."""
        for n, ids in enumerate(groups(block_ids, self._message_blocks)):
            yield n % self._depth, ids

    def _post(self, turn: int, ids: BlockIds) -> Any:
        return self._group.recv([self._message(turn, len(ids))], SOURCE, 0)

    def _message(self, turn: int, num_blocks: int) -> torch.Tensor:
        return self._staging[turn][: num_blocks * self._block_bytes]


def join(
    address: str,
    pair_id: str,
    rank: int,
    host: str,
    block_bytes: int,
    timeout_s: float,
    message_bytes: int = MESSAGE_BYTES,
    depth: int = 2,
) -> GlooPair:
    """Meets the other end at the source's store. Blocks; raises PeerLost, LayoutMismatch.

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
            raise PeerLost(f"gloo pair {pair_id} was given up by the source; pull again")
        shared.set(f"block_bytes/{rank}", str(block_bytes))
        shared.set(f"message_bytes/{rank}", str(message_bytes))
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = limit
        group = ProcessGroupGloo(shared, rank, 2, options)
        theirs = int(shared.get(f"block_bytes/{1 - rank}"))
        message_bytes = min(message_bytes, int(shared.get(f"message_bytes/{1 - rank}")))
    except (RuntimeError, torch.distributed.DistError) as err:
        raise PeerLost(f"gloo pair {pair_id} at {address} did not come together: {_first_line(err)}") from err
    if theirs != block_bytes:
        raise LayoutMismatch(
            f"gloo pair {pair_id}: blocks have {block_bytes} bytes here and {theirs} at the peer; "
            "both need one KV layout"
        )
    return GlooPair(group, block_bytes, max(1, message_bytes // block_bytes), depth)


def _rows(region: KvRegion) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.frombuffer(region.view, dtype=np.uint8).reshape(region.num_blocks, region.block_bytes)


def _first_line(err: BaseException) -> str:
    return str(err).partition("\n")[0]
