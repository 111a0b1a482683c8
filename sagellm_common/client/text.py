"""Text to token ids and back: tokenizer, streaming detokenizer, stop strings.

Only the `tokenizers` library is used: importing `transformers` costs seconds and hundreds of megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from sagellm_common.client.chat_template import ChatTemplate, Message
from sagellm_common.core.errors import ConfigError, InvalidRequest
from sagellm_common.core.types import TokenIds, as_token_ids

_REPLACEMENT = "\ufffd"
_NO_CHAT_TEMPLATE = "messages: this model has no chat template; send a text prompt instead"


class Tokenizer:
    """The tokenizer of a Hugging Face model directory. Thread-safe: nothing changes after construction."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, chat_template: ChatTemplate | None = None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._byte_level = b"ByteLevel" in tokenizer.decoder.__getstate__() if tokenizer.decoder else False

    @classmethod
    def from_dir(cls, path: str | Path) -> Self:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja.

        Raises ConfigError naming the file that is missing or unreadable.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"no tokenizer at {file}; give the directory of a Hugging Face model with a fast tokenizer"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as err:  # the library raises nothing narrower
            raise ConfigError(f"cannot read {file}: {err}") from err
        config = _read_json(directory / "tokenizer_config.json")
        source = _chat_template_source(directory, config)
        template = ChatTemplate(source, _special_tokens(config)) if source else None
        return cls(tokenizer, template)

    def encode(self, text: str, add_special_tokens: bool = True) -> TokenIds:
        """Raises InvalidRequest for text that is not valid Unicode."""
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as err:
            raise InvalidRequest("prompt: not valid Unicode text (a lone surrogate?)") from err
        return as_token_ids(encoding.ids)

    def encode_chat(self, messages: Sequence[Message]) -> TokenIds:
        """Token ids of `messages` and of the header that asks the assistant to answer."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Raises InvalidRequest when the model has no chat template or it refuses the messages."""
        if self._chat_template is None:
            raise InvalidRequest(_NO_CHAT_TEMPLATE)
        return self._chat_template.render(messages, add_generation_prompt)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Incomplete UTF-8 becomes U+FFFD."""
        ids = [int(t) for t in token_ids]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; they need not be valid UTF-8."""
        token = self._tokenizer.id_to_token(int(token_id))
        if token is None:
            return b""
        if self._byte_level and all(c in _BYTE_OF_CHAR for c in token):
            return bytes(_BYTE_OF_CHAR[c] for c in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return self.decode([token_id], skip_special_tokens=False).encode()


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ConfigError(f"{file} is not valid JSON: {err}") from err
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} must hold a JSON object")
    return loaded


def _chat_template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The file wins over the config; of several named templates, `default` is taken."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {t["name"]: t["template"] for t in source}.get("default")
    return source


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like; each is a string or a serialised AddedToken."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()


class Detokenizer:
    """Turns tokens into text as they come; the pieces add up to the text of all tokens.

    A token may hold part of a UTF-8 character, and some decoders look at the token before, so text is taken as
    the difference of two decodings from `prefix_offset`, and only once it does not end in an incomplete character:

        ids:      … a  b  c │ d  e  f │ g
                    prefix ─┘         │ └ new
                    read  ────────────┘       delta = decode(ids[prefix:]) - decode(ids[prefix:read])

    `context_token_ids` (the end of the prompt) come before the first token.
    """

    CONTEXT_TOKENS = 5

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, context_token_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = [int(t) for t in context_token_ids][-self.CONTEXT_TOKENS :]
        self._read_offset = len(self._ids)
        self._known: str | None = None

    def push(self, token_ids: Iterable[int]) -> str:
        """New text that later tokens cannot change; may be empty."""
        known = self._decode_known()
        self._ids.extend(token_ids)
        text = self._decode()
        if text == known and not text.endswith(_REPLACEMENT):
            del self._ids[self._read_offset :]  # special tokens, skipped: kept, they would be decoded again and again
        if len(text) <= len(known) or text.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[self._read_offset :]
        self._read_offset = len(self._ids)
        self._known = None
        return text[len(known) :]

    def prepare(self) -> None:
        """Decodes what the next tokens' text begins after, while there is time; else `push` does it."""
        self._decode_known()

    def flush(self) -> str:
        """What was held back at the end of the generation: an incomplete character, as U+FFFD."""
        known = self._decode_known()
        self._known = self._decode()
        return self._known[len(known) :]

    def _decode_known(self) -> str:
        """Of what is read. Decoded when the next tokens come: the ones before need not wait for it."""
        if self._known is None:
            self._known = self._tokenizer.decode(self._ids[: self._read_offset], self._skip_special_tokens)
        return self._known

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip_special_tokens)


class StopMatcher:
    """Finds the first stop string to be completed, however the text is cut into pieces.

    Text that may still become a stop string is held back; the stop string and what follows are never emitted.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may go out, the stop string that ended the generation or None)."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, stop = min(found)
            self._held = ""
            return text[:start], stop
        keep = self._ambiguous_suffix(text)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """What was held back, when the generation ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _ambiguous_suffix(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
