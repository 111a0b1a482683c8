"""Whether the plan overlaps a transfer, and that the workers hear of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sagellm_common.core.config import TransportConfig
from sagellm_common.core.topology import LinkCost
from sagellm_common.core.types import KvLayout
from services.router.transfers import TransferPlanner
from tests.support.router_harness import RouterHarness
from tests.support.topology import MODEL, make_record
from tests.support.waiting import eventually

SLOW = LinkCost("prefill-0", "decode-0", "tcp", 1e-4, 1e6)


def worker(worker_id: str) -> Any:
    return SimpleNamespace(worker_id=worker_id, record=make_record(worker_id))


def planner(link: LinkCost | None = SLOW, **settings: Any) -> TransferPlanner:
    return TransferPlanner(TransportConfig(**settings), lambda source, target: link)


def plan(transfers: TransferPlanner, compute_tokens: int = 1000, move_tokens: int = 1000) -> Any:
    return transfers.plan(
        worker("prefill-0"), worker("decode-0"), compute_tokens=compute_tokens, move_tokens=move_tokens
    )


def test_what_takes_long_on_the_link_is_moved_along() -> None:
    transfers = planner()
    transfers.observe("prefill-0", 1000, 2.0)
    planned = plan(transfers)
    # 63 blocks of 16 KiB at 1 MB/s behind two seconds of prefill.
    assert planned.overlap
    assert planned.segment_bytes >= 8192
    assert planned.exposed_without_s == pytest.approx(63 * 16384 / 1e6, rel=0.1)
    assert not plan(transfers, compute_tokens=1).overlap or plan(transfers, compute_tokens=1).exposed_s > 0.9


@pytest.mark.parametrize("settings", [{"overlap": "off"}, {"overlap_min_bytes": 5}])
def test_a_configuration_that_decides_itself_is_not_planned_over(settings: dict[str, Any]) -> None:
    transfers = planner(**settings)
    transfers.observe("prefill-0", 1000, 2.0)
    assert plan(transfers) is None


def test_what_is_not_known_is_not_planned() -> None:
    assert plan(planner()) is None
    unmeasured = planner(None)
    unmeasured.observe("prefill-0", 1000, 2.0)
    assert plan(unmeasured) is None
    cached = planner()
    cached.observe("prefill-0", 0, 2.0)
    cached.observe("prefill-0", 1000, 2.0)
    assert plan(cached, move_tokens=0) is None
    assert plan(cached, compute_tokens=0) is None


@pytest.mark.parametrize(
    ("link", "settings", "says"),
    [
        (SLOW, {"wire_dtype": "auto"}, "int8"),
        (replace(SLOW, bytes_per_s=1e12), {"wire_dtype": "auto"}, "same"),
        (None, {"wire_dtype": "auto"}, ""),
        (None, {"wire_dtype": "int8"}, "int8"),
        (SLOW, {}, "same"),
    ],
    ids=["slow", "fast", "unmeasured", "configured", "by-default"],
)
def test_the_dtype_on_the_link(link: LinkCost | None, settings: dict[str, Any], says: str) -> None:
    layout = KvLayout("tiny", "float32", 16, 2, 2, 64, 16 * 2 * 2 * 2 * 64 * 4)
    model = replace(MODEL, kv_layout=layout)
    ends = [
        SimpleNamespace(worker_id=name, record=make_record(name, model=model)) for name in ("prefill-0", "decode-0")
    ]
    transfers: Any = planner(link, **settings)
    assert transfers.wire_dtype(*ends, 1000) == says
    ends[0].record = make_record("prefill-0", model=model, transport="gloo")
    assert transfers.wire_dtype(*ends, 1000) == "", "its source does not convert"


@pytest.mark.parametrize(("bytes_per_s", "overlaps"), [(1e3, True), (1e12, False)], ids=["slow", "fast"])
async def test_the_plan_says_so_and_the_workers_do_it(
    router: RouterHarness, bytes_per_s: float, overlaps: bool
) -> None:
    prefill, decode = await router.pair()
    prefill.announces = True
    first = await router.generate(request_id="first")
    assert not [node for node in first.plan.nodes if node.HasField("overlap")]
    registration = decode._registration
    assert registration is not None
    await registration.publish_links([LinkCost("prefill-0", "decode-0", "tcp", 0.0, bytes_per_s)])
    await eventually(lambda: router.router.workers.cost("prefill-0", "decode-0") is not None)
    before = len(decode.pulling_ahead)
    second = await router.generate(request_id="second")
    assert second.tokens == first.tokens
    (node,) = [node for node in second.plan.nodes if node.HasField("overlap")]
    assert (node.overlap, node.segment_bytes > 0) == (overlaps, overlaps)
    assert len(decode.pulling_ahead) - before == overlaps
    request = prefill.requests[-1]
    assert (request.announce, request.overlap, request.segment_bytes) == (overlaps, overlaps, node.segment_bytes)
    assert ("along the prefill" if overlaps else "after the prefill") in second.plan.reason
    transfer = second.plan.nodes[-2]
    assert transfer.wire_dtype == "same"
    assert decode.requests[-1].wire_dtype == "same"
    assert {ahead.wire_dtype for ahead in decode.pulling_ahead[before:]} == ({"same"} if overlaps else set())
    await router.assert_nothing_held()
