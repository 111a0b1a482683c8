"""From a request of the OpenAI API to its generations, and from their outputs to the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from sagellm_common.client.aio import encode_prompt, fit_to_context
from sagellm_common.client.generation import TextOutput, generate_text
from sagellm_common.client.models import ModelDirectory, ServedModel
from sagellm_common.client.router import RouterClient
from sagellm_common.core.clock import Clock
from sagellm_common.core.types import GenerationRequest, SamplingParams, TokenIds
from services.gateway.api import ChatBody, CompletionBody, GenerationBody
from services.gateway.exchange import Exchange
from services.gateway.metrics import PROMPT_TOKENS, TokenTimer
from services.gateway.render import ChatFormat, Choice, CompletionFormat, Renderer, generation_id

Sink = Callable[[int, TextOutput], Awaitable[None]]
"""Takes the outputs of the generations of one answer: (its index, output)."""

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for text completions; chat fills the context."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one HTTP request asks for, tokenized: one generation per prompt and choice."""

    served: ServedModel
    requests: tuple[GenerationRequest, ...]
    choices_per_prompt: int
    stop: tuple[str, ...]
    skip_special_tokens: bool


class Generator:
    """Answers chat and text completions through the router."""

    def __init__(self, router: RouterClient, models: ModelDirectory, timeout_s: float, clock: Clock) -> None:
        self._router = router
        self._models = models
        self._timeout_s = timeout_s
        self._clock = clock

    async def answer(self, body: GenerationBody, exchange: Exchange) -> None:
        """Prepare, generate, send. Raises SageErrors; the HTTP status goes out with the first token, not before."""
        start_s = self._clock.now()
        job = await self._prepare(body, exchange)
        renderer = Renderer(
            format=ChatFormat() if isinstance(body, ChatBody) else CompletionFormat(),
            tokenizer=job.served.tokenizer,
            response_id=exchange.request_id,
            created_unix_s=int(time.time()),
            model=job.served.info.name,
            shown_logprobs=body.shown_logprobs,
            include_usage=body.include_usage,
        )
        choices = [Choice(index) for index in range(len(job.requests))]

        async def collect(index: int, output: TextOutput) -> None:
            choices[index].add(output)

        async def stream(index: int, output: TextOutput) -> None:
            choices[index].add(output)
            if chunks := renderer.chunks(choices[index]):
                await exchange.send_events(chunks)

        await self._run(job, stream if body.stream else collect, start_s)
        if body.stream:
            usage = [renderer.usage_chunk(choices, job.choices_per_prompt)] if body.include_usage else []
            await exchange.send_events([*usage, b"[DONE]"], last=True)
        else:
            await exchange.send_json(200, renderer.answer(choices, job.choices_per_prompt))

    async def _prepare(self, body: GenerationBody, exchange: Exchange) -> Job:
        served = await self._models.get(body.model)
        prompts: Sequence[TokenIds]
        if isinstance(body, ChatBody):
            prompts = [await encode_prompt(served, [message.for_template() for message in body.messages])]
        else:
            assert isinstance(body, CompletionBody)
            prompts = [await encode_prompt(served, prompt) for prompt in body.prompts]
        total = len(prompts) * body.num_choices
        requests: list[GenerationRequest] = []
        for prompt in prompts:
            sampling = _sampling(body, _max_new_tokens(body, len(prompt), served))
            for choice in range(body.num_choices):
                # Choices of one prompt differ by their seeds, in a way that can be repeated.
                seed = None if body.seed is None else (body.seed + choice) % 2**64
                requests.append(
                    GenerationRequest(
                        request_id=generation_id(exchange.request_id, len(requests), total),
                        model=served.info.name,
                        prompt_token_ids=prompt,
                        sampling=replace(sampling, seed=seed),
                        priority=body.priority or 0,
                        cache_salt=body.cache_salt or "",
                        tenant=exchange.tenant or "default",
                        service_class=exchange.service_class,
                    )
                )
        skip = body.skip_special_tokens is not False
        return Job(served, tuple(requests), body.num_choices, body.stops, skip)

    async def _run(self, job: Job, sink: Sink, start_s: float) -> None:
        """All generations at once; the first that fails ends the others."""
        if len(job.requests) == 1:
            await self._generate(job, 0, sink, start_s)
            return
        async with asyncio.TaskGroup() as group:
            for index in range(len(job.requests)):
                group.create_task(self._generate(job, index, sink, start_s))

    async def _generate(self, job: Job, index: int, sink: Sink, start_s: float) -> None:
        request = job.requests[index]
        PROMPT_TOKENS.inc(len(request.prompt_token_ids))
        timer = TokenTimer(self._clock, start_s)
        outputs = generate_text(
            self._router,
            request,
            job.served.tokenizer,
            timeout_s=self._timeout_s,
            stop=job.stop,
            skip_special_tokens=job.skip_special_tokens,
        )
        async with aclosing(outputs):
            async for output in outputs:
                timer.tokens(len(output.token_ids))
                await sink(index, output)
        timer.done()


def _max_new_tokens(body: GenerationBody, prompt_tokens: int, served: ServedModel) -> int:
    """Raises ContextTooLong when what is asked for does not fit."""
    room = fit_to_context(prompt_tokens, None, served.info)
    if body.max_new_tokens is not None:
        return fit_to_context(prompt_tokens, body.max_new_tokens, served.info)
    return room if isinstance(body, ChatBody) else min(room, COMPLETION_MAX_TOKENS)


def _sampling(body: GenerationBody, max_new_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        min_new_tokens=min(body.min_tokens or 0, max_new_tokens),
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        # The router's 0 is off; with 1 the chosen token's own comes.
        num_logprobs=0 if body.shown_logprobs is None else max(body.shown_logprobs, 1),
    )
