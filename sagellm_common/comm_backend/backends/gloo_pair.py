"""Two processes joined by Gloo for one direction of bytes: made on demand, thrown away after any error.

Gloo's waits cannot be aborted, only run out, and a timeout closes the pair. Its buffers belong to it until then. So
it never gets a pointer into KV memory: what it sends and receives are the staging buffers of the pair, and whatever
arrives after a pull was given up lands there.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]  # not in __all__

from sagellm_common.comm_backend.frames import groups
from sagellm_common.comm_backend.wire import split_address
from sagellm_common.comm_backend.write_gate import WriteGate
from sagellm_common.core.errors import LayoutMismatch, PeerLost
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockIds

SOURCE, RECEIVER = 0, 1
GROUP_BYTES = 4 << 20


class GlooPair:
    """One end of a pair. Used by one transfer at a time; its methods block, each wait at most `timeout_s`.

    `group` is a ProcessGroupGloo, whose methods torch's stubs do not tell. RuntimeError is how it fails.
    """

    def __init__(self, group: Any, block_bytes: int) -> None:
        self._group = group
        self._block_bytes = block_bytes
        self._staging = [torch.empty(max(GROUP_BYTES, block_bytes), dtype=torch.uint8) for _ in range(2)]
        self._rows = [s.numpy()[: len(s) // block_bytes * block_bytes].reshape(-1, block_bytes) for s in self._staging]

    def send(self, region: KvRegion, block_ids: BlockIds, timeout_s: float) -> None:
        """Sends the blocks group by group: one is gathered while the one before it is on its way."""
        pool, limit, in_flight = _rows(region), timedelta(seconds=timeout_s), None
        for turn, ids in self._groups(block_ids):
            np.take(pool, ids, axis=0, out=self._rows[turn][: len(ids)], mode="clip")
            if in_flight is not None:
                in_flight.wait(limit)
            in_flight = self._group.send([self._message(turn, len(ids))], RECEIVER, 0)
        if in_flight is not None:
            in_flight.wait(limit)

    def recv(self, region: KvRegion, block_ids: BlockIds, timeout_s: float, write: WriteGate) -> None:
        """Receives what `send` sends into the blocks, as long as `write` is open; then only takes it off the wire."""
        if region.block_bytes != self._block_bytes:  # see `join`
            raise LayoutMismatch(f"blocks have {region.block_bytes} bytes here and {self._block_bytes} at the source")
        pool, limit = _rows(region), timedelta(seconds=timeout_s)
        todo = list(self._groups(block_ids))
        posted = [self._post(turn, ids) for turn, ids in todo[:2]]
        for n, (turn, ids) in enumerate(todo):
            posted[n].wait(limit)
            with write:
                if write.open:
                    pool[ids] = self._rows[turn][: len(ids)]
            if n + 2 < len(todo):
                posted.append(self._post(*todo[n + 2]))

    def _groups(self, block_ids: BlockIds) -> Iterator[tuple[int, BlockIds]]:
        """(which staging buffer, blocks) per message; both ends cut alike."""
        for n, ids in enumerate(groups(block_ids, self._block_bytes, GROUP_BYTES)):
            yield n % 2, ids

    def _post(self, turn: int, ids: BlockIds) -> Any:
        return self._group.recv([self._message(turn, len(ids))], SOURCE, 0)

    def _message(self, turn: int, num_blocks: int) -> torch.Tensor:
        return self._staging[turn][: num_blocks * self._block_bytes]


def join(address: str, pair_id: str, rank: int, host: str, block_bytes: int, timeout_s: float) -> GlooPair:
    """Meets the other end at the source's store. Blocks; raises PeerLost, LayoutMismatch.

    Both ends must have blocks of one size before anything is sent: Gloo ends the *process* that receives less than
    the other side sends.
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
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = limit
        group = ProcessGroupGloo(shared, rank, 2, options)
        theirs = int(shared.get(f"block_bytes/{1 - rank}"))
    except (RuntimeError, torch.distributed.DistError) as err:
        raise PeerLost(f"gloo pair {pair_id} at {address} did not come together: {_first_line(err)}") from err
    if theirs != block_bytes:
        raise LayoutMismatch(
            f"gloo pair {pair_id}: blocks have {block_bytes} bytes here and {theirs} at the peer; "
            "both need one KV layout"
        )
    return GlooPair(group, block_bytes)


def _rows(region: KvRegion) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.frombuffer(region.view, dtype=np.uint8).reshape(region.num_blocks, region.block_bytes)


def _first_line(err: BaseException) -> str:
    return str(err).partition("\n")[0]
