"""Links with contention: each worker's network card is shared fairly by the transfers through it, each way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from bench.sim.clock import VirtualClock


@dataclass(slots=True, eq=False)
class _Transfer:
    source: str
    target: str
    left_bytes: float
    on_done: Callable[[], None]
    rate: float = 0.0
    since_s: float = 0.0
    plan: int = 0


class Network:
    """A transfer gets the smaller of its shares at the sender and at the receiver; what it leaves is not given on."""

    def __init__(self, clock: VirtualClock, bytes_per_s: float, latency_s: float) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._sending: dict[str, dict[_Transfer, None]] = defaultdict(dict)
        self._receiving: dict[str, dict[_Transfer, None]] = defaultdict(dict)
        self.bytes = 0.0

    def send(self, source: str, target: str, num_bytes: float, on_done: Callable[[], None]) -> None:
        self.bytes += num_bytes
        transfer = _Transfer(source, target, num_bytes, on_done)
        self._clock.at(self._clock.now_s + self._latency_s, lambda: self._begin(transfer))

    def _begin(self, transfer: _Transfer) -> None:
        transfer.since_s = self._clock.now_s
        self._sending[transfer.source][transfer] = None
        self._receiving[transfer.target][transfer] = None
        self._share(transfer)

    def _end(self, transfer: _Transfer, plan: int) -> None:
        if plan != transfer.plan:
            return
        del self._sending[transfer.source][transfer]
        del self._receiving[transfer.target][transfer]
        self._share(transfer)
        transfer.on_done()

    def _share(self, changed: _Transfer) -> None:
        """New rates for all transfers at both ends of one that came or went."""
        now_s = self._clock.now_s
        for transfer in {**self._sending[changed.source], **self._receiving[changed.target]}:
            transfer.left_bytes -= transfer.rate * (now_s - transfer.since_s)
            crowd = max(len(self._sending[transfer.source]), len(self._receiving[transfer.target]))
            transfer.rate, transfer.since_s = self._bytes_per_s / crowd, now_s
            transfer.plan += 1
            self._plan(transfer, transfer.plan)

    def _plan(self, transfer: _Transfer, plan: int) -> None:
        ends_s = self._clock.now_s + max(0.0, transfer.left_bytes) / transfer.rate
        self._clock.at(ends_s, lambda: self._end(transfer, plan))
