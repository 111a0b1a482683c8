"""The handoff in every interleaving of what router, prefill and decode, the network and the clock can do.

Each bound is explored completely. `make test-states` goes deeper (minutes); the numbers are printed with -s.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from sagellm_common.comm_backend import handoff
from sagellm_common.comm_backend.handoff import HandoffSource, HandoffTarget
from sagellm_common.core.kv import Allocation
from tests.support.handoff_world import FAULTS, Bounds, World, quiesced
from tests.support.state_search import Explored, Search, Violation

MAX_STATES = 500_000

ONE = Bounds(attempts=1, lives=1)
SHALLOW = {
    "leases expire": ONE,
    **{f"one of: {kind}": ONE.but(ticks=0, faults=1, kinds={kind}) for kind in sorted(FAULTS - {"repeat"})},
    "a message comes twice": ONE.but(ticks=0, faults=1, kinds={"repeat"}, ahead=False),
    "another attempt": ONE.but(ticks=0, attempts=2, late=0, ahead=False),
    "both asked at once": ONE.but(at_once=True),
    "the id comes again": ONE.but(ticks=0, lives=2, ahead=False, cached=1),
}
DEEP = {
    "both asked at once, one fault": ONE.but(ticks=0, faults=1, kinds=FAULTS - {"repeat"}, at_once=True),
    "both asked at once, another attempt": ONE.but(ticks=0, attempts=2, late=0, ahead=False, at_once=True),
    "both asked at once, the id comes again": ONE.but(ticks=0, lives=2, ahead=False, cached=1, at_once=True),
    "leases expire twice": ONE.but(ticks=2),
    "a message comes twice, pulled ahead": ONE.but(ticks=0, faults=1, kinds={"repeat"}),
    "any two faults": ONE.but(ticks=0, faults=2, kinds=FAULTS - {"repeat"}),
    "any fault and expiry": ONE.but(faults=1, kinds=FAULTS - {"repeat"}),
    "another attempt, late messages": ONE.but(ticks=0, attempts=2, ahead=False),
    "another attempt, pulled ahead": ONE.but(ticks=0, attempts=2, late=0),
    "another attempt at another decode": ONE.but(ticks=0, attempts=2, decodes=2, late=0, ahead=False),
    "another attempt at another prefill": ONE.but(ticks=0, attempts=2, prefills=2, late=0, ahead=False),
    "another attempt after a fault": ONE.but(
        ticks=0, attempts=2, faults=1, kinds=FAULTS - {"repeat"}, late=0, ahead=False
    ),
    "the id comes again, expiry": ONE.but(lives=2, ahead=False),
}
DEEPER = pytest.mark.skipif(
    os.environ.get("HANDOFF_STATES") != "deep", reason="takes minutes; `make test-states` sets HANDOFF_STATES=deep"
)


def explore(bounds: Bounds) -> Explored:
    search: Search[World] = Search(
        events=World.events, apply=World.apply, key=World.key, check=quiesced, goal=lambda world: world.completed > 0
    )
    return search.run(World(bounds), MAX_STATES)


@pytest.mark.parametrize("name", SHALLOW)
def test_no_interleaving_breaks_it(name: str) -> None:
    _holds(name, SHALLOW[name])


@DEEPER
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", DEEP)
def test_no_interleaving_breaks_it_deeper(name: str) -> None:
    _holds(name, DEEP[name])


def _holds(name: str, bounds: Bounds) -> None:
    found = explore(bounds)
    print(f"{name}: {found.states} states, {found.transitions} transitions, depth {found.depth}, {found.goals} done")
    assert found.goals, "no request ever gets through: nothing was shown"


# ---- would it find what is broken? ----


def no_epoch_fence(patch: pytest.MonkeyPatch) -> None:
    live = HandoffSource._live
    patch.setattr(HandoffSource, "_live", lambda table, key, epoch: live(table, key, _epoch(table, key, epoch)))


def _epoch(table: HandoffSource, key: str, epoch: int) -> int:
    return table._leases[key].epoch if key in table._leases else epoch


def free_before_the_readers_are_done(patch: pytest.MonkeyPatch) -> None:
    def end(table: HandoffSource, key: str, outcome: str, by: str = "") -> Allocation:
        lease = table._leases.pop(key)
        lease.users = 0
        return lease.allocation

    patch.setattr(HandoffSource, "_end", end)
    patch.setattr(handoff._Reading, "__exit__", lambda *_: None)


def free_before_the_writer_is_done(patch: pytest.MonkeyPatch) -> None:
    def end(table: HandoffTarget, key: str, outcome: str, by: str = "") -> Allocation:
        return table._leases.pop(key).allocation

    patch.setattr(HandoffTarget, "_end", end)
    patch.setattr(handoff._Writing, "__exit__", lambda *_: None)


def free_twice_after_a_read(patch: pytest.MonkeyPatch) -> None:
    def end(table: HandoffSource, key: str, outcome: str, by: str = "") -> Allocation:
        lease = table._leases.pop(key)
        lease.ended = True
        table._still_used += bool(lease.users)
        return lease.allocation

    patch.setattr(HandoffSource, "_end", end)


def the_same_epoch_for_the_same_attempt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HandoffSource, "new_epoch", lambda table, attempt: attempt << handoff._NONCE_BITS)


def claims_by_any_prompt(patch: pytest.MonkeyPatch) -> None:
    claim = HandoffTarget.claim

    def any_subject(table: HandoffTarget, request_id: str, attempt: int, subject: bytes = b"") -> Allocation:
        lease = table._leases.get(request_id)
        return claim(table, request_id, attempt, lease.subject if lease else subject)

    patch.setattr(HandoffTarget, "claim", any_subject)


def a_claim_leaves_the_lease(patch: pytest.MonkeyPatch) -> None:
    def claim(table: HandoffTarget, request_id: str, attempt: int, subject: bytes = b"") -> Allocation:
        return table._live(request_id, attempt).allocation

    patch.setattr(HandoffTarget, "claim", claim)


def expiry_forgets_to_free(patch: pytest.MonkeyPatch) -> None:
    def expire(table: HandoffSource) -> int:
        late = [key for key, lease in table._leases.items() if lease.expires_at_s <= table._clock.now()]
        return len([table._end(key, "expired") for key in late])

    patch.setattr(HandoffSource, "expire", expire)


def leases_never_expire(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HandoffTarget, "expire", lambda _: 0)


def pins_what_was_announced_although_computed_elsewhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("sagellm_common.comm_backend.handoff.np.array_equal", lambda *_: True)


def a_failed_computation_stays_pinned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(handoff._Computing, "__exit__", lambda *_: None)


@pytest.mark.parametrize(
    ("defect", "name"),
    [
        (no_epoch_fence, "the id comes again"),
        (free_before_the_readers_are_done, "leases expire"),
        (free_before_the_writer_is_done, "leases expire"),
        (free_twice_after_a_read, "leases expire"),
        (the_same_epoch_for_the_same_attempt, "the id comes again"),
        (claims_by_any_prompt, "the id comes again"),
        (a_claim_leaves_the_lease, "leases expire"),
        (expiry_forgets_to_free, "leases expire"),
        (leases_never_expire, "leases expire"),
        (pins_what_was_announced_although_computed_elsewhere, "one of: compute elsewhere"),
        (a_failed_computation_stays_pinned, "leases expire"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_defect_is_found(
    defect: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    defect(monkeypatch)
    with pytest.raises(Violation) as found:
        explore(SHALLOW[name])
    print(found.value)
