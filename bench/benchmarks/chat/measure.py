"""Two 2P2D clusters take turns with the same conversations: one with all caches and stores, one without any."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.benchmarks.chat.workload import Conversation, users
from sagellm_common.client.aio import AsyncClient
from sagellm_common.client.text import Tokenizer
from sagellm_common.core.config import Config
from sagellm_common.core.errors import SageError
from sagellm_common.core.types import GenerationSummary, WorkerState
from services.cli.cluster import Cluster
from services.cli.home import ClusterHome

ON, OFF = "on", "off"
STACK: Mapping[str, Mapping[str, Any]] = {
    ON: {"kv_store": {"stores": 2, "replicas": 2}},
    OFF: {"kv_store": {"enabled": False}, "engine": {"prefix_caching": False}},
}
IN_FLIGHT = 4
REQUEST_TIMEOUT_S = 300.0
RESTART_TIMEOUT_S = 60.0
WORKERS = ("prefill-0", "kv-store-0", "decode-0", "prefill-1", "kv-store-1", "decode-1")
"""Killed with requests under way. Router and gateway have no second: they are killed between two turns."""
LONE = ("router", "gateway")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Workload:
    users: int = 20
    turns: int = 4
    answer_tokens: int = 32
    num_blocks: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    turn: int
    ttft_ms: float
    token_ids: tuple[int, ...]
    summary: GenerationSummary


@dataclass(slots=True)
class Measured:
    """`answers[arm][user]` are those of the user's turns, in order."""

    answers: dict[str, list[list[Answer]]] = field(default_factory=dict)
    killed: list[str] = field(default_factory=list)

    @property
    def differing(self) -> list[tuple[int, int]]:
        """(user, turn) whose tokens are not the same in both arms."""
        pairs = zip(*self.answers.values(), strict=True)
        return [
            (user, a.turn)
            for user, arms in enumerate(pairs)
            for a, b in zip(*arms, strict=True)
            if a.token_ids != b.token_ids
        ]


@asynccontextmanager
async def a_cluster(arm: str, model: Path, num_blocks: int, scratch: Path) -> AsyncIterator[Cluster]:
    settings: dict[str, dict[str, Any]] = {
        "cluster": {"port_base": 0, "name": f"chat-{arm}"},
        "model": {"path": str(model)},
        "engine": {"num_blocks": num_blocks},
    }
    for section, values in STACK[arm].items():
        settings[section] = settings.get(section, {}) | values
    home = ClusterHome(f"chat-{arm}", scratch)
    with home.owned():
        # Killed on purpose: each death is the first.
        cluster = Cluster(Config.model_validate(settings), home, 2, 2, healthy_s=0.0)
        try:
            await cluster.start()
            yield cluster
        finally:
            await cluster.stop()


async def measure(model: Path, load: Workload, *, kill: bool, scratch: Path, progress: Progress) -> Measured:
    """Raises what a request fails with."""
    tokenizer, found = Tokenizer.from_dir(model), Measured()
    people = users(load.users, load.turns, load.seed)
    async with AsyncExitStack() as stack:
        clusters, clients, talks = {}, {}, {}
        for arm in STACK:
            progress(f"starting 2P2D, stack {arm}")
            clusters[arm] = await stack.enter_async_context(a_cluster(arm, model, load.num_blocks, scratch))
        for arm in STACK:
            address = clusters[arm].router_address
            clients[arm] = await stack.enter_async_context(AsyncClient(address, timeout_s=REQUEST_TIMEOUT_S))
            talks[arm] = [Conversation(user, tokenizer) for user in people]
            found.answers[arm] = [[] for _ in people]
            # Connections, allocators, what is imported at the first use.
            await asyncio.gather(*(clients[arm].complete([5 + n] * 40, max_tokens=4) for n in range(4)))
        for turn in range(load.turns):
            for arm in STACK:
                victims = due(turn, load.turns) if kill and arm == ON else []
                progress(f"turn {turn + 1} of {load.turns}, stack {arm}")
                during = [victim for victim in victims if victim in WORKERS]
                for victim in (victim for victim in victims if victim in LONE):
                    await killed(clusters[arm], victim, progress)
                    await settled(clusters[arm], clients[arm])
                async with asyncio.TaskGroup() as running:
                    answers = running.create_task(one_turn(clients[arm], talks[arm], turn, load, load.seed))
                    if during:
                        running.create_task(kills(clusters[arm], clients[arm], during, progress))
                for user, answer in enumerate(answers.result()):
                    talks[arm][user].answered(answer.token_ids)
                    found.answers[arm][user].append(answer)
                found.killed += victims
    return found


def due(turn: int, turns: int) -> list[str]:
    """Who is killed in this turn; nobody in the first, for there is nothing to lose, and each once in all of them."""
    if turn == 0:
        return []
    parts = [*WORKERS, *LONE]
    return parts[turn - 1 :: turns - 1]


async def one_turn(
    client: AsyncClient, talks: Sequence[Conversation], turn: int, load: Workload, seed: int
) -> list[Answer]:
    """IN_FLIGHT users at a time."""
    places = asyncio.Semaphore(IN_FLIGHT)

    async def ask(talk: Conversation) -> Answer:
        async with places:
            began_s, first_s = time.perf_counter(), 0.0
            token_ids: list[int] = []
            summary = GenerationSummary()
            async for output in client.generate(talk.ask(), max_tokens=load.answer_tokens):
                if output.token_ids and not token_ids:
                    first_s = time.perf_counter()
                token_ids += output.token_ids
                summary = output.summary or summary
            return Answer(turn, ((first_s or time.perf_counter()) - began_s) * 1e3, tuple(token_ids), summary)

    return await asyncio.gather(*(ask(talk) for talk in talks))


async def kills(cluster: Cluster, client: AsyncClient, victims: Sequence[str], progress: Progress) -> None:
    for victim in victims:
        await killed(cluster, victim, progress)
        await settled(cluster, client)


async def killed(cluster: Cluster, victim: str, progress: Progress) -> None:
    """kill -9; returns when its supervisor has started it again."""
    member = cluster.members[victim]
    before = member.process
    progress(f"kill -9 {victim}")
    await cluster.kill(victim)
    async with asyncio.timeout(RESTART_TIMEOUT_S):
        while member.process is None or member.process is before or member.ready is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def settled(cluster: Cluster, client: AsyncClient) -> None:
    """Until the router finds every worker serving."""
    wanted = {member.id for member in cluster.workers}
    async with asyncio.timeout(RESTART_TIMEOUT_S):
        while True:
            try:
                view = await client.topology()
            except SageError:
                view = None  # the router itself is on its way
            workers = view.workers if view else ()
            serving = [w for w in workers if w.record.state is WorkerState.SERVING and w.kv is not None]
            if {worker.record.worker_id for worker in serving} == wanted:
                return
            await asyncio.sleep(0.1)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rows(found: Measured) -> list[dict[str, Any]]:
    """Per turn and arm, in shares of prompt tokens: where their KV came from, and what decode held already."""
    made = []
    for arm, of_users in found.answers.items():
        for turn, answers in itertools.groupby(
            sorted(itertools.chain(*of_users), key=lambda a: a.turn), lambda a: a.turn
        ):
            done = list(answers)
            tokens = sum(answer.summary.prompt_tokens for answer in done)

            def share(name: str, done: list[Answer] = done, tokens: int = tokens) -> float:
                return round(sum(getattr(answer.summary, name) for answer in done) / tokens, 4)

            made.append(
                {
                    "turn": turn + 1,
                    "stack": arm,
                    "ttft_p50_ms": round(percentile([a.ttft_ms for a in done], 0.5), 1),
                    "ttft_p95_ms": round(percentile([a.ttft_ms for a in done], 0.95), 1),
                    "prompt_tokens": tokens,
                    "hit_rate": share("cached_tokens"),
                    "store_rate": share("store_tokens"),
                    "decode_held_rate": share("decode_cached_tokens"),
                    "kv_bytes_moved": sum(answer.summary.kv_bytes_transferred for answer in done),
                    "attempts": sum(answer.summary.attempts for answer in done),
                }
            )
    return sorted(made, key=lambda row: (row["turn"], row["stack"]))
