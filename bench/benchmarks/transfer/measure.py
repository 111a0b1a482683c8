"""Interleaved rounds: whatever slows the machine down slows all contestants down."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.benchmarks.transfer.blocks import Contestant, MemoryCopy, Pool
from bench.benchmarks.transfer.pair import BytePath, Pair, a_pair
from sagellm_common.comm_backend.protocol import Pull
from sagellm_common.core.errors import SageError

KIB, MIB = 1 << 10, 1 << 20
ACK_BLOCK_BYTES = 16 * KIB
ACK_TURN = 25
FIRST_BYTE_ROUNDS = 5
FAILING = ("shm", "tcp", "gloo", "mooncake")
FAILING_BYTES, FAILS_AFTER_S, STOPPED_S = 256 * MIB, 0.005, 0.5
"""Moving so much takes longer than until something happens to the source. On one host the latter is told late: a system
closes a killed process's sockets when it has taken its memory back."""
WATCH_S = 20e-6
MIN_POOL_BYTES = 256 * MIB
"""More than caches hold."""


@dataclass(frozen=True, slots=True)
class Preset:
    payload_bytes: tuple[int, ...]
    block_bytes: tuple[int, ...]
    budget_bytes: int
    """Moved by one contestant in one cell, about: so many rounds as that takes, within MIN_ROUNDS..MAX_ROUNDS."""
    ack_rounds: int
    fail_rounds: int

    def rounds(self, payload_bytes: int) -> int:
        return max(MIN_ROUNDS, min(MAX_ROUNDS, self.budget_bytes // payload_bytes))


MIN_ROUNDS, MAX_ROUNDS = 3, 15
QUICK = Preset((1 * MIB, 16 * MIB, 128 * MIB), (16 * KIB, 256 * KIB), 384 * MIB, 100, 1)
FULL = Preset(
    (1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB, 128 * MIB, 512 * MIB),
    (16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB),
    1024 * MIB,
    500,
    5,
)


@dataclass(slots=True)
class Samples:
    """Of one contestant in one cell, a value per round; the same round of others has the same place."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """Of both processes together."""
    first_byte_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Measured:
    cells: dict[tuple[int, int], dict[str, Samples]] = field(default_factory=dict)
    """(payload bytes, block bytes) → contestant → samples"""
    ack_s: dict[str, list[float]] = field(default_factory=dict)
    """One block of ACK_BLOCK_BYTES, asked for and here."""
    dead_s: dict[str, list[float]] = field(default_factory=dict)
    """From the SIGKILL of a source in the middle of a pull until the receiver knows."""
    late_s: dict[str, list[float]] = field(default_factory=dict)
    """How long after its deadline a pull from a stopped source ended."""
    missing: dict[str, str] = field(default_factory=dict)
    """Contestant → why it did not take part, or left."""


async def measure(backends: Sequence[str], preset: Preset, progress: Callable[[str], None]) -> Measured:
    found, pool_bytes = Measured(), max(MIN_POOL_BYTES, 2 * max(preset.payload_bytes))
    for block_bytes in preset.block_bytes:
        pool = Pool(pool_bytes // block_bytes, block_bytes)
        async with a_pair(pool, backends) as pair:
            found.missing |= pair.missing
            if block_bytes == ACK_BLOCK_BYTES:
                progress(f"one block of {ACK_BLOCK_BYTES // KIB} KiB, to the ack")
                found.ack_s = await _acks(pair, pool, preset.ack_rounds, found)
            for payload_bytes in preset.payload_bytes:
                if payload_bytes >= block_bytes:
                    progress(f"{payload_bytes // MIB} MiB in blocks of {block_bytes // KIB} KiB")
                    rounds = preset.rounds(payload_bytes)
                    cell = await _cell(pair, pool, payload_bytes // block_bytes, rounds, found)
                    found.cells[payload_bytes, block_bytes] = cell
    if failing := [name for name in backends if name in FAILING]:
        progress("a source that stops, one that dies")
        await _peers_that_fail(failing, preset.fail_rounds, found)
    return found


async def _cell(pair: Pair, pool: Pool, count: int, rounds: int, found: Measured) -> dict[str, Samples]:
    samples = {contestant.name: Samples() for contestant in pair.contestants}
    rng = np.random.default_rng(count)
    for contestant in list(pair.contestants):
        await _checked(pair, contestant, pool, count, rng, found)
    for turn in range(rounds):
        for contestant in _turned(pair.contestants, turn):
            mine = samples[contestant.name]
            chosen = pool.pick(rng, count), pool.pick(rng, count)
            ours_s, theirs_s, began_s = time.process_time(), pair.source_cpu_s(), time.perf_counter()
            await contestant.pull(*chosen)
            mine.seconds.append(time.perf_counter() - began_s)
            mine.cpu_s.append(time.process_time() - ours_s + pair.source_cpu_s() - theirs_s)
    for turn in range(FIRST_BYTE_ROUNDS):
        # A copy within this process keeps the watcher out, and has no first byte to wait for.
        for contestant in _turned([c for c in pair.contestants if not isinstance(c, MemoryCopy)], turn):
            samples[contestant.name].first_byte_s.append(await _first_byte(pair, contestant, pool, count, rng))
    return {c.name: samples[c.name] for c in pair.contestants}


async def _checked(
    pair: Pair, contestant: Contestant, pool: Pool, count: int, rng: np.random.Generator, found: Measured
) -> None:
    """The warm-up. Who fails or brings wrong bytes is out, with the reason."""
    source_blocks, target_blocks = pool.pick(rng, count), pool.pick(rng, count)
    shape = pool.num_blocks, pool.block_bytes
    here, there = (np.frombuffer(region.view, np.uint8).reshape(shape) for region in (pair.region, pair.reference))
    here[target_blocks] = 0
    try:
        await contestant.pull(source_blocks, target_blocks)
        wrong = sum(not np.array_equal(here[t], there[s]) for s, t in zip(source_blocks, target_blocks, strict=True))
        if not wrong:
            return
        reason = f"brought {wrong} of {count} blocks wrong"
    except (SageError, RuntimeError, OSError) as err:
        reason = str(err)
    found.missing[contestant.name] = f"{reason} ({count} blocks of {pool.block_bytes} bytes)"
    pair.contestants.remove(contestant)


async def _first_byte(pair: Pair, contestant: Contestant, pool: Pool, count: int, rng: np.random.Generator) -> float:
    """Seconds until the first target block begins to change, seen within WATCH_S and what the system makes of it.

    From a thread that sleeps: one that spins would keep the interpreter from the threads that pull.
    """
    source_blocks, target_blocks = pool.pick(rng, count), pool.pick(rng, count)
    at = int(target_blocks[0]) * pool.block_bytes
    head = np.frombuffer(pair.region.view, np.uint8)[at : at + 64]
    head[:] = 0
    done = threading.Event()

    def watch() -> float:
        while not head.any() and not done.is_set():
            time.sleep(WATCH_S)
        return time.perf_counter()

    watching = asyncio.ensure_future(asyncio.to_thread(watch))
    await asyncio.sleep(0.001)  # it watches
    began_s = time.perf_counter()
    try:
        await contestant.pull(source_blocks, target_blocks)
    finally:
        done.set()
        seen_s = await watching
    return seen_s - began_s


async def _acks(pair: Pair, pool: Pool, rounds: int, found: Measured) -> dict[str, list[float]]:
    """In turns of ACK_TURN pulls, as a worker in use has its own code in the processor's caches, not everybody's."""
    rng = np.random.default_rng(0)
    for contestant in list(pair.contestants):
        await _checked(pair, contestant, pool, 1, rng, found)
    contestants = [*pair.contestants, *pair.floor]
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for turn, done in enumerate(range(0, rounds, ACK_TURN)):
        for contestant in _turned(contestants, turn):
            chosen = [(pool.pick(rng, 1), pool.pick(rng, 1)) for _ in range(min(ACK_TURN, rounds - done))]
            for source_blocks, target_blocks in chosen:
                began_s = time.perf_counter()
                await contestant.pull(source_blocks, target_blocks)
                seconds[contestant.name].append(time.perf_counter() - began_s)
    return seconds


async def _peers_that_fail(backends: Sequence[str], rounds: int, found: Measured) -> None:
    """Pulls over these byte paths at a time, from a source that is stopped, goes on, and is killed."""
    pool = Pool(FAILING_BYTES // ACK_BLOCK_BYTES, ACK_BLOCK_BYTES)
    for turn in range(rounds):
        async with a_pair(pool, backends, plain=False) as pair:
            rng = np.random.default_rng(turn)
            paths = [path for path in pair.contestants if isinstance(path, BytePath) and path.name in backends]
            for path in paths:
                await path.pull(pool.pick(rng, 1), pool.pick(rng, 1))  # connects

            async def ended_s(path: BytePath, timeout_s: float) -> float:
                """When, but for one that was through before anything happened."""
                every = np.arange(pool.num_blocks, dtype=np.int32)
                try:
                    await path.channel.pull(Pull(path.source, every, every, timeout_s=timeout_s))
                except SageError:
                    return time.perf_counter()
                return 0.0

            for number, timeout_s, into in (
                (signal.SIGSTOP, STOPPED_S, found.late_s),
                (signal.SIGKILL, 60.0, found.dead_s),
            ):
                began_s = time.perf_counter()
                pulls = [asyncio.ensure_future(ended_s(path, timeout_s)) for path in paths]
                await asyncio.sleep(FAILS_AFTER_S)
                pair.signal_source(number)
                expected_s = began_s + timeout_s if number == signal.SIGSTOP else time.perf_counter()
                for path, at_s in zip(paths, await asyncio.gather(*pulls), strict=True):
                    if at_s:
                        into.setdefault(path.name, []).append(at_s - expected_s)
                pair.signal_source(signal.SIGCONT)


def _turned(contestants: Sequence[Contestant], turn: int) -> list[Contestant]:
    """Each round another one begins."""
    at = turn % len(contestants)
    return [*contestants[at:], *contestants[:at]]
