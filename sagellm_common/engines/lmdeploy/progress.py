"""How far the prompts of a step are computed, layer by layer where LMDeploy tells.

    step ──► forward (a chunk of a long prompt, or a batch) ──► layer 0, 1, … ──► forward ──► … ──► step's end
             chunk_begins                                       layer_done       chunk_done

A forward is seen on any tree and any device: it is over when its results are there, which a device hands out after all
else. Of a layer LMDeploy's attention tells, through the hook `on_kv_written` of our patches; int8 weights are computed
by our kernels, which ask for a `listener`. Both only on a CPU: a device is told to write long before it does. All of it
runs on the engine's thread, once per layer: a few microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sagellm_common.core.kv_progress import KvProgress
from sagellm_common.engines.watchdog import StepWatch

CacheKey = int
"""Address of a layer's key cache."""

_layers: dict[CacheKey, tuple[StepProgress, int]] = {}
"""Of all engines in this process: LMDeploy's hook is one for all."""


class StepProgress:
    """Follows the sequences of the step under way."""

    def __init__(self, watch: StepWatch | None = None) -> None:
        self._watch = watch
        self._step: Sequence[KvProgress | None] = ()
        self._followed: list[KvProgress] = []
        """Of the forward under way."""

    def begin_step(self, progress: Sequence[KvProgress | None]) -> None:
        """`progress` of each sequence of the batch, None for those that nobody follows."""
        self._step = progress

    def end_step(self) -> None:
        self._step = ()

    @contextmanager
    def forward(self, history_lengths: Tensor, seq_lengths: Tensor) -> Iterator[None]:
        """One forward: sequence i computes seq_lengths[i] tokens after history_lengths[i]. If it raises, none."""
        if any(self._step):
            ends = (history_lengths + seq_lengths).tolist()
            pairs = [(one, end) for one, end in zip(self._step, ends, strict=True) if one is not None]
            for one, end in pairs:
                one.chunk_begins(end)
            self._followed = [one for one, _ in pairs]
        try:
            yield
            for one in self._followed:
                one.chunk_done()
            if self._watch is not None:
                self._watch.alive()
        finally:
            self._followed = []

    @property
    def follows(self) -> bool:
        """Whether anybody wants to hear of the forward under way."""
        return bool(self._followed)

    def layer_done(self, layer: int) -> None:
        """The KV of a layer is written for all tokens of the forward."""
        for one in self._followed:
            one.layer_done(layer)

    # ---- LMDeploy's hook ----

    def follow_layers(self, caches: Sequence[Sequence[Tensor]]) -> bool:
        """Hears of the layers of these caches from now on; False when this LMDeploy has no hook that tells.

        caches[l][0] is the key cache of layer l.
        """
        _layers.update({layer[0].data_ptr(): (self, index) for index, layer in enumerate(caches)})
        try:
            from lmdeploy.pytorch.extension import EXT
        except ModuleNotFoundError:
            return False
        EXT.on_kv_written = _on_kv_written
        return True

    def unfollow(self) -> None:
        """Forgets the caches: their memory may become somebody else's."""
        for key in [key for key, (owner, _) in _layers.items() if owner is self]:
            del _layers[key]


def listener(key_cache: Tensor) -> Callable[[int], None] | None:
    """Whom to tell of each layer of a forward over these caches, given layer 0's keys; None: nobody follows it."""
    found = _layers.get(key_cache.data_ptr())
    return found[0].layer_done if found is not None and found[0].follows else None


def _on_kv_written(k_cache: Tensor, v_cache: Tensor, attn_metadata: Any) -> None:
    found = _layers.get(k_cache.data_ptr())
    if found is not None:
        owner, layer = found
        owner.layer_done(layer)
