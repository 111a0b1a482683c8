"""Many models on few workers: where groups and batches go, and how long their turns are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_common.core.errors import NoWorker
from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.strategies import ModelWork, RequestView, WorkerView, make_strategy
from sagellm_common.scheduler_ir.strategies.aegaeon import MAX_GROUP, MAX_QUOTA_S, decode_quotas, round_share

MODELS = ("a", "b", "c")
REQUEST = RequestView("r", 1000, ttft_target_s=1.0, tpot_target_s=0.1, model="a")


def learned() -> CostModel:
    """0.1 ms a prompt token, 1 ms a sequence in a step, a second per switch."""
    costs = CostModel()
    for i in range(1, 65):
        costs.observe_prefill([(0, 100 * i)], 1e-2 * i)
        costs.observe_decode(i, 0, 1e-3 * i)
        costs.observe_switch(1.0)
    return costs


def prefill(name: str, model: str, *groups: tuple[str, int], hosts: tuple[str, ...] = MODELS) -> WorkerView:
    queue = tuple(ModelWork(group, requests, 1000 * requests) for group, requests in groups)
    tokens = sum(group.tokens for group in queue)
    return WorkerView(name, WorkerRole.PREFILL, model=model, hosts=hosts, queue=queue, queued_tokens=tokens)


def decode(name: str, *batches: tuple[str, int]) -> WorkerView:
    work = tuple(ModelWork(model, requests) for model, requests in batches)
    return WorkerView(name, WorkerRole.DECODE, hosts=MODELS, model=work[0].model if work else "", batches=work)


@pytest.mark.parametrize(
    ("workers", "chosen"),
    [
        ([prefill("p0", "b"), prefill("p1", "b", ("b", 2), ("a", 3))], "p1"),  # a group with room, though it waits
        ([prefill("p0", "b"), prefill("p1", "b", ("a", MAX_GROUP))], "p0"),  # full: another one, where less is queued
        ([prefill("p0", "b"), prefill("p1", "a")], "p1"),  # a second of switching saved
        ([prefill("p0", "b", ("c", 1), ("b", 1)), prefill("p1", "a", ("a", MAX_GROUP))], "p1"),  # switches wait, too
        ([prefill("p0", "b"), prefill("p1", "a", hosts=("b", "c"))], "p0"),  # who does not host it cannot have it
    ],
    ids=["joins", "full", "loaded", "switches", "hosts"],
)
def test_prefill_by_groups(workers: list[WorkerView], chosen: str) -> None:
    placement = make_strategy("aegaeon", learned()).place(REQUEST, [*workers, decode("d0")])
    assert placement.prefill_worker_id == chosen


@pytest.mark.parametrize(
    ("workers", "chosen"),
    [
        ([decode("d0", ("b", 5)), decode("d1", ("a", 5), ("b", 5))], "d1"),  # its batch
        ([decode("d0", ("b", 5)), decode("d1", ("a", 50), ("c", 50))], "d0"),  # cannot take one more in time
        ([decode("d0", ("b", 5)), decode("d1")], "d1"),
    ],
    ids=["its batch", "too full", "idle"],
)
def test_decode_by_batches(workers: list[WorkerView], chosen: str) -> None:
    placement = make_strategy("aegaeon", learned()).place(REQUEST, [prefill("p0", "a"), *workers])
    assert placement.decode_worker_id == chosen


def test_who_has_to_load_the_model_first_is_named() -> None:
    def switching(*workers: WorkerView) -> tuple[str, ...]:
        return make_strategy("aegaeon", learned()).place(REQUEST, workers).switch_worker_ids

    assert switching(prefill("p0", "b"), decode("d0", ("a", 1))) == ("p0",)
    assert switching(prefill("p0", "b", ("a", 1)), decode("d0", ("b", 1))) == ("d0",)  # loaded by its turn
    single = WorkerView("p0", WorkerRole.PREFILL), WorkerView("d0", WorkerRole.DECODE)
    assert switching(*single) == ()  # one model per worker: there is none to switch to


def test_a_model_that_nobody_hosts() -> None:
    with pytest.raises(NoWorker, match="model 'z'"):
        make_strategy("aegaeon").place(RequestView("r", 1, model="z"), [decode("d0")])


@given(
    st.lists(st.floats(1e-4, 0.02), min_size=2, max_size=6),
    st.floats(0.05, 0.2),
    st.floats(0.01, 0.3),
)
def test_a_rounds_tokens_last_its_readers_alike(steps_s: list[float], target_s: float, switch_s: float) -> None:
    """Each batch makes tokens for as long as all others' readers, too, and for the round where that can be."""
    quotas = decode_quotas(steps_s, target_s, switch_s)
    share = round_share(steps_s, target_s, switch_s)
    round_s = sum(quotas) + len(steps_s) * switch_s
    lasts_s = [quota / step_s * target_s for quota, step_s in zip(quotas, steps_s, strict=True)]
    assert max(quotas) <= MAX_QUOTA_S * (1 + 1e-9)
    stretched = [quota <= step_s for quota, step_s in zip(quotas, steps_s, strict=True)]
    if not any(stretched):
        assert lasts_s == pytest.approx([lasts_s[0]] * len(lasts_s))
        assert round_s / lasts_s[0] == pytest.approx(share)


def test_a_batch_alone_has_no_rounds() -> None:
    assert decode_quotas([0.01], 0.1, 1.0) == [MAX_QUOTA_S]
    assert round_share([0.01], 0.1, 1.0) == pytest.approx(0.1)
