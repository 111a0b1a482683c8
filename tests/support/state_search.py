"""Breadth-first search through everything a system can do."""

from __future__ import annotations

import copyreg
import pickle
import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S")

Event = tuple[object, ...]

# States are copied by pickling them: in C, and identities within a state stay. An open lock is like any other.
copyreg.pickle(type(threading.Lock()), lambda lock: (threading.Lock, ()))


class Violation(AssertionError):
    """The system did what it must never do."""


@dataclass(frozen=True, slots=True)
class Explored:
    states: int
    transitions: int
    depth: int
    goals: int
    """States for which `goal` holds."""


class Search(Generic[S]):
    """All states that `events` and `apply` lead to from a first one. Each is checked once, when it is found; `check`
    may use it up.

    A Violation carries the shortest way there.
    """

    def __init__(
        self,
        events: Callable[[S], Iterable[Event]],
        apply: Callable[[S, Event], None],
        key: Callable[[S], Hashable],
        check: Callable[[S], None],
        goal: Callable[[S], bool],
    ) -> None:
        self._events, self._apply, self._key, self._check, self._goal = events, apply, key, check, goal

    def run(self, first: S, max_states: int) -> Explored:
        """Raises Violation, and AssertionError beyond max_states: then nothing was proved."""
        seen: dict[Hashable, int] = {self._key(first): 0}
        came_from: list[tuple[int, Event]] = [(0, ("start",))]
        frontier = [(0, pickle.dumps(first, 5))]
        transitions = depth = goals = 0
        while frontier:
            found = []
            for number, frozen in frontier:
                state = pickle.loads(frozen)
                goals += self._goal(state)
                for event in list(self._events(state)):
                    state = pickle.loads(frozen)
                    try:
                        self._apply(state, event)
                        key = self._key(state)
                        transitions += 1
                        if key in seen:
                            continue
                        frozen_next = pickle.dumps(state, 5)
                        self._check(state)
                    except Violation as err:
                        way = [*self._way(came_from, number), event]
                        raise Violation(f"{err}, after\n" + "\n".join(f"  {step}" for step in way)) from err
                    seen[key] = len(came_from)
                    assert len(seen) <= max_states, f"more than {max_states} states"
                    came_from.append((number, event))
                    found.append((seen[key], frozen_next))
            depth += bool(found)
            frontier = found
        return Explored(len(seen), transitions, depth, goals)

    @staticmethod
    def _way(came_from: list[tuple[int, Event]], number: int) -> list[Event]:
        steps: list[Event] = []
        while number:
            number, event = came_from[number]
            steps.append(event)
        return steps[::-1]
