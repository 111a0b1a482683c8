"""What no amount of waiting makes fit: told at once, before any block is taken."""

from __future__ import annotations

from sagellm_common.core.errors import ContextTooLong, InvalidRequest
from sagellm_common.core.types import TokenIds
from sagellm_common.engines.base import Engine


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
