"""The changes of the store's pool for whoever watches the store alone; a router's watch has them with the status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from sagellm_common.rpc.block_journal import BlockChanges, BlockJournal

INTERVAL_S = 0.05


async def watch(journal: BlockJournal, from_revision: int) -> AsyncIterator[BlockChanges]:
    """Everything after `from_revision`: a snapshot first where that is unknown or too long ago, then what changes."""
    seen = from_revision
    while True:
        for changes in journal.after(seen):
            seen = changes.revision
            yield changes
        await asyncio.sleep(INTERVAL_S)
