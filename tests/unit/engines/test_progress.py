"""What LMDeploy tells of a prompt's KV while it computes it: that it is written, and does not change any more."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sagellm_common.core.errors import LeaseExpired
from sagellm_common.core.kv import Allocation, KvRegion
from sagellm_common.core.kv_progress import KvProgress, Watermark
from sagellm_common.core.types import as_token_ids
from sagellm_common.engines.lmdeploy.progress import StepProgress
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
from tests.support.engines import Driver, running_engine

BLOCK_TOKENS, CHUNK = 16, 32
PROMPT = np.random.default_rng(0).integers(3, 259, size=75).tolist()


class Recorded(KvProgress):
    """Remembers each watermark, and the bytes that were ready with it."""

    def __init__(self, pool: KVBackendProtocol, allocation: Allocation, num_tokens: int) -> None:
        super().__init__(num_tokens, allocation.num_cached_tokens, BLOCK_TOKENS)
        region = pool.regions()
        assert isinstance(region, KvRegion)
        self._region, self._block_ids = region, allocation.block_ids
        self.marks: list[Watermark] = []
        self._ready: list[tuple[Watermark, list[bytes]]] = []

    def _set(self, mark: Watermark) -> None:
        super()._set(mark)
        self.marks.append(mark)
        self._ready.append((mark, self._read(mark)))

    def _read(self, mark: Watermark) -> list[bytes]:
        """The full blocks below the watermark, and the layers of the chunk's."""
        done, end = mark.tokens // BLOCK_TOKENS, mark.chunk_end // BLOCK_TOKENS
        whole = self._region.layers(self._block_ids[:done], 0, self._region.num_layers)
        return [bytes(view) for view in (*whole, *self._region.layers(self._block_ids[done:end], 0, mark.layers))]

    def changed_since(self) -> list[Watermark]:
        """The watermarks below which something was written later on."""
        return [mark for mark, was in self._ready if was != self._read(mark)]


async def followed(driver: Driver, prompt: list[int]) -> Recorded:
    """Prefills a prompt and hears of it."""
    pool = driver.engine.kv
    allocation = pool.allocate(as_token_ids(prompt), len(prompt))
    # As a lease does: the blocks stay as they are while somebody reads them.
    shared = pool.share(allocation)
    progress = Recorded(pool, allocation, len(prompt))
    await driver.run(prompt, 1, request={"allocation": allocation, "progress": progress})
    assert progress.changed_since() == []
    pool.free(shared)
    return progress


@pytest.mark.parametrize(
    "setting", [{}, {"kv_quant_bits": 4}, {"kv_quant_bits": 8}, {"weights": "int8"}, {"weights": "int8x2"}], ids=repr
)
async def test_each_layer_of_each_chunk_is_told_once_it_is_written(tiny_llama: Path, setting: dict[str, Any]) -> None:
    async with running_engine(tiny_llama, max_prefill_tokens=CHUNK, **setting) as driver:
        layers = driver.engine.kv.layout.num_layers
        assert driver.engine.kv.regions().num_layers == layers  # type: ignore[attr-defined]

        def chunk(start: int, end: int) -> list[Watermark]:
            return [*(Watermark(start, end, n) for n in range(layers + 1)), Watermark(end)]

        told = await followed(driver, PROMPT)
        assert told.marks == [*chunk(0, 32), *chunk(32, 64), *chunk(64, 75)]
        again = await followed(driver, PROMPT)
        assert again.marks == chunk(64, 75), "what comes from the prefix cache is ready from the start"
        # Two in one batch, which is one forward.
        others = [PROMPT[::-1][:12], PROMPT[5:19]]
        found = await asyncio.gather(*(followed(driver, prompt) for prompt in others))
        assert [one.marks[-1].tokens for one in found] == [len(prompt) for prompt in others]
        assert driver.engine.kv.get_utilization().used_blocks == 0
        assert driver.engine.kv.get_utilization().balanced


@pytest.mark.parametrize("weights", ["dtype", "int8"])
async def test_without_the_hook_only_our_kernels_tell_layers(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    async with running_engine(tiny_llama, max_prefill_tokens=CHUNK, weights=weights) as driver:
        from lmdeploy.pytorch.extension import EXT

        monkeypatch.setattr(EXT, "on_kv_written", None)
        told = await followed(driver, PROMPT)
        layers = range(driver.engine.kv.layout.num_layers + 1) if weights == "int8" else range(1)
        ends = [(0, 32), (32, 64), (64, 75)]
        assert told.marks == [m for a, b in ends for m in (*(Watermark(a, b, n) for n in layers), Watermark(b))]


def test_a_tree_without_our_patches_tells_no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdeploy.pytorch.extension", None)
    assert not StepProgress().follow_layers([(torch.zeros(1), torch.zeros(1))])


def test_a_forward_that_fails_has_done_nothing() -> None:
    one, step = KvProgress(64, 0, BLOCK_TOKENS), StepProgress()
    step.begin_step([one, None])
    assert not step.follows
    with pytest.raises(RuntimeError), step.forward(torch.tensor([0, 0]), torch.tensor([32, 5])):
        step.layer_done(0)
        raise RuntimeError
    assert one.watermark == Watermark(0, 32, 1)
    step.layer_done(1)
    assert one.watermark == Watermark(0, 32, 1), "no forward is under way"


def test_a_sequence_that_lost_its_blocks_is_not_followed() -> None:
    from sagellm_common.engines.lmdeploy.core import Running
    from sagellm_common.kv_runtime.pool import PoolAllocation

    def running(blocks: list[int]) -> Running:
        given = PoolAllocation(np.array([1, 2], np.int32), table=np.array([1, 2]))
        request = SimpleNamespace(allocation=given, progress=KvProgress(32, 0, BLOCK_TOKENS))
        logical = SimpleNamespace(get_real_blocks=lambda: np.array(blocks))
        return Running(request, SimpleNamespace(logical_blocks=logical), frozenset(), None)  # type: ignore[arg-type]

    assert running([1, 2]).keeps_its_blocks()
    moved = running([5, 6])
    assert not moved.keeps_its_blocks()
    assert moved.request.progress is not None
    with pytest.raises(LeaseExpired, match="blocks back"):
        moved.request.progress.wait(None, 0)
