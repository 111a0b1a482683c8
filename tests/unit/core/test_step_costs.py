"""The log of steps: each is told once to everybody who asks in time."""

from __future__ import annotations

from sagellm_common.core.step_costs import StepCost, StepLog


def test_each_reader_is_told_what_is_new_to_it() -> None:
    log = StepLog(kept=3)
    assert log.after(0) == (0, [])
    steps = [StepCost(float(i), sequences=1) for i in range(1, 6)]
    for step in steps[:2]:
        log.add(step)
    assert log.after(0) == (2, steps[:2])
    assert log.after(1) == (2, steps[1:2])
    for step in steps[2:]:
        log.add(step)
    assert log.after(0) == log.after(1) == (5, steps[2:]), "older ones are forgotten"
    assert log.after(4) == (5, steps[4:])
    assert log.after(5) == (5, [])


def test_chunks_become_the_features_of_their_step() -> None:
    step = StepCost.prefill([(0, 10), (4, 6)], 0.5, 0.25)
    assert step == StepCost(0.5, prompts=2, prompt_tokens=12, prompt_squares=100 + 36 - 16, cpu_seconds=0.25)
