from __future__ import annotations

import asyncio
import logging

import pytest

from sagellm_common.core.errors import PeerLost
from sagellm_common.rpc.background import Background


async def test_close_waits_its_grace_then_cancels() -> None:
    background, done = Background(), list[str]()
    go = asyncio.Event()

    async def quick() -> None:
        await go.wait()
        done.append("quick")

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            done.append("endless cancelled")
            raise

    background.spawn(quick(), "quick")
    background.spawn(endless(), "endless")
    await asyncio.sleep(0)
    go.set()
    await background.close(grace_s=0.05)
    assert done == ["quick", "endless cancelled"]
    assert len(background) == 0


async def test_on_end_is_called_even_if_it_never_began() -> None:
    background, ended = Background(), list[str]()

    async def work() -> None:
        ended.append("began")

    background.spawn(work(), "work", on_end=lambda: ended.append("end"))
    await background.close()
    await asyncio.sleep(0)
    assert ended == ["end"]


@pytest.mark.parametrize(("error", "level"), [(PeerLost("gone"), logging.INFO), (KeyError("bug"), logging.ERROR)])
async def test_errors_are_logged_and_stay_here(caplog: pytest.LogCaptureFixture, error: Exception, level: int) -> None:
    background = Background()

    async def work() -> None:
        raise error

    with caplog.at_level(logging.INFO):
        background.spawn(work(), "the work")
        await background.close(grace_s=1.0)
    (record,) = [r for r in caplog.records if r.name == "sagellm_common.rpc.background"]
    assert record.levelno == level
    assert "the work" in record.getMessage()
