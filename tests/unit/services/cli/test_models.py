from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sagellm_common.client.text import Tokenizer as SageTokenizer
from sagellm_common.core.errors import ConfigError
from services.cli import models
from services.cli.models import TinyKind, prepare_smollm2, prepare_tiny


@pytest.mark.parametrize("kind", get_args(TinyKind))
def test_tiny_models_are_repeatable(kind: TinyKind, tmp_path: Path) -> None:
    first, second = prepare_tiny(kind, tmp_path / "a"), prepare_tiny(kind, tmp_path / "b")
    other = prepare_tiny(kind, tmp_path / "c", seed=1)
    weights = [(path / "model.safetensors").read_bytes() for path in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]
    assert json.loads((first / "config.json").read_text())["model_type"] == kind


@pytest.mark.parametrize("kind", get_args(TinyKind))
def test_transformers_finds_every_weight_and_no_other(kind: TinyKind, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = prepare_tiny(kind, tmp_path / kind, max_position_embeddings=128)
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.max_position_embeddings == 128


def test_tiny_tokenizer_has_a_token_per_byte_and_speaks_chatml(tiny_llama: Path) -> None:
    tokenizer = SageTokenizer.from_dir(tiny_llama)
    assert len(tokenizer.encode("hé🙂")) == 1 + 2 + 4
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert json.loads((tiny_llama / "config.json").read_text())["vocab_size"] == 259


@given(st.text())
def test_tiny_tokenizer_round_trips(tiny_llama: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    if not any(special in text for special in models.TINY_SPECIAL_TOKENS):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_failed_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(models, "_write_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare_tiny("llama", tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_of_two_who_prepare_at_once_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "tiny"
    write = models._write_tokenizer

    def overtaken(*args: object) -> None:
        monkeypatch.setattr(models, "_write_tokenizer", write)
        prepare_tiny("llama", target)
        (target / "first").touch()
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(models, "_write_tokenizer", overtaken)
    assert prepare_tiny("llama", target) == target
    assert (target / "first").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_missing_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"make setup.*model\.path"):
        prepare_smollm2(tmp_path)


def test_rotary_rows_are_put_back() -> None:
    """Against a naive oracle: GGUF row 2i of a head is Hugging Face's row i, row 2i + 1 its row i + half."""
    num_heads, head_dim, hidden = 3, 8, 5
    wanted = np.arange(num_heads * head_dim * hidden, dtype=np.float32).reshape(num_heads * head_dim, hidden)
    stored = np.empty_like(wanted)
    for head in range(num_heads):
        for i in range(head_dim // 2):
            stored[head * head_dim + 2 * i] = wanted[head * head_dim + i]
            stored[head * head_dim + 2 * i + 1] = wanted[head * head_dim + i + head_dim // 2]
    np.testing.assert_array_equal(models._halves_rotary(stored, num_heads), wanted)


def test_smollm2_is_cached_and_answers(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])

    steps: list[str] = []
    assert prepare_smollm2(progress=lambda what, done, total: steps.append(what)) == smollm2
    assert steps == [], "a second call converts nothing"


# What transformers' own GGUF reader makes of these (checked once; it takes seconds).
SMOLLM2_TOKENS = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "12345": [33, 34, 35, 36, 37],
    "<|im_start|>user\n": [1, 4093, 198],
}


@pytest.mark.parametrize("text", SMOLLM2_TOKENS)
def test_smollm2_tokens(smollm2: Path, text: str) -> None:
    tokenizer = SageTokenizer.from_dir(smollm2)
    assert tokenizer.encode(text).tolist() == SMOLLM2_TOKENS[text]


@pytest.mark.parametrize("text", ["naïve café", "日本語", "🙂 x²", "  two  spaces\n\ttab", "a" * 300, "مرحبا", "\x00"])
def test_smollm2_tokenizer_round_trips(smollm2: Path, text: str) -> None:
    tokenizer = SageTokenizer.from_dir(smollm2)
    assert tokenizer.decode(tokenizer.encode(text)) == text
