from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.router_harness import RouterHarness, router_harness


@pytest.fixture
async def router() -> AsyncIterator[RouterHarness]:
    async with router_harness() as harness:
        yield harness
