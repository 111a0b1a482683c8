"""SageKVConnector: vLLM asks it what KV exists already, and has it copy KV in before a step and out after it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from sagellm_common.core.errors import ConfigError, Overloaded
from sagellm_common.engines.vllm.pages import Pages
from sagellm_common.engines.vllm.sequences import STATES, VllmSequence

log = logging.getLogger(__name__)

SEQUENCE = "sagellm_sequence"
"""Key of vLLM's kv_transfer_params under which a request names its VllmSequence."""


@dataclass(frozen=True, slots=True)
class Copy:
    """KV of tokens [begin, end) between a sequence's blocks and its pages."""

    sequence: VllmSequence
    page_ids: Sequence[int]
    begin: int
    end: int


@dataclass(slots=True)
class StepCopies(KVConnectorMetadata):
    loads: list[Copy] = field(default_factory=list)
    saves: list[Copy] = field(default_factory=list)


class SageKVConnector(KVConnectorBase_V1):
    """vLLM makes two: one beside its scheduler, which decides, and one in its worker, which copies.

    Both are in the engine's process and on its thread, and so is what they copy to and from.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        if len(specs) != 1 or not isinstance(specs[0], FullAttentionSpec) or specs[0].sliding_window is not None:
            raise ConfigError(
                "its KV is not kept whole (sliding window, recurrent state or several kinds of attention), "
                "so it cannot be handed over"
            )
        self._state = STATES[self._kv_transfer_config.engine_id]
        self._in_vllm: dict[str, VllmSequence] = {}
        self._loads: list[Copy] = []
        self._pages: Pages | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        """A save is done when its step is: a preemption takes nothing away."""
        return False

    # ---- beside the scheduler ----

    def on_new_request(self, request: Any) -> None:
        self._in_vllm[request.request_id] = self._state.sequences[request.kv_transfer_params[SEQUENCE]]

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """What was handed over, found in the prefix cache, or saved before a preemption. Leaves a token to compute."""
        saved = self._in_vllm[request.request_id].num_saved_tokens
        return max(0, min(saved, request.num_tokens - 1) - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            (page_ids,) = blocks.get_block_ids()
            self._loads.append(Copy(self._in_vllm[request.request_id], page_ids, 0, num_external_tokens))

    def build_connector_meta(self, scheduler_output: Any) -> StepCopies:
        copies = StepCopies(loads=self._loads)
        self._loads = []
        for request_id, num_computed in _computed_after(scheduler_output):
            sequence = self._in_vllm[request_id]
            sequence.scheduled = True
            end = self._worth_saving(sequence, num_computed)
            if end > sequence.num_saved_tokens:
                (page_ids,) = self._kv_cache_manager.get_block_ids(request_id)
                copies.saves.append(Copy(sequence, page_ids, sequence.num_saved_tokens, end))
        return copies

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        del self._in_vllm[request.request_id]
        return False, None

    def _worth_saving(self, sequence: VllmSequence, num_computed: int) -> int:
        """How many leading tokens' KV shall be in blocks after the step; makes room for them where they are wanted.

        Of generated tokens whole blocks only: one token at a time would be many small copies.
        """
        allocation, prompt = sequence.allocation, len(sequence.request.token_ids)
        if allocation is None:
            return 0
        size = self._state.pool.layout.block_size_tokens
        end = num_computed if num_computed <= prompt else max(prompt, num_computed // size * size)
        if sequence.request.hold_blocks and not sequence.out_of_blocks:
            try:
                self._state.pool.extend(allocation, end)
            except Overloaded as err:
                sequence.out_of_blocks = True
                log.info("%s: KV from here on is not kept: %s", sequence.request.request_id, err)
        return min(end, len(allocation.block_ids) * size)

    # ---- in the worker ----

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        layout, region = self._state.pool.layout, self._state.pool.regions()
        caches = [kv_caches[name] for name in sorted(kv_caches, key=extract_layer_index)]
        memory = torch.frombuffer(region.view, dtype=caches[0].dtype)
        self._pages = Pages(
            caches,
            memory[: region.num_blocks * layout.block_bytes // memory.itemsize].view(
                -1, 2, layout.num_layers, layout.block_size_tokens, layout.num_kv_heads, layout.head_dim
            ),
        )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for copy in self._copies().loads:
            self._to_and_from().load(copy.page_ids, _block_ids(copy), copy.end)

    def wait_for_save(self) -> None:
        for copy in self._copies().saves:
            self._to_and_from().save(copy.page_ids, _block_ids(copy), copy.begin, copy.end)
            copy.sequence.num_saved_tokens = copy.end
            if (progress := copy.sequence.request.progress) is not None:
                progress.chunk_begins(copy.end)
                progress.chunk_done()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are done before the step begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Saves are made after the step, all layers at once."""

    def _copies(self) -> StepCopies:
        copies = self._get_connector_metadata()
        assert isinstance(copies, StepCopies)
        return copies

    def _to_and_from(self) -> Pages:
        assert self._pages is not None, "vLLM registers its KV caches before the first step"
        return self._pages


def _block_ids(copy: Copy) -> Any:
    assert copy.sequence.allocation is not None
    return copy.sequence.allocation.block_ids


def _computed_after(scheduler_output: Any) -> Iterator[tuple[str, int]]:
    """(request id, tokens whose KV exists after the step) of everything scheduled."""
    scheduled = scheduler_output.num_scheduled_tokens
    for new in scheduler_output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens + scheduled[new.req_id]
    running = scheduler_output.scheduled_cached_reqs
    for request_id, num_computed in zip(running.req_ids, running.num_computed_tokens, strict=True):
        yield request_id, num_computed + scheduled[request_id]
