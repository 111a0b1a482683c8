"""Groups within one process, over links that go wrong on request."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sagellm_common.comm_backend.link_frames import HEAD_BYTES, check_head, check_payload, encode_head
from sagellm_common.comm_backend.link_group import LinkGroup, Stream
from sagellm_common.comm_backend.tensor_calls import rank_of

Link = tuple[str, Stream, int, int]
"""(group, stream, sender's rank, receiver's rank)"""


@dataclass(frozen=True, slots=True)
class LinkFaults:
    """How probable it is, for each message sent, that it is lost, sent twice, overtaken by the next one, changed in one
    byte; and how long it takes, at most. All drawn from `seed`."""

    seed: int = 0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    max_delay_s: float = 0.0


class MockNet:
    """Who can reach whom, and what is on its way. Faults begin when `faults` is set."""

    def __init__(self) -> None:
        self.members: dict[str, MockComm] = {}
        self._faults = LinkFaults()
        self._random = random.Random(0)
        self._links: defaultdict[Link, asyncio.Queue[bytes]] = defaultdict(asyncio.Queue)
        self._held: dict[Link, bytes] = {}

    def go_wrong(self, faults: LinkFaults) -> None:
        """From now on."""
        self._faults, self._random = faults, random.Random(faults.seed)

    async def carry(self, link: Link, message: bytes) -> None:
        faults, chance = self._faults, self._random.random
        if faults.max_delay_s:
            await asyncio.sleep(chance() * faults.max_delay_s)
        if chance() < faults.loss:
            return
        if chance() < faults.corrupt:
            changed = bytearray(message)
            # After the head: a changed head is a lost message, of which there is a fault of its own.
            at = HEAD_BYTES + self._random.randrange(max(1, len(message) - HEAD_BYTES))
            changed[min(at, len(message) - 1)] ^= 0xFF
            message = bytes(changed)
        if link not in self._held and chance() < faults.reorder:
            self._held[link] = message
            return
        self._links[link].put_nowait(message)
        if chance() < faults.duplicate:
            self._links[link].put_nowait(message)
        if (held := self._held.pop(link, None)) is not None:
            self._links[link].put_nowait(held)

    async def next(self, link: Link) -> bytes:
        """Raises EOFError once the sender has left."""
        queue = self._links[link]
        message = await queue.get()
        if not message:
            queue.put_nowait(message)
            raise EOFError
        return message

    def leave(self, group: str, rank: int, size: int) -> None:
        """Ends what this member sends, and its own waits."""
        for stream in Stream:
            for other in range(size):
                self._links[group, stream, rank, other].put_nowait(b"")
                self._links[group, stream, other, rank].put_nowait(b"")


class MockComm:
    """A `CommBackendProtocol` between all ends of one `MockNet`."""

    name = "mock"

    def __init__(self, net: MockNet) -> None:
        self.address = ""
        self._net = net
        self._groups: list[LinkGroup] = []

    async def start(self) -> str:
        self.address = f"mock:{len(self._net.members)}"
        self._net.members[self.address] = self
        return self.address

    async def join(self, group: str, members: Sequence[str], *, timeout_s: float) -> LinkGroup:
        rank = rank_of(self.address, members)
        formed = LinkGroup(group, MockLinks(self._net, group, members, rank), rank, len(members))
        self._groups.append(formed)
        await formed.join(timeout_s)
        return formed

    async def close(self) -> None:
        self._net.members.pop(self.address, None)
        for group in self._groups:
            await group.close()


class MockLinks:
    """The `Links` of one member."""

    def __init__(self, net: MockNet, group: str, members: Sequence[str], rank: int) -> None:
        self._net = net
        self._group = group
        self._members = members
        self._rank = rank
        self._sent: defaultdict[tuple[Stream, int], int] = defaultdict(int)
        self._received: defaultdict[tuple[Stream, int], int] = defaultdict(int)
        self._closed = False

    async def send(self, stream: Stream, to: int, payload: memoryview) -> None:
        if self._closed or self._members[to] not in self._net.members:
            raise ConnectionRefusedError(f"nobody is at {self._members[to]}")
        head = encode_head(self._sent[stream, to], payload)
        self._sent[stream, to] += 1
        await self._net.carry((self._group, stream, self._rank, to), head + payload)

    async def recv_into(self, stream: Stream, source: int, payload: memoryview) -> None:
        message = await self._net.next((self._group, stream, source, self._rank))
        number = self._received[stream, source]
        self._received[stream, source] += 1
        digest = check_head(message[:HEAD_BYTES], number, len(payload))
        payload[:] = message[HEAD_BYTES:]
        check_payload(payload, digest)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._net.leave(self._group, self._rank, len(self._members))
