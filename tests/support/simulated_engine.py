"""A small Engine over real bytes, in which wrong KV gives wrong tokens.

Each token has a 16-byte slot of KV: a hash over the token and the KV of all tokens before it, as read from the blocks.
The next token is a hash over the KV of all tokens so far. So a block that is missing, stale or misplaced anywhere in
the prefix changes every token after it, as in a real model, and `reference` says what must come out. As in a real model
half of a slot is in the block's keys, half in its values.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import xxhash

from sagellm_common.core.config import TenantConfig
from sagellm_common.core.errors import ContextTooLong, EngineFailed, InvalidRequest, KvExhausted, SageError
from sagellm_common.core.kv import Allocation, LayerPart
from sagellm_common.core.step_costs import StepLog
from sagellm_common.core.types import (
    FinishReason,
    KvLayout,
    ModelInfo,
    SamplingParams,
    TokenLogprob,
    as_token_ids,
)
from sagellm_common.engines.base import EngineRequest, EngineStats, SequenceOutput, StepCallback
from sagellm_common.kv_runtime.backends.mock import MockKvPool

SLOT_BYTES = 16
HALF_BYTES = SLOT_BYTES // 2
VOCAB_SIZE = 997
ENGINE_S = 0.25
"""What each output says that it took."""


def _slot(before: bytes, token: int) -> bytes:
    return xxhash.xxh3_128_digest(before + token.to_bytes(4, "little"))


def _sample(kv: bytes, sampling: SamplingParams) -> int:
    """A function of the whole prefix and, when sampling, of the seed: deterministic by position either way."""
    salt = b"" if sampling.greedy else repr(sampling.seed).encode()
    return xxhash.xxh3_64_intdigest(kv + salt) % VOCAB_SIZE


def reference(prompt: list[int], sampling: SamplingParams) -> tuple[list[int], FinishReason]:
    """What an undisturbed engine generates, computed without blocks, caches or steps."""
    kv = b""
    for token in prompt:
        kv += _slot(kv, token)
    tokens: list[int] = []
    while True:
        token = _sample(kv, sampling)
        if token in sampling.stop_token_ids:
            return tokens, FinishReason.STOP
        tokens.append(token)
        if len(tokens) == sampling.max_new_tokens:
            return tokens, FinishReason.LENGTH
        kv += _slot(kv, token)


def _layer_parts(layout: KvLayout) -> tuple[LayerPart, ...]:
    """Keys of all layers, then values of all layers: half of each slot, and of that each layer has its share."""
    half = layout.block_bytes // 2
    return (LayerPart(0, half // layout.num_layers), LayerPart(half, half // layout.num_layers))


class SimulatedPool(MockKvPool):
    """The pool whose blocks hold what `_slot` makes of tokens."""

    def __init__(self, layout: KvLayout, num_blocks: int, tenants: Mapping[str, TenantConfig] | None = None) -> None:
        super().__init__(layout, num_blocks, layer_parts=_layer_parts(layout), tenants=tenants)
        self._share_bytes = HALF_BYTES // layout.num_layers

    def forget(self) -> None:
        """Empties the prefix cache of what nobody uses, as a restart would."""
        with self.lock:
            self.cache.remove([key for key in self.cache.hashes() if self.cache.idle(key)])

    def read(self, allocation: Allocation, num_tokens: int) -> bytes:
        """The KV of the first tokens, as it stands in the blocks."""
        region = self.regions()
        shape = (region.num_blocks, 2 * self.layout.num_layers, -1, self._share_bytes)
        blocks = np.frombuffer(region.view, np.uint8).reshape(shape)
        return blocks[allocation.block_ids].transpose(0, 2, 1, 3).tobytes()[: num_tokens * SLOT_BYTES]

    def write(self, allocation: Allocation, position: int, slot: bytes, layers: Iterable[int] | None = None) -> None:
        """Layers `layers` of a slot; None: all."""
        index, offset = divmod(position, self.layout.block_size_tokens)
        assert index >= allocation.num_shared_blocks, "would write to a shared block"
        block, size, num_layers = (
            self.regions().block(int(allocation.block_ids[index])),
            self._share_bytes,
            self.layout.num_layers,
        )
        for layer in range(num_layers) if layers is None else layers:
            for plane in (layer, num_layers + layer):
                at = (plane * self.layout.block_size_tokens + offset) * size
                block[at : at + size] = slot[plane * size : (plane + 1) * size]


@dataclass(slots=True, eq=False)
class _Sequence:
    request: EngineRequest
    tokens: list[int]
    num_generated: int
    allocation: Allocation | None
    cancelled: bool = False
    taken_out: bool = False
    computed: int = field(default=0)
    layers: int = 0
    """Written of the chunk under way."""


class SimulatedEngine:
    """Steps on the event loop, one pass of it per step. `pause` holds it before its next step, `resume` lets it go.

    A sequence with `progress` advances by one layer of a chunk per step, others by a chunk.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size_tokens: int = 4,
        context_length_tokens: int = 128,
        max_prefill_tokens: int = 8,
        model: str = "simulated",
        num_layers: int = 2,
        tenants: Mapping[str, TenantConfig] | None = None,
    ) -> None:
        dim = HALF_BYTES // 4 // num_layers
        layout = KvLayout(model, "float32", block_size_tokens, num_layers, 1, dim, block_size_tokens * SLOT_BYTES)
        self.model = ModelInfo(model, f"/models/{model}", context_length_tokens, VOCAB_SIZE, layout)
        self.description = "simulated"
        self.kv = SimulatedPool(layout, num_blocks, tenants)
        self.failure: SageError | None = None
        """Set, the next step ends every sequence with it."""
        self._max_prefill_tokens = max_prefill_tokens
        self._sequences: dict[str, _Sequence] = {}
        self._steps = 0
        self.step_log = StepLog()
        self._work = asyncio.Event()
        self._running = asyncio.Event()
        self._running.set()
        self._task: asyncio.Task[None] | None = None
        self.ended = asyncio.Event()
        self.submitted: list[EngineRequest] = []
        self.cancelled: list[str] = []
        self.taken_out: list[str] = []

    async def start(self, on_step: StepCallback) -> None:
        self._on_step = on_step
        self._task = asyncio.create_task(self._run(), name=f"engine-{self.model.name}")

    def submit(self, request: EngineRequest) -> None:
        if self._task is None:
            raise EngineFailed("the engine is not running")
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request_id {request.request_id!r} is running already")
        left = request.sampling.max_new_tokens - request.num_emitted_tokens
        if len(request.token_ids) + left > self.model.context_length_tokens:
            raise ContextTooLong(f"{len(request.token_ids)} tokens + {left} exceed the context")
        self.submitted.append(replace(request, allocation=None))
        tokens = request.token_ids.tolist()
        sequence = _Sequence(request, tokens, request.num_emitted_tokens, request.allocation)
        if request.allocation is not None:
            assert request.allocation.num_cached_tokens < len(tokens), "nothing is left to compute"
            sequence.computed = request.allocation.num_cached_tokens
        self._sequences[request.request_id] = sequence
        self._work.set()

    def cancel(self, request_id: str) -> None:
        if request_id in self._sequences:
            self._sequences[request_id].cancelled = True
            self.cancelled.append(request_id)

    def take_out(self, request_id: str) -> None:
        if request_id in self._sequences:
            self._sequences[request_id].taken_out = True
            self.taken_out.append(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._sequences), waiting=0, steps=self._steps)

    def pause(self) -> None:
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            for sequence in self._sequences.values():
                sequence.cancelled = True
            self.step()
        self.ended.set()

    def step(self) -> None:
        """One step of all sequences, and its callback."""
        self._steps += 1
        outputs = [output for key in list(self._sequences) if (output := self._advance(key)) is not None]
        self.failure = None
        if outputs:
            self._on_step(outputs)

    async def _run(self) -> None:
        while True:
            if not self._sequences:
                self._work.clear()
                await self._work.wait()
            await self._running.wait()
            self.step()
            await asyncio.sleep(0)  # everybody else's turn

    def _advance(self, key: str) -> SequenceOutput | None:
        sequence = self._sequences[key]
        if sequence.cancelled:
            return self._finish(sequence, FinishReason.CANCELLED)
        if sequence.taken_out and not sequence.layers:
            return self._finish(sequence, FinishReason.CANCELLED, hold=True)
        if self.failure is not None:
            return self._finish(sequence, FinishReason.ERROR, error=self.failure)
        try:
            return self._compute(sequence)
        except KvExhausted as err:
            return self._finish(sequence, FinishReason.ERROR, error=err)

    def _compute(self, sequence: _Sequence) -> SequenceOutput | None:
        tokens, sampling = sequence.tokens, sequence.request.sampling
        if sequence.allocation is None:
            known = as_token_ids(tokens)
            sequence.allocation = self.kv.allocate(
                known, len(tokens), sequence.request.cache_salt, sequence.request.tenant
            )
            sequence.computed = sequence.allocation.num_cached_tokens
        blocks = sequence.allocation
        self.kv.extend(blocks, len(tokens))
        kv = self.kv.read(blocks, sequence.computed)
        layers = self._next_layers(sequence)
        most = self._max_prefill_tokens
        chunk = tokens[sequence.computed :][: min(sequence.request.chunk_tokens or most, most)]
        for position, token in enumerate(chunk, sequence.computed):
            slot = _slot(kv, token)
            self.kv.write(blocks, position, slot, layers)
            kv += slot
        if not self._chunk_done(sequence, len(chunk), layers):
            return None
        blocks.num_cached_tokens = sequence.computed
        self.kv.publish(blocks, as_token_ids(tokens[: sequence.computed]), sequence.request.cache_salt)
        if sequence.computed < len(tokens):
            return None
        token = _sample(kv, sampling)
        if token in sampling.stop_token_ids and not sampling.ignore_eos:
            return self._finish(sequence, FinishReason.STOP)
        tokens.append(token)
        sequence.num_generated += 1
        logprobs = (TokenLogprob(-0.5, (token,), (-0.5,)),) if sampling.num_logprobs else ()
        if sequence.num_generated >= sampling.max_new_tokens:
            return self._finish(sequence, FinishReason.LENGTH, (token,), logprobs)
        return SequenceOutput(sequence.request.request_id, (token,), logprobs, engine_s=ENGINE_S)

    def _next_layers(self, sequence: _Sequence) -> range:
        num_layers = self.kv.layout.num_layers
        followed = sequence.request.progress is not None
        return range(sequence.layers, sequence.layers + 1 if followed else num_layers)

    def _chunk_done(self, sequence: _Sequence, num_tokens: int, layers: range) -> bool:
        """Says how far it is; whether all layers of the chunk are written."""
        progress, sequence.layers = sequence.request.progress, layers.stop
        if progress is not None:
            if layers.start == 0:
                progress.chunk_begins(sequence.computed + num_tokens)
            progress.layer_done(layers.start)
        if sequence.layers < self.kv.layout.num_layers:
            return False
        if progress is not None:
            progress.chunk_done()
        sequence.layers = 0
        sequence.computed += num_tokens
        return True

    def _finish(
        self,
        sequence: _Sequence,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: SageError | None = None,
        hold: bool = False,
    ) -> SequenceOutput:
        request, held = sequence.request, sequence.allocation
        del self._sequences[request.request_id]
        if held is not None and hold:
            held.num_cached_tokens = sequence.computed
        if held is not None and not (hold or request.hold_blocks):
            self.kv.free(held)
            held = None
        return SequenceOutput(request.request_id, token_ids, logprobs, reason, error, held, ENGINE_S)
