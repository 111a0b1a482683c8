"""What no amount of waiting makes fit: told at once, before any block is taken."""

from __future__ import annotations

from sagellm_common.core.errors import ContextTooLong, InvalidRequest
from sagellm_common.core.types import ModelInfo, TokenIds
from sagellm_common.engines.base import Engine, EngineRequest


def check_fits(engine: Engine, token_ids: TokenIds) -> None:
    """Raises InvalidRequest for an empty prompt, ContextTooLong for one beyond the model or beyond the whole pool."""
    num_tokens, limit = len(token_ids), engine.model.context_length_tokens
    if num_tokens == 0:
        raise InvalidRequest("prompt_token_ids is empty: send at least one token")
    if num_tokens >= limit:
        raise ContextTooLong(
            f"the sequence has {num_tokens} tokens and leaves no room to generate: the context of model "
            f"{engine.model.name} is {limit} tokens"
        )
    pool_tokens = engine.kv.regions().num_blocks * engine.kv.layout.block_size_tokens
    if num_tokens > pool_tokens:
        raise ContextTooLong(
            f"the sequence has {num_tokens} tokens, but this worker's KV pool holds {pool_tokens}: "
            "shorten the prompt or raise engine.num_blocks"
        )


def check_request(request: EngineRequest, model: ModelInfo) -> None:
    """What every engine's `submit` refuses. Raises InvalidRequest, ContextTooLong."""
    tokens, limit = len(request.token_ids), model.context_length_tokens
    if tokens == 0:
        raise InvalidRequest("token_ids is empty; send at least one token")
    lowest, highest = int(request.token_ids.min()), int(request.token_ids.max())
    if lowest < 0 or highest >= model.vocab_size:
        outside = lowest if lowest < 0 else highest
        raise InvalidRequest(f"token_ids: {outside} is not in the model's vocabulary, 0..{model.vocab_size - 1}")
    left = request.sampling.max_new_tokens - request.num_emitted_tokens
    if left < 1:
        raise InvalidRequest(f"max_new_tokens {request.sampling.max_new_tokens} leaves nothing to generate; raise it")
    cached = request.allocation.num_cached_tokens if request.allocation is not None else 0
    if cached >= tokens:
        raise InvalidRequest(f"KV of {cached} tokens leaves nothing to compute of {tokens}; send one token more")
    if tokens + left > limit:
        raise ContextTooLong(f"{tokens} tokens + {left} to generate exceed the context of {limit} tokens")
