from __future__ import annotations

import asyncio

from sagellm_common.core.topology import SnapshotFeed, TopologySnapshot
from tests.support.topology import make_record


def snapshot(revision: int) -> TopologySnapshot:
    return TopologySnapshot(revision, "embedded", True, (make_record(),))


def test_find() -> None:
    assert snapshot(1).find("prefill-0") == make_record()
    assert snapshot(1).find("other") is None


async def test_a_slow_reader_skips_to_the_latest_and_misses_nothing_last() -> None:
    feed = SnapshotFeed(snapshot(0))
    changes = aiter(feed.changes())
    assert (await anext(changes)).revision == 0
    for revision in (1, 2, 3):
        feed.publish(snapshot(revision))
    assert (await anext(changes)).revision == 3


async def test_each_reader_gets_each_change() -> None:
    feed = SnapshotFeed(snapshot(0))
    seen: dict[int, list[int]] = {0: [], 1: []}

    async def read(reader: int) -> None:
        async for s in feed.changes():
            seen[reader].append(s.revision)
            if s.revision == 2:
                return

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for reader in seen:
            group.create_task(read(reader))
        for revision in (1, 2):
            await asyncio.sleep(0)
            feed.publish(snapshot(revision))
    assert seen == {0: [0, 1, 2], 1: [0, 1, 2]}


async def test_the_same_again_is_no_change() -> None:
    feed = SnapshotFeed(snapshot(0))
    changes = aiter(feed.changes())
    await anext(changes)
    waiting = asyncio.ensure_future(anext(changes))
    feed.publish(snapshot(0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    feed.publish(snapshot(1))
    assert (await waiting).revision == 1
