from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from sagellm_common.client.text import Detokenizer, StopMatcher, Tokenizer
from sagellm_common.core.errors import ConfigError, InvalidRequest
from tests.support.bpe import write_tokenizer

TEXTS = [
    "",
    "hello world",
    " leading space",
    "你好世界",
    "emoji 🙂👩‍👩‍👧 and é",
    "tab\tnew\nline",
    "the the  the",
    "\ufffd kept",
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie heißt »du«?"},
    {"role": "assistant", "content": "你好"},
    {"role": "user", "content": "<|im_end|> and {{ braces }}"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_dir(directory)


@pytest.fixture(scope="module")
def reference(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


class TestTokenizer:
    @pytest.mark.parametrize("text", TEXTS)
    def test_encodes_and_decodes_as_transformers_does(self, tokenizer, reference, text):
        ids = tokenizer.encode(text)
        assert ids.tolist() == reference(text)["input_ids"]
        assert tokenizer.decode(ids) == reference.decode(ids) == text

    def test_special_tokens_are_skipped_only_when_asked(self, tokenizer, reference):
        ids = tokenizer.encode("<|im_start|>hi<|im_end|>")
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True) == "hi"
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"

    @pytest.mark.parametrize("num_messages", [1, 2, 4])
    def test_chat_equals_transformers(self, tokenizer, reference, num_messages):
        messages = MESSAGES[:num_messages]
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer.render_chat(messages) == expected
        expected_ids = reference.apply_chat_template(messages, add_generation_prompt=True)
        assert tokenizer.encode_chat(messages).tolist() == expected_ids

    def test_bytes_of_tokens_add_up_to_the_text(self, tokenizer):
        text = "héllo 你好 🙂"
        assert b"".join(tokenizer.token_bytes(t) for t in tokenizer.encode(text)) == text.encode()

    def test_bytes_of_a_special_and_of_an_unknown_token(self, tokenizer):
        assert tokenizer.token_bytes(1) == b"<|im_start|>"
        assert tokenizer.token_bytes(10**6) == b""

    def test_lone_surrogate_is_an_invalid_request(self, tokenizer):
        with pytest.raises(InvalidRequest, match="Unicode"):
            tokenizer.encode("\ud800")

    def test_missing_tokenizer_names_the_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"tokenizer\.json"):
            Tokenizer.from_dir(tmp_path)

    def test_broken_tokenizer_names_the_file(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(ConfigError, match=r"tokenizer\.json"):
            Tokenizer.from_dir(tmp_path)

    @pytest.mark.parametrize("content", ["{", "[]"])
    def test_broken_configuration_names_the_file(self, tmp_path, content):
        write_tokenizer(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
            Tokenizer.from_dir(tmp_path)


class TestByteFallback:
    """Sentencepiece-like tokenizers: words with ▁, and <0xNN> for what is in no word."""

    @pytest.fixture
    def tokenizer(self):
        vocab = {"<unk>": 0, "▁hello": 1, "▁world": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
        inner = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return Tokenizer(inner)

    def test_a_character_of_three_bytes_appears_at_once(self, tokenizer):
        ids = [3 + b for b in "好".encode()]
        detokenizer = Detokenizer(tokenizer)
        assert [detokenizer.push([t]) for t in [1, *ids, 2]] == ["hello", "", "", "好", " world"]

    def test_the_prompt_keeps_the_space_before_the_first_word(self, tokenizer):
        assert Detokenizer(tokenizer).push([2]) == "world"
        assert Detokenizer(tokenizer, context_token_ids=[1]).push([2]) == " world"

    def test_bytes_of_tokens(self, tokenizer):
        assert b"".join(tokenizer.token_bytes(3 + b) for b in "好".encode()) == "好".encode()
        assert tokenizer.token_bytes(1) == b"hello"


class TestChatTemplate:
    def test_template_file_wins_over_the_config(self, tmp_path):
        write_tokenizer(tmp_path)
        (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages | tojson }}{{ eos_token }}")
        rendered = Tokenizer.from_dir(tmp_path).render_chat([{"role": "user", "content": "<é>"}])
        assert rendered == '<|im_start|>[{"role": "user", "content": "<é>"}]<|im_end|>'

    def test_named_templates_use_the_default(self, tmp_path):
        write_tokenizer(tmp_path)
        file = tmp_path / "tokenizer_config.json"
        templates = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": templates}))
        assert Tokenizer.from_dir(tmp_path).render_chat(MESSAGES) == "yes"

    def test_without_a_template_the_request_is_invalid(self, tmp_path):
        with pytest.raises(InvalidRequest, match="no chat template"):
            Tokenizer.from_dir(write_tokenizer(tmp_path, chat_template=None)).encode_chat(MESSAGES)

    def test_the_template_can_refuse(self, tokenizer):
        with pytest.raises(InvalidRequest, match="no role wizard"):
            tokenizer.render_chat([{"role": "wizard", "content": ""}])

    @pytest.mark.parametrize(
        "template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[9].x }}"]
    )
    def test_the_sandbox_holds(self, tmp_path, template):
        with pytest.raises(InvalidRequest, match="refuses"):
            Tokenizer.from_dir(write_tokenizer(tmp_path, template)).render_chat(MESSAGES)

    def test_a_template_that_does_not_parse_is_a_config_error(self, tmp_path):
        with pytest.raises(ConfigError, match="line 1"):
            Tokenizer.from_dir(write_tokenizer(tmp_path, "{% if %}"))

    def test_the_date_is_available(self, tmp_path):
        tokenizer = Tokenizer.from_dir(write_tokenizer(tmp_path, "{{ strftime_now('%Y') }}"))
        assert tokenizer.render_chat(MESSAGES).isdigit()


class TestDetokenizer:
    @pytest.mark.parametrize("step", [1, 2, 3, 7])
    @pytest.mark.parametrize("text", TEXTS)
    def test_pieces_add_up_and_never_hold_half_a_character(self, tokenizer, text, step):
        ids = tokenizer.encode(text).tolist()
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push(ids[i : i + step]) for i in range(0, len(ids), step)]
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + detokenizer.flush() == text

    def test_skipped_special_tokens_are_not_decoded_again_and_again(self, tokenizer, monkeypatch):
        lengths = []
        decode = tokenizer.decode
        monkeypatch.setattr(tokenizer, "decode", lambda ids, skip: lengths.append(len(ids)) or decode(ids, skip))
        word = tokenizer.encode(" word").tolist()
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push([token]) for token in [*word, *[1] * 100, *word]]
        assert "".join(pieces) == " word word"
        assert max(lengths) <= 2 * len(word) + 1

    def test_prepared_it_decodes_once_for_a_token(self, tokenizer, monkeypatch):
        hello, world = tokenizer.encode("hello").tolist(), tokenizer.encode(" world").tolist()
        detokenizer = Detokenizer(tokenizer, context_token_ids=hello)
        detokenizer.prepare()
        lengths = []
        decode = tokenizer.decode
        monkeypatch.setattr(tokenizer, "decode", lambda ids, skip: lengths.append(len(ids)) or decode(ids, skip))
        assert detokenizer.push(world) == " world"
        assert lengths == [len(hello) + len(world)]

    @given(ids=st.lists(st.integers(0, 319), max_size=60), step=st.integers(1, 5))
    def test_any_tokens_equal_decoding_them_at_once(self, tokenizer, ids, step):
        detokenizer = Detokenizer(tokenizer)
        streamed = "".join(detokenizer.push(ids[i : i + step]) for i in range(0, len(ids), step)) + detokenizer.flush()
        assert streamed == tokenizer.decode(ids)

    def test_an_emoji_appears_with_its_last_byte(self, tokenizer):
        ids = [tokenizer.encode(c)[0] for c in "a"]
        smile = [next(t for t in range(320) if tokenizer.token_bytes(t) == bytes([b])) for b in "🙃".encode()]
        detokenizer = Detokenizer(tokenizer)
        assert [detokenizer.push([t]) for t in [*ids, *smile]] == ["a", "", "", "", "🙃"]

    def test_flush_shows_an_unfinished_character_once(self, tokenizer):
        first_byte = next(t for t in range(320) if tokenizer.token_bytes(t) == b"\xf0")
        detokenizer = Detokenizer(tokenizer)
        assert detokenizer.push([first_byte]) == ""
        assert detokenizer.flush() == "\ufffd"
        assert detokenizer.flush() == ""

    def test_the_prompt_is_context_and_not_output(self, tokenizer):
        ids = tokenizer.encode("hello world").tolist()
        assert Detokenizer(tokenizer, context_token_ids=ids).push(ids) == "hello world"

    def test_special_tokens_are_kept_when_asked(self, tokenizer):
        assert Detokenizer(tokenizer).push([1, 2]) == ""
        assert Detokenizer(tokenizer, skip_special_tokens=False).push([1, 2]) == "<|im_start|><|im_end|>"


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Oracle: read letter by letter until the text ends in a stop string; the longest then counts."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


class TestStopMatcher:
    def test_text_that_may_become_a_stop_string_is_held_back(self):
        matcher = StopMatcher(["END"])
        assert matcher.push("say E") == ("say ", None)
        assert matcher.push("N") == ("", None)
        assert matcher.push("ergy EN") == ("ENergy ", None)
        assert matcher.push("D and more") == ("", "END")

    def test_flush_releases_what_was_held(self):
        matcher = StopMatcher(["END"])
        assert matcher.push("the EN") == ("the ", None)
        assert matcher.flush() == "EN"
        assert matcher.flush() == ""

    def test_without_stop_strings_all_passes(self):
        assert StopMatcher().push("anything") == ("anything", None)

    @given(
        text=st.text("ab", max_size=30),
        stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
        cuts=st.lists(st.integers(0, 30)),
    )
    def test_cutting_the_text_changes_nothing(self, text, stops, cuts):
        bounds = sorted({0, len(text), *(c for c in cuts if c < len(text))})
        matcher = StopMatcher(stops)
        emitted, stopped = "", False
        for begin, end in itertools.pairwise(bounds):
            piece, hit = matcher.push(text[begin:end])
            emitted += piece
            if hit is not None:
                stopped = True
                break
        if not stopped:
            emitted += matcher.flush()
        assert (emitted, stopped) == cut_at_first_stop(text, stops)
