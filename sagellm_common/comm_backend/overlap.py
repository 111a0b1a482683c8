"""Whether a prompt's KV is moved while it is computed, and in which pieces: three windows on one time line.

    prefill     |████████████████████████|                     computes, KV grows evenly
    migration        |▒▒|▒▒|▒▒|▒▒|▒▒|▒▒|▒▒|▒▒|                  pieces, each as soon as it is computed
    decode                                   |░░░░ …            the first step, when all of it is there
                0                        C   └ C + exposed

With pieces of s bytes, k of them, each p = per_message_s + s / bytes_per_s on the link, the last is there

    exposed = latency_s + max(p, s / growth + k·p - C) + k·per_message_s

after the computation's end C: the link keeps up and the last piece is late, or it does not and all of them queue. The
last term is what handling pieces takes from the computation, whose cores do it. Moved afterwards, it is what
`fusion.plan_messages` expects of one pull.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sagellm_common.comm_backend.fusion import plan_messages
from sagellm_common.core.topology import LinkCost

ARRANGE_S = 1.5e-3
"""What has to be gained before it pays: telling router and decode worker, and following the computation layer by layer.
About what 4 MiB take on a loopback link, the size below which the fixed threshold does not bother either."""
DEFAULT_PER_MESSAGE_S = 20e-6
"""Where the link's is not known."""


@dataclass(frozen=True, slots=True)
class Window:
    """Seconds from the beginning of the prefill."""

    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class OverlapPlan:
    """`segment_bytes` of KV are gathered before they are moved; 0 when it is moved afterwards.

    `exposed_s` is how long decode waits after the prefill, `exposed_without_s` how long it would without overlap.
    """

    overlap: bool
    segment_bytes: int
    prefill: Window
    migration: Window
    exposed_s: float
    exposed_without_s: float

    @property
    def reason(self) -> str:
        """For people."""
        prefill, moving = self.prefill.end_s * 1e3, self.migration
        when = f"expected at {moving.begin_s * 1e3:.1f} to {moving.end_s * 1e3:.1f} ms, prefill until {prefill:.1f} ms"
        if not self.overlap:
            return f"KV is pulled after the prefill, {when}"
        sooner_ms = (self.exposed_without_s - self.exposed_s) * 1e3
        return f"KV is pulled along the prefill by {self.segment_bytes} bytes, {when}: {sooner_ms:.1f} ms sooner"

    @property
    def decode_begins_s(self) -> float:
        return max(self.prefill.end_s, self.migration.end_s)


def plan_overlap(
    num_bytes: int, compute_s: float, link: LinkCost, *, block_bytes: int, least_bytes: int, most_bytes: int
) -> OverlapPlan:
    """For num_bytes of KV that compute_s of prefill bring about; pieces of least_bytes to most_bytes, doubling."""
    per_message_s = link.per_message_s or DEFAULT_PER_MESSAGE_S
    known = LinkCost("", "", "", link.latency_s, link.bytes_per_s, per_message_s)
    after = plan_messages(
        max(1, num_bytes // block_bytes), block_bytes, known, max_bytes=most_bytes, max_blocks=num_bytes
    ).seconds
    sizes = [least_bytes]
    while sizes[-1] * 2 <= min(most_bytes, num_bytes):
        sizes.append(sizes[-1] * 2)
    along, size = min((exposed_seconds(num_bytes, compute_s, known, size), size) for size in sizes)
    prefill = Window(0.0, compute_s)
    if after - along <= ARRANGE_S:
        return OverlapPlan(False, 0, prefill, Window(compute_s, compute_s + after), after, after)
    begins_s = compute_s * min(1.0, size / num_bytes)
    return OverlapPlan(True, size, prefill, Window(begins_s, compute_s + along), along, after)


def exposed_seconds(num_bytes: int, compute_s: float, link: LinkCost, segment_bytes: int) -> float:
    """From the end of the computation until all of the KV is there; see above."""
    segments = math.ceil(num_bytes / segment_bytes)
    each_s = link.per_message_s + min(segment_bytes, num_bytes) / link.bytes_per_s
    first_s = compute_s / segments
    behind_s = first_s + segments * each_s - compute_s
    return link.latency_s + max(each_s, behind_s) + segments * link.per_message_s


def efficiency(moving_s: float, exposed_s: float) -> float:
    """Overlapped ÷ total transfer time: the share of `moving_s`, in which bytes moved, that nobody waited for."""
    return max(0.0, 1.0 - exposed_s / moving_s) if moving_s > 0 else 0.0
