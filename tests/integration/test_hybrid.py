"""Placement by learned costs on real processes: the tokens stay what they are, and the router knows what they cost."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sagellm_common.client.aio import AsyncClient
from sagellm_common.client.text import Tokenizer
from sagellm_common.scheduler_ir.cost_model import CostModel
from tests.integration.test_token_equality import complete_all, forty_prompts
from tests.support.checks import assert_nothing_leaked
from tests.support.cluster import RunningCluster
from tests.support.engines import running_engine

NEW_TOKENS = 64
PARTS = ("prefill", "decode", "transfer")
COMPARED = r"(prefill-\d): \d+ ms expected, \d+ ms taken; expected ((?:, )?\d+ ms on (?:prefill|decode)-\d)+"


async def learned(cluster: RunningCluster) -> dict[str, float]:
    """Samples by part."""
    async with httpx.AsyncClient(trust_env=False) as http:
        page = await http.get(f"http://{cluster.metrics_address('router')}/metrics")
    return {
        sample.labels["part"]: sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
        if sample.name == "sagellm_router_cost_samples_total"
    }


async def test_hybrid_gives_the_single_engines_tokens_and_learns_what_they_cost(
    tiny_llama: Path, tmp_path: Path
) -> None:
    prompts = forty_prompts(Tokenizer.from_dir(tiny_llama), 300)[::4]
    async with running_engine(tiny_llama, prefix_caching=False) as driver:
        alone = await asyncio.gather(*(driver.run(prompt, NEW_TOKENS) for prompt in prompts))
        expected = [tokens for tokens, _ in alone]
    costs = tmp_path / "costs.json"
    settings = (
        *("router.strategy=hybrid", "router.ttft_target_ms=2000", "router.tpot_target_ms=200"),
        *("engine.policy=on_time", f"router.cost_model_path={costs}"),
    )
    with RunningCluster(*settings, model=tiny_llama, num_prefill=2) as cluster:
        done = await complete_all(cluster, prompts, NEW_TOKENS)
        assert [list(completion.token_ids) for completion in done] == expected
        assert {completion.summary.attempts for completion in done} == {1}
        assert {completion.summary.prefill_worker_id for completion in done} == {"prefill-0", "prefill-1"}
        samples = await learned(cluster)
        assert min(samples[part] for part in PARTS) > 0, samples
        async with AsyncClient(cluster.router_address) as client:
            asked = await client.complete(prompts[0], max_tokens=2)
            explanation = await client.explain(asked.request_id)
        assert explanation.plan.strategy == "hybrid"
        (event,) = [event for event in explanation.events if event.stage == "first token"]
        told = re.fullmatch(COMPARED, event.detail)
        assert told is not None, event.detail
        assert {*re.findall(r"prefill-\d", event.detail)} == {"prefill-0", "prefill-1"}
        assert told[1] == asked.summary.prefill_worker_id
        await assert_nothing_leaked(cluster)
    kept = CostModel.from_dict(json.loads(await asyncio.to_thread(costs.read_bytes)))
    assert min(kept.prefill.samples, kept.decode.samples, len(kept.links)) > 0
