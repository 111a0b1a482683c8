from __future__ import annotations

import numpy as np
import pytest

from sagellm_common.kv_runtime.defrag import fragmentation, plan_compaction

MAPS = {".": (True, False), "#": (False, False), "P": (False, True)}


def after(slots: str, max_moves: int) -> str:
    """The map as the plan leaves it; every move is checked."""
    free = np.array([MAPS[slot][0] for slot in slots], np.bool_)
    pinned = np.array([MAPS[slot][1] for slot in slots], np.bool_)
    plan = plan_compaction(free, pinned, max_moves)
    assert len(plan.sources) == len(plan.destinations) <= max_moves
    assert len({*plan.sources.tolist(), *plan.destinations.tolist()}) == 2 * len(plan.sources)
    moved = list(slots)
    for source, destination in zip(plan.sources, plan.destinations, strict=True):
        assert (slots[source], slots[destination]) == ("#", ".")
        moved[source], moved[destination] = ".", "#"
    return "".join(moved)


def longest(slots: str) -> int:
    return max(map(len, slots.replace("P", "#").split("#")))


@pytest.mark.parametrize(
    ("slots", "max_moves", "run"),
    [
        ("#.#.#.#.#.", 9, 5),  # all of it
        ("#.#.#.#.#.", 2, 5),
        ("#.#.#.#.#.", 1, 3),
        ("##....", 9, 4),  # nothing to gain
        ("######", 9, 0),
        ("......", 9, 6),
        ("#.P.#.P.#", 9, 3),  # pinned blocks fence runs in
        ("P.#.P....", 9, 4),
        ("#.#.#.#.#.", 0, 1),
        ("", 9, 0),
    ],
)
def test_the_longest_free_run_the_budget_allows(slots: str, max_moves: int, run: int) -> None:
    assert longest(after(slots, max_moves)) == run


def test_what_a_few_moves_would_gain_next_to_nothing_is_left() -> None:
    assert after("....###.", 3) == "....###."


def test_the_smallest_holes_are_filled() -> None:
    assert after("##.###......#...", 1) == "###" + "###......." + "..."


def test_any_map_gets_better_or_stays() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        slots = "".join(rng.choice(list("..##P"), size=int(rng.integers(1, 40))))
        moved = after(slots, int(rng.integers(0, 12)))
        assert longest(moved) >= longest(slots)
        assert moved.count("#") == slots.count("#")


def test_fragmentation_is_by_its_formulas() -> None:
    free = np.array([1, 0, 1, 1, 0, 0, 1], np.bool_)
    found = fragmentation(free, held_slots=48, wasted_slots=12)
    assert (found.internal, found.external) == (0.25, 0.5)
    assert (found.free_blocks, found.longest_free_run_blocks) == (4, 2)
    full = fragmentation(np.zeros(4, np.bool_), 0, 0)
    assert (full.internal, full.external) == (0.0, 0.0)
