"""Greedy tokens held against Hugging Face transformers, up to what rounding may do.

Two right implementations in bfloat16 differ in the last bits of a logit, and where two logits are closer than that they
choose different tokens; with random weights that is not rare. So each token is judged on its own, after the tokens
before it: by the logits of the same weights in float32, it must be within rounding of the best. What rounding does is
measured: it is how far transformers' own logits in the engine's dtype are from those in float32.
"""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from bench.gpu_check.worker import Failed

TIMEOUT_S = 900.0
SAME = 1e-3
"""Two ways to add up in float32 differ by less, in logits of size 1 to 10."""


def judge(model: str, device: str, dtype: str, sequences: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """`sequences` are (prompt, greedy tokens) of the engine. In a process of its own, which gives its memory back.

    Raises Failed.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_judge, args=(theirs, model, device, dtype, sequences), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(TIMEOUT_S):
            raise Failed(f"transformers took longer than {TIMEOUT_S:g} s")
        found: dict[str, Any] = ours.recv()
        return found
    except EOFError:
        process.join(10)
        raise Failed(f"transformers' process ended with exit code {process.exitcode}; its error is above") from None
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()


def _judge(pipe: Connection, model: str, device: str, dtype: str, sequences: list[tuple[list[int], list[int]]]) -> None:
    pipe.send(verdict(model, device, dtype, sequences))


def verdict(model: str, device: str, dtype: str, sequences: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """How many tokens are the best ones in float32, how far the others are from that, and whether rounding explains it.

    `worst_gap` and `rounding` are differences of logits.
    """
    import torch

    exact = _logits(model, device, torch.float32, sequences)
    rounded = exact if dtype == "float32" else _logits(model, device, getattr(torch, dtype), sequences)
    same = total = 0
    gap = noise = 0.0
    for (_, tokens), right, near in zip(sequences, exact, rounded, strict=True):
        chosen = torch.tensor(tokens)[:, None]
        gaps = right.amax(-1, keepdim=True) - right.gather(1, chosen)
        same += int((gaps == 0).sum())
        total += len(tokens)
        gap = max(gap, float(gaps.max()))
        noise = max(noise, float((right - near).abs().max()))
    # The best one's logit may be off by `noise` one way and the chosen one's the other way.
    ok = gap <= 2 * noise + SAME
    return {"tokens": total, "best_in_float32": same, "worst_gap": gap, "rounding": noise, "ok": ok}


def _logits(model: str, device: str, dtype: Any, sequences: list[tuple[list[int], list[int]]]) -> list[Any]:
    """Per sequence [tokens, vocabulary] in float32 on the host: what is said of each token, given those before it."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    found = []
    with torch.inference_mode():
        for prompt, tokens in sequences:
            ids = torch.tensor([prompt + tokens[:-1]], device=device)
            logits = network(ids, use_cache=False).logits[0, len(prompt) - 1 :]
            found.append(logits.float().cpu())
    return found
