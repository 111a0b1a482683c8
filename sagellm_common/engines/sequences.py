"""Sequences in an engine, each with somebody who waits for it, and their blocks, which change owners on the way."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sagellm_common.core.errors import Draining
from sagellm_common.core.types import FinishReason
from sagellm_common.engines.base import Engine, EngineRequest, SequenceOutput
from sagellm_common.kv_runtime.owned_blocks import OwnedBlocks

Take = Callable[[SequenceOutput], None]
"""Takes one output within the engine's step: it must not wait."""


@dataclass(slots=True, eq=False)
class _Sequence:
    """`last` gets the output that ends it; cancelled, nobody is interested any more."""

    request_id: str
    take: Take
    last: asyncio.Future[SequenceOutput]
    taken_out: bool = False


class Sequences:
    """`on_step` is the engine's callback."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: dict[str, _Sequence] = {}
        self._numbers = itertools.count()

    async def run(self, request: EngineRequest, blocks: OwnedBlocks, take: Take) -> SequenceOutput:
        """Runs a sequence to its end, on `blocks` if there are any; returns its last output. `take` gets all outputs.

        The engine owns the blocks meanwhile. Afterwards, whatever ended it, `blocks` has those it gave back, if
        `request.hold_blocks` asked for them or it was taken out; then the output says CANCELLED. Raises what `submit`
        raises, the error the sequence ended with, and Draining when the engine was stopped.
        """
        # Numbered, for a cancelled sequence may still be in the engine when its request comes again.
        engine_id = f"{request.request_id}#{next(self._numbers)}"
        allocation = blocks.allocation if blocks.held else None
        sequence = self._running[engine_id] = _Sequence(
            request.request_id, take, asyncio.get_running_loop().create_future()
        )
        try:
            self._engine.submit(replace(request, request_id=engine_id, allocation=allocation))
        except BaseException:
            del self._running[engine_id]
            raise
        if blocks.held:
            blocks.hand_over()
        try:
            output = await sequence.last
        except asyncio.CancelledError:
            # Either the engine has just let go and the blocks are ours again, or `on_step` frees them once it does.
            if sequence.last.cancelled():
                self._engine.cancel(engine_id)
            else:
                blocks.take(sequence.last.result().held)
            raise
        blocks.take(output.held)
        if output.error is not None:
            raise output.error
        if output.finish_reason is FinishReason.CANCELLED and not sequence.taken_out:
            raise Draining(f"request {request.request_id}: the engine of this worker was stopped")
        return output

    def take_out(self, request_id: str) -> None:
        """Ends the request's sequence after the step under way; whoever waits gets its blocks. A no-op for others."""
        for engine_id, sequence in self._running.items():
            if sequence.request_id == request_id:
                sequence.taken_out = True
                self._engine.take_out(engine_id)

    def on_step(self, outputs: Sequence[SequenceOutput]) -> None:
        """Passes outputs on at once, and wakes whoever waits when a sequence ends."""
        for output in outputs:
            sequence = self._running[output.request_id]
            finished = output.finish_reason is not None
            if finished:
                del self._running[output.request_id]
            if sequence.last.cancelled():
                if output.held is not None:
                    self._engine.kv.free(output.held)
                continue
            sequence.take(output)
            if finished:
                sequence.last.set_result(output)
