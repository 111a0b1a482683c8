"""What the router plans of a prefill is what LMDeploy does: through the wire, the real services and the real engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.types import WorkerRecord, WorkerRole
from sagellm_common.engines import make_engine
from sagellm_common.engines.lmdeploy.progress import StepProgress
from tests.support.engines import engine_config
from tests.support.oracle import greedy
from tests.support.router_harness import RouterHarness, router_harness
from tests.support.waiting import TIMEOUT_S, eventually
from tests.support.workers import decode_all, request, test_config, worker

NEW_TOKENS, CONFIGURED = 6, 32
PROMPT = np.random.default_rng(5).integers(3, 259, size=75).tolist()


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens before, tokens) of each forward of one prompt that an engine in this process has run."""
    found: list[tuple[int, int]] = []
    original: Callable[..., Any] = StepProgress.forward

    @contextmanager
    def recorded(self: StepProgress, history: Any, lengths: Any) -> Iterator[None]:
        if lengths.tolist() != [1]:
            found.append((int(history[0]), int(lengths[0])))
        with original(self, history, lengths):
            yield

    monkeypatch.setattr(StepProgress, "forward", recorded)
    return found


def reachable(router: RouterHarness, record: WorkerRecord) -> bool:
    link = router.router.workers.find(record.worker_id, record.incarnation)
    return link is not None and link.reachable


@pytest.mark.parametrize(
    ("planned", "run"),
    [
        (20, [(0, 20), (20, 20), (40, 20), (60, 15)]),
        (0, [(0, 32), (32, 32), (64, 11)]),
        (500, [(0, 32), (32, 32), (64, 11)]),  # no more than the worker is configured to
    ],
)
async def test_the_engine_computes_the_chunks_that_the_router_planned(
    tiny_llama: Path, forwards: list[tuple[int, int]], planned: int, run: list[tuple[int, int]]
) -> None:
    def engine() -> Any:
        return make_engine(engine_config(tiny_llama, max_prefill_tokens=CONFIGURED))

    async with (
        router_harness(prefill_chunk_tokens=planned) as router,
        worker(WorkerRole.PREFILL, router.router.address, engine=engine(), config=test_config()) as first,
        worker(WorkerRole.DECODE, router.router.address, engine=engine(), config=test_config()) as second,
    ):
        for record in (first.runtime.record, second.runtime.record):
            await eventually(lambda record=record: reachable(router, record))  # type: ignore[misc]
        generated = await router.generate(PROMPT, model="", max_new_tokens=NEW_TOKENS, ignore_eos=True)
        assert generated.tokens == greedy(tiny_llama, PROMPT, NEW_TOKENS)
        assert forwards == run
        [prefill] = [node for node in generated.plan.nodes if node.chunk_tokens] or [None]
        assert planned == (prefill.chunk_tokens if prefill else 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"chunk_tokens": -1}, "chunk_tokens is -1, but must be at least 0"),
        ({"needed_s": -0.001}, r"needed_ms is -1\.0, but must be at least 0 and finite"),
        ({"needed_s": math.nan}, "needed_ms is nan"),
        ({"first_token_within_s": math.nan}, "first_token_within_ms is not a number"),
    ],
)
async def test_what_makes_no_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    async with (
        router_harness() as router,
        worker(WorkerRole.PREFILL, router.router.address) as prefill,
        worker(WorkerRole.DECODE, router.router.address) as decode,
    ):
        wanted = request(list(range(1, 15)))
        ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
        with pytest.raises(InvalidRequest, match=message):
            await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S, **wrong)
        planned: dict[str, Any] = {"chunk_tokens": 3, "first_token_within_s": -0.5, "needed_s": 0.25}
        first = await prefill.prefill_session.prefill(wanted, 2, ticket, timeout_s=TIMEOUT_S, **planned)
        told = prefill.engine.submitted[-1]
        assert (told.chunk_tokens, told.first_token_within_s, told.needed_s) == (3, -0.5, 0.25)
        assert await decode_all(decode, wanted, first.token_ids, first.source)
