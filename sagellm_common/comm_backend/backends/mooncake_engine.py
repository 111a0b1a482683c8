"""Mooncake's Transfer Engine, reduced to what a receiver needs: reads into memory that nothing else uses.

A read cannot be called back: what a stopped peer sends when it goes on is still written where the read was told to.
So reads go into staging slots, never into KV memory, and a slot whose reads have not all ended is kept aside until the
engine says that they have.

    free ──► read into ──► given back ──► free                 all of its reads have ended
                                └───────► kept aside ──► free   once they have

Engines are never destroyed: their destructor holds the interpreter lock for up to a second. A channel that is closed
leaves its engine to the next one of the process.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sagellm_common.core.errors import ConfigError, KvExhausted, PeerLost

log = logging.getLogger(__name__)

SLOT_BYTES = 4 << 20
MAX_SLOTS = 128
"""Slots of one engine at most: two for each pull, and those kept aside."""
MAX_READS = 512
"""Reads of one call. An engine queues 1024 for a peer and fails what waits there for more than a second."""
POLL_S = 0.0002
SUBMIT_POLL_S = 0.02
METADATA = "P2PHANDSHAKE"
"""Engines ask each other where their memory is; no metadata server."""

_idle: list[Engine] = []
_idle_lock = threading.Lock()


class Stop(Protocol):
    """Tells that nobody wants to read any more: a `threading.Event`, or what is like one."""

    def is_set(self) -> bool: ...

    def wait(self, timeout_s: float) -> bool:
        """Whether it is set, at the latest after so long."""


@dataclass(slots=True, eq=False)
class Slot:
    """Registered memory of the engine's own, and the reads into it that may still go on."""

    memory: memoryview
    address: int
    pending: deque[int] = field(default_factory=deque)
    submitting: _Submitting | None = None
    """While the engine is still being told of some of them."""


class _Submitting:
    """An engine is told of reads, on a thread that may be left behind: of a peer that has stopped it wants to hear
    first, for longer than anybody waits."""

    def __init__(self, submit: Callable[[Stop], None]) -> None:
        self.done = threading.Event()
        self.given_up = threading.Event()
        self.error: BaseException | None = None
        self._submit = submit
        threading.Thread(target=self._run, name="kv-mooncake-submit", daemon=True).start()

    def _run(self) -> None:
        try:
            self._submit(self.given_up)
        except BaseException as err:  # noqa: BLE001  # handed to whoever waits
            self.error = err
        finally:
            self.done.set()


class Engine:
    """One engine of this process, serving what is registered and reading from others. Thread-safe."""

    def __init__(self, protocol: str, host: str) -> None:
        self.protocol, self.host = protocol, host
        self._engine = _started(protocol, host)
        self.session = f"{host}:{self._engine.get_rpc_port()}"
        """What other engines call it."""
        self._lock = threading.Lock()
        self._free: dict[int, list[Slot]] = {}
        self._aside: list[Slot] = []
        self._num_slots = 0
        self._turns: dict[str, threading.Lock] = {}

    def serve(self, address: int, num_bytes: int) -> None:
        """Lets peers read this memory, until `unserve`. Raises ConfigError."""
        if self._engine.register_memory(address, num_bytes):
            raise ConfigError(
                f"transport.backend: Mooncake could not register {num_bytes} bytes of KV over {self.protocol}; "
                "raise the limit of locked memory (ulimit -l)"
            )

    def unserve(self, address: int) -> None:
        self._engine.unregister_memory(address)

    @contextlib.contextmanager
    def slots(self, num_bytes: int) -> Iterator[tuple[Slot, Slot]]:
        """Two slots of at least num_bytes each, to be read into in turns. Raises KvExhausted."""
        size = max(SLOT_BYTES, -(-num_bytes // SLOT_BYTES) * SLOT_BYTES)
        one = self._take(size)
        try:
            two = self._take(size)
            try:
                yield one, two
            finally:
                self._give_back(two)
        finally:
            self._give_back(one)

    def _take(self, size: int) -> Slot:
        with self._lock:
            self._reclaim()
            if free := self._free.get(size):
                return free.pop()
            if self._num_slots >= MAX_SLOTS:
                raise KvExhausted(
                    f"all {MAX_SLOTS} staging slots of this worker are in use, {len(self._aside)} of them by reads "
                    "from peers that have stopped",
                    retry_after_s=1.0,
                )
            self._num_slots += 1
        memory = memoryview(mmap.mmap(-1, size))
        slot = Slot(memory, address_of(memory))
        self.serve(slot.address, size)
        return slot

    def _give_back(self, slot: Slot) -> None:
        with self._lock:
            self._aside.append(slot)
            self._reclaim()

    @contextlib.contextmanager
    def reading(
        self, peer: str, reads: Sequence[tuple[int, int]], slot: Slot, deadline_s: float, stop: Stop
    ) -> Iterator[None]:
        """Reads the peer's memory into the slot from its start, `reads` being (address, bytes), while the block runs.

        Entering submits, leaving waits. Raises PeerLost, and TimeoutError at `deadline_s` (monotonic) or soon after
        `stop` is set.
        """
        with self._turn(peer, deadline_s, stop):
            slot.submitting = told = _Submitting(lambda given_up: self._submit(peer, reads, slot, deadline_s, given_up))
            try:
                yield
                while not told.done.wait(SUBMIT_POLL_S):
                    if stop.is_set() or time.monotonic() >= deadline_s:
                        raise TimeoutError(f"Mooncake engine {peer} takes no reads")
                if told.error is not None:
                    raise told.error
                self._settle(peer, slot, 0, deadline_s, stop)
            finally:
                told.given_up.set()

    def _submit(self, peer: str, reads: Sequence[tuple[int, int]], slot: Slot, deadline_s: float, stop: Stop) -> None:
        at = slot.address
        for address, num_bytes in reads:
            self._settle(peer, slot, MAX_READS - 1, deadline_s, stop)
            # One by one: the status of a batch tells that one of its reads failed, not whether the others go on.
            batch = self._engine.batch_transfer_async_read(peer, [at], [address], [num_bytes])
            if not batch:
                raise PeerLost(f"Mooncake engine {peer} cannot be read from")
            slot.pending.append(batch)
            at += num_bytes

    def _settle(self, peer: str, slot: Slot, most: int, deadline_s: float, stop: Stop) -> None:
        """Until no more than `most` reads into the slot go on."""
        while len(slot.pending) > most:
            ended = self._advance(slot)
            if ended is False:
                raise PeerLost(f"Mooncake could not read from engine {peer}")
            if ended is None and (stop.wait(POLL_S) or time.monotonic() >= deadline_s):
                raise TimeoutError(f"Mooncake engine {peer} sends no bytes")

    @contextlib.contextmanager
    def _turn(self, peer: str, deadline_s: float, stop: Stop) -> Iterator[None]:
        """One call at a time for a peer, so that its queue is never full."""
        with self._lock:
            turn = self._turns.setdefault(peer, threading.Lock())
        while not turn.acquire(timeout=0.05):
            if stop.is_set() or time.monotonic() >= deadline_s:
                raise TimeoutError(f"Mooncake engine {peer} is busy")
        try:
            yield
        finally:
            turn.release()

    def _advance(self, slot: Slot) -> bool | None:
        """Whether the slot's next read has brought its bytes; None: it goes on."""
        status = self._engine.transfer_check_status(slot.pending[0])
        if status in (0, -2):  # waiting, or for longer than the engine likes
            return None
        slot.pending.popleft()
        return bool(status == 1)

    def _reclaim(self) -> None:
        """Frees slots whose reads have ended. The lock is held."""
        for slot in list(self._aside):
            if slot.submitting is not None and not slot.submitting.done.is_set():
                continue
            while slot.pending and self._advance(slot) is not None:
                pass
            if not slot.pending:
                self._aside.remove(slot)
                self._free.setdefault(len(slot.memory), []).append(slot)


def address_of(memory: memoryview) -> int:
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)


def acquire(protocol: str, host: str) -> Engine:
    """An engine for one channel, which `release`s it. Raises ConfigError."""
    with _idle_lock:
        for engine in _idle:
            if (engine.protocol, engine.host) == (protocol, host):
                _idle.remove(engine)
                return engine
    return Engine(protocol, host)


def release(engine: Engine) -> None:
    with _idle_lock:
        _idle.append(engine)


def _started(protocol: str, host: str) -> Any:
    """Raises ConfigError where the wheel or a library of the system's is missing."""
    # All that the engine does not take as an argument.
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    if protocol == "tcp":
        os.environ["MC_FORCE_TCP"] = "1"  # or it prefers whatever it finds
    try:
        from mooncake.engine import TransferEngine
    except ModuleNotFoundError as err:
        raise ConfigError(
            f"transport.backend: Mooncake's Transfer Engine is not installed ({err}); `make setup` installs it"
        ) from err
    except ImportError as err:
        raise ConfigError(
            f"transport.backend: Mooncake's Transfer Engine cannot be loaded ({err}); `make system-deps` installs the "
            "libraries it needs"
        ) from err
    engine = TransferEngine()
    # It listens on all interfaces, whatever host it is given, and its MC_TCP_BIND_ADDRESS changes nothing (0.3.13).
    log.warning("Mooncake's engine serves KV memory on every interface of this host: for trusted networks only")
    if engine.initialize(host, METADATA, protocol, ""):
        raise ConfigError(f"transport.backend: Mooncake's Transfer Engine does not start on {host} over {protocol}")
    return engine
