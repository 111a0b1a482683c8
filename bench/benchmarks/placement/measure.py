"""One 2P2D cluster, a mixed workload in turns: the router's strategy is another one each time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.config import Config
from services.cli.cluster import Cluster
from services.cli.home import ClusterHome

REQUEST_TIMEOUT_S = 300.0
BLOCK_TOKENS = 16

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Workload:
    """A turn: questions over shared documents, short chats, and now and then a long prompt of its own; Poisson."""

    requests: int = 60
    rate_rps: float = 3.0
    turns: int = 3
    documents: int = 4
    document_tokens: int = 512
    long_tokens: int = 900
    answer_tokens: int = 24
    ttft_target_ms: float = 1500.0
    tpot_target_ms: float = 120.0
    num_blocks: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    at_s: float
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    ttft_ms: float
    tpot_ms: float
    cached_tokens: int


@dataclass(slots=True)
class Turn:
    strategy: str
    answers: list[Answer] = field(default_factory=list)

    def p95(self, name: str) -> float:
        return float(np.percentile([getattr(answer, name) for answer in self.answers], 95))

    def in_time(self, load: Workload) -> float:
        """Share of all that met both targets."""
        return float(
            np.mean([a.ttft_ms <= load.ttft_target_ms and a.tpot_ms <= load.tpot_target_ms for a in self.answers])
        )


def asked(load: Workload, turn: int, vocab_size: int) -> list[Asked]:
    """The same shape each turn, for the strategies have it one after the other; tokens of its own, for caches last."""
    shape, tokens = random.Random(load.seed), random.Random(f"{load.seed}/{turn}")

    def text(count: int) -> tuple[int, ...]:
        return tuple(tokens.randrange(5, vocab_size) for _ in range(count))

    documents = [text(load.document_tokens) for _ in range(load.documents)]
    found, now_s = [], 0.0
    for _ in range(load.requests):
        now_s += shape.expovariate(load.rate_rps)
        kind, which = shape.random(), shape.randrange(load.documents)
        if kind < 0.5:
            prompt = documents[which] + text(shape.randrange(8, 48))
        elif kind < 0.85:
            prompt = text(shape.randrange(16, 160))
        else:
            prompt = text(load.long_tokens)
        found.append(Asked(now_s, prompt))
    return found


async def measure(
    model: Path, strategies: Sequence[str], load: Workload, scratch: Path, progress: Progress
) -> list[Turn]:
    """`load.turns` of each strategy, by turns. The first round is not counted: costs are learned, code is loaded."""
    config = Config.model_validate(
        {
            "cluster": {"port_base": 0, "name": "placement"},
            "model": {"path": str(model)},
            "engine": {"num_blocks": load.num_blocks, "policy": "on_time", "block_size_tokens": BLOCK_TOKENS},
            "kv_store": {"enabled": False},
            "router": {"ttft_target_ms": load.ttft_target_ms, "tpot_target_ms": load.tpot_target_ms},
        }
    )
    home, found = ClusterHome("placement", scratch), []
    with home.owned():
        cluster = Cluster(config, home, 2, 2)
        try:
            progress("starting 2P2D")
            await cluster.start()
            async with AsyncClient(cluster.router_address, timeout_s=REQUEST_TIMEOUT_S) as client:
                vocab_size = (await client.models())[0].vocab_size
                for number in range(1 + load.turns):
                    for strategy in strategies:
                        progress(f"turn {number} of {load.turns}, {strategy}" if number else f"warm-up, {strategy}")
                        await client.set_strategy(strategy)
                        turn = await _turn(client, strategy, asked(load, len(found), vocab_size), load.answer_tokens)
                        found.append(turn)
        finally:
            await cluster.stop()
    return found[len(strategies) :]


async def _turn(client: AsyncClient, strategy: str, requests: Sequence[Asked], answer_tokens: int) -> Turn:
    turn, began_s = Turn(strategy), time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(_ask(client, one, began_s, answer_tokens)) for one in requests]
    turn.answers = [task.result() for task in running]
    return turn


async def _ask(client: AsyncClient, one: Asked, began_s: float, answer_tokens: int) -> Answer:
    await asyncio.sleep(one.at_s - (time.perf_counter() - began_s))
    sent_s, arrivals, cached = time.perf_counter(), [], 0
    async for output in client.generate(list(one.prompt), max_tokens=answer_tokens, temperature=0.0, ignore_eos=True):
        arrivals += [time.perf_counter()] * bool(output.token_ids)
        cached = output.summary.cached_tokens if output.summary else cached
    gaps = max(1, len(arrivals) - 1)
    return Answer(1e3 * (arrivals[0] - sent_s), 1e3 * (arrivals[-1] - arrivals[0]) / gaps, cached)
