"""Is this request one that can be served? Asked once, at admission; everything behind may rely on it."""

from __future__ import annotations

from sagellm_common.core.errors import ContextTooLong, InvalidRequest
from sagellm_common.core.types import GenerationRequest, ModelInfo, SamplingParams

MAX_LOGPROBS = 20
MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 10.0
MAX_STOP_TOKEN_IDS = 128
"""min_new_tokens forbids them, and a few tokens must stay allowed."""
MAX_SEED = 2**64 - 1
_MAX_INT32 = 2**31 - 1


def validate_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequest naming the first parameter out of range, its value and the range."""
    s = sampling
    if not 1 <= s.max_new_tokens <= _MAX_INT32:
        raise _out_of_range("max_new_tokens", s.max_new_tokens, "at least 1")
    if not 0 <= s.min_new_tokens <= s.max_new_tokens:
        raise _out_of_range("min_new_tokens", s.min_new_tokens, f"0 to max_new_tokens ({s.max_new_tokens})")
    # A NaN fails every comparison, so these need no check of their own.
    if not 0 <= s.temperature <= MAX_TEMPERATURE:
        raise _out_of_range("temperature", s.temperature, f"0 to {MAX_TEMPERATURE:g}")
    if not 0 < s.top_p <= 1:
        raise _out_of_range("top_p", s.top_p, "above 0 and at most 1")
    if not 0 <= s.top_k <= _MAX_INT32:
        raise _out_of_range("top_k", s.top_k, "at least 0 (0 is off)")
    if not 0 <= s.min_p <= 1:
        raise _out_of_range("min_p", s.min_p, "0 to 1")
    if not MIN_REPETITION_PENALTY <= s.repetition_penalty <= MAX_REPETITION_PENALTY:
        allowed = f"{MIN_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g}"
        raise _out_of_range("repetition_penalty", s.repetition_penalty, allowed)
    if s.seed is not None and not 0 <= s.seed <= MAX_SEED:
        raise _out_of_range("seed", s.seed, "0 to 2**64 - 1")
    if not 0 <= s.num_logprobs <= MAX_LOGPROBS:
        raise _out_of_range("num_logprobs", s.num_logprobs, f"0 to {MAX_LOGPROBS}")
    if len(s.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids has {len(s.stop_token_ids)} tokens, but {MAX_STOP_TOKEN_IDS} are the most",
            metadata={"field": "stop_token_ids"},
        )
    for token in s.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise _out_of_range("stop_token_ids", token, f"token ids of 0 to {vocab_size - 1}")


def validate_request(request: GenerationRequest, model: ModelInfo) -> None:
    """Raises InvalidRequest, and ContextTooLong when prompt and new tokens together exceed the context."""
    prompt = request.prompt_token_ids
    if prompt.size == 0:
        raise InvalidRequest("the prompt is empty: send at least one token")
    if int(prompt.view("<u4").max()) >= model.vocab_size:  # the negative ones are the largest, so
        lowest, highest = int(prompt.min()), int(prompt.max())
        outside = lowest if lowest < 0 else highest
        raise _out_of_range("prompt_token_ids", outside, f"token ids of 0 to {model.vocab_size - 1}")
    validate_sampling(request.sampling, model.vocab_size)
    wanted = prompt.size + request.sampling.max_new_tokens
    if wanted > model.context_length_tokens:
        raise ContextTooLong(
            f"prompt of {prompt.size} tokens + max_new_tokens {request.sampling.max_new_tokens} = {wanted}, "
            f"but {model.name} has a context of {model.context_length_tokens} tokens",
            metadata={
                "prompt_tokens": str(prompt.size),
                "max_new_tokens": str(request.sampling.max_new_tokens),
                "context_length_tokens": str(model.context_length_tokens),
            },
        )


def _out_of_range(field: str, value: float, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{field} is {value}, but must be {allowed}", metadata={"field": field, "value": str(value)})
