from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sagellm_common.core.errors import ContextTooLong, InvalidRequest
from sagellm_common.core.types import GenerationRequest, SamplingParams, as_token_ids
from sagellm_common.core.validation import validate_request, validate_sampling
from tests.support.topology import MODEL

NAN, INF = float("nan"), float("inf")


def request(prompt: list[int] | None = None, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(**({"max_new_tokens": 8} | sampling))
    return GenerationRequest("r", "tiny", as_token_ids([1, 2, 3] if prompt is None else prompt), params)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 100.0},
        {"top_p": 1e-6},
        {"top_p": 1.0},
        {"min_p": 1.0},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 10.0},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"num_logprobs": 20},
        {"stop_token_ids": (0, 511)},
        {"stop_token_ids": tuple(range(128))},
        {"min_new_tokens": 8},
        {"max_new_tokens": 125},
    ],
)
def test_the_ends_of_each_range_are_fine(sampling: dict[str, Any]) -> None:
    validate_request(request(**sampling), MODEL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("min_new_tokens", -1),
        ("min_new_tokens", 9),
        *[("temperature", v) for v in (-0.1, 100.1, NAN, INF, -INF)],
        *[("top_p", v) for v in (0.0, -1.0, 1.1, NAN, INF)],
        ("top_k", -1),
        *[("min_p", v) for v in (-0.1, 1.1, NAN)],
        *[("repetition_penalty", v) for v in (0.0, 1e-40, -1.0, 10.1, NAN, INF)],
        ("seed", -1),
        ("seed", 2**64),
        ("num_logprobs", -1),
        ("num_logprobs", 21),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: float) -> None:
    sampling = replace(SamplingParams(max_new_tokens=8), **{field: value})
    with pytest.raises(InvalidRequest, match=rf"^{field} is {value}, but must be ") as caught:
        validate_sampling(sampling, MODEL.vocab_size)
    assert caught.value.metadata == {"field": field, "value": str(value)}


@pytest.mark.parametrize("token", [-1, 512])
def test_tokens_outside_the_vocabulary_are_named(token: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"prompt_token_ids is {token}, but must be token ids of 0 to 511"):
        validate_request(request([1, token, 2]), MODEL)
    with pytest.raises(InvalidRequest, match=rf"stop_token_ids is {token}, but must be token ids of 0 to 511"):
        validate_request(request(stop_token_ids=(1, token)), MODEL)


def test_more_stop_tokens_than_may_be_forbidden_at_once_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="stop_token_ids has 129 tokens, but 128 are the most"):
        validate_request(request(stop_token_ids=tuple(range(129))), MODEL)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        validate_request(request([]), MODEL)


@pytest.mark.parametrize(("prompt", "new"), [(128, 1), (1, 128), (200, 1), (3, 2**31 - 1)])
def test_what_exceeds_the_context_is_told_with_the_numbers(prompt: int, new: int) -> None:
    with pytest.raises(ContextTooLong, match=rf"{prompt} tokens .* {new} = {prompt + new}, .* 128 tokens"):
        validate_request(request([1] * prompt, max_new_tokens=new), MODEL)
