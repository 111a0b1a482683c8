"""What the OpenAI API accepts, as pydantic models: strict, and every field is either served or refused by name."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 4
MAX_PROMPTS = 64
MAX_LOGPROBS = 20
MAX_STOPS = 16
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1


def _refuse(fix: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported_parameter", "not supported here; {fix}", {"fix": fix})


def only(*neutral: Any, fix: str = "leave it out") -> AfterValidator:
    """For a field of OpenAI's that may be sent with a value that changes nothing, and not otherwise."""

    def check(value: Any) -> Any:
        if value is not None and value not in neutral:
            raise _refuse(fix)
        return value

    return AfterValidator(check)


Harmless = Any
"""The type of a field that is about OpenAI's own bookkeeping: accepted, without effect."""

TokenId = Annotated[int, Field(ge=0, le=_INT32_MAX)]
# fail_fast: of a long list of the wrong kind one error is enough.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIdLists = Annotated[list[TokenIds], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Harmless = None


class GenerationBody(Body):
    """What chat and text completions share. None always means OpenAI's default."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1, le=_INT32_MAX)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-_INT64_MAX - 1, le=_INT64_MAX)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None

    # vLLM's extensions
    top_k: int | None = Field(None, ge=-1, le=_INT32_MAX, description="0 and -1 are off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    min_tokens: int | None = Field(None, ge=0, le=_INT32_MAX)
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = Field(None, ge=-_INT32_MAX, le=_INT32_MAX)
    cache_salt: str | None = None

    user: Harmless = None
    metadata: Harmless = None
    store: Harmless = None
    service_tier: Harmless = None
    prompt_cache_key: Harmless = None
    prompt_cache_retention: Harmless = None
    safety_identifier: Harmless = None

    frequency_penalty: Annotated[Any, only(0, fix="use repetition_penalty")] = None
    presence_penalty: Annotated[Any, only(0, fix="use repetition_penalty")] = None
    logit_bias: Annotated[Any, only({})] = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    @abstractmethod
    def shown_logprobs(self) -> int | None:
        """How many alternatives to show per token; None: no log-probabilities at all."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.min_tokens and self.max_new_tokens and self.min_tokens > self.max_new_tokens:
            raise PydanticCustomError("value_error", "min_tokens: must not exceed max_tokens")
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value_error", "stream_options: only allowed with stream: true")
        return self


def _text_parts(content: Any) -> Any:
    """Of content given in parts only text can be served; say so rather than list the fields of a text part."""
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise _refuse(f"this model reads text, not {part['type']!r}")
    return content


class TextPart(Body):
    type: Literal["text"]
    text: str


TextParts = Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | TextParts | None, BeforeValidator(_text_parts)] = None
    name: str | None = None

    # An answer is often sent back whole, with these unset.
    refusal: Annotated[Any, only("")] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None
    tool_call_id: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "content: a message of role {role} needs content", {"role": self.role})
        return self

    def for_template(self) -> dict[str, str]:
        """As chat templates expect it: one string, and the older name of the developer role."""
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message | ({"name": self.name} if self.name else {})


class ChatBody(GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, le=_INT32_MAX)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    parallel_tool_calls: Harmless = None
    modalities: Annotated[Any, only(["text"], fix="answers are text")] = None
    response_format: Annotated[Any, only({"type": "text"}, fix="answers are plain text")] = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none")] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none")] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only("none")] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def shown_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("value_error", "top_logprobs: needs logprobs: true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("value_error", "max_tokens: differs from max_completion_tokens; send one of them")
        return self


class CompletionBody(GenerationBody):
    prompt: (
        str | Annotated[list[str], Field(fail_fast=True)] | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None

    echo: Annotated[Any, only(False)] = None
    suffix: Annotated[Any, only("")] = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return cast(list[list[int]], [self.prompt])
        return cast(list[str] | list[list[int]], self.prompt)

    @property
    def shown_logprobs(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise PydanticCustomError("value_error", "prompt: must hold 1 to {limit} prompts", {"limit": MAX_PROMPTS})
        if self.best_of is not None and self.best_of != self.num_choices:
            raise PydanticCustomError("unsupported_parameter", "best_of: not supported here; leave it out")
        return self
