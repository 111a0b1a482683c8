"""Generations as OpenAI's JSON: whole answers and stream chunks, for chat and for text completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from sagellm_common.client.generation import TextOutput
from sagellm_common.client.text import Tokenizer
from sagellm_common.core.types import FinishReason, GenerationSummary, TokenLogprob

Json = dict[str, Any]

_MIN_LOGPROB = -9999.0
"""JSON has no -inf."""


@dataclass(slots=True)
class Choice:
    """One generation's output so far; its `delta` between two chunks."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    summary: GenerationSummary = field(default_factory=GenerationSummary)
    num_chunks: int = 0
    text_offset: int = 0

    def add(self, output: TextOutput) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason
        self.summary = output.summary or self.summary

    def take(self) -> None:
        """Forgets what a chunk has just sent."""
        self.num_chunks += 1
        self.text = ""
        self.token_ids.clear()
        self.logprobs.clear()


class Format(Protocol):
    """How chat and text completions differ."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def choice(self, choice: Choice, logprobs: Json | None) -> Json: ...

    def chunk_choices(self, choice: Choice, logprobs: Json | None) -> list[Json]:
        """What streams of `choice` since its last chunk, as one or two chunks."""

    def logprobs(self, choice: Choice, tokenizer: Tokenizer, num_shown: int) -> Json: ...


class ChatFormat:
    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def choice(self, choice: Choice, logprobs: Json | None) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return _choice(choice, logprobs, message=message)

    def chunk_choices(self, choice: Choice, logprobs: Json | None) -> list[Json]:
        chunks = []
        if not choice.num_chunks:
            delta = {"role": "assistant", "content": "", "refusal": None}
            chunks.append({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})
        if choice.text or logprobs or choice.finish_reason is not None:
            chunks.append(_choice(choice, logprobs, delta={"content": choice.text} if choice.text else {}))
        return chunks

    def logprobs(self, choice: Choice, tokenizer: Tokenizer, num_shown: int) -> Json:
        def entry(token_id: int, logprob: float) -> Json:
            token = tokenizer.token_bytes(token_id)
            text = token.decode(errors="replace")
            return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": list(token)}

        return {
            "content": [
                entry(token_id, lp.logprob) | {"top_logprobs": [entry(t, p) for t, p in _best(lp, num_shown)]}
                for token_id, lp in zip(choice.token_ids, choice.logprobs, strict=False)
            ],
            "refusal": None,
        }


class CompletionFormat:
    id_prefix = "cmpl"
    object_name = chunk_object_name = "text_completion"

    def choice(self, choice: Choice, logprobs: Json | None) -> Json:
        return _choice(choice, logprobs, text=choice.text)

    def chunk_choices(self, choice: Choice, logprobs: Json | None) -> list[Json]:
        if choice.text or logprobs or choice.finish_reason is not None:
            return [self.choice(choice, logprobs)]
        return []

    def logprobs(self, choice: Choice, tokenizer: Tokenizer, num_shown: int) -> Json:
        def text(token_id: int) -> str:
            return tokenizer.token_bytes(token_id).decode(errors="replace")

        table: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, lp in zip(choice.token_ids, choice.logprobs, strict=False):
            token, logprob = text(token_id), max(lp.logprob, _MIN_LOGPROB)
            table["tokens"].append(token)
            table["token_logprobs"].append(logprob)
            # The chosen token is always among them, also when it is none of the best.
            table["top_logprobs"].append(
                {text(t): max(p, _MIN_LOGPROB) for t, p in _best(lp, num_shown)} | {token: logprob}
            )
            table["text_offset"].append(choice.text_offset)
            choice.text_offset += len(token)
        return table


def _choice(choice: Choice, logprobs: Json | None, **content: Any) -> Json:
    reason = choice.finish_reason.value if choice.finish_reason else None
    return {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": reason}


def _best(lp: TokenLogprob, num_shown: int) -> list[tuple[int, float]]:
    return list(zip(lp.top_token_ids, lp.top_logprobs, strict=True))[:num_shown]


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders the answer called `response_id`. `shown_logprobs` of None leaves log-probabilities out."""

    format: Format
    tokenizer: Tokenizer
    response_id: str
    created_unix_s: int
    model: str
    shown_logprobs: int | None
    include_usage: bool

    def answer(self, choices: Sequence[Choice], choices_per_prompt: int) -> Json:
        rendered = [self.format.choice(choice, self._logprobs(choice)) for choice in choices]
        return self._envelope(self.format.object_name, rendered) | self._end(choices, choices_per_prompt)

    def chunks(self, choice: Choice) -> list[Json]:
        """What has come of `choice` since the last call; nothing while its text is held back."""
        if not choice.text and choice.finish_reason is None and choice.num_chunks:
            return []
        chunks = self.format.chunk_choices(choice, self._logprobs(choice))
        if chunks:
            choice.take()
        # OpenAI announces the usage chunk at the end by a null in those before.
        usage = {"usage": None} if self.include_usage else {}
        return [self._envelope(self.format.chunk_object_name, [chunk]) | usage for chunk in chunks]

    def usage_chunk(self, choices: Sequence[Choice], choices_per_prompt: int) -> Json:
        return self._envelope(self.format.chunk_object_name, []) | self._end(choices, choices_per_prompt)

    def _logprobs(self, choice: Choice) -> Json | None:
        if self.shown_logprobs is None or not choice.logprobs:
            return None
        return self.format.logprobs(choice, self.tokenizer, self.shown_logprobs)

    def _envelope(self, object_name: str, choices: list[Json]) -> Json:
        return {
            "id": self.response_id,
            "object": object_name,
            "created": self.created_unix_s,
            "model": self.model,
            "choices": choices,
        }

    def _end(self, choices: Sequence[Choice], choices_per_prompt: int) -> Json:
        """Usage, and what the cluster did. A prompt counts once, however many choices it has."""
        summaries = [choice.summary for choice in choices]
        per_prompt = summaries[::choices_per_prompt]
        prompt_tokens = sum(s.prompt_tokens for s in per_prompt)
        completion_tokens = sum(s.completion_tokens for s in summaries)
        generations = [
            {"request_id": generation_id(self.response_id, choice.index, len(choices)), **_rounded(choice.summary)}
            for choice in choices
        ]
        more = {"request_id": self.response_id, "generations": generations}
        return {
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
                "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in per_prompt)},
            },
            "sagellm": generations[0] if len(generations) == 1 else more,
        }


def generation_id(response_id: str, index: int, num_generations: int) -> str:
    """The router's request id of one of an answer's generations."""
    return response_id if num_generations == 1 else f"{response_id}-{index}"


def _rounded(summary: GenerationSummary) -> Json:
    return {k: round(v, 3) if isinstance(v, float) and math.isfinite(v) else v for k, v in asdict(summary).items()}
