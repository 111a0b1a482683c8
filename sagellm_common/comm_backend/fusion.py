"""How many blocks share a message: few messages cost little each, but the last one is handled alone.

A message of b bytes takes p = per_message_s + b / bytes_per_s on either side, and while the receiver handles one the
source prepares the next. In such a pipeline of STAGES equal stages (a permutation flow shop) messages p_1 … p_k take

    latency_s + Σ p_i + (STAGES - 1) · max p_i

so of all ways to cut n blocks into k messages the most even one is the fastest, and the best g blocks per message
minimises ceil(n / g) · per_message_s + (STAGES - 1) · g · block_bytes / bytes_per_s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.comm_backend.links import LinkTable
from sagellm_common.core.topology import LinkCost
from sagellm_common.core.types import KvSource

STAGES = 2
"""Source (digest, send) and receiver (receive, check)."""
MAX_DEPTH = 16


@dataclass(frozen=True, slots=True)
class MessagePlan:
    """`depth` messages under way at a time hide the link's latency. `seconds` is what the model expects; 0: unknown."""

    blocks_per_message: int
    depth: int
    seconds: float = 0.0


def transfer_seconds(message_bytes: Sequence[int], link: LinkCost) -> float:
    """What moving these messages, in order, takes."""
    if not message_bytes:
        return link.latency_s
    each = [link.per_message_s + size / link.bytes_per_s for size in message_bytes]
    return link.latency_s + sum(each) + (STAGES - 1) * max(each)


@lru_cache(maxsize=4096)
def plan_messages(num_blocks: int, block_bytes: int, link: LinkCost, *, max_bytes: int, max_blocks: int) -> MessagePlan:
    """The fastest plan whose messages have at most max_bytes and max_blocks, but at least one block."""
    most = max(1, min(num_blocks, max_blocks, max_bytes // block_bytes))
    sizes = np.arange(1, most + 1)
    costs = -(-num_blocks // sizes) * link.per_message_s + (STAGES - 1) * sizes * (block_bytes / link.bytes_per_s)
    best = int(sizes[np.argmin(costs)])
    whole, rest = divmod(max(num_blocks, 1), best)
    messages = [best * block_bytes] * whole + [rest * block_bytes] * (rest > 0)
    each_s = link.per_message_s + messages[0] / link.bytes_per_s
    depth = min(MAX_DEPTH, len(messages), STAGES + math.ceil(link.latency_s / max(each_s, 1e-9)))
    return MessagePlan(best, max(1, depth), transfer_seconds(messages, link))


class MessagePlanner:
    """Plans by what `links` knows of the source, within the settings; without either, by the byte path's default."""

    def __init__(self, settings: KVTransportConfig, links: LinkTable) -> None:
        self.settings = settings
        self._links = links
        self._forced: dict[str, int] = {}

    def plan(
        self, source: KvSource, num_blocks: int, block_bytes: int, *, default_bytes: int, max_blocks: int
    ) -> MessagePlan:
        """For one pull of num_blocks blocks. `default_bytes` is the byte path's message where none is configured."""
        now = self.settings.now
        if num_blocks == 1:
            return MessagePlan(1, 1)
        max_bytes = now.chunk_bytes or default_bytes
        link = self._links.find(source.worker_id, source.backend)
        if blocks := self._forced.get(source.transfer_id):
            return MessagePlan(min(blocks, max_blocks), now.pipeline_depth)
        if now.fusion == "off" or link is None or not link.per_message_s:
            return MessagePlan(max(1, min(max_blocks, max_bytes // block_bytes)), now.pipeline_depth)
        # Costs within a tenth of each other are one cost: the plan is looked up, not made, for most pulls.
        plan = plan_messages(num_blocks, block_bytes, _rounded(link), max_bytes=max_bytes, max_blocks=max_blocks)
        return MessagePlan(plan.blocks_per_message, min(plan.depth, now.pipeline_depth), plan.seconds)

    def force(self, transfer_id: str, blocks_per_message: int) -> None:
        """For a measurement: this transfer goes in messages of so many blocks. 0 ends it."""
        if blocks_per_message:
            self._forced[transfer_id] = blocks_per_message
        else:
            self._forced.pop(transfer_id, None)


def _rounded(link: LinkCost) -> LinkCost:
    return LinkCost(
        source_id="",
        target_id="",
        backend="",
        latency_s=_two_digits(link.latency_s),
        bytes_per_s=_two_digits(link.bytes_per_s),
        per_message_s=_two_digits(link.per_message_s),
    )


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")
