"""Groups over torch.distributed: Gloo between hosts' memory, NCCL between GPUs.

What is called is compared over Gloo, whatever carries the payload: a message that is larger than what it is received
into ends the *process* in Gloo, and hangs in NCCL. Both hold on to buffers they were given until their own timeout, so
they are given copies; a tensor of the caller's is written by this process alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import (  # type: ignore[attr-defined]  # not in __all__
    AllreduceOptions,
    PrefixStore,
    ProcessGroupGloo,
    TCPStore,
)
from torch.distributed import ReduceOp as TorchReduceOp

from sagellm_common.comm_backend.backends.torch_store import open_store
from sagellm_common.comm_backend.daemon import in_daemon_thread
from sagellm_common.comm_backend.protocol import ReduceOp
from sagellm_common.comm_backend.tensor_calls import CALL_BYTES, Call, Kind, agreed, as_bytes, check_rank, rank_of
from sagellm_common.comm_backend.wire import split_address
from sagellm_common.core.errors import PeerLost

T = TypeVar("T")

STORE_S = 300.0
CALL, ANSWER, PAYLOAD = 1, 2, 3
"""Tags of messages; collectives have streams of their own."""
OPS: dict[ReduceOp, Any] = {
    ReduceOp.SUM: TorchReduceOp.SUM,
    ReduceOp.MAX: TorchReduceOp.MAX,
    ReduceOp.MIN: TorchReduceOp.MIN,
}


class TorchComm:
    """A `CommBackendProtocol`: members meet at the store of the first of them."""

    def __init__(self, name: str, host: str, port: int, device: str = "cpu") -> None:
        self.name = name
        self.address = ""
        self._host, self._port = host, port
        self._device = device
        self._store: TCPStore | None = None
        self._groups: list[TorchGroup] = []

    async def start(self) -> str:
        self._store, self.address = open_store(self._host, self._port, STORE_S, "groups")
        return self.address

    async def join(self, group: str, members: Sequence[str], *, timeout_s: float) -> TorchGroup:
        rank, size = rank_of(self.address, members), len(members)
        formed = TorchGroup(group, rank, size, self._device)
        self._groups.append(formed)
        host, port = split_address(members[0])

        def meet(limit: timedelta) -> _Joined:
            # A client of its own: a wait on a store blocks everybody who shares it.
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
            shared = PrefixStore(group, store)
            if shared.add(f"joined/{rank}", 1) != 1:
                raise PeerLost(f"group {group!r} was formed before; a name is used once")
            return _Joined(shared, rank, size, self._host, self._device, limit)

        await formed.form(meet, timeout_s)
        return formed

    async def close(self) -> None:
        for group in self._groups:
            await group.close()
        self._store = None


class TorchGroup:
    """A `CommGroup`. Torch's waits block, so each call waits on a thread of its own, which nothing depends on later."""

    def __init__(self, name: str, rank: int, size: int, device: str) -> None:
        self.rank, self.size = rank, size
        self._name = name
        self._device = device
        self._joined: _Joined | None = None
        self._broken = ""
        self._collective = asyncio.Lock()
        self._lanes: defaultdict[tuple[int, int], asyncio.Lock] = defaultdict(asyncio.Lock)

    async def form(self, meet: Callable[[timedelta], _Joined], timeout_s: float) -> None:
        async with self._operation(self._collective, timeout_s):
            self._joined = await self._blocking(lambda: meet(timedelta(seconds=timeout_s)))

    async def send(self, tensor: torch.Tensor, to: int, *, timeout_s: float) -> None:
        check_rank("to", to, self.size, but=self.rank)
        call = Call.of(Kind.MESSAGE, tensor, device=self._device)
        async with self._operation(self._lanes[CALL, to], timeout_s) as joined:
            payload, limit = as_bytes(_copy(tensor)), timedelta(seconds=timeout_s)
            await self._blocking(lambda: joined.send(call, payload, to, limit))

    async def recv(self, into: torch.Tensor, source: int, *, timeout_s: float) -> None:
        check_rank("source", source, self.size, but=self.rank)
        call = Call.of(Kind.MESSAGE, into, device=self._device)
        async with self._operation(self._lanes[ANSWER, source], timeout_s) as joined:
            arrived, limit = _copy(into), timedelta(seconds=timeout_s)
            await self._blocking(lambda: joined.recv(call, as_bytes(arrived), source, limit))
            into.copy_(arrived)

    async def broadcast(self, tensor: torch.Tensor, root: int, *, timeout_s: float) -> None:
        check_rank("root", root, self.size)
        call = Call.of(Kind.BROADCAST, tensor, root=root, device=self._device)
        async with self._operation(self._collective, timeout_s) as joined:
            copy, limit = _copy(tensor), timedelta(seconds=timeout_s)
            await self._blocking(lambda: joined.broadcast(call, as_bytes(copy), limit))
            tensor.copy_(copy)

    async def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = ReduceOp.SUM, *, timeout_s: float) -> None:
        call = Call.of(Kind.ALL_REDUCE, tensor, op, device=self._device)
        async with self._operation(self._collective, timeout_s) as joined:
            copy, limit = _copy(tensor), timedelta(seconds=timeout_s)
            await self._blocking(lambda: joined.all_reduce(call, copy, limit))
            tensor.copy_(copy)

    async def all_gather(self, tensor: torch.Tensor, *, timeout_s: float) -> list[torch.Tensor]:
        call = Call.of(Kind.ALL_GATHER, tensor, device=self._device)
        async with self._operation(self._collective, timeout_s) as joined:
            copy, limit = as_bytes(_copy(tensor)), timedelta(seconds=timeout_s)
            return await self._blocking(lambda: joined.all_gather(call, copy, limit))

    async def close(self) -> None:
        self._break("this member has left")

    async def _blocking(self, run: Callable[[], T]) -> T:
        return await in_daemon_thread(f"comm-{self._name}", run)

    @asynccontextmanager
    async def _operation(self, turn: asyncio.Lock, timeout_s: float) -> AsyncIterator[Any]:
        """One call's turn; it breaks the group unless it ends well. Yields what was joined."""
        try:
            async with asyncio.timeout(timeout_s), turn:
                if self._broken:
                    raise PeerLost(f"group {self._name!r} is broken: {self._broken}; form another one")
                yield self._joined
        except (RuntimeError, TimeoutError, torch.distributed.DistError) as err:
            why = f"silent for {timeout_s:g} s" if isinstance(err, TimeoutError) else str(err).partition("\n")[0]
            self._break(why)
            raise PeerLost(f"group {self._name!r}: a member was lost: {why}") from err
        except BaseException as err:
            self._break(f"{type(err).__name__} {err}".strip())
            raise

    def _break(self, why: str) -> None:
        """Lets go of the connections: they close, for the others to notice, once no call of ours waits on them."""
        self._broken = self._broken or why
        if self._joined is not None:
            self._joined.abort()
            self._joined = None


class _Joined:
    """What torch has of a group. Its methods block, each wait for `limit` at most; RuntimeError is how torch fails."""

    def __init__(self, store: PrefixStore, rank: int, size: int, host: str, device: str, limit: timedelta) -> None:
        """Waits until all members are there."""
        self._store, self._rank, self._size, self._device = store, rank, size, device
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = limit
        self._gloo: Any = ProcessGroupGloo(PrefixStore("gloo", store), rank, size, options)
        self._payload: Any = self._gloo if device == "cpu" else _nccl("nccl", store, rank, size, limit)
        self._pairs: dict[tuple[int, int], Any] = {}
        self._pair_lock = threading.Lock()

    def send(self, call: Call, payload: torch.Tensor, to: int, limit: timedelta) -> None:
        theirs = torch.empty(CALL_BYTES, dtype=torch.uint8)
        answered = self._gloo.recv([theirs], to, ANSWER)
        self._gloo.send([_encoded(call)], to, CALL).wait(limit)
        answered.wait(limit)
        agreed({self._rank: call, to: Call.decode(theirs.numpy().data)})
        if len(payload):
            group, peer = (self._gloo, to) if self._device == "cpu" else (self._pair(self._rank, to, limit), 1)
            self._wait(group.send([payload], peer, PAYLOAD), payload, limit)

    def recv(self, call: Call, into: torch.Tensor, source: int, limit: timedelta) -> None:
        theirs = torch.empty(CALL_BYTES, dtype=torch.uint8)
        self._gloo.recv([theirs], source, CALL).wait(limit)
        self._gloo.send([_encoded(call)], source, ANSWER).wait(limit)
        agreed({self._rank: call, source: Call.decode(theirs.numpy().data)})
        if len(into):
            group, peer = (self._gloo, source) if self._device == "cpu" else (self._pair(source, self._rank, limit), 0)
            self._wait(group.recv([into], peer, PAYLOAD), into, limit)

    def broadcast(self, call: Call, payload: torch.Tensor, limit: timedelta) -> None:
        self._agree(call, limit)
        if len(payload):
            self._wait(self._payload.broadcast(payload, call.root, limit), payload, limit)

    def all_reduce(self, call: Call, tensor: torch.Tensor, limit: timedelta) -> None:
        self._agree(call, limit)
        options = AllreduceOptions()
        options.reduceOp, options.timeout = OPS[call.op], limit
        if tensor.numel():
            self._wait(self._payload.allreduce([tensor], options), tensor, limit)

    def all_gather(self, call: Call, payload: torch.Tensor, limit: timedelta) -> list[torch.Tensor]:
        calls = self._agree(call, limit)
        parts = [torch.empty(c.shape, dtype=c.dtype, device=payload.device) for c in calls]
        # Of one size, as torch's must be.
        rows = payload.new_empty(self._size, max(part.nbytes for part in parts))
        if rows.numel():
            padded = payload.new_zeros(rows.size(1))
            padded[: len(payload)] = payload
            self._wait(self._payload.allgather([list(rows)], [padded]), rows, limit)
        for part, row in zip(parts, rows, strict=True):
            as_bytes(part).copy_(row[: part.nbytes])
        return parts

    def abort(self) -> None:
        """Gloo's waits cannot be ended, only run out."""
        if self._device != "cpu":
            for group in (self._payload, *self._pairs.values()):
                group.abort()

    def _agree(self, call: Call, limit: timedelta) -> list[Call]:
        """Everybody's call, by rank. Raises LayoutMismatch, on all ranks."""
        rows = torch.empty(self._size, CALL_BYTES, dtype=torch.uint8)
        self._gloo.allgather([list(rows)], [_encoded(call)]).wait(limit)
        calls = [Call.decode(row.numpy().data) for row in rows]
        agreed(dict(enumerate(calls)))
        return calls

    def _pair(self, sender: int, receiver: int, limit: timedelta) -> Any:
        """NCCL knows no tags and runs what it is told in order: each direction between two ranks is a group of its own,
        made when it is first used, in which the sender is rank 0."""
        with self._pair_lock:
            lane = (sender, receiver)
            if lane not in self._pairs:
                self._pairs[lane] = _nccl(f"pair/{sender}/{receiver}", self._store, lane.index(self._rank), 2, limit)
            return self._pairs[lane]

    @staticmethod
    def _wait(work: Any, tensor: torch.Tensor, limit: timedelta) -> None:
        work.wait(limit)
        if tensor.is_cuda:
            # NCCL's wait is one of the stream's, not of the host's.
            torch.cuda.current_stream(tensor.device).synchronize()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _nccl(name: str, store: PrefixStore, rank: int, size: int, limit: timedelta) -> Any:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = limit
    return ProcessGroupNCCL(PrefixStore(name, store), rank, size, options)


def _encoded(call: Call) -> torch.Tensor:
    return torch.frombuffer(bytearray(call.encode()), dtype=torch.uint8)
