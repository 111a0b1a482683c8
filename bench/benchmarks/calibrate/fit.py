"""From what was measured to a profile of the simulator, and how well the cost model foretells steps it has not seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bench.benchmarks.calibrate.measure import Served
from bench.sim.profile import Costs, Profile
from sagellm_common.core.config import Config
from sagellm_common.core.step_costs import StepCost
from sagellm_common.core.types import ModelInfo
from sagellm_common.scheduler_ir.cost_model import CostModel

NOISE_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Foretold:
    """Steps of one kind beside what was expected of them: mean and median of |expected − took| / took."""

    part: str
    steps: int
    mape: float
    median: float


def learned(steps: Iterable[StepCost], served: Iterable[Served]) -> CostModel:
    """The production cost model, of what the router would have heard."""
    costs = CostModel()
    for step in steps:
        costs.observe_step(step)
    for one in served:
        summary = one.summary
        if summary.kv_bytes_transferred and summary.transfer_ms > 0:
            link = summary.prefill_worker_id, summary.decode_worker_id
            costs.observe_transfer(*link, summary.kv_bytes_transferred, summary.transfer_ms / 1e3)
    return costs


def links_foretold(costs: CostModel, served: Iterable[Served]) -> list[Foretold]:
    """The same of what was pulled; empty where nothing was."""
    errors = []
    for one in served:
        summary = one.summary
        if summary.kv_bytes_transferred and summary.transfer_ms > 0:
            link, took_s = (summary.prefill_worker_id, summary.decode_worker_id), summary.transfer_ms / 1e3
            errors.append(abs(costs.transfer_s(*link, summary.kv_bytes_transferred).seconds - took_s) / took_s)
    return [Foretold("transfer", len(errors), statistics.mean(errors), statistics.median(errors))] if errors else []


def on_a_core(steps: Iterable[StepCost]) -> list[StepCost]:
    """As long as the engine's thread was on a core: what they cost, without what others on the machine took."""
    return [replace(step, seconds=step.cpu_seconds) for step in steps if step.cpu_seconds]


def foretold(costs: CostModel, steps: Sequence[StepCost]) -> list[Foretold]:
    """By kind, and by size within: where the model's form does not hold, one size is worse than another."""
    groups: dict[str, list[float]] = {}
    for step in steps:
        if step.seconds <= 0:
            continue
        error = abs(costs.step_s(step).seconds - step.seconds) / step.seconds
        if step.prompts:
            size = 1 << (step.prompt_tokens - 1).bit_length()
            names = "prefill", f"prefill ≤ {size} tokens"
        else:
            size = 1 << (step.sequences - 1).bit_length()
            names = "decode", f"decode ≤ {size} sequences"
        for name in names:
            groups.setdefault(name, []).append(error)
    return [
        Foretold(name, len(errors), statistics.mean(errors), statistics.median(errors))
        for name, errors in sorted(groups.items(), key=lambda group: (group[0].split()[0], len(group[0]), group[0]))
    ]


def ratios(costs: CostModel, steps: Iterable[StepCost]) -> list[float]:
    """What steps took as shares of what the costs say."""
    return [step.seconds / expected for step in steps if (expected := costs.step_s(step).seconds) > 0]


def profile_of(
    costs: CostModel,
    steps: Sequence[StepCost],
    alone: Sequence[Served],
    served: Sequence[Served],
    config: Config,
    model: ModelInfo,
    num_blocks: int,
) -> Profile:
    """Engines as the cost model has them, which it learned from `steps`; what these do not explain of first tokens and
    of handoffs, as medians.

    Outliers count for less in the costs, but requests have to wait for them: the spread of what prompts took is drawn
    from, and decode steps, which are so many, take their mean. What a first token took beyond the
    engine's own time, waiting there included, is the overhead. Of requests that were `alone` the second token tells the
    handoff: it waited for nobody's step but that of joining.
    """
    layout = model.kv_layout
    decode = {start: _mean_costs(costs, start, steps) for start in costs.decode.known}
    noise = sorted(ratios(costs, (step for step in steps if step.prompt_tokens > step.prompts)))
    drawn = [noise[round(i * (len(noise) - 1) / (NOISE_SAMPLES - 1))] for i in range(NOISE_SAMPLES)] if noise else []
    first, *larger = sorted(decode)
    handed = [
        one.first_gap_s - costs.prefill_s([(one.request.prompt_tokens, one.request.prompt_tokens + 1)]).seconds
        for one in alone
        if one.summary.kv_bytes_transferred and one.request.output_tokens > 1
    ]
    bandwidths = [1 / per_byte for fit in costs.links.values() if (per_byte := fit.coefficients[1]) > 0]
    return Profile(
        prefill=_three(costs.prefill.coefficients),
        decode=decode[first],
        larger_batches=tuple((start, decode[start]) for start in larger),
        link_latency_s=max(0.0, statistics.median(handed)),
        link_bytes_per_s=statistics.median(bandwidths) if bandwidths else 1e12,
        kv_bytes_per_token=layout.block_bytes // layout.block_size_tokens,
        num_layers=layout.num_layers,
        kv_tokens=num_blocks * layout.block_size_tokens,
        max_batch=config.engine.max_batch_size,
        prefill_chunk_tokens=config.engine.max_prefill_tokens,
        prefill_noise=tuple(drawn),
        overhead_s=max(0.0, statistics.median(one.ttft_s - one.summary.prefill_engine_ms / 1e3 for one in served)),
    )


def _mean_costs(costs: CostModel, start: int, steps: Iterable[StepCost]) -> Costs:
    """Of decode steps in the regime that begins with `start` sequences."""
    beyond = min((other for other in costs.decode.known if other > start), default=math.inf)
    slower = statistics.mean(ratios(costs, (step for step in steps if start <= step.sequences < beyond)) or [1.0])
    return _three([slower * cost for cost in costs.decode.coefficients(start)])


def _three(values: Sequence[float]) -> Costs:
    a, b, c = values
    return a, b, c
