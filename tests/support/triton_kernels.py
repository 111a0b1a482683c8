"""LMDeploy's Triton kernels where there is no GPU. Run as a process, for triton reads TRITON_INTERPRET when imported.

    python -m tests.support.triton_kernels interpret STEPS ANSWERS    on CPU tensors, through triton's interpreter
    python -m tests.support.triton_kernels compile                    for sm_90a; one JSON line per kernel

Both make LMDeploy believe in a GPU, see `pretended_gpu`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODE = sys.argv[1] if __name__ == "__main__" else ""
os.environ["LMDEPLOY_ENABLE_CHECK_ENV"] = "0"
if MODE == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.support.pretended_gpu import alias_libdevice, pretend_gpu  # noqa: E402

BLOCK_SIZE, NUM_BLOCKS = 16, 8
"""Of the caches in `interpret`."""


# ---- on CPU tensors ----


def new_caches(kv_heads: int, head_dim: int, bits: int) -> dict[str, Tensor | None]:
    """Zeroed keys and values, [blocks, block_size, kv_heads, head_dim], and scales and zeros when quantised."""
    width, kind = (head_dim if bits != 4 else head_dim // 2), (torch.uint8 if bits else torch.float32)
    caches: dict[str, Tensor | None] = {
        name: torch.zeros(NUM_BLOCKS, BLOCK_SIZE, kv_heads, width, dtype=kind) for name in ("k", "v")
    }
    for name in ("k_scales_zeros", "v_scales_zeros"):
        caches[name] = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, kv_heads, 2) if bits else None
    return caches


def interpret(sequences: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What LMDeploy's kernels make of steps on one cache each: after each step its output and the caches."""
    pretend_gpu(("cpu", 0, 0), (8, 0), processors=4)  # few: paged attention splits its work over all of them
    import lmdeploy.pytorch.kernels.cuda.flashattention as flash
    import lmdeploy.pytorch.kernels.cuda.pagedattention as paged
    from lmdeploy.pytorch.kernels.cuda.fill_kv_cache import fill_kv_cache
    from lmdeploy.pytorch.kernels.cuda.flatten_kv_cache import flatten_kv_cache

    alias_libdevice(flash, paged)

    def run(step: dict[str, Any], blocks: Tensor, bits: int, caches: dict[str, Any]) -> Tensor:
        q, k, v = step["q"], step["k"], step["v"]
        q_lens, kv_lens = torch.tensor(step["q_lens"]), torch.tensor(step["kv_lens"])
        starts = q_lens.cumsum(0) - q_lens
        scales = {"k_scales_zeros": caches["k_scales_zeros"], "v_scales_zeros": caches["v_scales_zeros"]}
        scales["quant_policy"] = bits
        fill_kv_cache(
            *(k, v, caches["k"], caches["v"], starts, q_lens),
            kv_seq_length=kv_lens,
            max_q_seq_length=max(step["q_lens"]),
            block_offsets=blocks,
            **scales,
        )
        out, scale = torch.empty_like(q), q.size(-1) ** -0.5
        if step["decoding"]:
            paged.paged_attention_fwd(
                q, caches["k"], caches["v"], out, blocks, kv_seqlens=kv_lens, sm_scale=scale, **scales
            )
            return out
        kv_starts = kv_lens.cumsum(0) - kv_lens
        room = int(kv_lens.sum()) + BLOCK_SIZE
        flat_k, flat_v = flatten_kv_cache(
            *(caches["k"], caches["v"], kv_lens, blocks),
            start_loc=kv_starts,
            out_size=room,
            out_dtype=q.dtype,
            **scales,
        )
        flash.flash_attention_fwd(
            *(q, flat_k, flat_v, out),
            q_start_loc=starts,
            q_seqlens=q_lens,
            kv_start_loc=kv_starts,
            kv_seqlens=kv_lens,
            max_seqlen=max(step["q_lens"]),
            sm_scale=scale,
            causal=True,
        )
        return out

    answers = []
    for sequence in sequences:
        steps, first = sequence["steps"], sequence["steps"][0]
        caches = new_caches(first["k"].size(1), first["k"].size(2), sequence["bits"])
        after = []
        for step in steps:
            out = run(step, sequence["blocks"].int(), sequence["bits"], caches)
            kept = {name: cache.clone() for name, cache in caches.items() if cache is not None}
            after.append({"out": out, **kept})
        answers.append(after)
    return answers


# ---- for a GPU that is not there ----


def launches() -> dict[str, Callable[[], Any]]:
    """Calls that together launch every kernel a Llama or Qwen2 needs in bfloat16: 32 heads of 128, 8 of them for KV."""
    from lmdeploy.pytorch.kernels.cuda.activation import silu_and_mul
    from lmdeploy.pytorch.kernels.cuda.apply_rotary_pos_emb import apply_rotary_pos_emb
    from lmdeploy.pytorch.kernels.cuda.fill_kv_cache import fill_kv_cache
    from lmdeploy.pytorch.kernels.cuda.flashattention import flash_attention_fwd
    from lmdeploy.pytorch.kernels.cuda.flatten_kv_cache import flatten_kv_cache
    from lmdeploy.pytorch.kernels.cuda.multinomial_sampling import multinomial_sampling
    from lmdeploy.pytorch.kernels.cuda.pagedattention import paged_attention_fwd
    from lmdeploy.pytorch.kernels.cuda.rms_norm import rms_norm

    heads, kv_heads, dim, block_size, tokens, sequences = 32, 8, 128, 64, 8, 2
    bf16 = torch.bfloat16
    q, k = torch.zeros(tokens, heads, dim, dtype=bf16), torch.zeros(tokens, kv_heads, dim, dtype=bf16)
    hidden, weight = torch.zeros(1, tokens, 4096, dtype=bf16), torch.zeros(4096, dtype=bf16)
    blocks = torch.zeros(sequences, 4, dtype=torch.int32)
    lens, starts, ones = torch.tensor([4, 4]), torch.tensor([0, 4]), torch.ones(sequences, dtype=torch.long)
    flat = torch.zeros(kv_heads, 192, dim, dtype=bf16)
    rows = torch.arange(sequences)

    def quantised(bits: int) -> dict[str, Callable[[], Any]]:
        width, kind = (dim if bits != 4 else dim // 2), (torch.uint8 if bits else bf16)
        cache = torch.zeros(32, block_size, kv_heads, width, dtype=kind)
        scales = torch.zeros(32, block_size, kv_heads, 2, dtype=bf16) if bits else None
        rest = {"k_scales_zeros": scales, "v_scales_zeros": scales, "quant_policy": bits}

        def fill(states: Tensor, first: Tensor, count: Tensor) -> None:
            fill_kv_cache(
                *(states, states, cache, cache, first, count),
                kv_seq_length=lens,
                max_q_seq_length=int(count.max()),
                block_offsets=blocks,
                **rest,
            )

        name = f"int{bits}" if bits else "bf16"
        return {
            f"fill_kv_cache prefill {name}": lambda: fill(k, starts, lens),
            f"fill_kv_cache decode {name}": lambda: fill(k[:sequences], rows, ones),
            f"paged_attention {name}": lambda: paged_attention_fwd(
                *(q[:sequences], cache, cache, torch.empty_like(q[:sequences]), blocks),
                kv_seqlens=lens,
                sm_scale=0.1,
                **rest,
            ),
            f"flatten_kv_cache {name}": lambda: flatten_kv_cache(
                cache, cache, lens, blocks, start_loc=starts, out_size=192, out_dtype=bf16, **rest
            ),
        }

    return {
        **quantised(0),
        **quantised(8),
        **quantised(4),
        "flash_attention": lambda: flash_attention_fwd(
            *(q, flat, flat, torch.empty_like(q)),
            q_start_loc=starts,
            q_seqlens=lens,
            kv_start_loc=starts,
            kv_seqlens=lens,
            max_seqlen=4,
            sm_scale=0.1,
            causal=True,
        ),
        "rms_norm": lambda: rms_norm(hidden, weight),
        "rms_norm with residual": lambda: rms_norm(hidden, weight, residual=hidden.clone()),
        "rotary embedding": lambda: apply_rotary_pos_emb(q, k, q[:, 0], q[:, 0]),
        "silu_and_mul": lambda: silu_and_mul(torch.zeros(tokens, 8192, dtype=bf16)),
        "multinomial": lambda: multinomial_sampling(
            torch.zeros(sequences, 40), rows, rows, torch.zeros(sequences, 40, dtype=torch.long)
        ),
    }


def compile_all() -> None:
    """Each launch becomes a compilation. Prints {name, kernels: [{target, cubin_bytes}] or error}."""
    pretend_gpu(("cuda", 90, 32), (9, 0), processors=132)
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=(1, 1, 1), warmup=True, **kwargs))
        return compiled[-1]

    JITFunction.run = compile_only
    for name, launch in launches().items():
        compiled.clear()
        found: dict[str, Any] = {"name": name}
        try:
            launch()
            found["kernels"] = [
                {
                    "target": next(line for line in kernel.asm["ptx"].splitlines() if line.startswith(".target")),
                    "cubin_bytes": len(kernel.asm["cubin"]),
                }
                for kernel in compiled
            ]
        except Exception as error:  # whatever the compiler says is the finding
            found["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    if MODE == "interpret":
        torch.save(interpret(torch.load(Path(sys.argv[2]))), sys.argv[3])
    else:
        compile_all()
