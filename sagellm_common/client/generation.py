"""One generation as text: the router's tokens, detokenized, ended by stop strings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from sagellm_common.client.router import RouterClient
from sagellm_common.client.text import Detokenizer, StopMatcher, Tokenizer
from sagellm_common.core.errors import SageError
from sagellm_common.core.types import FinishReason, GenerationOutput, GenerationRequest, GenerationSummary, TokenLogprob

log = logging.getLogger(__name__)

_SUMMARY_WAIT_S = 1.0
"""How long the end of a generation that hit a stop string may wait for the router's summary."""


@dataclass(frozen=True, slots=True)
class TextOutput:
    """Text that came with these tokens. Text may lag behind the tokens while a character or stop string is open.

    The last output has finish_reason and summary. `stop` is the stop string that ended it, if one did.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | None = None
    summary: GenerationSummary | None = None


async def generate_text(
    router: RouterClient,
    request: GenerationRequest,
    tokenizer: Tokenizer,
    *,
    timeout_s: float,
    stop: Sequence[str] = (),
    skip_special_tokens: bool = True,
) -> AsyncGenerator[TextOutput]:
    """One TextOutput per message of the router. Closing the generator cancels the generation."""
    context = request.prompt_token_ids[-Detokenizer.CONTEXT_TOKENS :].tolist()
    detokenizer = Detokenizer(tokenizer, skip_special_tokens, context)
    matcher = StopMatcher(stop)
    num_tokens = 0
    outputs = router.generate(request, timeout_s)
    asyncio.get_running_loop().call_soon(detokenizer.prepare)  # once the request is on its way
    async with aclosing(outputs):
        async for output in outputs:
            num_tokens += len(output.token_ids)
            text = detokenizer.push(output.token_ids)
            if output.finish_reason is not None:
                text += detokenizer.flush()
            text, hit = matcher.push(text)
            finish, summary = output.finish_reason, output.summary
            if hit is not None:
                if finish is None:
                    summary = await _end_early(router, output.request_id, outputs)
                summary = summary or GenerationSummary(prompt_tokens=len(request.prompt_token_ids))
                summary = replace(summary, completion_tokens=num_tokens)
                finish = FinishReason.STOP
            elif finish is not None:
                text += matcher.flush()
            yield TextOutput(output.request_id, text, output.token_ids, output.logprobs, finish, hit, summary)
            if hit is not None:
                return
            # Otherwise the stream ends by itself: leaving it here would look like a cancellation.


async def _end_early(
    router: RouterClient, request_id: str, outputs: AsyncGenerator[GenerationOutput]
) -> GenerationSummary | None:
    """Cancels a generation whose text is complete, and waits a little for what the router has to say of it."""
    try:
        async with asyncio.timeout(_SUMMARY_WAIT_S):
            await router.cancel(request_id)
            async for output in outputs:
                if output.summary is not None:
                    return output.summary
    except (SageError, TimeoutError) as err:
        # The answer is complete; leaving the stream cancels what is left of the generation.
        log.debug("no summary of %s after its stop string: %r", request_id, err)
    return None
