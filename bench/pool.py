"""How full a KV pool is, and with what, under sequences of mixed lengths: `python -m bench.pool`.

Replays a trace of requests against a `KVPool`, as continuous batching does, without computing anything: all requests
wait in a queue, whoever's prompt fits starts, each running sequence gets a token per step, and the latest gives way
when nobody can grow. Only steps with requests waiting count, for else nobody wants the memory.

    utilization    token slots with a token of a running sequence / all slots of the pool; held: slots in their blocks
    fragmentation  slots for no token / slots in held and cached blocks (internal); free blocks outside the longest free
                   run / free blocks (external); see `KvFragmentation`
    segments       runs of neighbouring blocks in the table of a finished sequence: what a transfer of it consists of

Beside it the same pool when each request gets room for its longest possible sequence from the start, as engines without
paging do, and with the gaps closed between steps (`kv.defrag: live`, DEFRAG_BLOCKS each).
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.serving import table
from sagellm_common.core.errors import ConfigError, KvExhausted
from sagellm_common.core.types import KvLayout, TokenIds
from sagellm_common.kv_runtime.backends.mock import MockKvPool
from sagellm_common.kv_runtime.block_manager import BlockArray
from sagellm_common.kv_runtime.integrity import check
from sagellm_common.kv_runtime.pool import PoolAllocation, Table

SAMPLE = Path(__file__).parent / "data" / "mixed_lengths.jsonl"
BLOCK_TOKENS = 16
LONGEST_TOKENS = 4096
MAX_RUNNING = 256
DEFRAG_BLOCKS = 8
DEFRAG_STEPS = SAMPLE_STEPS = 8
LAYOUT = KvLayout("bench", "float32", BLOCK_TOKENS, 1, 1, 1, block_bytes=64)
"""Bytes are moved, but few: what counts is where the blocks are."""
MIN_UTILIZATION, MAX_FRAGMENTATION = 0.95, 0.05


@dataclass(frozen=True, slots=True)
class Request:
    """`document` says which others begin with the same `document_tokens`."""

    document: int
    document_tokens: int
    prompt_tokens: int
    new_tokens: int

    def token_ids(self, number: int) -> TokenIds:
        """Prompt and what is generated: made up, and the same each time."""
        shared = np.arange(self.document_tokens) + (self.document << 16)
        own = np.arange(self.prompt_tokens + self.new_tokens - self.document_tokens) + ((number + 1) << 13) + (1 << 28)
        return np.concatenate([shared, own]).astype(np.int32)


@dataclass(slots=True, eq=False)
class Running:
    request: Request
    token_ids: TokenIds
    allocation: PoolAllocation
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """Means over the steps with requests waiting; `segments` is of finished sequences, per 64 blocks."""

    utilization: float
    held: float
    internal_fragmentation: float
    external_fragmentation: float
    segments_per_64_blocks: float
    preemptions: int
    hit_rate: float
    moved_blocks: int
    steps: int
    requests: int
    cpu_us_per_block: float


class BatchPool(MockKvPool):
    """As LMDeploy's: keeps a free block for each running sequence, and between steps a sequence's blocks may move."""

    running = 0

    def tables(self) -> Iterator[Table]:
        return (replace(table, pinned=False) for table in super().tables())

    def _headroom(self) -> int:
        return self.running


class Batching:
    """One replay."""

    def __init__(self, requests: Sequence[Request], num_blocks: int, *, reserve: bool, defrag: bool) -> None:
        self._waiting = deque(
            (request, request.token_ids(n), request.prompt_tokens) for n, request in enumerate(requests)
        )
        self._pool = BatchPool(LAYOUT, num_blocks, eviction="cost-aware")
        self._reserve = reserve
        self._defrag = defrag
        self._running: list[Running] = []
        self._segments: list[float] = []
        self._preemptions = self._hits = self._asked = self._blocks = 0
        self._pool_s = 0.0

    def run(self) -> Result:
        seen: list[tuple[float, float, float, float]] = []
        steps = 0
        while self._waiting or self._running:
            self._admit()
            if self._waiting and steps % SAMPLE_STEPS == 0:
                seen.append(self._sample())
            self._step()
            if self._defrag and steps % DEFRAG_STEPS == 0:
                self._pool.defragment(DEFRAG_BLOCKS * LAYOUT.block_bytes)
            steps += 1
        problems = check(self._pool).problems
        assert not problems, problems
        if not seen:
            raise ConfigError(f"--blocks: {self._pool.regions().num_blocks} hold all of the trace at once; use fewer")
        utilization, held, internal, external = np.array(seen).mean(axis=0)
        return Result(
            utilization=float(utilization),
            held=float(held),
            internal_fragmentation=float(internal),
            external_fragmentation=float(external),
            segments_per_64_blocks=float(np.mean(self._segments)),
            preemptions=self._preemptions,
            hit_rate=self._hits / self._asked,
            moved_blocks=self._pool.moved_blocks,
            steps=steps,
            requests=len(self._segments),
            cpu_us_per_block=self._pool_s * 1e6 / self._blocks,
        )

    def _sample(self) -> tuple[float, float, float, float]:
        """(utilization, held, internal, external) now."""
        stats, found = self._pool.get_utilization(), self._pool.get_fragmentation()
        empty = found.internal * (stats.used_blocks + stats.cached_blocks)
        total = stats.total_blocks
        return (stats.used_blocks - empty) / total, stats.used_blocks / total, found.internal, found.external

    def _admit(self) -> None:
        while self._waiting and len(self._running) < MAX_RUNNING:
            request, token_ids, num_tokens = self._waiting[0]
            self._pool.running = len(self._running)
            began = time.process_time()
            try:
                wanted = LONGEST_TOKENS if self._reserve else num_tokens
                allocation = self._pool.allocate(token_ids[:num_tokens], wanted)
            except KvExhausted as error:
                if not self._running:
                    raise ConfigError("--blocks: the pool is too small for one request; use more") from error
                return
            finally:
                self._pool_s += time.process_time() - began
            allocation.num_tokens = num_tokens
            self._waiting.popleft()
            self._hits += allocation.num_cached_tokens
            self._asked += num_tokens
            self._blocks += len(allocation.table)
            self._running.append(Running(request, token_ids, allocation, num_tokens))

    def _step(self) -> None:
        """A token for everybody; those who cannot grow make the latest give way."""
        self._pool.running = 0
        began = time.process_time()
        for one in list(self._running):
            while one in self._running and not self._grow(one):
                self._preempt(self._running[-1])
        for one in [one for one in self._running if one.num_tokens == len(one.token_ids)]:
            self._running.remove(one)
            self._segments.append(segments(self._pool.blocks.slots(one.allocation.table)))
            self._pool.publish(one.allocation, one.token_ids)
            self._pool.free(one.allocation)
        self._pool_s += time.process_time() - began

    def _grow(self, one: Running) -> bool:
        if one.num_tokens % BLOCK_TOKENS == 0 and not self._reserve:
            try:
                self._pool.extend(one.allocation, one.num_tokens + 1)
            except KvExhausted:
                return False
            self._blocks += 1
        one.num_tokens += 1
        one.allocation.num_tokens = one.num_tokens
        return True

    def _preempt(self, one: Running) -> None:
        self._running.remove(one)
        self._preemptions += 1
        self._pool.free(one.allocation)
        self._waiting.appendleft((one.request, one.token_ids, one.num_tokens))


def segments(slots: BlockArray) -> float:
    """Runs of neighbours in memory among a table's blocks, per 64 blocks."""
    return (1 + int(np.count_nonzero(np.diff(slots) != 1))) * 64 / len(slots)


def make_sample(count: int = 1200, seed: int = 5) -> Iterator[Request]:
    """Chats (short), questions about documents (long prompts, shared), and completions of any length."""
    rng = np.random.default_rng(seed)
    documents = rng.integers(300, 2500, size=24)
    for n in range(count):
        new = int(np.clip(rng.lognormal(4.6, 0.9), 4, 1000))
        kind = rng.choice(["chat", "document", "completion"], p=[0.5, 0.3, 0.2])
        document, shared = 1000 + n, 0
        if kind == "document":
            document = int(min(rng.zipf(1.5) - 1, len(documents) - 1))
            shared = int(documents[document])
        own = {"chat": rng.lognormal(4.5, 1.0), "document": rng.lognormal(3.5, 0.7), "completion": rng.uniform(1, 2500)}
        prompt = shared + int(np.clip(own[str(kind)], 1, 2500))
        yield Request(document, shared, min(prompt, LONGEST_TOKENS - new), new)


def load(path: Path) -> list[Request]:
    return [Request(**json.loads(line)) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.pool", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path, default=SAMPLE, help="JSON lines with the fields of `Request`")
    parser.add_argument("--make-sample", action="store_true", help=f"writes {SAMPLE.name} anew and stops")
    parser.add_argument("--blocks", type=int, default=4096, help=f"of the pool, each of {BLOCK_TOKENS} tokens")
    parser.add_argument("--json", type=Path, default=Path("bench/results/pool.json"))
    args = parser.parse_args()
    if args.make_sample:
        args.trace.write_text("".join(json.dumps(asdict(request)) + "\n" for request in make_sample()))
        return
    requests = load(args.trace)
    modes: dict[str, dict[str, bool]] = {
        "paged": {"reserve": False, "defrag": False},
        "paged, gaps closed": {"reserve": False, "defrag": True},
        "longest reserved": {"reserve": True, "defrag": False},
    }
    results = {name: Batching(requests, args.blocks, **mode).run() for name, mode in modes.items()}
    rows = [["", "utilization", "held", "internal", "external", "segments/64", "preempted", "hit", "CPU µs/block"]]
    for name, found in results.items():
        rows.append(
            [
                name,
                f"{found.utilization:.1%}",
                f"{found.held:.1%}",
                f"{found.internal_fragmentation:.1%}",
                f"{found.external_fragmentation:.1%}",
                f"{found.segments_per_64_blocks:.1f}",
                str(found.preemptions),
                f"{found.hit_rate:.1%}",
                f"{found.cpu_us_per_block:.1f}",
            ]
        )
    print(table(rows))
    ours = results["paged"]
    met = {
        f"utilization of at least {MIN_UTILIZATION:.0%}": ours.utilization >= MIN_UTILIZATION,
        f"internal fragmentation below {MAX_FRAGMENTATION:.0%}": ours.internal_fragmentation < MAX_FRAGMENTATION,
    }
    for target, reached in met.items():
        print(f"{'met' if reached else 'MISSED'}: {target}")
    document: dict[str, Any] = {
        "conditions": {"trace": args.trace.name, "requests": len(requests), "blocks": args.blocks},
        "results": {name: asdict(found) for name, found in results.items()},
        "targets": met,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
