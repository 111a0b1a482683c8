"""llama.cpp for bench/kernels.py: one JSON line in per run, one out. Its venv needs `xllamacpp` only.

python llama_worker.py MODEL.gguf THREADS SLOTS CONTEXT_TOKENS on|off (flash attention)
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

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

    print(json.dumps({"ready": True}), flush=True)
    with ThreadPoolExecutor(slots) as pool:
        for line in sys.stdin:
            work = json.loads(line)
            start, cpu = time.perf_counter(), time.process_time()
            tokens = list(pool.map(lambda p, n=work["new_tokens"]: complete(p, n), work["prompts"]))
            took = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
            print(json.dumps({"tokens": tokens, **took}), flush=True)


if __name__ == "__main__":
    main()
