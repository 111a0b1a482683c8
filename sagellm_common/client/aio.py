"""The asynchronous SDK: text, messages or token ids in, a stream of text and tokens out."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self, TypedDict, Unpack, cast

import numpy as np

from sagellm_common.client.chat_template import Message
from sagellm_common.client.generation import TextOutput, generate_text
from sagellm_common.client.models import ModelDirectory, ServedModel
from sagellm_common.client.router import (
    ClassStrategy,
    ClusterView,
    Explanation,
    ProbedLinks,
    RoleChange,
    RouterClient,
    Tokens,
    WorkerEviction,
    WorkerTransport,
)
from sagellm_common.core.errors import ContextTooLong, InvalidRequest
from sagellm_common.core.types import (
    FinishReason,
    GenerationRequest,
    GenerationSummary,
    ModelInfo,
    SamplingParams,
    TokenIds,
    TokenLogprob,
    WorkerRole,
    as_token_ids,
)
from sagellm_common.core.validation import validate_sampling
from sagellm_common.rpc.carriers import Choice

Prompt = str | Sequence[Message] | Sequence[int] | TokenIds
"""Text, chat messages (`{"role": …, "content": …}`) or token ids."""

OFF_LOOP_SIZE = 16_384
"""Longer prompts, in characters or token ids, are encoded on a thread, so that other requests go on."""
_MESSAGE_SIZE = 32
"""What the chat template adds to a message, roughly."""


class Options(TypedDict, total=False):
    """What may be said of a generation. Without temperature it is greedy; max_tokens fills the context."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: Sequence[int]
    num_logprobs: int
    stop: Sequence[str]
    skip_special_tokens: bool
    priority: int
    cache_salt: str
    service_class: str
    tenant: str
    request_id: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    summary: GenerationSummary


class AsyncClient:
    """Talks to one router, or to one of several (`host:port,host:port`). Errors are SageErrors of `core.errors`.

    async with AsyncClient(router_address) as client:
        async for output in client.generate("Once upon a time", max_tokens=20):
            print(output.text, end="")

    `model_path` says where to read the tokenizer when the workers' path does not exist on this machine.
    `timeout_s` bounds a whole generation unless the call says otherwise. `session` is what carries the generations:
    framed TCP, gRPC, or (auto) framed where the router offers it and can be reached. `tokens` "direct" come straight
    from the workers where these can be reached and the router says so, too (rpc.tokens).
    """

    def __init__(
        self,
        router_address: str,
        *,
        model_path: str | None = None,
        timeout_s: float = 300.0,
        session: Choice = "auto",
        tokens: Tokens = "relayed",
    ) -> None:
        self._router = RouterClient(router_address, session=session, tokens=tokens)
        self._models = ModelDirectory(self._router, model_path=model_path)
        self._timeout_s = timeout_s

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[TextOutput]:
        """Outputs as tokens arrive. Closing the generator cancels; `contextlib.aclosing` does it without delay."""
        _refuse_unknown(options)
        served = await self._models.get(options.get("model", ""))
        request = _request(await encode_prompt(served, prompt), served.info, options)
        stop = options.get("stop", ())
        outputs = generate_text(
            self._router,
            request,
            served.tokenizer,
            timeout_s=options.get("timeout_s", self._timeout_s),
            stop=[stop] if isinstance(stop, str) else stop,
            skip_special_tokens=options.get("skip_special_tokens", True),
        )
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> AsyncGenerator[TextOutput]:
        """`generate` of messages, through the model's chat template."""
        return self.generate(messages, **options)

    async def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """The whole generation at once."""
        outputs = self.generate(prompt, **options)
        async with aclosing(outputs):
            return gather([output async for output in outputs])

    async def cancel(self, request_id: str) -> None:
        """Ends a generation, also one of another client. Unknown ids are fine."""
        await self._router.cancel(request_id)

    async def models(self) -> tuple[ModelInfo, ...]:
        return await self._router.models()

    async def topology(self) -> ClusterView:
        return await self._router.topology()

    async def probe_links(self, target_ids: Sequence[str] = (), max_bytes: int = 0) -> ProbedLinks:
        """See `RouterClient.probe_links`."""
        return await self._router.probe_links(target_ids, max_bytes)

    async def set_transport(
        self, settings: Mapping[str, str], worker_ids: Sequence[str] = ()
    ) -> tuple[WorkerTransport, ...]:
        """See `RouterClient.set_transport`."""
        return await self._router.set_transport(settings, worker_ids)

    async def set_strategy(self, strategy: str, service_class: str = "") -> tuple[ClassStrategy, ...]:
        """See `RouterClient.set_strategy`."""
        return await self._router.set_strategy(strategy, service_class)

    async def set_eviction(
        self, policy: str, worker_ids: Sequence[str] = (), migration: str = ""
    ) -> tuple[WorkerEviction, ...]:
        """See `RouterClient.set_eviction`."""
        return await self._router.set_eviction(policy, worker_ids, migration)

    async def set_role(
        self, worker_id: str, role: WorkerRole, *, grace_s: float | None = None, keep_engine: bool = False
    ) -> RoleChange:
        """See `RouterClient.set_role`."""
        return await self._router.set_role(worker_id, role, grace_s=grace_s, keep_engine=keep_engine)

    async def drain_worker(self, worker_id: str, *, grace_s: float | None = None) -> int:
        """See `RouterClient.drain_worker`."""
        return await self._router.drain_worker(worker_id, grace_s=grace_s)

    async def explain(self, request_id: str) -> Explanation:
        return await self._router.explain(request_id)

    async def close(self) -> None:
        """Cancels generations in flight. Idempotent."""
        await self._router.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


def gather(outputs: Sequence[TextOutput]) -> Completion:
    """The completion that all `outputs` of one generation add up to."""
    last = outputs[-1]
    assert last.finish_reason is not None, "the stream ended without a last output"
    return Completion(
        request_id=last.request_id,
        text="".join(o.text for o in outputs),
        token_ids=tuple(t for o in outputs for t in o.token_ids),
        logprobs=tuple(lp for o in outputs for lp in o.logprobs),
        finish_reason=last.finish_reason,
        summary=last.summary or GenerationSummary(),
    )


async def encode_prompt(served: ServedModel, prompt: Prompt) -> TokenIds:
    """Token ids of a prompt of any kind. Raises InvalidRequest when it is empty or no token of the model."""
    size = len(prompt)
    if size == 0:  # of text, too: a tokenizer may add a start token to nothing at all
        raise InvalidRequest("prompt: empty; it must hold at least one token")
    if isinstance(prompt, str):
        encode = partial(served.tokenizer.encode, prompt)
    elif isinstance(prompt[0], Mapping):
        messages = cast(Sequence[Message], prompt)
        size = sum(len(str(message.get("content"))) + _MESSAGE_SIZE for message in messages)
        encode = partial(served.tokenizer.encode_chat, messages)
    else:
        encode = partial(checked_token_ids, cast(Sequence[int], prompt), served.info.vocab_size)
    token_ids = await asyncio.to_thread(encode) if size > OFF_LOOP_SIZE else encode()
    if not len(token_ids):
        raise InvalidRequest("prompt: empty; it must hold at least one token")
    return token_ids


def checked_token_ids(prompt: Sequence[int] | TokenIds, vocab_size: int) -> TokenIds:
    """Raises InvalidRequest for what is no token of the model."""
    wide = np.asarray(prompt)
    if not wide.size:
        return as_token_ids(wide)
    if wide.ndim != 1 or wide.dtype.kind not in "iu":
        raise InvalidRequest("prompt: must be text, messages or a flat list of integer token ids")
    lowest, highest = int(wide.min()), int(wide.max())
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise InvalidRequest(f"prompt: token id {bad} is not in the model's vocabulary, 0..{vocab_size - 1}")
    return as_token_ids(wide)


def fit_to_context(prompt_tokens: int, max_tokens: int | None, model: ModelInfo) -> int:
    """How many tokens may be generated: max_tokens, or all that fit. Raises ContextTooLong."""
    context = model.context_length_tokens
    room = context - prompt_tokens
    if room < 1:
        raise ContextTooLong(
            f"prompt: has {prompt_tokens} tokens, but the context of {model.name} is {context} tokens, "
            "at least one of which is for the answer; shorten the prompt"
        )
    if max_tokens is None:
        return room
    if max_tokens > room:
        raise ContextTooLong(
            f"max_tokens: {prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed the context of "
            f"{model.name}, {context} tokens; ask for at most {room}"
        )
    return max_tokens


def _request(prompt_token_ids: TokenIds, model: ModelInfo, options: Options) -> GenerationRequest:
    sampling = SamplingParams(
        max_new_tokens=fit_to_context(len(prompt_token_ids), options.get("max_tokens"), model),
        temperature=options.get("temperature", 0.0),
        top_p=options.get("top_p", 1.0),
        top_k=options.get("top_k", 0),
        min_p=options.get("min_p", 0.0),
        repetition_penalty=options.get("repetition_penalty", 1.0),
        seed=options.get("seed"),
        min_new_tokens=options.get("min_tokens", 0),
        ignore_eos=options.get("ignore_eos", False),
        stop_token_ids=tuple(options.get("stop_token_ids", ())),
        num_logprobs=options.get("num_logprobs", 0),
    )
    validate_sampling(sampling, model.vocab_size)
    return GenerationRequest(
        request_id=options.get("request_id") or f"sdk-{uuid.uuid4().hex}",
        model=model.name,
        prompt_token_ids=prompt_token_ids,
        sampling=sampling,
        tenant=options.get("tenant", "default"),
        priority=options.get("priority", 0),
        cache_salt=options.get("cache_salt", ""),
        service_class=options.get("service_class", ""),
    )


def _refuse_unknown(options: Options) -> None:
    if unknown := sorted(options.keys() - Options.__annotations__.keys()):
        known = ", ".join(Options.__annotations__)
        raise TypeError(f"unknown options {', '.join(unknown)}; known: {known}")
