"""`make demo`: a cluster from nothing, three requests, and what happened to them.

1. a chat through the OpenAI API,
2. a long prompt through the gRPC SDK, so that there is KV worth moving,
3. the chat again after the prefill worker was restarted: its KV comes from the store.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import fields
from typing import Any

from rich.rule import Rule

from sagellm_common.client.aio import AsyncClient, gather
from sagellm_common.client.router import ClusterView
from sagellm_common.core.types import GenerationSummary, KvOrigins, WorkerRole
from services.cli import render, run
from services.cli.cluster import Cluster
from services.cli.home import ClusterHome

QUESTION = "What is photosynthesis? Answer in one sentence."
STORY = """\
The lighthouse stood at the end of a narrow spit of rock, and for as long as anyone in the village could remember \
it had been kept by a member of the same family. Every evening the keeper climbed the one hundred and twelve steps \
to the lamp room, trimmed the wick, wound the clockwork that turned the lens, and wrote a line in the log: the \
wind, the state of the sea, the ships that passed. The oldest of these books were older than the harbour itself. \
They told of a winter when the bay froze so hard that people walked to the island, of a whale that lay for three \
days in the shallows before the tide took it back, and of a schooner without a crew that drifted past at dawn with \
all her sails set. When the light was at last made automatic, the company sent two engineers in a small van. They \
were kind, and a little embarrassed, and they let the old keeper throw the switch. That night he climbed the stairs \
again, out of habit, and sat beside the humming box that had taken his place. The beam went round as it always had. \
He opened the log, looked out at the water for a long time, and wrote the last entry of his life:"""

STORE_TIMEOUT_S = 20.0
POLL_S = 0.05


async def run_demo() -> None:
    """Leaves no process behind. Raises StartFailed, SageError, Interrupted."""
    out = render.out
    out.print("[bold]sageLLM[/] [dim]one prefill and one decode worker, a KV store, a router and a gateway[/]\n")
    model_since = time.monotonic()
    config = run.resolve_config(None, ["cluster.port_base=0"], name="demo")
    out.print(f"  [green]✓[/] {'model':<12} [dim]{config.model.path} ({time.monotonic() - model_since:.1f} s)[/]")

    cluster = Cluster(config, ClusterHome("demo"))
    view = render.StartupView(out)
    cluster.on_event = view.on_event
    stopping = run.stop_on_signals(cluster.kill_all)
    async with run.running(cluster, view, stopping):
        cluster.on_event = lambda _: None
        requests = asyncio.ensure_future(_requests(cluster))
        stop = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait({requests, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not requests.done():
                raise run.Interrupted
            await requests
        finally:
            for task in (requests, stop):
                task.cancel()
            await asyncio.wait({requests, stop})
    out.print('\n[dim]All processes stopped. Next: `sagellm up`, then `sagellm chat "…"`, or any OpenAI client.[/]')


async def _requests(cluster: Cluster) -> None:
    out = render.out
    async with AsyncClient(cluster.router_address, model_path=cluster.config.model.path) as client:
        _title("1  a chat, through the OpenAI API")
        chat = await _openai_chat(cluster.gateway_url, QUESTION)

        _title("2  a long prompt, through the gRPC SDK")
        out.print(f"[dim]… {STORY[STORY.rindex('He opened') :]}[/]", end="")
        outputs = []
        async for output in client.generate(STORY, max_tokens=48, stop=["\n"]):
            _live(output.text)
            outputs.append(output)
        out.print()
        story = gather(outputs)

        _title("3  the chat again, after the prefill worker was restarted")
        with out.status("restarting prefill-0"):
            await _offloaded(client)
            await cluster.restart_process("prefill-0")
        again = await _openai_chat(cluster.gateway_url, QUESTION)
        out.print(f"[green]served from the store: {again.store_tokens} of {again.prompt_tokens} prompt tokens[/]")

        _title("what happened")
        explanation = await client.explain(story.request_id)
        out.print("  The plan of request 2:\n")
        out.print(render.plan_diagram(explanation.plan))
        out.print(render.summaries_table([("1 chat", chat), ("2 long prompt", story.summary), ("3 chat again", again)]))


async def _openai_chat(gateway_url: str, question: str) -> GenerationSummary:
    """Streams an answer to the terminal."""
    import openai

    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(base_url=f"{gateway_url}/v1", api_key="none", http_client=http) as client:
        render.out.print(f"[dim]{question}[/]")
        model = (await client.models.list()).data[0].id
        chunks = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_completion_tokens=64,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        happened: dict[str, Any] = {}
        async for chunk in chunks:
            for choice in chunk.choices:
                _live(choice.delta.content or "")
            happened |= (chunk.model_extra or {}).get("sagellm") or {}
    render.out.print()
    if "origins" in happened:
        happened["origins"] = KvOrigins(**happened["origins"])
    return GenerationSummary(**{f.name: happened[f.name] for f in fields(GenerationSummary) if f.name in happened})


async def _offloaded(client: AsyncClient) -> None:
    """Waits until the decode workers have given their blocks to the store. Raises TimeoutError."""

    def done(view: ClusterView) -> bool:
        return all(
            worker.kv is not None and worker.kv.cached_blocks > 0
            if worker.record.role is WorkerRole.KV_STORE
            else worker.pinned_transfers == worker.running_requests == 0
            for worker in view.workers
        )

    async with asyncio.timeout(STORE_TIMEOUT_S):
        while not done(await client.topology()):  # noqa: ASYNC110 - other processes
            await asyncio.sleep(POLL_S)


def _title(text: str) -> None:
    render.out.print()
    render.out.print(Rule(f"[bold]{text}[/]", align="left", style="dim"))


def _live(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
