"""The undisturbed single engine: Hugging Face transformers, greedy, on the same weights."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _model(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def greedy(path: Path, tokens: list[int], max_new_tokens: int, *, ignore_eos: bool = True) -> list[int]:
    """The tokens transformers generates; without the end-of-sequence token where it stops there."""
    return list(_greedy(path, tuple(tokens), max_new_tokens, ignore_eos))


@cache
def _greedy(path: Path, tokens: tuple[int, ...], max_new_tokens: int, ignore_eos: bool) -> list[int]:
    import torch

    model = _model(path)
    eos = model.config.eos_token_id
    model.generation_config.eos_token_id = None if ignore_eos else eos
    with torch.inference_mode():
        ids = model.generate(torch.tensor([tokens]), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    found: list[int] = ids[0, len(tokens) :].tolist()
    return found[:-1] if not ignore_eos and found[-1] == eos else found


def continued(path: Path, tokens: list[int], found: list[int]) -> list[int]:
    """What greedy transformers says at each place of `found` after `tokens` and what is before it in `found`.

    By induction `found` is what transformers generates exactly if it is this: in one pass instead of one per token.
    """
    import torch

    with torch.inference_mode():
        logits = _model(path)(torch.tensor([tokens + found[:-1]])).logits[0, len(tokens) - 1 :]
    said: list[int] = logits.argmax(-1).tolist()
    return said


def log_softmax(path: Path, tokens: list[int]) -> list[float]:
    """Log-probabilities of the next token."""
    import torch

    with torch.inference_mode():
        logits = _model(path)(torch.tensor([tokens])).logits[0, -1]
    found: list[float] = logits.log_softmax(-1).tolist()
    return found


def keys_and_values(path: Path, tokens: list[int]) -> Any:
    """The KV cache of `tokens`: float32 [keys | values, layers, tokens, kv_heads, head_dim]."""
    import torch

    with torch.inference_mode():
        cache = _model(path)(torch.tensor([tokens]), use_cache=True).past_key_values
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return torch.stack([torch.stack(kinds)[:, 0] for kinds in zip(*layers, strict=True)]).transpose(2, 3).numpy()
