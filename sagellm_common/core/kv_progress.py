"""How far the KV of a sequence is computed, while it is: written by an engine, waited for by whoever sends it on.

          tokens ►  0          tokens      chunk_end     num_tokens
layer 0             ██████████████████████████
layer 1             ██████████████████████████           layers = 2 of the chunk under way,
layer 2             ██████████████                       all of those before it
layer 3             ██████████████
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from sagellm_common.core.errors import SageError


@dataclass(frozen=True, slots=True)
class Watermark:
    """All layers of the first `tokens` tokens may be read, and the first `layers` of the first `chunk_end`."""

    tokens: int
    chunk_end: int = 0
    layers: int = 0


class KvProgress:
    """The watermark of one sequence. Thread-safe; it only grows. A step of it costs its writer about a microsecond.

    `segment_bytes` of its KV are gathered before they are sent on; 0: as the sender is configured.

    An engine calls `chunk_begins`, `layer_done` for each layer in order (or for none, if it cannot tell), and
    `chunk_done`. Whoever gave it to the engine calls `complete` or `fail` in the end.
    """

    def __init__(self, num_tokens: int, num_cached_tokens: int, block_size_tokens: int, segment_bytes: int = 0) -> None:
        self.num_tokens = num_tokens
        self.block_size_tokens = block_size_tokens
        self.segment_bytes = segment_bytes
        self._mark = Watermark(num_cached_tokens)
        self._error: SageError | None = None
        self._changed = threading.Condition(threading.Lock())

    @property
    def watermark(self) -> Watermark:
        return self._mark

    def chunk_begins(self, end: int) -> None:
        """The KV of tokens up to `end` is computed next; those after the sequence's own are nobody's business."""
        end = min(end, self.num_tokens)
        if end > self._mark.tokens:
            self._set(Watermark(self._mark.tokens, end))

    def layer_done(self, layer: int) -> None:
        """Layer `layer` of the chunk is written. One that comes out of turn counts with the chunk."""
        mark = self._mark
        if mark.chunk_end > mark.tokens and layer == mark.layers:
            self._set(Watermark(mark.tokens, mark.chunk_end, layer + 1))

    def chunk_done(self) -> None:
        """All layers of the chunk are written."""
        if self._mark.chunk_end > self._mark.tokens:
            self._set(Watermark(self._mark.chunk_end))

    def complete(self) -> None:
        """All of it may be read. A no-op after `fail`."""
        if self._mark.tokens < self.num_tokens:
            self._set(Watermark(self.num_tokens))

    def fail(self, error: SageError) -> None:
        """It will not be completed: whoever waits gets `error`. A no-op once it is complete, or failed already."""
        with self._changed:
            if self._error is None and self._mark.tokens < self.num_tokens:
                self._error = error
                self._changed.notify_all()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def wait(self, seen: Watermark | None, timeout_s: float) -> Watermark:
        """The watermark once it is another than `seen`, or the same after timeout_s. Raises what `fail` was given."""
        with self._changed:
            self._changed.wait_for(lambda: self._mark != seen or self._error is not None, timeout_s)
            if self._error is not None:
                raise self._error
            return self._mark

    def _set(self, mark: Watermark) -> None:
        with self._changed:
            if self._error is None:
                self._mark = mark
                self._changed.notify_all()
