"""Who waits for a place at the workers, who of them is next, and who gives way to whom when there is no room.

next        of the tenant that has been served least, each level of priority worth HEAD_START_TOKENS, the first by
            the engines' order; who is too late anyway comes after all who are not. One turn in PATIENT_EVERY is
            that of who came first, once that one has waited PATIENCE_S: nobody starves
gives way   the lowest priority, if that is lower than the newcomer's; else, of a tenant with more requests here
            than the newcomer's will have, the latest
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from sagellm_common.scheduler_ir.engine_policy import Order, RankedPolicy, SequenceView
from sagellm_common.scheduler_ir.fairness import TokenCounters

HEAD_START_TOKENS = 4096
"""A finite one: who has it in every request waits for others all the same, once it was served so much more."""
PATIENCE_S = 30.0
PATIENT_EVERY = 4


@dataclass(frozen=True, slots=True)
class Waiting:
    """`tokens` are what serving it counts for in its tenant's share; see `service_tokens`."""

    view: SequenceView
    tenant: str = ""
    tokens: int = 0


Ranked = tuple[tuple[float, ...], int, Waiting]


@dataclass(slots=True)
class _Line:
    """Of one tenant: heaps by rank. Who has left since is dropped where it comes up."""

    in_time: list[Ranked] = field(default_factory=list)
    late: list[Ranked] = field(default_factory=list)
    count: int = 0


class WaitingRoom:
    """Pure bookkeeping. A turn costs O(log requests + tenants that wait). `fair` False: tenants make no difference."""

    def __init__(self, order: Order, *, fair: bool) -> None:
        self.order = order
        self._policy = RankedPolicy(order=order)
        self._by_deadline = order in ("feasible", "on_time")
        self.fair = fair
        self._waiting: dict[str, Waiting] = {}
        """By request id, as they came."""
        self._lines: dict[str, _Line] = {}
        self._served = TokenCounters()
        self._turns = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        """As they came."""
        return iter(self._waiting.values())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def push(self, one: Waiting) -> None:
        """Raises ValueError for an id that waits already."""
        request_id = one.view.request_id
        if request_id in self._waiting:
            raise ValueError(f"request {request_id} waits already")
        self._waiting[request_id] = one
        self._served.enter(one.tenant)
        line = self._lines.setdefault(self._line_of(one), _Line())
        line.count += 1
        heapq.heappush(line.in_time, (self._policy.rank(one.view), one.view.arrival, one))

    def remove(self, request_id: str) -> None:
        """It waits no longer, and has got nothing. A no-op for others."""
        if (one := self._waiting.pop(request_id, None)) is None:
            return
        self._served.leave(one.tenant)
        name = self._line_of(one)
        self._lines[name].count -= 1
        if not self._lines[name].count:
            del self._lines[name]

    def peek(self, now_s: float) -> Waiting | None:
        """Who is next; None when nobody waits."""
        if not self._waiting:
            return None
        eldest = next(iter(self))
        if self._turns % PATIENT_EVERY == 0 and now_s - eldest.view.arrived_s >= PATIENCE_S:
            return eldest
        heads = [(name, self._head(line, now_s)) for name, line in self._lines.items()]
        return min(heads, key=lambda found: (*found[1][0], self._behind(found[1][1]), found[0]))[1][1]

    def pop(self, now_s: float) -> Waiting | None:
        """`peek`, and the turn is its: its tenant has got its tokens by that."""
        if (chosen := self.peek(now_s)) is not None:
            self._turns += 1
            self._served.charge(chosen.tenant, chosen.tokens)
            self.remove(chosen.view.request_id)
        return chosen

    def charge(self, tenant: str, tokens: int) -> None:
        """For one that did not have to wait; less than 0 gives back what a request was charged for and did not use."""
        self._served.charge(tenant, tokens)

    def gives_way_to(self, newcomer: Waiting) -> Waiting | None:
        """Who is to leave so that the newcomer can wait; None: nobody, it is the one to be turned away."""
        if not self._waiting:
            return None
        latest_first = [*self._waiting.values()][::-1]
        lowest = min(latest_first, key=lambda one: one.view.priority)
        if lowest.view.priority < newcomer.view.priority:
            return lowest
        if not self.fair:
            return None
        counts = Counter(one.tenant for one in latest_first)
        crowd, most = counts.most_common(1)[0]
        if most <= counts[newcomer.tenant] + 1:
            return None
        of_crowd = (one for one in latest_first if one.tenant == crowd)
        return next((one for one in of_crowd if one.view.priority <= newcomer.view.priority), None)

    def _line_of(self, one: Waiting) -> str:
        return one.tenant if self.fair else ""

    def _head(self, line: _Line, now_s: float) -> tuple[tuple[bool], Waiting]:
        """The first of a line, and whether it is late."""
        while line.in_time:
            _, arrival, one = line.in_time[0]
            if self._waiting.get(one.view.request_id) is not one:
                heapq.heappop(line.in_time)
            elif self._by_deadline and now_s + one.view.needed_s > one.view.deadline_s:
                heapq.heappop(line.in_time)
                heapq.heappush(line.late, ((one.view.needed_s,), arrival, one))
            else:
                return (False,), one
        while self._waiting.get(line.late[0][2].view.request_id) is not line.late[0][2]:
            heapq.heappop(line.late)
        return (True,), line.late[0][2]

    def _behind(self, one: Waiting) -> int:
        """Where its tenant stands: the least first."""
        return self._served[one.tenant] - HEAD_START_TOKENS * one.view.priority if self.fair else 0
