"""The engine on pip's LMDeploy, without our patches: the same tokens, and it says what it lacks.

In a process of its own: a process imports one LMDeploy.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tests.support.engines import running_engine
from tests.support.oracle import greedy

PROMPTS = [list(range(3, 60)), list(range(3, 40)), [7]]


async def answers(model: Path) -> dict[str, object]:
    async with running_engine(model, patches="off", max_prefill_tokens=32, num_blocks=16) as driver:
        found = await asyncio.gather(*(driver.run(prompt, 40) for prompt in PROMPTS))
        import lmdeploy

        return {
            "tokens": [tokens for tokens, _ in found],
            "description": driver.engine.description,
            "lmdeploy": lmdeploy.__file__,
            "balanced": driver.engine.kv.get_utilization().balanced,
        }


async def test_the_stock_engine_answers_the_same_and_says_what_it_lacks(tiny_llama: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, str(tiny_llama), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    found = json.loads(out.splitlines()[-1])
    assert found["tokens"] == [greedy(tiny_llama, prompt, 40) for prompt in PROMPTS]
    assert found["description"].startswith("LMDeploy 0.11.0, without hooks prefix_store, block_manager, ")
    assert Path(found["lmdeploy"]).parents[1].name == "site-packages"
    assert found["balanced"]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(answers(Path(sys.argv[1])))))
