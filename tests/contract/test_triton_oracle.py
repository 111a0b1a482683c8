"""Our fp32 attention against the kernels LMDeploy runs on a GPU, and those kernels against the compiler for an H200.

Both need triton but no GPU. The kernels run in a process of their own: see `tests/support/triton_kernels.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lmdeploy.pytorch.backends.base import OpType

from sagellm_common.engines.lmdeploy.device_cpu import attention
from sagellm_common.engines.lmdeploy.device_cpu.backend import CpuOpsBackend
from tests.support import triton_kernels
from tests.support.triton_kernels import BLOCK_SIZE, NUM_BLOCKS, new_caches

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; `make setup` installs it on Linux x86-64",
)

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
LENGTHS = ((20, 7), (13, 9), (1, 1))
"""Two prompts; a chunk on top of each, which ends after and at the end of a block; one step of decoding."""
TOLERANCE = 1e-5
TIMEOUT_S = 110


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Both processes, which start at once; called, it waits for the one of that mode and returns what it printed."""
    folder = tmp_path_factory.mktemp("triton")
    torch.save([make_sequence(bits) for bits in KV_BITS.values()], folder / "steps.pt")
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        processes = {}
        for mode, files in (("interpret", ("steps.pt", "answers.pt")), ("compile", ())):
            command = [sys.executable, "-m", triton_kernels.__name__, mode, *(str(folder / file) for file in files)]
            process = stack.enter_context(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            processes[mode] = process

        def wait(mode: str) -> str:
            printed, complaints = processes[mode].communicate(timeout=TIMEOUT_S)
            assert processes[mode].returncode == 0, complaints[-4000:]
            return str(folder / "answers.pt") if mode == "interpret" else printed

        yield wait


def make_sequence(bits: int) -> dict[str, Any]:
    """Steps of two sequences over scattered blocks."""
    generator = torch.Generator().manual_seed(bits)

    def states(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, HEAD_DIM, generator=generator)

    totals = list(
        zip(*itertools.accumulate(LENGTHS, lambda a, b: tuple(map(sum, zip(a, b, strict=True)))), strict=True)
    )
    width = -(-max(map(max, totals)) // BLOCK_SIZE)
    order = torch.randperm(NUM_BLOCKS, generator=generator)
    return {
        "bits": bits,
        "blocks": order[: len(totals) * width].view(len(totals), width),
        "steps": [
            {
                "q": states(sum(lens), HEADS),
                "k": states(sum(lens), KV_HEADS),
                "v": states(sum(lens), KV_HEADS),
                "q_lens": list(lens),
                "kv_lens": [total[i] for total in totals],
                "decoding": max(lens) == 1,
            }
            for i, lens in enumerate(LENGTHS)
        ],
    }


KV_BITS = {"fp32": 0, "int8": 8, "int4": 4}


@pytest.fixture(scope="module")
def interpreted(answers: Callable[[str], str]) -> dict[str, list[dict[str, Any]]]:
    """What LMDeploy's kernels answered, by the quantisation of the cache."""
    return dict(zip(KV_BITS, torch.load(answers("interpret")), strict=True))


def ours(sequence: dict[str, Any], builder: Any) -> list[dict[str, Any]]:
    """The same steps through our backend, from the step's context on."""
    caches = new_caches(KV_HEADS, HEAD_DIM, sequence["bits"])
    impl = builder.build(HEADS, HEAD_DIM, num_kv_heads=KV_HEADS)
    after = []
    for step in sequence["steps"]:
        context = types.SimpleNamespace(
            kv_caches=[(caches["k"], caches["v"])],
            q_seqlens=torch.tensor(step["q_lens"]),
            kv_seqlens=torch.tensor(step["kv_lens"]),
            block_offsets=sequence["blocks"],
            is_decoding=step["decoding"],
            kv_quant_policy=sequence["bits"],
        )
        metadata = CpuOpsBackend.update_step_context(context).attn_metadata
        out = impl.forward(
            *(step["q"], step["k"], step["v"], caches["k"], caches["v"], metadata),
            k_scales_zeros=caches["k_scales_zeros"],
            v_scales_zeros=caches["v_scales_zeros"],
        )
        after.append({"out": out, **{name: cache.clone() for name, cache in caches.items() if cache is not None}})
    return after


@pytest.mark.parametrize("tile_tokens", [16, 32, attention.TILE_TOKENS, None], ids=str)
@pytest.mark.parametrize("kv", KV_BITS)
def test_attention_equals_lmdeploys_kernels(
    interpreted: dict[str, list[dict[str, Any]]], kv: str, tile_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache bytes are equal, outputs within rounding: fresh prompts, chunks after them, and decoding.

    In torch, tile by tile; and, with None, whatever the backend takes here: the compiled kernels where there are any.
    """
    if tile_tokens is None:
        builder = CpuOpsBackend.get_layer_impl_builder(OpType.PagedAttention)
    else:
        builder = attention.CpuAttentionBuilder
        monkeypatch.setattr(attention, "TILE_TOKENS", tile_tokens)
    for step, (mine, theirs) in enumerate(zip(ours(make_sequence(KV_BITS[kv]), builder), interpreted[kv], strict=True)):
        for name in theirs.keys() - {"out"}:
            assert torch.equal(mine[name], theirs[name]), f"step {step}: {name} differs"
        torch.testing.assert_close(mine["out"], theirs["out"], atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def compiled(answers: Callable[[str], str]) -> dict[str, dict[str, Any]]:
    return {found["name"]: found for found in map(json.loads, answers("compile").splitlines())}


NAMES = (
    *(
        f"{kernel} {kind}"
        for kind in ("bf16", "int8", "int4")
        for kernel in ("fill_kv_cache prefill", "fill_kv_cache decode", "paged_attention", "flatten_kv_cache")
    ),
    "flash_attention",
    "rms_norm",
    "rms_norm with residual",
    "rotary embedding",
    "silu_and_mul",
    "multinomial",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_we_rely_on_compile_for_an_h200(compiled: dict[str, dict[str, Any]], name: str) -> None:
    found = compiled[name]
    assert "error" not in found, found["error"]
    assert found["kernels"]
    for kernel in found["kernels"]:
        assert kernel["target"].split()[1] == "sm_90a"
        assert kernel["cubin_bytes"] > 0
