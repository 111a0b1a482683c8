"""`python -m bench.tiers`: how fast KV blocks move between tiers, beside what memory and disk give in the same run.

Rounds are interleaved: reference, tier, reference, tier, … A ratio is the median of the rounds'.

    memory   one copy of as many bytes within the process (numpy), against migrations between two host tiers
    disk     pwrite and pread of as many bytes, in pieces of 1 MiB by as many threads, against migrations between a host
             tier and a file tier: past the system's cache (O_DIRECT), which is what the disk gives; and through it,
             which is another copy in memory, to which the digest of every byte adds: no target there
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sagellm_common.core import shared_memory
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.types import KvLayout
from sagellm_common.kv_runtime.backends.file_directory import TierDirectory
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.backends.host_tier import HostTier
from sagellm_common.kv_runtime.migrator import KVMigrator, MigrationPlan
from sagellm_common.kv_runtime.tiers import BlockKey, keys_of
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash

TARGET = 0.8
BLOCK_TOKENS = 16
SEQUENCE_BLOCKS = 512
PIECE_BYTES = 1 << 20
THREADS = 4
WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Row:
    """GB/s, medians over the rounds; `ratio` is that of moved ÷ reference of each round."""

    what: str
    block_bytes: int
    reference: str
    reference_gb_per_s: float
    moved_gb_per_s: float
    ratio: float
    target: float | None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.tiers", description=__doc__.split("\n")[0])
    parser.add_argument("--mib", type=int, default=256, help="of KV moved in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", default="16,256,720", help="sizes of blocks in KiB")
    parser.add_argument("--path", type=Path, help="directory on the disk to measure; default: the temporary one")
    parser.add_argument("--json", type=Path, default=Path("bench/results/tiers.json"))
    args = parser.parse_args(argv)
    rows = []
    for kib in map(int, args.blocks.split(",")):
        rows += measure(kib << 10, args.mib << 20, args.rounds, args.path)
    args.json.write_text(json.dumps(document(rows, args), indent=1) + "\n")
    args.json.with_suffix(".md").write_text(table(rows, args))
    print(table(rows, args))
    return 0


def measure(block_bytes: int, num_bytes: int, rounds: int, path: Path | None) -> list[Row]:
    count = num_bytes // block_bytes
    layout = KvLayout("bench", "float32", BLOCK_TOKENS, 1, 1, 1, block_bytes)
    keys = some_keys(layout, count)
    rows = [memory(layout, keys, rounds)]
    for direct in (False, True):
        with tempfile.TemporaryDirectory(prefix="sagellm-bench-", dir=path) as scratch:
            rows += disk(layout, keys, rounds, Path(scratch), direct)
    return rows


def memory(layout: KvLayout, keys: list[BlockKey], rounds: int) -> Row:
    source, target = host(layout, len(keys)), host(layout, len(keys))
    fill(source, keys)
    fill(target, keys)  # the system has handed out the memory
    a, b = np.zeros(size(layout, keys), np.uint8), np.zeros(size(layout, keys), np.uint8)
    a[:], b[:] = 1, 2
    reference, moved = [], []
    migrator = KVMigrator([source, target], threads=THREADS)
    for _ in range(rounds):
        reference.append(seconds(lambda: in_threads(THREADS, len(a), lambda part: np.copyto(b[part], a[part]))))
        target.remove(target.hashes())
        moved.append(seconds(lambda: migrate(migrator, keys, 0, 1)))
    migrator.close()
    return row("memory to memory", layout, keys, f"copy in memory, {THREADS} threads", reference, moved)


def disk(layout: KvLayout, keys: list[BlockKey], rounds: int, path: Path, direct: bool) -> list[Row]:
    """A file that is written anew each round, and a tier that is: both have their place on the disk already."""
    top = host(layout, len(keys))
    fill(top, keys)
    directory = TierDirectory(path / "tier", 2 * size(layout, keys) + (64 << 20), direct_io=direct)
    tier = directory.open(layout)
    migrator = KVMigrator([top, tier], threads=THREADS)
    plain = Plain(path / "plain", size(layout, keys), direct)
    times: dict[str, list[float]] = {"write": [], "read": [], "written": [], "read back": []}
    for n in range(rounds + 1):
        tier.remove(tier.hashes())
        found = {"write": seconds(plain.write), "written": seconds(lambda: migrate(migrator, keys, 0, 1))}
        if not direct:
            os.sync()  # what waits for the disk would be written during the next round
        top.remove(top.hashes())
        found |= {"read": seconds(plain.read), "read back": seconds(lambda: migrate(migrator, keys, 1, 0))}
        if n:  # the first finds the disk's blocks unwritten
            for name, took in found.items():
                times[name].append(took)
    migrator.close()
    tier.close()
    directory.close()
    plain.close()
    how, target = ("O_DIRECT", TARGET) if direct else ("cached", None)
    wrote, read = f"pwrite of 1 MiB, {THREADS} threads", f"pread of 1 MiB, {THREADS} threads"
    return [
        row(f"memory to disk, {how}", layout, keys, wrote, times["write"], times["written"], target),
        row(f"disk to memory, {how}", layout, keys, read, times["read"], times["read back"], target),
    ]


class Plain:
    """What the disk gives who wants nothing but bytes: no digest, no index, no blocks."""

    def __init__(self, path: Path, num_bytes: int, direct: bool) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0), 0o600)
        self._size = num_bytes // PIECE_BYTES * PIECE_BYTES
        os.posix_fallocate(self._file, 0, self._size)
        self._memory = memoryview(shared_memory.allocate(self._size).arena)
        self._memory[:] = np.random.default_rng(0).bytes(self._size)

    def write(self) -> None:
        in_threads(THREADS, self._size, self._write)

    def read(self) -> None:
        in_threads(THREADS, self._size, self._read)

    def _write(self, part: slice) -> None:
        for at in range(part.start, part.stop, PIECE_BYTES):
            os.pwrite(self._file, self._memory[at : at + PIECE_BYTES], at)

    def _read(self, part: slice) -> None:
        for at in range(part.start, part.stop, PIECE_BYTES):
            os.preadv(self._file, [self._memory[at : at + PIECE_BYTES]], at)

    def close(self) -> None:
        os.close(self._file)


def in_threads(threads: int, num_bytes: int, work: Callable[[slice], None]) -> None:
    """Parts of a multiple of PIECE_BYTES."""
    step = -(-num_bytes // threads // PIECE_BYTES) * PIECE_BYTES
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [slice(at, min(at + step, num_bytes)) for at in range(0, num_bytes, step)]))


def migrate(migrator: KVMigrator, keys: list[BlockKey], source: int, target: int) -> None:
    migration = migrator.migrate(MigrationPlan(source, target, tuple(keys)))
    if not migration.wait(WAIT_S) or migration.blocks_present != len(keys):
        raise RuntimeError(f"{migration.blocks_present} of {len(keys)} blocks were moved")


def host(layout: KvLayout, count: int) -> HostTier:
    return HostTier(HostKvPool(count * layout.block_bytes, SystemClock(), layout))


def fill(tier: HostTier, keys: list[BlockKey]) -> None:
    with tier.filling(keys) as filling:
        filling.region.view[:] = np.random.default_rng(0).bytes(len(filling.region.view))
        filling.num_filled = len(filling.keys)


def some_keys(layout: KvLayout, count: int) -> list[BlockKey]:
    """Of sequences of SEQUENCE_BLOCKS."""
    keys: list[BlockKey] = []
    for first in range(0, count, SEQUENCE_BLOCKS):
        blocks = min(SEQUENCE_BLOCKS, count - first)
        token_ids = np.arange(first * BLOCK_TOKENS, (first + blocks) * BLOCK_TOKENS, dtype=np.int32)
        keys += keys_of(block_hashes(token_ids, BLOCK_TOKENS, root_hash(layout)), token_ids, BLOCK_TOKENS)
    return keys


def size(layout: KvLayout, keys: list[BlockKey]) -> int:
    return len(keys) * layout.block_bytes


def seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def row(
    what: str,
    layout: KvLayout,
    keys: list[BlockKey],
    against: str,
    reference: list[float],
    moved: list[float],
    target: float | None = TARGET,
) -> Row:
    gb = size(layout, keys) / 1e9
    ratio = statistics.median(a / b for a, b in zip(reference, moved, strict=True))
    medians = gb / statistics.median(reference), gb / statistics.median(moved)
    return Row(what, layout.block_bytes, against, *medians, ratio, target)


def document(rows: list[Row], args: argparse.Namespace) -> dict[str, object]:
    return {
        "command": f"python -m bench.tiers --mib {args.mib} --rounds {args.rounds} --blocks {args.blocks}",
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "target_ratio": TARGET,
        "rows": [
            {
                "what": r.what,
                "block_bytes": r.block_bytes,
                "reference": r.reference,
                "reference_gb_per_s": round(r.reference_gb_per_s, 3),
                "moved_gb_per_s": round(r.moved_gb_per_s, 3),
                "ratio": round(r.ratio, 3),
                "target": r.target,
            }
            for r in rows
        ],
    }


def table(rows: list[Row], args: argparse.Namespace) -> str:
    lines = [
        f"{args.mib} MiB of KV a round, medians of {args.rounds} rounds, digest on, {os.cpu_count()} cores.",
        f"Target: {TARGET} of memory and disk. Load average with other work: {os.getloadavg()[0]:.1f}.",
        "",
        "| | block | reference, GB/s | moved, GB/s | ratio |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        verdict = "" if r.target is None else " met" if r.ratio >= r.target else " **missed**"
        lines.append(
            f"| {r.what} | {r.block_bytes >> 10} KiB | {r.reference_gb_per_s:.2f} ({r.reference}) | "
            f"{r.moved_gb_per_s:.2f} | {r.ratio:.2f}{verdict} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
