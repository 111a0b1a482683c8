"""Made-up workloads, each with one trait of real ones: what a policy must not be bad at, whatever it was tuned on.

Every trace is a list of prompts as `replay` takes them: block numbers that stand for their whole prefix.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count

Prompts = list[list[int]]


def zipf(rng: random.Random, requests: int) -> Prompts:
    """300 documents of 4 to 40 blocks, asked about by popularity 1/rank, each time with a question of its own."""
    fresh = count()
    documents = [[next(fresh) for _ in range(rng.randint(4, 40))] for _ in range(300)]
    weights = [1 / rank for rank in range(1, 301)]
    return [[*rng.choices(documents, weights)[0], next(fresh)] for _ in range(requests)]


def drifting_zipf(rng: random.Random, requests: int) -> Prompts:
    """As `zipf`, but what is popular today is not tomorrow: the ranks move on by one every few requests."""
    fresh = count()
    documents = [[next(fresh) for _ in range(rng.randint(4, 40))] for _ in range(600)]
    ranks = rng.choices(range(300), [1 / rank for rank in range(1, 301)], k=requests)
    return [[*documents[(rank + at // 10) % 600], next(fresh)] for at, rank in enumerate(ranks)]


def scan(rng: random.Random, requests: int) -> Prompts:
    """30 documents that are used again and again, and now and then a long run of prompts that never come back."""
    fresh = count()
    documents = [[next(fresh) for _ in range(20)] for _ in range(30)]
    trace: Prompts = []
    while len(trace) < requests:
        trace += [[*rng.choice(documents), next(fresh)] for _ in range(60)]
        trace += [[next(fresh) for _ in range(30)] for _ in range(40)]
    return trace[:requests]


def loop(rng: random.Random, requests: int) -> Prompts:
    """120 documents, one after the other, round and round: what was used last is used last again."""
    documents = [list(range(100 * n, 100 * n + rng.randint(8, 24))) for n in range(120)]
    return [documents[at % 120] for at in range(requests)]


def chat(rng: random.Random, requests: int) -> Prompts:
    """Conversations under one system prompt: each turn asks with all that was said before, or the user has left."""
    fresh = count()
    system = [next(fresh) for _ in range(4)]
    talks: list[list[int]] = []
    trace: Prompts = []
    for _ in range(requests):
        if len(talks) < 60 or rng.random() < 0.2:
            talks.append(list(system))
        # Who has spoken lately speaks again.
        talk = talks[-1 - min(int(rng.expovariate(1 / 20)), len(talks) - 1)]
        talk += [next(fresh) for _ in range(rng.randint(1, 6))]
        trace.append(list(talk))
        if rng.random() < 0.25:
            talks.remove(talk)
    return trace


def agents(rng: random.Random, requests: int) -> Prompts:
    """Eight tools' long instructions; under each, tasks that call in quick succession, branch, and end for good."""
    fresh = count()
    tools = [[next(fresh) for _ in range(rng.randint(10, 30))] for _ in range(8)]
    trace: Prompts = []
    tasks: list[list[int]] = []
    for _ in range(requests):
        if len(tasks) < 20:
            tasks.append([*rng.choices(tools, [1 / n for n in range(1, 9)])[0], *(next(fresh) for _ in range(3))])
        at = rng.randrange(len(tasks))
        tasks[at] = [*tasks[at], *(next(fresh) for _ in range(rng.randint(1, 3)))]
        trace.append(list(tasks[at]))
        if rng.random() < 0.1:  # an attempt that failed: back to an earlier step
            tasks[at] = tasks[at][: max(12, len(tasks[at]) // 2)]
        if rng.random() < 0.08:
            del tasks[at]
    return trace


def unique(rng: random.Random, requests: int) -> Prompts:
    """Nothing ever comes again."""
    fresh = count()
    return [[next(fresh) for _ in range(rng.randint(1, 40))] for _ in range(requests)]


FAMILIES: dict[str, Callable[[random.Random, int], Prompts]] = {
    made.__name__: made for made in (zipf, drifting_zipf, scan, loop, chat, agents, unique)
}
