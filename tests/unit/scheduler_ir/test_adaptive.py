"""When adaptive changes its mind, and when it does not."""

from __future__ import annotations

from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.strategies import RequestView, WorkerView
from sagellm_common.scheduler_ir.strategies.adaptive import Adaptive

REQUEST = RequestView("r", 1000, ttft_target_s=1.0)


def learned() -> CostModel:
    """0.1 ms a prompt token."""
    costs = CostModel()
    for tokens in range(100, 1100, 100):
        costs.observe_prefill([(0, tokens)], 1e-4 * tokens)
    return costs


def workers(queued_tokens: int) -> list[WorkerView]:
    return [
        WorkerView("p0", WorkerRole.PREFILL, queued_tokens=queued_tokens),
        WorkerView("p1", WorkerRole.PREFILL, queued_tokens=queued_tokens),
        WorkerView("d0", WorkerRole.DECODE),
    ]


def test_it_changes_by_load_and_not_at_every_ripple_between_the_bounds() -> None:
    strategy = Adaptive(learned())
    seen = []
    for waits_s in (0.0, 0.2, 0.29, 0.31, 0.2, 0.11, 0.09, 0.2, 0.4):
        placement = strategy.place(REQUEST, workers(round(waits_s * 1e4)))
        seen.append(strategy.is_busy)
        assert placement.strategy == "adaptive"
        assert placement.reason.startswith("busy" if strategy.is_busy else "calm")
        assert bool(placement.expected_s) == strategy.is_busy  # hybrid forecasts, fifo does not
    assert seen == [False, False, False, True, True, True, False, False, True]


def test_decode_steps_near_their_target_are_load_too() -> None:
    costs = learned()
    for sequences in range(1, 65):
        costs.observe_decode(sequences, 0, 1e-3 * sequences)
    strategy = Adaptive(costs)
    request = RequestView("r", 10, tpot_target_s=0.05)
    decoding = [WorkerView("p0", WorkerRole.PREFILL), WorkerView("d0", WorkerRole.DECODE, sequences=45)]
    strategy.place(request, decoding)
    assert strategy.is_busy


def test_while_nothing_is_learned_it_is_calm() -> None:
    strategy = Adaptive()
    strategy.place(REQUEST, workers(10**9))
    assert not strategy.is_busy
