"""How much one worker carries within the targets, and so how many workers a demand needs: from the fitted costs.

prefill    a queue with n servers: enough that a first token waits no longer than its target leaves, in 9 of 10 cases
decode     Little's law: sequences alive = arrivals · tokens · time per token, at the largest batch within the target
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sagellm_common.scheduler_ir.cost_model import CostModel
from services.autoscaler.demand import Demand

LATE_SHARE = 0.1
"""Of the requests, that may miss their target."""
ARRIVAL_AND_SERVICE_VARIATION = 2.0
"""Squared coefficients of variation of the times between arrivals and of the prefills, added: prompts' lengths are
heavy-tailed. 2 is what a memoryless queue has."""
BURST_SIGMAS = 1.65
"""Sequences alive vary as a Poisson count does; 95 % of the time there are no more than this over the mean."""
MAX_WORKERS = 10_000


@dataclass(frozen=True, slots=True)
class Targets:
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Of one decode worker."""

    max_batch: int
    kv_tokens: int
    kv_bytes_per_token: int = 0


@dataclass(frozen=True, slots=True)
class Need:
    """Workers of each phase; and how it came to that: seconds of prefill per request, sequences per decode worker and
    in all, time per token then. `feasible` is False where one request alone is beyond the targets."""

    prefill: int
    decode: int
    prefill_s: float
    batch: int
    sequences: float
    tpot_s: float
    feasible: bool


def needed(demand: Demand, costs: CostModel, targets: Targets, limits: WorkerLimits) -> Need:
    """At least one worker of each phase. Costs that nobody has learned yet are zero: one is enough to learn them."""
    prefill_s = costs.prefill_s(
        [(int(demand.prompt_tokens - demand.computed_tokens), int(demand.prompt_tokens))]
    ).seconds
    prefill = prefill_workers(demand.requests_per_s, prefill_s, targets.ttft_s)
    context = demand.prompt_tokens + demand.output_tokens / 2
    batch = largest_batch(costs, context, targets.tpot_s, limits)
    tpot_s = costs.decode_s(max(1, batch), int(max(1, batch) * context)).seconds
    sequences = demand.requests_per_s * demand.output_tokens * tpot_s
    peak = sequences + BURST_SIGMAS * math.sqrt(sequences)
    decode = max(1, math.ceil(peak / max(1, batch)))
    feasible = batch >= 1 and prefill_s <= targets.ttft_s
    return Need(prefill, decode, prefill_s, batch, sequences, tpot_s, feasible)


def flip_s(
    to_prefill: bool, requests: int, demand: Demand, need: Need, costs: CostModel, limits: WorkerLimits
) -> float:
    """Until a worker with so many requests does nothing but its new role. Who decodes there moves on with its KV, or
    ends there where that is sooner, or where no link was measured; prompts end there."""
    if not to_prefill:
        return requests * need.prefill_s
    kv_bytes = round(requests * (demand.prompt_tokens + demand.output_tokens / 2) * limits.kv_bytes_per_token)
    end_s = demand.output_tokens * need.tpot_s if requests else 0.0
    return min(end_s, costs.transfer_s("", "", kv_bytes).seconds) if costs.links else end_s


def largest_batch(costs: CostModel, context_tokens: float, tpot_s: float, limits: WorkerLimits) -> int:
    """Most sequences of such a context that one worker steps within the target; 0 when one alone is too slow."""
    most = min(limits.max_batch, int(limits.kv_tokens / max(1.0, context_tokens)))
    low, high = 0, max(1, most)
    while low < high:
        middle = (low + high + 1) // 2
        if costs.decode_s(middle, int(middle * context_tokens)).seconds <= tpot_s:
            low = middle
        else:
            high = middle - 1
    return low


def prefill_workers(requests_per_s: float, prefill_s: float, ttft_s: float) -> int:
    """Fewest servers with P(wait > what the target leaves) ≤ LATE_SHARE, by Erlang's C formula and the correction for
    general variation of Allen and Cunneen (Gross et al., "Fundamentals of Queueing Theory", §7.2)."""
    load = requests_per_s * prefill_s
    if load <= 0:
        return 1
    patience_s = max(0.0, ttft_s - prefill_s)
    servers = max(1, math.floor(load) + 1)
    while servers < MAX_WORKERS and _late(servers, load, prefill_s, patience_s) > LATE_SHARE:
        servers += 1
    return servers


def _late(servers: int, load: float, service_s: float, patience_s: float) -> float:
    """P(wait > patience_s): exponential with the mean that Allen and Cunneen give."""
    busy = _erlang_c(servers, load)
    mean_s = busy * service_s / (servers - load) * ARRIVAL_AND_SERVICE_VARIATION / 2
    return busy * math.exp(-patience_s * busy / mean_s) if mean_s > 0 else 0.0


def _erlang_c(servers: int, load: float) -> float:
    """P(all servers are busy); by the recursion of Erlang's B, which does not overflow."""
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = load * blocked / (n + load * blocked)
    return servers * blocked / (servers - load * (1 - blocked))
