"""llama.cpp for bench/kernels.py: one JSON line in per run, one out. Its venv needs `xllamacpp` only.

python llama_worker.py MODEL.gguf THREADS SLOTS CONTEXT_TOKENS on|off (flash attention)
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp


def main() -> None:
    path, threads, slots, context = sys.argv[1], *map(int, sys.argv[2:5])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel, params.n_ctx = slots, slots * context
    params.n_batch, params.n_ubatch = 2048, 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    kinds = xllamacpp.llama_flash_attn_type
    on, off = kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED, kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.flash_attn_type = {"on": on, "off": off}[sys.argv[5]]
    params.cache_prompt, params.verbosity = False, -1
    server = xllamacpp.Server(params)

    def complete(prompt: list[int], new_tokens: int) -> int:
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": new_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "top_k": 1,
                "cache_prompt": False,
            }
        )
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        tokens: int = (
            answer["tokens_predicted"] if "tokens_predicted" in answer else answer["usage"]["completion_tokens"]
        )
        return tokens

    def stream(prompt: list[int], new_tokens: int) -> list[float]:
        """When its first token came: (wall, CPU) clock. Of one prompt alone: several share the server's steps."""
        first: list[float] = []

        def on_chunk(_: Any) -> bool:
            if not first:
                first.extend((time.perf_counter(), time.process_time()))
            return False

        work = {"prompt": prompt, "n_predict": new_tokens, "ignore_eos": True, "temperature": 0, "top_k": 1}
        server.handle_completions({**work, "cache_prompt": False, "stream": True}, on_chunk)
        return first

    print(json.dumps({"ready": True}), flush=True)
    with ThreadPoolExecutor(slots) as pool:
        for line in sys.stdin:
            work = json.loads(line)
            start, cpu = time.perf_counter(), time.process_time()
            new_tokens, took = work["new_tokens"], {}
            if len(work["prompts"]) == 1 and new_tokens > 1:
                wall_s, cpu_s = stream(work["prompts"][0], new_tokens)
                took["first"] = [wall_s - start, cpu_s - cpu]
                tokens = [new_tokens]  # a stream of text does not tell; ignore_eos sees to it
            else:
                tokens = list(pool.map(lambda p, n=new_tokens: complete(p, n), work["prompts"]))
            took |= {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
            print(json.dumps({"tokens": tokens, **took}), flush=True)


if __name__ == "__main__":
    main()
