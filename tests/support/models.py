"""Checkpoints for tests, made once per machine."""

from __future__ import annotations

from pathlib import Path

from services.cli.models import TinyKind, cache_home, prepare_tiny, prepare_tiny_long_context

# Bumped when prepare_tiny writes other bytes.
VERSION = 1


def tiny_model(kind: TinyKind, max_position_embeddings: int = 2048, num_heads: int = 4) -> Path:
    """A tiny random checkpoint from the cache; a head has 64 / num_heads dimensions."""
    name = f"tiny-{kind}" if max_position_embeddings == 2048 else f"tiny-{kind}-{max_position_embeddings}"
    name = name if num_heads == 4 else f"{name}-{num_heads}-heads"
    target = cache_home() / "tests" / f"v{VERSION}" / name
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_heads // 2}
    return prepare_tiny(kind, target, max_position_embeddings=max_position_embeddings, **heads)


def tiny_long_context_model() -> Path:
    """A tiny random Llama that takes prompts of 128K tokens."""
    return prepare_tiny_long_context(cache_home() / "tests" / f"v{VERSION}" / "tiny-long-context")
