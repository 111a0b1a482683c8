"""Whoever allocates frees: KV blocks in a `with`, until they are handed on."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from sagellm_common.core.kv import Allocation
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol


class OwnedBlocks:
    """Frees what it holds at the end of the `with`, whatever ended it.

    with OwnedBlocks(pool, pool.allocate(...)) as blocks:
        engine.submit(EngineRequest(..., allocation=blocks.allocation))   # raises: still ours
        blocks.hand_over()                                                # now the engine's
    """

    def __init__(self, pool: KVBackendProtocol, allocation: Allocation | None = None) -> None:
        self._pool = pool
        self._allocation = allocation

    @property
    def allocation(self) -> Allocation:
        assert self._allocation is not None, "these blocks were handed over"
        return self._allocation

    @property
    def held(self) -> bool:
        return self._allocation is not None

    def take(self, allocation: Allocation | None) -> None:
        """Becomes the owner. What was owned before must have been handed over."""
        assert self._allocation is None, "would lose track of the blocks held so far"
        self._allocation = allocation

    def hand_over(self) -> Allocation:
        """Somebody else frees them from now on."""
        allocation, self._allocation = self.allocation, None
        return allocation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if self._allocation is not None:
            self._pool.free(self.hand_over())
