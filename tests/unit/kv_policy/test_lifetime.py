"""What is learned of lifetimes: hazards, worth and skill."""

from __future__ import annotations

from sagellm_common.kv_policy.lifetime import LifetimePredictor


def test_nothing_known_the_younger_is_worth_more() -> None:
    lifetimes = LifetimePredictor()
    assert lifetimes.value((1, 2), 3) > lifetimes.value((0,), 300)


def test_a_class_that_comes_again_soon_is_worth_more_than_one_that_comes_late_or_never() -> None:
    lifetimes = LifetimePredictor(prior=0.01)
    for _ in range(200):
        lifetimes.observe((1,), 10, used=True)
        lifetimes.observe((2,), 5000, used=True)
        lifetimes.observe((3,), 5000, used=False)
    lifetimes.refresh([])
    soon, late, never = (lifetimes.value((kind,), 0) for kind in (1, 2, 3))
    assert soon > 10 * late > 10 * never
    assert lifetimes.value((1,), 1000) < soon / 100, "it is too late for those of the first class"
    assert lifetimes.value((2,), 4096) > late, "soon they come"


def test_blocks_that_lie_idle_still_count_as_not_used_so_far() -> None:
    counted, blind = LifetimePredictor(), LifetimePredictor()
    for lifetimes in (counted, blind):
        for _ in range(50):
            lifetimes.observe((1,), 100, used=True)
    blind.refresh([])
    counted.refresh([((1,), 5000)] * 200)
    assert counted.value((1,), 0) < 0.5 * blind.value((1,), 0)


def test_an_unseen_class_is_taken_for_the_one_above_it() -> None:
    lifetimes = LifetimePredictor()
    for _ in range(50):
        lifetimes.observe((1, 1), 10, used=True)
    lifetimes.refresh([])
    assert lifetimes.value((1, 7), 0) == lifetimes.value((1,), 0)


def test_skill_is_judged_on_what_was_foretold() -> None:
    lifetimes = LifetimePredictor()
    assert lifetimes.skill == 0.0
    for _ in range(2):
        for _ in range(300):
            lifetimes.observe((1,), 10, used=True)
            lifetimes.observe((2,), 10, used=False)
        lifetimes.refresh([])
    assert lifetimes.skill > 0.9


def test_what_was_learned_long_ago_fades() -> None:
    lifetimes = LifetimePredictor(memory=100)
    for _ in range(200):
        lifetimes.observe((1,), 10, used=True)
    for _ in range(8):
        lifetimes.refresh([])
        for _ in range(100):
            lifetimes.observe((1,), 10, used=False)
    lifetimes.refresh([])
    fresh = LifetimePredictor()
    for _ in range(100):
        fresh.observe((1,), 10, used=True)
        fresh.observe((1,), 10, used=False)
    fresh.refresh([])
    assert lifetimes.value((1,), 0) < 0.5 * fresh.value((1,), 0)
