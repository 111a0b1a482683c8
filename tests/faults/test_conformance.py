"""Every fault at every state of a handoff, seeded: no wrong token, no hang, no block that is not given back.

A router and two workers of each role run in this process, see `fault_lab`. A run arms one state with one fault, sends
three requests through it, heals the network and looks whether everybody has everything back. `make test` makes 340
runs, `make test-faults-long` ten times as many.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from sagellm_common.core import failpoints
from sagellm_common.core.errors import SageError
from sagellm_common.core.types import SamplingParams, WorkerRole
from tests.support.fault_lab import LEASE_TTL_S, FaultLab, fault_lab, forget
from tests.support.fault_proxy import FaultProxy
from tests.support.simulated_engine import VOCAB_SIZE, reference

TIMES = int(os.environ.get("SAGELLM_TEST_FAULT_TIMES", "1"))
SEEDS = 5 * TIMES
SEEDS_WHEN_SILENT = TIMES
"""Runs per state: fewer where each waits for somebody's patience to end."""
DEADLINE_S = 8.0
HANG_S = DEADLINE_S + 2.0
NEW_TOKENS = 12
LONGEST_PROMPT_TOKENS = 120
ON_THE_WAY = "a byte of the KV"
KV_BYTES = 1000
"""On the way, the fault comes within so many: most prompts have more."""
STATES = (
    "source.handshaking",  # first: two workers agree once
    "decode.reserved",
    "prefill.computing",
    "prefill.pinned",
    "receiver.pulling",
    "source.sending",
    ON_THE_WAY,
    "decode.pulled",
    "decode.committed",
    "decode.streaming",
)

TYPED = ("PEER_LOST", "LEASE_EXPIRED", "KV_CORRUPT", "NO_WORKER", "DRAINING", "DEADLINE_EXCEEDED")
"""What may become of a request whose every attempt was hit."""

Break = Callable[[Sequence[FaultProxy], random.Random], None]


def killed(ways: Sequence[FaultProxy], rng: random.Random) -> None:
    for way in ways:
        way.cut()


def half_closed(ways: Sequence[FaultProxy], rng: random.Random) -> None:
    for way in ways:
        way.half_close()


def black_holed(ways: Sequence[FaultProxy], rng: random.Random) -> None:
    for way in ways:
        way.stall()


def stopped_for_longer_than_the_lease(ways: Sequence[FaultProxy], rng: random.Random) -> None:
    """And then it goes on in the middle of what it did."""
    for way in ways:
        way.stall(rng.uniform(1.2, 2.0) * LEASE_TTL_S)


@contextmanager
def armed(lab: FaultLab, state: str, action: Callable[[], None], rng: random.Random) -> Iterator[None]:
    if state != ON_THE_WAY:
        with failpoints.armed(state, action):
            yield
        return
    for member in lab.members[WorkerRole.PREFILL]:
        member.data.after_bytes(rng.randrange(1, KV_BYTES), action)
    yield


class Outcomes(Counter[str]):
    """Of all requests of a test: right, or the reason of a typed error."""

    async def add(self, lab: FaultLab, prompt: list[int], request_id: str) -> None:
        wanted = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        try:
            async with asyncio.timeout(HANG_S):
                done = await lab.clients.generate(
                    prompt,
                    request_id=request_id,
                    model="simulated",
                    timeout_s=DEADLINE_S,
                    max_new_tokens=NEW_TOKENS,
                    ignore_eos=True,
                )
        except SageError as err:
            assert err.reason in TYPED, err
            self[err.reason] += 1
            return
        assert done.tokens == reference(prompt, wanted)[0], f"{request_id}: wrong tokens"
        self["right"] += 1


def prompts(rng: random.Random, count: int) -> list[list[int]]:
    lengths = [rng.randint(1, LONGEST_PROMPT_TOKENS) for _ in range(count)]
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


async def run(lab: FaultLab, state: str, fault: Break, rng: random.Random, outcomes: Outcomes, name: str) -> bool:
    """Whether the state was reached."""
    role, data_only, reached = rng.choice(list(lab.members)), rng.random() < 0.4, False

    def action() -> None:
        nonlocal reached
        if not reached:
            reached = True
            victim = lab.pick(role, rng)
            fault([victim.data] if data_only else victim.proxies, rng)

    with armed(lab, state, action, rng):
        await asyncio.gather(*(outcomes.add(lab, p, f"{name}-{n}") for n, p in enumerate(prompts(rng, 3))))
    await lab.healed()
    forget(lab)
    return reached


@pytest.mark.parametrize("overlap", [False, True], ids=["at the end", "while computed"])
@pytest.mark.parametrize(
    ("fault", "seeds"),
    [
        (killed, SEEDS),
        (half_closed, SEEDS),
        (black_holed, SEEDS_WHEN_SILENT),
        (stopped_for_longer_than_the_lease, SEEDS_WHEN_SILENT),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.timeout(120 * TIMES)
async def test_a_fault_at_any_state(monkeypatch: pytest.MonkeyPatch, fault: Break, seeds: int, overlap: bool) -> None:
    outcomes, reached = Outcomes(), Counter[str]()
    async with fault_lab(monkeypatch, overlap=overlap) as lab:
        for state in STATES:
            for seed in range(seeds):
                name = f"{fault.__name__} {state} {seed}"
                reached[state] += await run(lab, state, fault, random.Random(name), outcomes, name)
    assert set(+reached) == set(STATES)
    # A whole pair of workers was always there.
    assert outcomes["right"] >= 0.9 * outcomes.total(), outcomes


@pytest.mark.parametrize("overlap", [False, True], ids=["at the end", "while computed"])
@pytest.mark.timeout(120 * TIMES)
async def test_one_percent_of_corrupted_segments(monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    outcomes, rng = Outcomes(), random.Random(1)
    async with fault_lab(monkeypatch, overlap=overlap) as lab:
        for number in range(SEEDS * len(STATES)):
            for member in lab.members[WorkerRole.PREFILL]:
                member.data.corrupt(rng, 0.01)
            await asyncio.gather(*(outcomes.add(lab, p, f"{number}-{n}") for n, p in enumerate(prompts(rng, 8))))
            await lab.healed()
            forget(lab)
        assert sum(member.data.corrupted for member in lab.members[WorkerRole.PREFILL]) > 0
    assert set(outcomes) == {"right"}, outcomes
