from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sagellm_common.rpc.carriers import Choice
from tests.support.router_harness import RouterHarness, router_harness


@pytest.fixture
def carried_by() -> Choice:
    """The router's sessions with its workers; tests of what goes wrong override it."""
    return "auto"


@pytest.fixture
async def router(carried_by: Choice) -> AsyncIterator[RouterHarness]:
    async with router_harness(carried_by) as harness:
        yield harness
