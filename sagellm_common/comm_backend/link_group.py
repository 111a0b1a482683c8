"""Groups over links of bytes between each two members (tcp, mock): the collectives, step by step.

call ──► everybody's call to everybody ──► all agree? ──► payload
                                no: LayoutMismatch on all ─┘
"""

from __future__ import annotations

import asyncio
import enum
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import torch

from sagellm_common.comm_backend.protocol import ReduceOp
from sagellm_common.comm_backend.tensor_calls import CALL_BYTES, Call, Kind, agreed, as_bytes, check_rank
from sagellm_common.core.errors import LayoutMismatch, PeerLost

Lane = tuple["Stream", int]


class Stream(enum.IntEnum):
    """Between each two ranks there is one of each in either direction, with an order of its own."""

    COLLECTIVE = 0
    MESSAGE = 1
    ANSWER = 2
    """To a MESSAGE of the other direction: what its receiver waits for."""


class Links(Protocol):
    """Ordered messages to and from each other rank. Raises OSError or EOFError when a peer is lost."""

    async def send(self, stream: Stream, to: int, payload: memoryview) -> None: ...

    async def recv_into(self, stream: Stream, source: int, payload: memoryview) -> None:
        """The next message, of just this size. Raises PeerLost for another size, KvCorrupt for other bytes."""

    def close(self) -> None:
        """Ends the waits of both sides. Idempotent."""


class LinkGroup:
    """A `CommGroup`."""

    def __init__(self, name: str, links: Links, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._name = name
        self._links = links
        self._broken = ""
        self._collective = asyncio.Lock()
        self._lanes: defaultdict[Lane, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def join(self, timeout_s: float) -> None:
        """Returns once all members are there."""
        async with self._operation(self._collective, timeout_s):
            for stream in Stream:  # connects all of them: the end of each tells that the peer has gone
                await self._agree(Call(Kind.JOIN, torch.uint8, (self.size,)), stream)

    async def send(self, tensor: torch.Tensor, to: int, *, timeout_s: float) -> None:
        check_rank("to", to, self.size, but=self.rank)
        ours = Call.of(Kind.MESSAGE, tensor)
        async with self._operation(self._lanes[Stream.MESSAGE, to], timeout_s):
            await self._links.send(Stream.MESSAGE, to, memoryview(ours.encode()))
            agreed({self.rank: ours, to: await self._call_of(to, Stream.ANSWER)})
            await self._send(Stream.MESSAGE, to, tensor.contiguous())

    async def recv(self, into: torch.Tensor, source: int, *, timeout_s: float) -> None:
        check_rank("source", source, self.size, but=self.rank)
        ours = Call.of(Kind.MESSAGE, into)
        async with self._operation(self._lanes[Stream.ANSWER, source], timeout_s):
            theirs = await self._call_of(source, Stream.MESSAGE)
            await self._links.send(Stream.ANSWER, source, memoryview(ours.encode()))
            agreed({self.rank: ours, source: theirs})
            await self._recv(Stream.MESSAGE, source, into)

    async def broadcast(self, tensor: torch.Tensor, root: int, *, timeout_s: float) -> None:
        check_rank("root", root, self.size)
        async with self._operation(self._collective, timeout_s):
            await self._agree(Call.of(Kind.BROADCAST, tensor, root=root))
            await self._broadcast(tensor, root)

    async def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = ReduceOp.SUM, *, timeout_s: float) -> None:
        call = Call.of(Kind.ALL_REDUCE, tensor, op)
        async with self._operation(self._collective, timeout_s):
            await self._agree(call)
            whole = tensor.contiguous()
            await self._reduce(list(whole.reshape(-1).tensor_split(self.size)), op)
            if whole is not tensor:
                tensor.copy_(whole)

    async def all_gather(self, tensor: torch.Tensor, *, timeout_s: float) -> list[torch.Tensor]:
        call = Call.of(Kind.ALL_GATHER, tensor)
        async with self._operation(self._collective, timeout_s):
            calls = await self._agree(call)
            parts = [torch.empty(c.shape, dtype=c.dtype) for c in calls]
            parts[self.rank].copy_(tensor)
            await self._rotate(parts)
            return parts

    async def close(self) -> None:
        self._break("this member has left")

    # ---- how ----

    async def _broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Down a binomial tree: in step k the 2^k ranks that have it send it on."""
        distance = (self.rank - root) % self.size
        step = 1
        while step < self.size:
            if distance < step and distance + step < self.size:
                await self._send(Stream.COLLECTIVE, (self.rank + step) % self.size, tensor.contiguous())
            elif step <= distance < 2 * step:
                await self._recv(Stream.COLLECTIVE, (self.rank - step) % self.size, tensor)
            step *= 2

    async def _reduce(self, parts: list[torch.Tensor], op: ReduceOp) -> None:
        """Around the ring: each part is reduced on its way, by one rank after the other, and then goes round whole."""
        n, right, left = self.size, (self.rank + 1) % self.size, (self.rank - 1) % self.size
        for step in range(n - 1):
            mine = parts[(self.rank - step - 1) % n]
            theirs = torch.empty_like(mine)
            await self._exchange(right, parts[(self.rank - step) % n], left, theirs)
            _reduce_into(mine, theirs, op)
        await self._rotate(parts, first=self.rank + 1)

    async def _rotate(self, parts: list[torch.Tensor], first: int | None = None) -> None:
        """Around the ring, once: this rank has part number `first` (its own), and gets all others."""
        n, right, left = self.size, (self.rank + 1) % self.size, (self.rank - 1) % self.size
        at = self.rank if first is None else first
        for step in range(n - 1):
            await self._exchange(right, parts[(at - step) % n], left, parts[(at - step - 1) % n])

    async def _exchange(self, to: int, tensor: torch.Tensor, source: int, into: torch.Tensor) -> None:
        async with asyncio.TaskGroup() as both:
            both.create_task(self._send(Stream.COLLECTIVE, to, tensor))
            both.create_task(self._recv(Stream.COLLECTIVE, source, into))

    async def _agree(self, call: Call, stream: Stream = Stream.COLLECTIVE) -> list[Call]:
        """Everybody's call, by rank. Raises LayoutMismatch, on all ranks."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        async with asyncio.TaskGroup() as group:
            for rank in others:
                group.create_task(self._links.send(stream, rank, memoryview(call.encode())))
            theirs = [group.create_task(self._call_of(rank, stream)) for rank in others]
        calls = [task.result() for task in theirs]
        calls.insert(self.rank, call)
        agreed(dict(enumerate(calls)))
        return calls

    async def _call_of(self, rank: int, stream: Stream) -> Call:
        encoded = bytearray(CALL_BYTES)
        await self._links.recv_into(stream, rank, memoryview(encoded))
        return Call.decode(encoded)

    async def _send(self, stream: Stream, to: int, tensor: torch.Tensor) -> None:
        await self._links.send(stream, to, _view(tensor))

    async def _recv(self, stream: Stream, source: int, into: torch.Tensor) -> None:
        whole = into if into.is_contiguous() else torch.empty_like(into, memory_format=torch.contiguous_format)
        await self._links.recv_into(stream, source, _view(whole))
        if whole is not into:
            into.copy_(whole)

    @asynccontextmanager
    async def _operation(self, turn: asyncio.Lock, timeout_s: float) -> AsyncIterator[None]:
        """One call's turn; it breaks the group unless it ends well."""
        try:
            async with asyncio.timeout(timeout_s), turn:
                if self._broken:
                    raise PeerLost(f"group {self._name!r} is broken: {self._broken}; form another one")
                yield
        except BaseException as err:
            reason = _reason(err)
            self._break(f"{type(reason).__name__} {reason}".strip())
            if isinstance(reason, TimeoutError):
                raise PeerLost(f"group {self._name!r}: a member was silent for {timeout_s:g} s") from err
            if isinstance(reason, (OSError, EOFError)):
                raise PeerLost(f"group {self._name!r}: a member was lost: {reason or 'it has left'}") from err
            if reason is not err:
                raise reason from None
            raise

    def _break(self, why: str) -> None:
        self._broken = self._broken or why
        self._links.close()


def _reason(err: BaseException) -> BaseException:
    """What a TaskGroup's tasks failed with: rather that payloads do not fit than that a member went away over it."""
    if not isinstance(err, BaseExceptionGroup):
        return err
    reasons = [_reason(one) for one in err.exceptions]
    return min(reasons, key=lambda one: not isinstance(one, LayoutMismatch))


def _reduce_into(tensor: torch.Tensor, other: torch.Tensor, op: ReduceOp) -> None:
    match op:
        case ReduceOp.SUM:
            tensor.add_(other)
        case ReduceOp.MAX:
            torch.maximum(tensor, other, out=tensor)
        case ReduceOp.MIN:
            torch.minimum(tensor, other, out=tensor)


def _view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor of the host."""
    return as_bytes(tensor).numpy().data
